"""Hands the power of an instance's other nodes to the agent that counts its tokens.

Each agent reports the mean power of its GPUs of such an instance for the last closed epochs. Here the reports are
summed, for exactly the nodes that the orders name: nothing is remembered, so an operator that restarts goes on.
"""

from collections.abc import Mapping, Sequence

from wattlock_api.base import decimal_string
from wattlock_api.nodeenergy import EpochPower, Order
from wattlock_api.peerpower import MAX_PEER_POWER_BYTES, PeerPower, PeerPowers

from wattlock_operator.world import World

_MAX_EPOCHS = 8
_MAX_INSTANCES = 64


def _reported(world: World, node: str, key: str) -> Mapping[int, float | None] | None:
    """Return what a node reports of an instance's epochs; None while it reports nothing of the instance."""
    node_energy = world.node_energies.get(node)
    if node_energy is None or node_energy.status is None:
        return None
    for instance in node_energy.status.instances:
        if instance.key == key:
            return {each.epoch: None if each.watts is None else float(each.watts) for each in instance.epochs}
    return None


def sum_epochs(reports: Sequence[Mapping[int, float | None]]) -> list[EpochPower]:
    """Return the sum over nodes of each epoch that all of them report, the newest eight, oldest first.

    An epoch that one node cannot use has no watts.
    """
    common = sorted(set.intersection(*map(set, reports)))[-_MAX_EPOCHS:] if reports else []
    found = []
    for epoch in common:
        watts = [report[epoch] for report in reports]
        known = [each for each in watts if each is not None]
        whole = decimal_string(sum(known), 3) if len(known) == len(watts) else None
        found.append(EpochPower(epoch=epoch, watts=whole))
    return found


def peer_powers(world: World, by_node: Mapping[str, Sequence[Order]]) -> dict[str, str]:
    """Return the annotation of each node that counts the tokens of instances with GPUs elsewhere."""
    found: dict[str, str] = {}
    for node, orders in by_node.items():
        instances = []
        for order in orders:
            if order.span is None or order.metrics_url is None or len(order.span.nodes) < 2:
                continue
            others = [each for each in order.span.nodes if each != node]
            reports = [_reported(world, each, f"{order.policy.uid}/{order.instance}") for each in others]
            told = [report for report in reports if report is not None]
            epochs = sum_epochs(told) if len(told) == len(others) else []
            if epochs:
                instances.append(
                    PeerPower(policy_uid=order.policy.uid, instance=order.instance, nodes=others, epochs=epochs)
                )
        if instances:
            powers = PeerPowers(instances=instances[:_MAX_INSTANCES])
            text = powers.model_dump_json(by_alias=True, exclude_none=True)
            if len(text) <= MAX_PEER_POWER_BYTES:
                found[node] = text
    return found
