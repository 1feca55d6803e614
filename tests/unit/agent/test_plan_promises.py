"""Properties of the plan: what it must never do, for any state of the world."""

from collections import defaultdict
from dataclasses import replace

from hypothesis import given, settings
from plan_worlds import CLOCKS, HOLDS, worlds
from wattlock_agent.orders import key_of
from wattlock_agent.plan import plan
from wattlock_agent.world import Forget, Lock, Release
from wattlock_api.constants import Mode, Reason
from wattlock_api.schedule import Arm, arm_of, epoch_at


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


def is_lost(gpu):
    return gpu.fault is not None and gpu.fault.reason == Reason.GPU_LOST


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
        can_undo = world.mode is Mode.ENFORCE and world.may_write and not is_lost(gpu)
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
        can_undo = world.mode is Mode.ENFORCE and world.may_write and not is_lost(gpu) and gpu.conflict is None
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
