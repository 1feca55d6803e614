"""Carries a decision out: writes to the API server, only what differs, each failure told and tried again.

An operator that leads no more must not write what it decided while it did. Before each write it looks whether it still
leads; and what it changes is written only over what was decided on, so that the API server refuses a write that was
held up on its way while another operator wrote.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence, Set
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
from wattlock_api.nodeenergy import Order
from wattlock_api.policystatus import EnergyPolicyStatus

from wattlock_operator import kube as api
from wattlock_operator.decide import Decision
from wattlock_operator.events import Telling
from wattlock_operator.kube import Kube, KubeError
from wattlock_operator.metrics import Metrics
from wattlock_operator.placement import FINGERPRINT_ANNOTATION, MANAGED_BY_LABEL, MANAGER
from wattlock_operator.store import NODE_ENERGY, POLICY, Kind, Store
from wattlock_operator.world import DaemonSetView, NodeEnergyView, PolicyView

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
    moment = datetime.fromtimestamp(now_seconds, UTC).strftime("%Y%m%d%H%M%S%f")
    # A long name is cut: the hash keeps those apart that begin alike, and a name from ending in a dot or dash.
    unique = hashlib.sha256(f"{policy.uid}/{telling.reason}/{moment}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{policy.name[:200].rstrip('-.')}.{unique}",
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
        "reason": str(telling.reason),
        "message": telling.message[:1024],
        "source": {"component": "wattlock-operator"},
        "reportingComponent": "wattlock.dev/operator",
        "reportingInstance": identity[:128],
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }


def orders_body(node: str, orders: Sequence[Order], peer_power: str) -> dict[str, Any]:
    """Return a new NodeEnergy."""
    body = api.manifest("NodeEnergy", node)
    if peer_power:
        body["metadata"]["annotations"] = {PEER_POWER_ANNOTATION: peer_power}
    return body | {"spec": {"orders": [order.to_api() for order in orders]}}


def orders_patch(orders: Sequence[Order], peer_power: str, present: NodeEnergyView) -> list[dict[str, Any]]:
    """Return the patch that gives a NodeEnergy its orders, if its spec is the one that was decided on.

    The generation grows with each change of the spec and of nothing else. The resourceVersion would not do: an agent's
    report changes it, and where the API server is slow there always was a report meanwhile.
    """
    patch: list[dict[str, Any]] = [
        {"op": "test", "path": "/metadata/uid", "value": present.uid},
        {"op": "test", "path": "/metadata/generation", "value": present.generation},
        {"op": "add", "path": "/spec", "value": {"orders": [order.to_api() for order in orders]}},
    ]
    annotation = "/metadata/annotations/" + PEER_POWER_ANNOTATION.replace("/", "~1")
    if peer_power and not present.annotated:
        patch.append({"op": "add", "path": "/metadata/annotations", "value": {PEER_POWER_ANNOTATION: peer_power}})
    elif peer_power:
        patch.append({"op": "add", "path": annotation, "value": peer_power})
    elif present.peer_power:
        patch.append({"op": "remove", "path": annotation})
    return patch


class NotLeadingError(Exception):
    """Another operator may lead: nothing more is written."""


def _as_it_was(version: str) -> dict[str, str]:
    """Return the metadata by which the API server refuses a write over any other version."""
    return {"resourceVersion": version} if version else {}


class Applier:
    """Writes decisions. Blocking; its methods never raise for a single failed write.

    All may raise KubeError when the API server does not answer or wants to be left alone, and NotLeadingError.
    """

    def __init__(
        self,
        kube: Kube,
        agent_namespace: str,
        identity: str,
        metrics: Metrics,
        store: Store,
        is_leading: Callable[[], bool],
    ) -> None:
        self._kube, self._namespace, self._identity, self._metrics = kube, agent_namespace, identity, metrics
        self._store, self._is_leading = store, is_leading

    def _try(self, kind: str, verb: str, name: str, write: Callable[[], object]) -> bool:
        if not self._is_leading():
            raise NotLeadingError
        try:
            write()
        except KubeError as error:
            # Somebody else was faster: a user, an agent, or another operator. The next pass looks again.
            overtaken = error.status in (404, 409) or isinstance(error, api.OvertakenError)
            log.log(logging.INFO if overtaken else logging.WARNING, "could not %s %s %s: %s", verb, kind, name, error)
            if not overtaken:
                self._metrics.failed(kind)
            if error.ends_pass:
                raise
            return False
        self._metrics.wrote(kind, verb)
        return True

    def _change(self, kind: Kind, verb: str, path: str, key: tuple[str, str], write: Callable[[], api.Json]) -> bool:
        """Write an object of ours, and know at once what it is like now: the watch tells it a little later.

        ``key``: its namespace and name. A NodeEnergy that is not found is forgotten: the watch that should have told
        may have been away at that moment, and then never tells. A policy is not: while its kind is being deleted it is
        not found now and then, and without it every order would be withdrawn.
        """

        def change() -> None:
            known = self._store.version(kind, key)
            try:
                body = write()
            except KubeError as error:
                if error.status in (404, 409, 422):
                    found = self._kube.get(path)
                    if found is not None:
                        self._store.put(kind, found)
                    elif kind is NODE_ENERGY and known is not None:
                        self._store.gone(kind, key, known)
                raise
            self._store.put(kind, body)

        return self._try(kind.name, verb, "/".join(filter(None, key)), change)

    def write_orders(
        self, node: str, orders: Sequence[Order], peer_power: str = "", present: NodeEnergyView | None = None
    ) -> bool:
        """Write the orders of a node, and the power of its instances on other nodes."""
        path = api.node_energy_path(node)
        if present is None:
            create = partial(self._kube.create, api.NODE_ENERGIES, orders_body(node, orders, peer_power))
            return self._change(NODE_ENERGY, "create", path, ("", node), create)
        write = partial(self._kube.amend, path, orders_patch(orders, peer_power, present))
        return self._change(NODE_ENERGY, "patch", path, ("", node), write)

    def write_status(self, policy: PolicyView, status: EnergyPolicyStatus) -> bool:
        """Write the status of a policy: of that very object, not of a later one of its name."""
        body = api.manifest("EnergyPolicy", policy.name, policy.namespace)
        body["metadata"] |= {"uid": policy.uid} | _as_it_was(policy.version)
        body["status"] = status.to_api()
        path = api.policy_path(policy.namespace, policy.name)
        write = partial(self._kube.apply, path + "/status", body)
        return self._change(POLICY, "apply", path, (policy.namespace, policy.name), write)

    def _set_finalizers(self, policy: PolicyView, finalizers: Sequence[str]) -> bool:
        path = api.policy_path(policy.namespace, policy.name)
        # The list is replaced as a whole: only as long as nobody else has touched it.
        body = {"metadata": {"uid": policy.uid, "finalizers": list(finalizers)} | _as_it_was(policy.version)}
        key = (policy.namespace, policy.name)
        return self._change(POLICY, "patch", path, key, partial(self._kube.merge, path, body))

    def claim(self, policies: Iterable[PolicyView]) -> bool:
        """Make the deletion of new policies wait for us; return whether there was such a policy."""
        new = [policy for policy in policies if not policy.finalizer and not policy.deleting]
        for policy in new:
            self._set_finalizers(policy, (*policy.finalizers, FINALIZER))
        return bool(new)

    def let_go(self, policies: Iterable[PolicyView]) -> bool:
        """Let deleted policies go; return whether that went well."""
        well = True
        for policy in policies:
            if policy.finalizer:
                well &= self._set_finalizers(policy, [name for name in policy.finalizers if name != FINALIZER])
        return well

    def _tell(self, telling: Telling, now_seconds: float) -> None:
        body = event_body(telling, self._identity, now_seconds)
        path = f"/api/v1/namespaces/{telling.policy.namespace}/events"
        try:
            self._try("Event", "create", telling.reason, partial(self._kube.request, "POST", path, body=body))
        except KubeError as error:
            # An Event that is throttled (429: the admission plug-in EventRateLimit has bounds for a namespace, which
            # its tenants can use up) says nothing about other writes. It is dropped, as one that is refused.
            if error.status is None:
                raise

    def tell(self, tellings: Iterable[Telling], failed: Set[str], now_seconds: float) -> None:
        """Tell the Events, those of each policy in turn; one that is refused or throttled is dropped.

        ``failed``: UIDs of the policies whose status could not be written. Where another operator has written it, that
        one tells.
        """
        by_policy: dict[str, list[Telling]] = {}
        for telling in tellings:
            if telling.policy.uid not in failed:
                by_policy.setdefault(telling.policy.uid, []).append(telling)

        def tell_all(of_policy: Sequence[Telling]) -> None:
            for telling in of_policy:
                self._tell(telling, now_seconds)

        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="write") as pool:
            list(pool.map(tell_all, by_policy.values()))

    def apply(self, decision: Decision) -> tuple[bool, frozenset[str]]:
        """Carry a decision out, but for the finalizers and the Events, which come after.

        Returns:
            Whether all went well, and the UIDs of the policies whose status could not be written.

        Raises:
            KubeError: the API server does not answer, or wants to be left alone.
            NotLeadingError: the rest is not written.
        """
        well = True
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="write") as pool:
            orders_written = list(
                pool.map(
                    lambda node: self.write_orders(
                        node,
                        decision.write_orders[node],
                        decision.peer_powers.get(node, ""),
                        decision.present.get(node),
                    ),
                    decision.write_orders,
                )
            )
            # Looked at when all are tried: to stop at the first that is refused would cancel those that still wait.
            well &= all(orders_written)
            for node in decision.delete_node_energies:
                delete = partial(self._kube.delete, api.node_energy_path(node), decision.present[node].uid)
                well &= self._try("NodeEnergy", "delete", node, delete)
            well &= self._daemon_sets(decision)
            written = list(pool.map(lambda entry: self.write_status(*entry), decision.write_statuses))
        failed = [policy.uid for (policy, _), fine in zip(decision.write_statuses, written, strict=True) if not fine]
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
