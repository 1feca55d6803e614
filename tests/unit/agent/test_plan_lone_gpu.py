"""The plan for a lone GPU: what its orders lock it to, and that one defect, or an odd order, is enough not to."""

from dataclasses import replace

import pytest
from plan_worlds import HOLDS, lone_world
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.orders import InstanceKey, parse_orders
from wattlock_agent.plan import plan
from wattlock_agent.world import AppliedLock, Lock, Refusal, Release
from wattlock_api.constants import GpuState, Mode, Reason
from wattlock_api.nodeenergy import Order


@pytest.mark.parametrize(
    ("change", "reason", "state"),
    [
        ({"mode": "Observe"}, "ObserveMode", "Observing"),
        ({"role": "Prefill", "capMHz": None}, "PrefillPool", "Released"),
        ({"role": "Mixed", "capMHz": None}, "MixedPool", "Released"),
        ({"role": "Mixed", "idle": {"afterSeconds": 60}}, "MixedPool", "Released"),
        ({"capMHz": 300}, "UnsupportedClock", "Unsupported"),
        ({"capMHz": None, "hold": {"reason": "NoPrefillPeer", "message": "none"}}, "NoPrefillPeer", "Released"),
    ],
)
def test_refusals_say_why(make_gpu, make_order, change, reason, state):
    world = lone_world(make_gpu(), make_order(**change))
    decision = plan(world)["GPU-0"]
    assert (decision.reason, decision.state) == (reason, state)
    assert decision.action is None
    assert decision.settled


@pytest.mark.parametrize(
    ("change", "reason"), [({"mig_enabled": True}, "MIGEnabled"), ({"virtual": True}, "VirtualGPU")]
)
def test_unsuitable_gpus_are_refused(make_gpu, make_order, change, reason):
    decision = plan(lone_world(make_gpu(**change), make_order()))["GPU-0"]
    assert (decision.reason, decision.state, decision.action) == (reason, "Unsupported", None)


DEFECTS = {
    "no orders": lambda world: replace(world, orders=None),
    "no holders": lambda world: replace(world, holders=None),
    "nobody holds it": lambda world: replace(world, holders=Holders({}, frozenset(), {})),
    "held by another": lambda world: replace(
        world, holders=Holders({"GPU-0": (PodName("llm", "other"),)}, frozenset(), {})
    ),
    "of another namespace": lambda world: replace(
        world, holders=Holders({"GPU-0": (PodName("team", "decode-0"),)}, frozenset(), {})
    ),
    "handed out in shares": lambda world: replace(world, holders=replace(world.holders, shared=frozenset({"GPU-0"}))),
    "held by two": lambda world: replace(
        world, holders=Holders({"GPU-0": (PodName("llm", "a"), PodName("llm", "decode-0"))}, frozenset(), {})
    ),
    "unknown device beside it": lambda world: replace(
        world, holders=replace(world.holders, unknown={PodName("llm", "decode-0"): ("MIG-x",)})
    ),
    "stale": lambda world: replace(world, stale="silent"),
    "stopping": lambda world: replace(world, stopping=True),
    "observing": lambda world: replace(world, mode=Mode.OBSERVE),
    "no capability": lambda world: replace(world, may_write=False),
    "no journal": lambda world: replace(world, journal_problem="disk full"),
    "held released": lambda world: replace(
        world, holds={InstanceKey("policy-1", "decode-0"): Refusal(GpuState.RELEASED, Reason.GUARDRAIL, "slow")}
    ),
    "lost": lambda world: with_view(world, fault=Refusal(GpuState.LOST, Reason.GPU_LOST, "gone")),
    "refused": lambda world: with_view(world, refused=Refusal(GpuState.OBSERVING, Reason.NO_PERMISSION, "no")),
    "conflict": lambda world: with_view(world, conflict=Refusal(GpuState.CONFLICT, Reason.OTHER_WRITER, "other")),
    "locked by somebody before": lambda world: with_view(world, foreign_mhz=1200),
    "perhaps locked by somebody before": lambda world: with_view(world, suspected_until_seconds=100.1),
    "another agent": lambda world: replace(world, other_agent="another agent has the journal"),
    "locked a moment ago": lambda world: with_view(world, lock_not_before_seconds=100.1),
}


def with_view(world, **changes):
    return replace(world, gpus=(replace(world.gpus[0], **changes),))


