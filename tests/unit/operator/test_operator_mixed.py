"""Mixed pools with a clock and idle instances, as the operator sees them: orders, holds, status."""

import dataclasses

import pytest
from operator_worlds import DECODE, NOW, agent_pod, gpu, instance, node_energy, pod, policy, two_pools, world
from wattlock_api.energypolicy import EnergyPolicySpec
from wattlock_api.nodeenergy import OrderIdle
from wattlock_operator.decide import Memory, decide
from wattlock_operator.orders import give_orders
from wattlock_operator.status import urgent_change

MIXED = {"name": "decode", "role": "Mixed", "selector": {"matchLabels": DECODE}}
CLOCK = {"clock": {"maxSMClockMHz": 1590}}
DECODES, PREFILLS = two_pools(CLOCK["clock"])


def of(*pools, **spec):
    return policy(spec={"pools": list(pools)} | spec)


def orders_of(found, *pods, nodes=("n1",), entries=()):
    given = give_orders(world([found], pods or [pod("d0", DECODE)], entries, nodes=nodes))
    return {order.pod.name: order for orders in given.by_node.values() for order in orders}


PODS = (pod("d0", DECODE), agent_pod("n1"))


def status_of(found, gpus=(), instances=(), pods=PODS):
    orders = decide(world([found], pods), None, Memory(), NOW).write_orders.get("n1", ())
    entry = node_energy(gpus=gpus, instances=instances, orders=orders)
    return decide(world([found], pods, [entry]), None, Memory(), NOW).statuses["uid-qwen"]


def state(status, kind):
    (found,) = [entry for entry in status.conditions if entry.type == kind]
    return found.status, found.reason


# --- orders --------------------------------------------------------------------------------------------------------


def test_a_mixed_pool_without_a_clock_is_left_alone_as_ever():
    order = orders_of(of(MIXED))["d0"]
    assert (order.cap_mhz, order.max_prefill_percent, order.idle, order.guardrail, order.hold) == (None,) * 5
    assert not order.may_be_capped


@pytest.mark.parametrize(("mixed", "percent"), [({}, 20), ({"mixed": {"maxPrefillPercent": 35}}, 35)])
def test_a_mixed_pool_with_a_clock_is_ordered_with_its_bound_and_needs_no_prefill_peer(mixed, percent):
    order = orders_of(of(MIXED | CLOCK | mixed))["d0"]
    assert (order.cap_mhz, order.max_prefill_percent, order.hold) == (1590, percent, None)
    assert order.experiment is not None
    assert order.guardrail is not None
    assert order.may_be_capped


def test_in_observe_the_bound_is_told_and_nothing_that_could_be_written():
    order = orders_of(of(MIXED | CLOCK | {"idle": {}}, mode="Observe"))["d0"]
    assert (order.cap_mhz, order.idle, order.max_prefill_percent) == (None, None, 20)


def test_a_mixed_pool_takes_its_clock_from_a_profile_or_says_why_not():
    order = orders_of(of(MIXED | {"clock": {"profile": "missing"}}))["d0"]
    assert (order.cap_mhz, order.hold.reason) == (None, "ProfileNotFound")


@pytest.mark.parametrize("wanted", [DECODES, MIXED | CLOCK])
def test_idle_comes_with_the_cap_alone(wanted):
    pool = wanted | {"idle": {"maxSMClockMHz": 600, "afterSeconds": 30}}
    order = orders_of(of(pool, requirePrefillPeer=False))["d0"]
    assert order.idle == OrderIdle(cap_mhz=600, after_seconds=30)
    held = orders_of(of(DECODES | {"idle": {}}, PREFILLS))["d0"]
    assert held.hold.reason == "NoPrefillPeer"
    assert held.idle is None


def test_without_idle_nothing_happens_to_idle_instances():
    assert orders_of(of(DECODES, requirePrefillPeer=False))["d0"].idle is None


