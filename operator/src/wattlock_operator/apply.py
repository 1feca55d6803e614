"""Carries a decision out: writes to the API server, only what differs, each failure told and tried again."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

from wattlock_api.base import timestamp
from wattlock_api.clockprofile import PUBLISHED
from wattlock_api.constants import (
    AGENT_COMPONENT,
    API_VERSION,
    COMPONENT_LABEL,
    FINALIZER,
    PEER_POWER_ANNOTATION,
    PLACEMENT_LABEL,
    PUBLISHED_PROFILE,
)
from wattlock_api.energypolicy import EnergyPolicyStatus
from wattlock_api.nodeenergy import Order

from wattlock_operator import kube as api
from wattlock_operator.decide import Decision
from wattlock_operator.events import Telling
from wattlock_operator.kube import Kube, KubeError
from wattlock_operator.metrics import Metrics
from wattlock_operator.placement import FINGERPRINT_ANNOTATION, MANAGED_BY_LABEL, MANAGER
from wattlock_operator.world import DaemonSetView, PolicyView

log = logging.getLogger(__name__)

#: Writes under way at once.
PARALLEL = 8


def parse_daemon_set(body: dict[str, Any]) -> DaemonSetView:
    """Return the projection of an agent DaemonSet."""
    metadata = body.get("metadata") or {}
    return DaemonSetView(
        name=metadata["name"],
        placement=(metadata.get("labels") or {}).get(PLACEMENT_LABEL, ""),
        fingerprint=(metadata.get("annotations") or {}).get(FINGERPRINT_ANNOTATION, ""),
    )


def read_daemon_sets(kube: Kube, namespace: str) -> tuple[DaemonSetView, ...]:
    """Return our agent DaemonSets; those on their way out count as gone, so that they are made anew when wanted.

    Raises:
        KubeError: the list failed.
    """
    selector = f"{MANAGED_BY_LABEL}={MANAGER},{COMPONENT_LABEL}={AGENT_COMPONENT}"
    found = kube.list_all(api.daemon_sets_path(namespace), selector)
    return tuple(parse_daemon_set(body) for body in found if not body["metadata"].get("deletionTimestamp"))


def ensure_published_profile(kube: Kube) -> bool:
    """Create the shipped profile where there is none; one that exists is left as its users want it.

    Raises:
        KubeError: it failed.
    """
    body = api.manifest("ClockProfile", PUBLISHED_PROFILE) | {"spec": PUBLISHED.to_api()}
    try:
        kube.request("POST", api.PROFILES, body=body)
    except KubeError as error:
        if error.status == 409:
            return False
        raise
    return True


def event_body(telling: Telling, identity: str, now_seconds: float) -> dict[str, Any]:
    """Return the Event for a policy."""
    policy, at = telling.policy, timestamp(now_seconds)
    unique = datetime.fromtimestamp(now_seconds, UTC).strftime("%Y%m%d%H%M%S%f")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{policy.name[:200]}.{unique}.{telling.reason.lower()[:30]}",
            "namespace": policy.namespace,
        },
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": "EnergyPolicy",
            "namespace": policy.namespace,
            "name": policy.name,
            "uid": policy.uid,
        },
        "type": "Warning" if telling.warning else "Normal",
        "reason": telling.reason,
        "message": telling.message[:1024],
        "source": {"component": "wattlock-operator"},
        "reportingComponent": "wattlock.dev/operator",
        "reportingInstance": identity[:128],
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }


class Applier:
    """Writes decisions. Blocking; its methods never raise for a single failed write."""

    def __init__(self, kube: Kube, agent_namespace: str, identity: str, metrics: Metrics) -> None:
        self._kube, self._namespace, self._identity, self._metrics = kube, agent_namespace, identity, metrics

    def _try(self, kind: str, verb: str, name: str, write: Callable[[], object]) -> bool:
        try:
            write()
        except KubeError as error:
            gone = error.status in (404, 409) and kind in ("EnergyPolicy", "Event")
            log.log(logging.INFO if gone else logging.WARNING, "could not %s %s %s: %s", verb, kind, name, error)
            if not gone:
                self._metrics.failed(kind)
            if error.status is None:
                raise  # no answer at all: the rest of the pass would only wait for more time-outs
            return False
        self._metrics.wrote(kind, verb)
        return True

    def write_orders(self, node: str, orders: Sequence[Order], peer_power: str = "") -> bool:
        """Write the orders of a node, and the power of its instances on other nodes."""
        return self._try("NodeEnergy", "apply", node, partial(self._write_orders, node, orders, peer_power))

    def _write_orders(self, node: str, orders: Sequence[Order], peer_power: str) -> None:
        path, body = api.node_energy_path(node), api.manifest("NodeEnergy", node)
        if not orders:
            # Applying an empty list over entries that we own removes spec itself, which the schema refuses.
            try:
                self._kube.merge(
                    path, {"spec": {"orders": []}, "metadata": {"annotations": {PEER_POWER_ANNOTATION: None}}}
                )
            except KubeError as error:
                if error.status != 404:
                    raise
                self._kube.request("POST", api.NODE_ENERGIES, body=body | {"spec": {}})
            return
        if peer_power:
            body["metadata"]["annotations"] = {PEER_POWER_ANNOTATION: peer_power}
        self._kube.apply(path, body | {"spec": {"orders": [order.to_api() for order in orders]}})

    def write_status(self, policy: PolicyView, status: EnergyPolicyStatus) -> bool:
        """Write the status of a policy: of that very object, not of a later one of its name."""
        body = api.manifest("EnergyPolicy", policy.name, policy.namespace)
        body["metadata"]["uid"] = policy.uid
        body["status"] = status.to_api()
        path = api.policy_path(policy.namespace, policy.name) + "/status"
        return self._try("EnergyPolicy", "apply", policy.title, lambda: self._kube.apply(path, body))

    def let_go(self, policy: PolicyView) -> bool:
        """Take our finalizer from a deleted policy.

        Kopf does it, too, but not while the kind itself is being deleted: discovery then lists no "patch" for it, so
        Kopf leaves it alone, and policies and kind would stay for ever.
        """
        return self._try("EnergyPolicy", "let go", policy.title, partial(self._let_go, policy))

    def _let_go(self, policy: PolicyView) -> None:
        path = api.policy_path(policy.namespace, policy.name)
        metadata = (self._kube.get(path) or {}).get("metadata") or {}
        finalizers = metadata.get("finalizers") or []
        if metadata.get("uid") != policy.uid or FINALIZER not in finalizers:
            return
        kept = [name for name in finalizers if name != FINALIZER]
        # With the version, so that nobody else's finalizer is lost; who was slower tries again in the next pass.
        patch = {"resourceVersion": metadata["resourceVersion"], "finalizers": kept}
        self._kube.merge(path, {"metadata": patch})

    def apply(self, decision: Decision, now_seconds: float) -> tuple[bool, frozenset[str]]:
        """Carry a decision out.

        Returns:
            Whether all went well, and the UIDs of the policies whose status could not be written.

        Raises:
            KubeError: the API server does not answer.
        """
        well = True
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="write") as pool:
            well &= all(
                pool.map(
                    lambda node: self.write_orders(
                        node, decision.write_orders[node], decision.peer_powers.get(node, "")
                    ),
                    decision.write_orders,
                )
            )
            for node in decision.delete_node_energies:
                path = api.node_energy_path(node)
                well &= self._try("NodeEnergy", "delete", node, partial(self._kube.delete, path))
            well &= self._daemon_sets(decision)
            for policy in decision.let_go:
                self.let_go(policy)
            written = list(pool.map(lambda entry: self.write_status(*entry), decision.write_statuses))
        failed = [policy.uid for (policy, _), fine in zip(decision.write_statuses, written, strict=True) if not fine]
        for telling in decision.tellings:
            body = event_body(telling, self._identity, now_seconds)
            path = f"/api/v1/namespaces/{telling.policy.namespace}/events"
            self._try(
                "Event",
                "create",
                telling.reason,
                partial(self._kube.request, "POST", path, body=body),
            )
        return well and not failed, frozenset(failed)

    def _daemon_sets(self, decision: Decision) -> bool:
        well = True
        for manifest in decision.daemon_sets.apply:
            name = manifest["metadata"]["name"]
            path = api.daemon_sets_path(self._namespace, name)
            log.info("applying DaemonSet %s", name)
            well &= self._try("DaemonSet", "apply", name, partial(self._kube.apply, path, manifest))
        for name in decision.daemon_sets.delete:
            path = api.daemon_sets_path(self._namespace, name)
            log.info("deleting DaemonSet %s: no policy asks for its placement any more", name)
            well &= self._try("DaemonSet", "delete", name, partial(self._kube.delete, path))
        return well
