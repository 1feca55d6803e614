"""The decision as a whole: safe and total on any world, and at rest once it is carried out."""

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_worlds import (
    DECODE,
    GPU_NODE,
    NOW,
    PREFILL,
    agent_pod,
    as_kept,
    gpu,
    instance,
    node_energy,
    pod,
    policy,
    world,
)
from wattlock_api.constants import Mode, Role
from wattlock_api.nodeenergy import NodeEnergySpec, PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, PoolReason, PoolStatus, Summary
from wattlock_operator.decide import Decision, Memory, decide
from wattlock_operator.parse import parse_node_energy
from wattlock_operator.placement import plan_daemon_sets
from wattlock_operator.status import urgent_change
from wattlock_operator.world import NodeView, World

TEMPLATE = {"kind": "DaemonSet", "spec": {"template": {"spec": {"containers": [{"name": "agent"}]}}}}

names = st.sampled_from(["a", "b", "c", "d", "e"])
policies = st.builds(
    lambda name, created, mode, peer, group, deleting, finalizer, force: policy(
        name,
        created=created,
        deleting=deleting,
        finalizer=finalizer,
        force_release=force,
        spec={"mode": mode, "requirePrefillPeer": peer, "groupBy": group},
    ),
    names,
    st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
    st.sampled_from(["Observe", "Enforce"]),
    st.booleans(),
    st.sampled_from([[], ["m"]]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
pods = st.builds(
    lambda name, labels, model, node, phase, ready, terminating, wants_gpu: pod(
        name, labels | model, node, phase=phase, ready=ready, terminating=terminating, wants_gpu=wants_gpu
    ),
    names,
    st.sampled_from([DECODE, PREFILL, {}]),
    st.sampled_from([{}, {"m": "x"}, {"m": "y"}]),
    st.sampled_from(["", "n1", "n2", "gone"]),
    st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "", "Odd"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
gpus = st.builds(
    lambda index, name, uid, state: gpu(index, name, policy_uid=uid, state=state),
    st.integers(0, 7),
    names,
    st.sampled_from(["uid-a", "uid-b", "uid-lost", None]),
    st.sampled_from(["Released", "Locked", "Observing", "Conflict", "Unsupported", "Lost"]),
)
node_energies = st.builds(
    lambda name, generation, found, age: node_energy(
        name, gpus=found, instances=[instance()], generation=generation, age_seconds=age
    ),
    st.sampled_from(["n1", "n2", "gone"]),
    st.integers(0, 3),
    st.lists(gpus, max_size=3),
    st.sampled_from([1.0, 1000.0]),
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    unique = {"unique_by": lambda entry: entry.name, "max_size": 4}
    found = draw(st.lists(policies, **unique))
    agents = [agent_pod(name) for name in draw(st.sets(st.sampled_from(["n1", "n2", "gone"])))]
    return world(
        found,
        [*draw(st.lists(pods, **{**unique, "max_size": 5})), *agents],
        draw(st.lists(node_energies, **unique)),
        ("n1", "n2"),
    )


def carried_out(before: World, decision: Decision) -> World:
    """The world after the API server took everything."""
    entries = {**before.node_energies}
    for name in decision.delete_node_energies:
        del entries[name]
    for name, orders in decision.write_orders.items():
        old = entries.get(name)
        body = {
            "metadata": {"name": name, "generation": (old.generation if old else 0) + 1},
            "spec": {"orders": [order.to_api() for order in orders]},
        }
        entries[name] = dataclasses.replace(parse_node_energy(body), status=old.status if old else None)
    statuses = {policy.uid: status for policy, status in decision.write_statuses}
    after = [
        dataclasses.replace(entry, status=statuses.get(entry.uid, entry.status))
        for entry in before.policies
        if entry.uid not in decision.released
    ]
    return dataclasses.replace(before, node_energies=entries, policies=tuple(after))


@settings(max_examples=150)
@given(worlds())
def test_a_cap_needs_every_condition_for_it(somewhere):
    decision = decide(somewhere, TEMPLATE, Memory(), NOW)
    by_uid = {entry.uid: entry for entry in somewhere.policies}
    pods_by_uid = {entry.uid: entry for entry in somewhere.pods}
    for node, orders in decision.write_orders.items():
        assert node in somewhere.nodes
        assert len({order.pod_uid for order in orders}) == len(orders)
        for order in orders:
            owner, target = by_uid[order.policy.uid], pods_by_uid[order.pod_uid]
            assert not owner.deleting
            assert (target.namespace, target.node, target.finished) == (owner.namespace, node, False)
            assert owner.spec is not None
            if order.cap_mhz is None:
                continue
            assert order.role is Role.DECODE
            assert owner.spec.mode is Mode.ENFORCE
            assert owner.finalizer
            assert order.hold is None
            claims = [entry for entry in somewhere.policies if not entry.deleting]
            assert len(claims) == 1, "every policy here selects every decode pod"
            if owner.spec.require_prefill_peer:
                assert any(
                    peer.ready and not peer.terminating and not peer.finished and peer.node
                    for peer in somewhere.pods
                    if peer.labels.get("role") == "prefill"
                    if all(peer.labels.get(key) == target.labels.get(key) for key in owner.spec.group_by)
                )


@settings(max_examples=120)
@given(worlds())
def test_a_decision_that_was_carried_out_leaves_nothing_to_do(somewhere):
    decision = decide(somewhere, None, Memory(), NOW)
    after = carried_out(somewhere, decision)
    again = decide(after, None, decision.memory, NOW + 0.1)
    more = decide(carried_out(after, again), None, again.memory, NOW + 0.2)
    assert not more.write_orders
    assert not more.delete_node_energies
    assert not again.write_statuses, "at most one write of a status in a second"


@settings(max_examples=120)
@given(worlds())
def test_statuses_are_what_the_schema_allows_and_survive_the_way_through_it(somewhere):
    decision = decide(somewhere, TEMPLATE, Memory(), NOW)
    assert decision.failures == ()
    for status in decision.statuses.values():
        assert EnergyPolicyStatus.model_validate(status.to_api()) == status
        assert {condition.type for condition in status.conditions} >= {"Ready", "Enforced", "Verified", "Conflict"}
        for condition in status.conditions:
            assert condition.reason
            assert condition.message


@settings(max_examples=100)
@given(worlds())
def test_orders_survive_the_way_through_the_api(somewhere):
    for orders in decide(somewhere, TEMPLATE, Memory(), NOW).write_orders.values():
        assert tuple(NodeEnergySpec.model_validate({"orders": [order.to_api() for order in orders]}).orders) == orders


@settings(max_examples=120)
@given(worlds())
def test_no_policy_goes_while_a_reachable_node_reports_its_lock(somewhere):
    decision = decide(somewhere, TEMPLATE, Memory(), NOW)
    for name, entry in somewhere.node_energies.items():
        agents = {agent.node for agent in somewhere.agent_pods()}
        fresh = entry.status is not None and entry.status.reported_at != "2027-01-15T07:43:20Z"
        for found in entry.status.gpus if entry.status else ():
            if found.state == "Locked" and name in agents and name in somewhere.nodes and fresh:
                assert found.policy_uid not in decision.released


def test_a_spec_that_is_not_understood_releases_and_says_so():
    broken = dataclasses.replace(policy(), spec=None, problem="pools: missing")
    decision = decide(world([broken], [pod("d0", DECODE), pod("p0", PREFILL)]), TEMPLATE, Memory(), NOW)
    assert not decision.write_orders
    (ready,) = [entry for entry in decision.statuses["uid-qwen"].conditions if entry.type == "Ready"]
    assert (ready.status, ready.reason) == ("False", "InvalidSpec")
    assert "pools: missing" in ready.message


#: What was measured by a pool, and what its tuner and its rollout had come to.
MEASURED = {
    "name": "decode",
    "role": "Decode",
    "energyKWh": "12",
    "countedJoules": "1000",
    "savings": {
        "method": "Switchback",
        "verdict": "Verified",
        "reason": "IntervalExcludesZero",
        "message": "saving 20%",
        "savedKWh": "3.4",
        "savedKWhCI95": ["3", "4"],
        "departed": [{"capMHz": 1590, "pairs": 7}],
    },
    "rollout": {"phase": "RolledBack", "target": [{"product": "", "capMHz": 1590}], "generation": 1, "message": "slow"},
    "tuning": {"phase": "Settled", "capMHz": 1400, "searches": 2},
}
NUMBERS = {"gpus": 4, "capped": 4, "locked": 4, "powerWatts": 2000, "tokensPerSecond": "900"}
SERVED = [instance(energy_joules="37000", pair_stats=[PairStats(cap_mhz=1590, pairs=5)])]


def after_a_rollback(memory: Memory, seconds: float, understood: bool, status: EnergyPolicyStatus) -> Decision:
    view = policy(status=status, spec={"rollout": {"steps": [1, "100%"]}})
    view = view if understood else dataclasses.replace(view, spec=None, problem="pools.0.architecture: a new word")
    entry = node_energy(gpus=[gpu()], instances=SERVED)
    return decide(world([view], [pod("d0", DECODE), pod("p0", PREFILL)], [entry]), None, memory, NOW + seconds)


def test_a_spec_that_is_not_understood_loses_nothing_that_was_measured():
    before = EnergyPolicyStatus.model_validate({"pools": [MEASURED | NUMBERS]})
    status = after_a_rollback(Memory(), 0, False, before).statuses["uid-qwen"]
    assert status.pools == EnergyPolicyStatus.model_validate({"pools": [MEASURED]}).pools, "none of it about now"
    assert (status.summary.saved_kwh, status.summary.gpus, status.summary.capped) == ("3.40", 0, None)
    found = {each.type: each.reason for each in status.conditions}
    assert (found["Ready"], found["Enforced"], found["Progressing"]) == ("InvalidSpec", "InvalidSpec", "UpToDate")
    again = after_a_rollback(Memory(), 30, False, as_kept(status)).statuses["uid-qwen"]
    assert again.pools == status.pools, "nor does it wear off"


@pytest.mark.parametrize("restarted", [True, False])
def test_sums_and_states_go_on_when_the_spec_is_understood_again(restarted):
    before = EnergyPolicyStatus.model_validate({"pools": [MEASURED]})
    looked = after_a_rollback(Memory(), 0, True, before)
    assert looked.statuses["uid-qwen"].pools[0].energy_kwh == "12.010000"
    odd = after_a_rollback(looked.memory, 30, False, as_kept(looked.statuses["uid-qwen"]))
    memory = Memory() if restarted else odd.memory
    decision = after_a_rollback(memory, 60, True, as_kept(odd.statuses["uid-qwen"]))
    (pool, _) = decision.statuses["uid-qwen"].pools
    assert (pool.energy_kwh, pool.savings.saved_kwh) == ("12.010000", "3.400000")
    assert (pool.savings.departed[0].pairs, pool.savings.pairs) == (7, 12)
    assert pool.rollout.phase == "RolledBack"
    assert [order.hold.reason for order in decision.write_orders["n1"] if order.pod.name == "d0"] == ["RolledBack"]


def test_instances_that_left_while_the_spec_was_not_understood_stay_in_the_sums():
    before = EnergyPolicyStatus.model_validate({"pools": [MEASURED]})
    looked = after_a_rollback(Memory(), 0, True, before)
    odd = after_a_rollback(looked.memory, 30, False, as_kept(looked.statuses["uid-qwen"]))
    view = policy(status=as_kept(odd.statuses["uid-qwen"]))
    last = decide(world([view], [pod("d1", DECODE)], [node_energy(gpus=[gpu(0, "d1")])]), None, odd.memory, NOW + 60)
    (gone,) = last.statuses["uid-qwen"].pools[0].savings.departed
    assert gone.pairs == 12


def test_a_bad_template_is_a_condition_and_orders_go_on():
    somewhere = world([policy()], [pod("d0", DECODE), pod("p0", PREFILL)])
    decision = decide(somewhere, {"kind": "Deployment"}, Memory(), NOW)
    (ready,) = [entry for entry in decision.statuses["uid-qwen"].conditions if entry.type == "Ready"]
    assert ready.reason == "AgentTemplateInvalid"
    assert decision.write_orders


@pytest.mark.parametrize(
    ("pods_", "entry", "nodes", "written", "deleted"),
    [
        ([agent_pod("n1")], None, ("n1",), {"n1": ()}, ()),
        ([agent_pod("n1")], node_energy(), ("n1",), {}, ()),
        ([], node_energy(), ("n1",), {}, ("n1",)),
        ([], node_energy(gpus=[gpu()]), ("n1",), {}, ()),
        ([], node_energy(gpus=[gpu()]), (), {}, ("n1",)),
        ([agent_pod("n1")], node_energy(readable=False), ("n1",), {"n1": ()}, ()),
    ],
)
def test_node_energies_live_as_long_as_an_agent_an_order_or_a_lock(pods_, entry, nodes, written, deleted):
    decision = decide(world([], pods_, [entry] if entry else [], nodes), None, Memory(), NOW)
    assert (decision.write_orders, decision.delete_node_energies) == (written, deleted)


def test_taking_turns_between_arms_is_a_number():
    def status(reason: str, state: str, locked: int) -> EnergyPolicyStatus:
        pool = PoolStatus(
            name="decode",
            role=Role.DECODE,
            gpus=2,
            locked=locked,
            reasons=[PoolReason(reason=reason, gpus=2, message="")],
        )
        return EnergyPolicyStatus(pools=[pool], summary=Summary(gpus=2, locked=locked))

    capped, control = status("Locked", "Locked", 2), status("ControlEpoch", "Released", 0)
    assert not urgent_change(capped, control)
    assert urgent_change(capped, status("Guardrail", "Released", 0))


def test_numbers_are_written_every_20_seconds_and_states_at_once():
    somewhere = world([policy()], [pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1")], [node_energy(gpus=[gpu()])])
    first = decide(somewhere, None, Memory(), NOW)
    assert len(first.write_statuses) == 1
    there = carried_out(somewhere, first)

    def later(seconds: float, **change: object) -> Decision:
        entry = node_energy(gpus=[gpu(**change)], orders=there.node_energies["n1"].orders, generation=2)
        current = dataclasses.replace(there, node_energies={"n1": entry})
        return decide(current, None, settled.memory, NOW + seconds)

    calm = node_energy(gpus=[gpu(power_watts=300)], orders=there.node_energies["n1"].orders, generation=2)
    settled = decide(dataclasses.replace(there, node_energies={"n1": calm}), None, first.memory, NOW + 2)
    there = carried_out(there, settled)
    assert not later(5, power_watts=310).write_statuses
    assert later(23, power_watts=310).write_statuses
    assert later(3.5, power_watts=310, state="Released", reason="Guardrail").write_statuses
    throttled = later(2.5, power_watts=310, state="Released", reason="Guardrail")
    assert not throttled.write_statuses
    assert throttled.again_soon


def test_ten_thousand_pods_are_decided_in_little_time():
    many = [pod(f"d{index}", DECODE, f"n{index % 500}") for index in range(5000)]
    many += [pod(f"x{index}", {"app": "web"}, f"n{index % 500}") for index in range(5000)]
    names_ = [f"n{index}" for index in range(500)]
    somewhere = world([policy()], [*many, pod("p0", PREFILL, "n0")], nodes=names_)
    began = time.process_time()  # ours alone: the machine may be busy
    decision = decide(somewhere, TEMPLATE, Memory(), NOW)
    assert len(decision.write_orders) == 500
    assert time.process_time() - began < 3


def test_the_nodes_of_worlds_match_the_default_placement():
    assert NodeView("n", GPU_NODE, True).labels["nvidia.com/gpu.present"] == "true"
    assert len(plan_daemon_sets(world([policy()]), TEMPLATE, ()).apply) == 1