@pytest.mark.parametrize(("role", "reason"), [("Mixed", "SpansNodes"), ("Decode", None)])
def test_a_mixed_instance_on_several_nodes_is_not_capped(role, reason):
    """One agent alone sees its prompts, and the others would hear of it from the operator, seconds later."""
    group = {"leaderworkerset.sigs.k8s.io/name": "big", "leaderworkerset.sigs.k8s.io/group-index": "3"}
    pods = [pod(f"big-{number}", DECODE | group, f"n{number}") for number in (1, 2)]
    found = of(MIXED | CLOCK | {"role": role}, requirePrefillPeer=False)
    for order in orders_of(found, *pods, nodes=("n1", "n2")).values():
        assert (order.hold.reason if order.hold else None) == reason
        assert (order.cap_mhz is None) == (reason is not None)


def test_a_mixed_pool_rolls_out_its_clock_in_steps():
    pods = [pod(f"d{number}", DECODE) for number in range(3)]
    orders = orders_of(of(MIXED | CLOCK, rollout={"steps": [1, "100%"]}), *pods)
    assert sorted(order.cap_mhz or 0 for order in orders.values()) == [0, 0, 1590]
    assert {order.hold.reason for order in orders.values() if order.hold} == {"RolloutPending"}


# --- status --------------------------------------------------------------------------------------------------------


def test_a_mixed_pool_with_a_clock_counts_and_one_without_does_not():
    capped = status_of(of(MIXED | CLOCK), [gpu(0)])
    assert state(capped, "Enforced") == ("True", "Capped")
    assert (capped.summary.capped, capped.summary.clock) == ("1/1", "1590MHz")
    assert capped.pools[0].savings is not None
    alone = status_of(of(MIXED), [gpu(0, state="Released", reason="MixedPool", requested_mhz=None)])
    assert state(alone, "Enforced") == ("False", "NoClock")
    assert alone.summary.capped is None
    assert alone.pools[0].savings is None


def test_prefill_that_holds_a_mixed_instance_is_told_and_no_fault():
    text = "more than 20 % of its tokens were prompt tokens"
    held = gpu(1, "d1", state="Released", reason="PrefillShare", message=text, requested_mhz=None)
    pods = (pod("d0", DECODE), pod("d1", DECODE), agent_pod("n1"))
    status = status_of(of(MIXED | CLOCK), [gpu(0), held], pods=pods)
    assert state(status, "Enforced") == ("False", "PrefillShare")
    assert state(status, "Ready")[0] == "True"
    assert {entry.reason: entry.gpus for entry in status.pools[0].reasons} == {"Locked": 1, "PrefillShare": 1}


def test_idle_instances_are_capped_and_how_many_are_idle_is_told_without_an_alarm():
    found = of(DECODES | {"idle": {}}, requirePrefillPeer=False)
    working = status_of(found, [gpu(0), gpu(1)])
    idle = status_of(found, [gpu(0), gpu(1, reason="Idle", message="no requests: at most 345 MHz")])
    assert state(idle, "Enforced") == ("True", "Capped")
    assert (idle.pools[0].capped, idle.pools[0].locked, idle.pools[0].requested_mhz) == (2, 2, 1590)
    assert {entry.reason: entry.gpus for entry in idle.pools[0].reasons} == {"Locked": 1, "Idle": 1}
    assert not urgent_change(working, idle), "traffic comes and goes all day"


def test_an_engine_that_does_not_tell_its_requests_is_said_beside_the_gpus():
    found = of(DECODES | {"idle": {}}, requirePrefillPeer=False)
    status = status_of(found, [gpu(0)], [instance(reason="IdleNotTold", message="its metrics do not tell")])
    assert {entry.reason: entry.gpus for entry in status.pools[0].reasons} == {"Locked": 1, "IdleNotTold": 0}
    assert state(status, "Enforced") == ("True", "Capped")


def test_a_claim_of_another_controller_concerns_mixed_pools_with_a_clock():
    claimed = dataclasses.replace(pod("d0", DECODE), claims=("dynamo.nvidia.com/gpu-power-limit",))
    assert orders_of(of(MIXED | CLOCK), claimed)["d0"].hold.reason == "OtherController"
    assert orders_of(of(MIXED), claimed)["d0"].hold is None


@pytest.mark.parametrize(
    ("pool", "capped"), [(MIXED, False), (MIXED | CLOCK, True), (DECODES, True), (PREFILLS, False)]
)
def test_which_pools_may_be_capped(pool, capped):
    spec = EnergyPolicySpec.model_validate({"pools": [pool]})
    assert (spec.capped_pools == {pool["name"]}) == spec.pools[0].may_be_capped == capped
