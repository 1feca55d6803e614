"""When a deleted policy may go."""

import dataclasses

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, node_energy, pod, policy, world
from wattlock_api.base import timestamp
from wattlock_api.constants import FORCE_RELEASE_ANNOTATION, STUCK_RELEASE_SECONDS, GpuState
from wattlock_api.nodeenergy import AgentStatus, NodeEnergyStatus
from wattlock_operator.decide import Memory, decide
from wattlock_operator.orders import give_orders
from wattlock_operator.release import release_of, release_sentence

POLICY = policy(deleting=True)
ORDERED = {"uid-qwen": frozenset({"n1"})}
ORDERS = give_orders(world([policy()], [pod("d0", DECODE), pod("p0", PREFILL)])).by_node["n1"]
BEHIND = NodeEnergyStatus(observed_generation=1, reported_at="2027-01-15T08:00:00Z")


def last_words(agent: str) -> NodeEnergyStatus:
    """The report of an agent that stopped before the orders changed."""
    return BEHIND.model_copy(update={"phase": "Stopping", "agent": AgentStatus(pod=agent)})


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
        (node_energy(generation=2, status=last_words("agent-n1")), None),
        (node_energy(generation=2, status=last_words("agent-of-before")), "not confirmed"),
        (node_energy(generation=2, status=last_words("")), "not confirmed"),
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


def test_the_last_words_of_an_earlier_agent_count_only_where_no_other_runs():
    stopped = node_energy(generation=2, status=last_words("agent-of-before"))
    earlier = dataclasses.replace(agent_pod("n1"), name="agent-of-before")
    finished = dataclasses.replace(agent_pod("n1"), phase="Succeeded")
    for agents, complete in (
        ([], True),
        ([finished], True),
        ([earlier], True),  # on its way out
        ([agent_pod("n2")], True),
        ([agent_pod("n1")], False),
        ([agent_pod("n1"), earlier], False),
        ([earlier, agent_pod("n1")], False),
    ):
        assert release_of(POLICY, world([POLICY], agents, [stopped]), ORDERED, NOW).complete is complete, agents


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


def deleted(seconds_ago: float, **changes):
    return policy(deleting=True, deleted_at=timestamp(NOW - seconds_ago), **changes)


CLAIMS_LOCKS = node_energy("n1", gpus=[gpu()])
NEVER_CONFIRMS = node_energy(
    "n1", generation=2, status=NodeEnergyStatus(observed_generation=1, reported_at=timestamp(NOW))
)


@pytest.mark.parametrize("lie", [CLAIMS_LOCKS, NEVER_CONFIRMS], ids=["claims locks", "never confirms"])
def test_an_agent_that_answers_and_never_lets_go_is_named_with_the_way_out(lie):
    somewhere = world([], [agent_pod("n1")], [lie])
    young, old = deleted(STUCK_RELEASE_SECONDS - 1), deleted(STUCK_RELEASE_SECONDS + 1)
    assert FORCE_RELEASE_ANNOTATION not in release_sentence(young, release_of(young, somewhere, ORDERED, NOW))
    release = release_of(old, somewhere, ORDERED, NOW)
    assert not release.complete, "without a person's word it waits: the lock may be real"
    sentence = release_sentence(old, release)
    assert "n1" in sentence
    assert FORCE_RELEASE_ANNOTATION in sentence
    assert "read its log" in sentence


@pytest.mark.parametrize("lie", [CLAIMS_LOCKS, NEVER_CONFIRMS], ids=["claims locks", "never confirms"])
def test_the_annotation_gives_up_on_it_then_and_not_before(lie):
    somewhere = world([], [agent_pod("n1")], [lie])
    for age_seconds, complete in ((5, False), (STUCK_RELEASE_SECONDS - 1, False), (STUCK_RELEASE_SECONDS + 1, True)):
        forced = deleted(age_seconds, force_release=True)
        assert release_of(forced, somewhere, ORDERED, NOW).complete is complete


def test_an_order_that_is_still_there_is_waited_for_however_old_the_deletion():
    somewhere = world([], [agent_pod("n1")], [node_energy("n1", ORDERS, gpus=[gpu()])])
    forced = deleted(10 * STUCK_RELEASE_SECONDS, force_release=True)
    release = release_of(forced, somewhere, ORDERED, NOW)
    assert not release.complete
    assert not release.stuck


def test_a_release_that_is_held_up_is_a_warning_on_the_policy():
    old = deleted(STUCK_RELEASE_SECONDS + 1)
    decision = decide(world([old], [agent_pod("n1")], [CLAIMS_LOCKS]), None, Memory(ordered_nodes=ORDERED), NOW)
    ready = next(entry for entry in decision.statuses[old.uid].conditions if entry.type == "Ready")
    assert ready.reason == "ReleaseStuck"
    assert [(entry.warning, entry.reason) for entry in decision.tellings if entry.message.startswith("Ready")] == [
        (True, "ReleaseStuck")
    ]
    assert decision.released == frozenset()


def test_the_way_out_is_said_however_long_the_names_are():
    old = deleted(STUCK_RELEASE_SECONDS + 1, name="p" * 253, namespace="n" * 63, uid="uid-old")
    names = [f"{number}{'x' * 240}" for number in range(5)]
    agents = [dataclasses.replace(agent_pod(name), name=f"agent-{name}"[:253]) for name in names[:2]]
    reports = [node_energy(name, gpus=[gpu(policy_uid=old.uid)]) for name in names]
    sentence = release_sentence(old, release_of(old, world([], agents, reports, names), {old.uid: set(names)}, NOW))
    assert len(sentence) <= 1024
    assert sentence.endswith("or the node reboots.")
    assert f"{FORCE_RELEASE_ANNOTATION}=true" in sentence
