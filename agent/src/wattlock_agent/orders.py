"""Orders as the agent takes them from the spec of its NodeEnergy. Pure."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from wattlock_api.constants import PEER_POWER_ANNOTATION
from wattlock_api.nodeenergy import Order
from wattlock_api.peerpower import MAX_PEER_POWER_BYTES, PeerPowers

from wattlock_agent.holders.base import PodName

MAX_ORDERS = 256


@dataclass(frozen=True, order=True)
class InstanceKey:
    """A serving instance under one policy."""

    policy_uid: str
    instance: str

    @property
    def text(self) -> str:
        """The key in the list of instances of the status."""
        return f"{self.policy_uid}/{self.instance}"


@dataclass(frozen=True)
class Orders:
    """The orders of one generation of the spec."""

    generation: int
    orders: tuple[Order, ...] = ()
    unreadable: tuple[str, ...] = ()
    """What could not be understood, a sentence each. Such an order is not carried out: its GPUs are released."""


#: What the agent follows when its NodeEnergy does not exist.
NO_ORDERS = Orders(generation=0)


def key_of(order: Order) -> InstanceKey:
    """Return the instance that the order is about."""
    return InstanceKey(order.policy.uid, order.instance)


def pod_of(order: Order) -> PodName:
    """Return the pod that the order is about, as the kubelet names it."""
    return PodName(order.pod.namespace, order.pod.name)


def parse_peers(annotations: Any) -> PeerPowers:
    """Return the power of instances on their other nodes, from the annotations of a NodeEnergy; nothing if unreadable.

    What is missing then is missed: the epochs are dropped and counted as such.
    """
    text = annotations.get(PEER_POWER_ANNOTATION) if isinstance(annotations, dict) else None
    if not isinstance(text, str) or len(text) > MAX_PEER_POWER_BYTES:
        return PeerPowers()
    try:
        return PeerPowers.model_validate_json(text)
    except ValidationError:
        return PeerPowers()


def parse_orders(generation: int, spec: Any) -> Orders:
    """Return the orders in the JSON of a spec; each is read by itself, so that one bad order spoils no other."""
    raw = spec.get("orders", []) if isinstance(spec, dict) else None
    if not isinstance(raw, list):
        return Orders(generation, (), ("spec.orders is no list",))
    orders: dict[str, Order] = {}
    unreadable: list[str] = []
    for number, item in enumerate(raw[:MAX_ORDERS]):
        try:
            order = Order.model_validate(item)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            unreadable.append(f"orders[{number}].{place}: {first['msg']}; are operator and agent of the same version?")
            continue
        if order.pod_uid in orders:
            unreadable.append(f"orders[{number}]: a second order for pod UID {order.pod_uid}")
            continue
        orders[order.pod_uid] = order
    if len(raw) > MAX_ORDERS:
        unreadable.append(f"{len(raw)} orders, only the first {MAX_ORDERS} are read")
    return Orders(generation, tuple(orders.values()), tuple(unreadable[:8]))