@pytest.mark.parametrize("defect", DEFECTS)
def test_one_defect_is_enough_not_to_lock(make_gpu, make_order, defect):
    good = lone_world(make_gpu(), make_order())
    assert plan(good)["GPU-0"].action == Lock(345, 1590)
    decision = plan(DEFECTS[defect](good))["GPU-0"]
    assert not isinstance(decision.action, Lock)
    assert decision.reason != Reason.LOCKED


def idle_world(make_gpu, make_order, **changes):
    world = lone_world(make_gpu(), make_order(**({"idle": {"afterSeconds": 60}} | changes)))
    return replace(world, idle=frozenset({InstanceKey("policy-1", "decode-0")}))


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({}, Lock(345, 345, idle=True)),
        ({"idle": {"afterSeconds": 60, "capMHz": 1007}}, Lock(345, 1005, idle=True)),
        ({"idle": {"afterSeconds": 60, "capMHz": 1980}}, Lock(345, 1590, idle=True)),
        ({"idle": None}, Lock(345, 1590)),
        ({"role": "Mixed", "maxPrefillPercent": 20}, Lock(345, 345, idle=True)),
        ({"experiment": {"seed": "policy-1", "epochSeconds": 20, "controlShare": 0.5}}, Lock(345, 345, idle=True)),
    ],
)
def test_an_idle_instance_gets_the_lower_cap(make_gpu, make_order, changes, action):
    world = idle_world(make_gpu, make_order, **changes)
    for unix_seconds in range(0, 200, 20):  # whatever the arm
        decision = plan(replace(world, unix_seconds=float(unix_seconds)))["GPU-0"]
        assert decision.action == action
        assert decision.requested_mhz == 1590, "what it gets back"


@pytest.mark.parametrize("defect", [name for name in DEFECTS if name != "held released"])
def test_one_defect_is_enough_not_to_cap_an_idle_instance(make_gpu, make_order, defect):
    decision = plan(DEFECTS[defect](idle_world(make_gpu, make_order)))["GPU-0"]
    assert not isinstance(decision.action, Lock)


@pytest.mark.parametrize("reason", HOLDS)
def test_only_the_guardrail_holds_an_idle_instance_released(make_gpu, make_order, reason):
    hold = {InstanceKey("policy-1", "decode-0"): Refusal(GpuState.RELEASED, reason, "text")}
    decision = plan(replace(idle_world(make_gpu, make_order), holds=hold))["GPU-0"]
    assert (decision.reason == Reason.IDLE) == (reason != Reason.GUARDRAIL)
    assert isinstance(decision.action, Lock) == (reason != Reason.GUARDRAIL)


def test_an_idle_cap_below_every_clock_is_refused_with_what_to_write(make_gpu, make_order):
    decision = plan(idle_world(make_gpu, make_order, idle={"afterSeconds": 60, "capMHz": 200}))["GPU-0"]
    assert (decision.reason, decision.action) == ("UnsupportedClock", None)
    assert "leave it out" in decision.message


def test_what_another_agent_left_on_an_idle_gpu_goes_before_anything_is_known(make_gpu, make_order):
    blind = replace(lone_world(make_gpu()), orders=None, holders=None, pending=True)
    left = with_view(blind, recorded=True, left_idle=True)
    assert plan(left)["GPU-0"].action == Release()
    assert plan(with_view(blind, recorded=True))["GPU-0"].action is None, "an ordinary cap waits for the orders"


def test_two_orders_for_one_pod_name_lock_nothing(make_gpu, make_order):
    pod = {"namespace": "llm", "name": "decode-0", "uid": "new"}
    newer = Order.model_validate(make_order().to_api() | {"pod": pod, "podUid": "new"})
    decision = plan(lone_world(make_gpu(), make_order(), newer))["GPU-0"]
    assert (decision.reason, decision.action) == ("HolderChanged", None)


def test_a_pod_that_replaces_another_gets_a_lock_of_its_own(make_gpu, make_order):
    world = lone_world(make_gpu(), make_order())
    view = replace(world.gpus[0], lock=AppliedLock(1590, "an older pod"), recorded=True)
    decision = plan(replace(world, gpus=(view,)))["GPU-0"]
    assert decision.action == Lock(345, 1590)


def test_unreadable_orders_spoil_no_other(make_order):
    good = make_order().to_api()
    spec = {"orders": [good | {"role": "Sings", "podUid": "x"}, good, good, "text"]}
    orders = parse_orders(7, spec)
    assert [order.pod_uid for order in orders.orders] == ["uid-decode-0"]
    assert len(orders.unreadable) == 3
    assert parse_orders(1, {"orders": "text"}).unreadable
    assert parse_orders(1, None).unreadable
