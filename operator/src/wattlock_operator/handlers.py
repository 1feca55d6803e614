"""Kopf's watches: what they see goes into the store. Kopf writes nothing.

A policy's finalizer is set and removed by the passes of the one operator that leads (``apply``). Kopf would do it in
every replica, by handlers; and it removes a finalizer that it knows and that none of its handlers needs.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import kopf
from wattlock_api.constants import GROUP, VERSION

from wattlock_operator.store import NODE, NODE_ENERGY, POD, POLICY, PROFILE, Kind, Store

_WATCHED: tuple[tuple[tuple[str, ...], Kind], ...] = (
    ((GROUP, VERSION, "energypolicies"), POLICY),
    ((GROUP, VERSION, "nodeenergies"), NODE_ENERGY),
    ((GROUP, VERSION, "clockprofiles"), PROFILE),
    (("", "v1", "pods"), POD),
    (("", "v1", "nodes"), NODE),
)


class _Backoffs:
    """Pauses between attempts to reach the API server, in seconds, without an end: an outage must not end Kopf."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1.0, 1.0, 2.0, 3.0, 5.0), itertools.repeat(10.0))


def configure(settings: kopf.OperatorSettings) -> None:
    """Set what Kopf does by itself: bounded watches, no log lines as Events, hands off our finalizer."""
    settings.posting.enabled = False
    settings.peering.standalone = True
    # Watches that fall silent are the classic trouble (nolar/kopf 955, 1094): end them from both sides.
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 250
    settings.watching.connect_timeout = 30
    settings.watching.reconnect_backoff = 1.0
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Backoffs()
    # Kopf reads a page whole, however long it is, and a tenant can make pods of 1.5 MiB.
    settings.watching.chunk_size = 50
    settings.execution.max_workers = 2
    # A worker of Kopf holds a place for its object until that is idle so long, or for as long as its deletion waits.
    # With few places and 5 s, its default, a tenant with some hundred objects keeps everybody's events waiting.
    settings.queueing.worker_limit = 1024
    settings.queueing.idle_timeout = 0.5
    settings.process.ultimate_exiting_timeout = None  # it would kill the process; see run._abandon
    settings.persistence.finalizer = f"{GROUP}/of-no-handler"


def _watch(
    registry: kopf.OperatorRegistry, resource: tuple[str, ...], kind: Kind, store: Store, listed: Callable[[], None]
) -> None:
    async def see(event: kopf.RawEvent, **_: Any) -> None:
        if event["type"] == "DELETED":
            store.drop(kind, event["object"])
        else:
            store.put(kind, event["object"])
        if event["type"] is None:  # Kopf has read a whole list: what is not in it any more, it does not tell
            listed()

    kopf.on.event(*resource, id=f"see-{kind.name}", registry=registry)(see)


def register(store: Store, kinds_changed: Callable[[], None], listed: Callable[[], None]) -> kopf.OperatorRegistry:
    """Return a registry with all watches.

    Args:
        store: takes in what they see.
        kinds_changed: called when one of our CustomResourceDefinitions was changed, deleted or installed.
        listed: called when a watch begins anew from a whole list.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        in_cluster = kopf.login_with_service_account(**kwargs)
        if in_cluster is None:
            return kopf.login_with_kubeconfig(**kwargs)
        # Kopf would ask DNS for kubernetes.default.svc; every other client takes the address that the kubelet gives.
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        return dataclasses.replace(in_cluster, server=f"https://{f'[{host}]' if ':' in host else host}:{port}")

    for resource, kind in _WATCHED:
        _watch(registry, resource, kind, store, listed)

    @kopf.on.event(
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        id="see-kinds",
        when=lambda spec, **_: spec.get("group") == GROUP,
        registry=registry,
    )
    async def see_kinds(event: kopf.RawEvent, **_: Any) -> None:
        if event["type"] is not None:  # else it is one that was there at the start
            kinds_changed()

    return registry
