"""When a deleted policy may go."""

import dataclasses

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, node_energy, pod, policy, world
from wattlock_api.constants import FORCE_RELEASE_ANNOTATION, GpuState
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_operator.orders import give_orders
from wattlock_operator.release import release_of, release_sentence

POLICY = policy(deleting=True)
ORDERED = {"uid-qwen": frozenset({"n1"})}
ORDERS = give_orders(world([policy()], [pod("d0", DECODE), pod("p0", PREFILL)])).by_node["n1"]
BEHIND = NodeEnergyStatus(observed_generation=1, reported_at="2027-01-15T08:00:00Z")
RELEASED = gpu(state=GpuState.RELEASED, reason="NoOrder")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (node_energy(), None),
        (node_energy(gpus=[RELEASED]), None),
        (node_energy(gpus=[gpu(policy_uid="uid-other")]), None),
        (node_energy(gpus=[gpu()]), "still locked"),
        (node_energy(orders=ORDERS), "being withdrawn"),
        (node_energy(generation=2, status=BEHIND), "not confirmed"),
        (node_energy(generation=2, status=BEHIND.model_copy(update={"phase": "Stopping"})), None),
        (node_energy(status=None), "not reported yet"),
        (node_energy(gpus=[gpu()], age_seconds=600), "has not reported for 3 minutes"),
    ],
)
def test_a_node_blocks_until_it_has_confirmed(entry, why):
    release = release_of(POLICY, world([POLICY], [agent_pod("n1")], [entry]), ORDERED, NOW)
    assert release.complete is (why is None)
    if why is not None:
        assert why in release.waiting[0].why
        assert "n1" in release_sentence(POLICY, release)


def test_a_node_that_no_longer_exists_does_not_block():
    assert release_of(POLICY, world([POLICY], [], [node_energy(gpus=[gpu()])], nodes=()), ORDERED, NOW).complete


def test_a_node_that_never_had_an_order_of_the_policy_does_not_block():
    lagging = node_energy("n2", generation=2, status=BEHIND)
    somewhere = world([POLICY], [agent_pod("n2")], [lagging], ("n1", "n2"))
    assert release_of(POLICY, somewhere, ORDERED, NOW).complete


def test_after_a_restart_every_node_that_lags_blocks():
    lagging = node_energy("n2", generation=2, status=BEHIND)
    somewhere = world([POLICY], [agent_pod("n2")], [lagging], ("n1", "n2"))
    assert not release_of(POLICY, somewhere, {}, NOW).complete


def test_an_ordered_node_whose_agent_never_came_does_not_block():
    assert release_of(POLICY, world([POLICY], [], [node_energy(status=None)]), ORDERED, NOW).complete


def test_the_annotation_gives_up_on_unreachable_nodes_only():
    reachable, dead = node_energy("n1", gpus=[gpu()]), node_energy("n2", gpus=[gpu()])
    somewhere = world([POLICY], [agent_pod("n1")], [reachable, dead], ("n1", "n2"))
    patient = release_of(POLICY, somewhere, ORDERED, NOW)
    assert FORCE_RELEASE_ANNOTATION in release_sentence(POLICY, patient)
    assert [entry.node for entry in patient.waiting] == ["n1", "n2"]
    forced = release_of(dataclasses.replace(POLICY, force_release=True), somewhere, ORDERED, NOW)
    assert [entry.node for entry in forced.waiting] == ["n1"]
    assert [entry.node for entry in forced.abandoned] == ["n2"]
