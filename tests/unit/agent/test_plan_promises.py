"""Properties of the plan: what it must never do, for any state of the world."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.orders import InstanceKey, Orders, key_of, parse_orders
from wattlock_agent.plan import plan
from wattlock_agent.world import AppliedLock, Forget, GpuView, Lock, Refusal, Release, World
from wattlock_api.constants import GpuState, Mode, Reason
from wattlock_api.nodeenergy import Order
from wattlock_api.schedule import Arm, arm_of, epoch_at

CLOCKS = tuple(range(345, 1981, 15))
PODS = tuple(PodName("llm", f"pod-{number}") for number in range(3))


def order_strategy():
    def build(pod, uid, role, mode, cap, experiment, hold, instance, generation, conflict_policy, mixed, idle):
        fields = {
            "policy": {"namespace": "llm", "name": "p", "uid": "policy", "generation": generation},
            "pool": "x",
            "role": role,
            "pod": {"namespace": pod.namespace, "name": pod.name, "uid": uid},
            "podUid": uid,
            "instance": instance,
            "mode": mode,
            "conflictPolicy": conflict_policy,
        }
        if cap is not None:
            fields["capMHz"] = cap
        if experiment:
            fields["experiment"] = {"seed": "s", "epochSeconds": 20, "controlShare": 0.5}
        if role == "Mixed" and mixed:
            fields["maxPrefillPercent"] = mixed
        if idle is not None:
            fields["idle"] = idle
        if hold:
            fields["hold"] = {"reason": "NoPrefillPeer", "message": "no prefill pod"}
        return Order.model_validate(fields)

    return st.builds(
        build,
        st.sampled_from(PODS),
        st.sampled_from(["uid-0", "uid-1", "uid-2", "uid-3"]),
        st.sampled_from(["Decode", "Decode", "Decode", "Prefill", "Mixed", "Mixed"]),
        st.sampled_from(["Enforce", "Enforce", "Enforce", "Observe"]),
        st.sampled_from([None, 100, 345, 1590, 1600, 1980, 5000]),
        st.booleans(),
        st.sampled_from([False, False, False, True]),
        st.sampled_from(["a", "b"]),
        st.integers(1, 2),
        st.sampled_from(["Skip", "Skip", "Coexist"]),
        st.sampled_from([None, 20, 20]),
        st.sampled_from([None, {"afterSeconds": 60}, {"afterSeconds": 60, "capMHz": 1000}]),
    )


#: What may hold an instance released; all but the first are about prompts, of which one without work computes none.
HOLDS = (Reason.GUARDRAIL, Reason.COMPUTES_PROMPTS, Reason.PREFILL_SHARE, Reason.PREFILL_UNKNOWN)


def refusals(reason):
    return st.sampled_from([None, None, None, None, Refusal(GpuState.RELEASED, reason, "text")])


@st.composite
def worlds(draw):
    gpus = []
    for number in range(draw(st.integers(1, 4))):
        identity = GpuIdentity(
            uuid=f"GPU-{number}",
            index=number,
            minor=number,
            product="NVIDIA H200",
            supported_clocks_mhz=draw(st.sampled_from([CLOCKS, CLOCKS, CLOCKS, ()])),
            mig_enabled=draw(st.sampled_from([False, False, False, True])),
            virtual=draw(st.sampled_from([False, False, False, True])),
        )
        locks = [None, AppliedLock(1590, "uid-0"), AppliedLock(1200, "uid-1"), AppliedLock(345, "uid-0", idle=True)]
        lock = draw(st.sampled_from(locks))
        recorded = lock is not None or draw(st.booleans())
        undone = recorded and lock is None and draw(st.sampled_from([False, False, True]))
        gpus.append(
            GpuView(
                identity=identity,
                lock=lock,
                recorded=recorded,
                left_idle=recorded and lock is None and not undone and draw(st.booleans()),
                undone=undone,
                fault=draw(refusals(Reason.GPU_LOST)),
                refused=draw(refusals(Reason.NO_PERMISSION)),
                conflict=draw(refusals(Reason.OTHER_WRITER)),
                contested=draw(st.sampled_from(["", "", "", "another program sets its clock"])),
                foreign_mhz=draw(st.sampled_from([None, None, None, 1200])),
                suspected_until_seconds=draw(st.sampled_from([0.0, 0.0, 0.0, 105.0])),
                lock_not_before_seconds=draw(st.sampled_from([0.0, 0.0, 103.0])),
                release_not_before_seconds=draw(st.sampled_from([0.0, 0.0, 103.0])),
            )
        )
    held = {
        gpu.identity.uuid: tuple(draw(st.lists(st.sampled_from(PODS), min_size=1, max_size=2, unique=True)))
        for gpu in gpus
        if draw(st.sampled_from([True, True, True, False]))
    }
    shared = frozenset(uuid for uuid in held if draw(st.sampled_from([False, False, False, True])))
    unknown = {pod: ("MIG-x",) for pod in PODS if draw(st.sampled_from([False] * 5 + [True]))}
    unique = {order.pod_uid: order for order in draw(st.lists(order_strategy(), max_size=4))}
    known = draw(st.sampled_from([True, True, True, True, False]))
    return World(
        now_seconds=100.0,
        unix_seconds=draw(st.floats(0, 1000)),
        mode=draw(st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE])),
        may_write=draw(st.sampled_from([True, True, True, False])),
        orders=Orders(1, tuple(unique.values())) if known else None,
        stale=draw(st.sampled_from(["", "", "", "silent"])),
        holders=Holders(held, shared, unknown) if draw(st.sampled_from([True, True, True, False])) else None,
        holders_problem="",
        gpus=tuple(gpus),
        holds={
            InstanceKey("policy", name): Refusal(GpuState.RELEASED, draw(st.sampled_from(HOLDS)), "slow")
            for name in ("a", "b")
            if draw(st.sampled_from([False, False, False, True]))
        },
        idle=frozenset(InstanceKey("policy", name) for name in ("a", "b") if draw(st.booleans())),
        journal_problem=draw(st.sampled_from(["", "", "", "disk full"])),
        other_agent=draw(st.sampled_from([""] * 7 + ["another agent has the journal"])),
        pending=draw(st.booleans()),
        stopping=draw(st.sampled_from([False, False, False, True])),
    )


def may_be_locked(world, gpu):
    """The promise once more, in the plainest words."""
    if world.orders is None or world.holders is None or world.stale or world.stopping or world.journal_problem:
        return False
    if world.mode is not Mode.ENFORCE or not world.may_write:
        return False
    uuid = gpu.identity.uuid
    pods = world.holders.pods.get(uuid, ())
    if len(pods) != 1 or uuid in world.holders.shared or pods[0] in world.holders.unknown:
        return False
    orders = [order for order in world.orders.orders if order.pod.name == pods[0].name]
    if len(orders) != 1:
        return False
    order = orders[0]
    if order.role != "Decode" and (order.role != "Mixed" or order.max_prefill_percent is None):
        return False
    if order.mode != "Enforce" or order.cap_mhz is None or order.hold is not None:
        return False
    idle = key_of(order) in world.idle and order.idle is not None
    hold = world.holds.get(key_of(order))
    if hold is not None and not (idle and hold.reason in HOLDS[1:]):
        return False
    if gpu.conflict or gpu.fault or gpu.refused or world.other_agent:
        return False
    if gpu.foreign_mhz is not None and order.conflict_policy == "Skip":
        return False
    if gpu.identity.mig_enabled or gpu.identity.virtual:
        return False
    if order.experiment is not None and not idle:
        experiment = order.experiment.experiment()
        if arm_of(experiment, order.instance, epoch_at(experiment, world.unix_seconds)) is not Arm.CAP:
            return False
    return any(clock <= order.cap_mhz for clock in gpu.identity.supported_clocks_mhz)


@settings(max_examples=250)
@given(worlds())
def test_locks_only_what_was_chosen_and_only_as_far(world):
    decisions = plan(world)
    assert set(decisions) == {gpu.identity.uuid for gpu in world.gpus}
    for gpu in world.gpus:
        decision = decisions[gpu.identity.uuid]
        if isinstance(decision.action, Lock) or decision.reason in (Reason.LOCKED, Reason.IDLE):
            assert may_be_locked(world, gpu)
        if isinstance(decision.action, Lock):
            assert decision.action.cap_mhz in gpu.identity.supported_clocks_mhz
            assert decision.action.cap_mhz <= decision.order.cap_mhz
            assert decision.action.low_mhz == gpu.identity.supported_clocks_mhz[0]
            assert gpu.lock_not_before_seconds <= world.now_seconds
            assert gpu.suspected_until_seconds <= world.now_seconds or decision.order.conflict_policy == "Coexist"
            assert decision.settled == bool(gpu.contested), "nobody waits for the end of a contest"
        if decision.reason in (Reason.LOCKED, Reason.IDLE):
            assert not gpu.contested
        assert not decision.in_force or may_be_locked(world, gpu)


@settings(max_examples=250)
@given(worlds())
def test_undoes_every_lock_that_is_not_wanted_and_no_other(world):
    decisions = plan(world)
    for gpu in world.gpus:
        decision = decisions[gpu.identity.uuid]
        if isinstance(decision.action, Release):
            assert gpu.recorded, "a GPU without our record is never reset"
            assert world.mode is Mode.ENFORCE or gpu.undone, "only its record is removed then"
            assert gpu.conflict is None, "another writer's lock is not ours to undo"
        if isinstance(decision.action, Forget):
            assert gpu.conflict is not None
        can_undo = world.mode is Mode.ENFORCE and world.may_write and gpu.fault is None
        waits = (world.pending and not world.stopping) or gpu.release_not_before_seconds > world.now_seconds
        wanted = decision.reason in (Reason.LOCKED, Reason.WAITING_TO_WRITE, Reason.IDLE) or (
            decision.reason == Reason.CONTESTED and may_be_locked(world, gpu)
        )
        if gpu.recorded and gpu.conflict is None and can_undo and not waits and not wanted:
            assert isinstance(decision.action, Release)


@settings(max_examples=250)
@given(worlds())
def test_the_cap_of_idle_instances_stands_only_while_they_are_idle(world):
    """Whatever else is the case: what wants to wake up waits for no order, no kubelet and no write interval."""
    decisions = plan(world)
    for gpu in world.gpus:
        decision = decisions[gpu.identity.uuid]
        pods = world.holders.pods.get(gpu.identity.uuid, ()) if world.holders else ()
        keys = {
            key_of(each)
            for each in (world.orders.orders if world.orders else ())
            if each.pod.name in {p.name for p in pods}
        }
        idle = decision.order is not None and key_of(decision.order) in world.idle and decision.order.idle is not None
        assert decision.idle <= idle
        assert decision.idle <= (keys <= world.idle)
        if isinstance(decision.action, Lock) and decision.action.idle:
            assert decision.idle
            assert decision.action.cap_mhz <= snapped(decision.order.idle.cap_mhz or 345)
            assert decision.action.cap_mhz <= decision.order.cap_mhz
        can_undo = world.mode is Mode.ENFORCE and world.may_write and gpu.fault is None and gpu.conflict is None
        fails = gpu.release_not_before_seconds > world.now_seconds
        lower = gpu.left_idle or (gpu.lock is not None and gpu.lock.idle and not decision.idle)
        if lower and can_undo and not fails:
            assert isinstance(decision.action, Release)


def snapped(mhz):
    return max(clock for clock in CLOCKS if clock <= mhz)


@settings(max_examples=250)
@given(worlds())
def test_gpus_of_an_instance_act_alike(world):
    decisions = plan(world)
    by_instance = defaultdict(list)
    for decision in decisions.values():
        if decision.order is not None and decision.order.cap_mhz is not None and decision.order.mode == "Enforce":
            by_instance[key_of(decision.order)].append(decision)
    for group in by_instance.values():
        about_the_gpu = {Reason.MIG_ENABLED, Reason.VIRTUAL_GPU, Reason.CLOCKS_NOT_SUPPORTED}
        about_the_gpu |= {Reason.OTHER_WRITER, Reason.FOREIGN_LOCK}
        if any(each.reason in about_the_gpu for each in group):
            assert not any(isinstance(each.action, Lock) or each.in_force for each in group)
        views = {gpu.identity.uuid: gpu for gpu in world.gpus}
        waiting = [
            each
            for each in group
            if each.reason == Reason.WAITING_TO_WRITE
            or (each.reason == Reason.IDLE and not each.in_force)
            or (each.reason == Reason.CONTESTED and not each.in_force and may_be_locked(world, views[each.uuid]))
        ]
        # One whose lower cap is undone first is written when that is done.
        locking = [isinstance(each.action, Lock) for each in waiting if not isinstance(each.action, Release)]
        assert len(set(locking)) <= 1


@settings(max_examples=120)
@given(worlds())
def test_a_stale_or_stopping_agent_holds_nothing(world):
    for changed in (replace(world, stale="silent"), replace(world, stopping=True)):
        for decision in plan(changed).values():
            assert not isinstance(decision.action, Lock)
            assert decision.reason not in (Reason.LOCKED, Reason.IDLE)


@settings(max_examples=120)
@given(worlds())
def test_every_decision_explains_itself(world):
    for decision in plan(world).values():
        assert decision.reason
        assert decision.message


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


def lone_world(gpu, *orders):
    return World(
        now_seconds=100.0,
        unix_seconds=0.0,
        mode=Mode.ENFORCE,
        may_write=True,
        orders=Orders(1, orders),
        stale="",
        holders=Holders({gpu.uuid: (PodName("llm", "decode-0"),)}, frozenset(), {}),
        holders_problem="",
        gpus=(GpuView(gpu),),
        holds={},
        idle=frozenset(),
        journal_problem="",
        pending=False,
    )


def test_unreadable_orders_spoil_no_other(make_order):
    good = make_order().to_api()
    spec = {"orders": [good | {"role": "Sings", "podUid": "x"}, good, good, "text"]}
    orders = parse_orders(7, spec)
    assert [order.pod_uid for order in orders.orders] == ["uid-decode-0"]
    assert len(orders.unreadable) == 3
    assert parse_orders(1, {"orders": "text"}).unreadable
    assert parse_orders(1, None).unreadable
