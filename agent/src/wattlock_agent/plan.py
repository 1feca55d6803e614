"""Decides what is to be done with every GPU now. Pure and total: it holds the promises about writing.

A GPU is locked only when all of this holds: the process may write (mode Enforce, capability, a journal that can be
written), orders are fresh, exactly one pod holds the GPU whole, that pod has an order of mode Enforce and role Decode
(or Mixed, with a bound on its prefill work) with a cap that the GPU supports, the arm of the epoch is the cap, and
neither the operator, the guardrail, the prompts that the pod computes nor another writer (unless the policy says
Coexist) speak against it. In every other case our lock, if there is one, is undone at once.

An instance without requests gets a lower cap where its order has one, in both arms alike. It may stand only while a
page of this moment shows no work: in every other case it is undone at once, also where the ordinary cap is to follow.

The GPUs of an instance on this node act alike: where one of them cannot be locked, none is, because the slowest GPU
of a tensor-parallel group sets the pace of all, so that a lock on some would save little and hide what it costs.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wattlock_api.constants import ConflictPolicy, GpuState, Mode, Reason
from wattlock_api.nodeenergy import Order

from wattlock_agent.clocks import snap_down_mhz
from wattlock_agent.holders.base import PodName
from wattlock_agent.objections import (
    control_epoch,
    foreign_lock,
    no_basis,
    no_clock,
    no_idle_clock,
    order_speaks_against,
    process_speaks_against,
    unknown_devices,
    unsuitable,
)
from wattlock_agent.orders import InstanceKey, key_of, pod_of
from wattlock_agent.world import Action, Decision, Forget, GpuView, Lock, Refusal, Release, World


@dataclass(frozen=True)
class _Verdict:
    gpu: GpuView
    order: Order | None
    refusal: Refusal | None
    instances: tuple[InstanceKey, ...] = ()
    """Instances that the refusal is about."""
    cap_mhz: int | None = None
    idle_mhz: int | None = None
    """The lower cap of an idle instance; ``None``: it is not idle."""

    @property
    def lock_mhz(self) -> int | None:
        """The cap that is wanted now."""
        return self.cap_mhz if self.idle_mhz is None else self.idle_mhz


def plan(world: World) -> dict[str, Decision]:
    """Return a decision for each GPU, by UUID."""
    verdicts = _alike([_judge(world, gpu) for gpu in world.gpus], unknown_devices(world))
    wait_until: dict[InstanceKey, float] = defaultdict(float)
    for verdict in verdicts:
        if verdict.refusal is None and not _in_force(verdict):
            gpu = verdict.gpu
            until_seconds = max(gpu.lock_not_before_seconds, gpu.suspected_until_seconds if _skips(verdict) else 0.0)
            for key in verdict.instances:
                wait_until[key] = max(wait_until[key], until_seconds)
    return {verdict.gpu.identity.uuid: _decide(world, verdict, wait_until) for verdict in verdicts}


def orders_without_gpu(world: World) -> dict[str, Refusal]:
    """Return why orders have no GPU on this node, by pod UID; empty while the kubelet has not answered."""
    if world.orders is None or world.holders is None:
        return {}
    holding = {pod for pods in world.holders.pods.values() for pod in pods}
    return {
        order.pod_uid: Refusal(
            GpuState.RELEASED,
            Reason.UNKNOWN_DEVICE if pod_of(order) in world.holders.unknown else Reason.POD_NOT_ON_NODE,
            f"pod {order.pod.namespace}/{order.pod.name} holds no GPU that is visible on this node",
        )
        for order in world.orders.orders
        if pod_of(order) not in holding
    }


def _judge(world: World, gpu: GpuView) -> _Verdict:
    identity = gpu.identity
    if world.holders is None or world.orders is None:
        return _Verdict(gpu, None, no_basis(world))
    pods = world.holders.pods.get(identity.uuid, ())
    by_pod: dict[PodName, list[Order]] = defaultdict(list)
    for each in world.orders.orders:
        by_pod[pod_of(each)].append(each)
    held = [each for pod in pods for each in by_pod[pod]]
    order = held[0] if len(held) == 1 and len(pods) == 1 else None
    instances = tuple(sorted({key_of(each) for each in held}))

    def verdict(refusal: Refusal | None, cap_mhz: int | None = None) -> _Verdict:
        return _Verdict(gpu, order, refusal, instances, cap_mhz)

    if gpu.fault is not None:
        return verdict(gpu.fault)
    if not held:
        names = ", ".join(f"{pod.namespace}/{pod.name}" for pod in pods[:4])
        text = f"its holder {names} has no order" if pods else "no pod holds it"
        return verdict(Refusal(GpuState.RELEASED, Reason.NO_ORDER, text))
    if (refusal := unsuitable(identity, world.holders, pods)) is not None:
        return verdict(refusal)
    if order is None:
        return verdict(
            Refusal(
                GpuState.RELEASED,
                Reason.HOLDER_CHANGED,
                f"{len(held)} orders name pod {pods[0].namespace}/{pods[0].name} by different UIDs; "
                "waiting for the operator to drop the old one",
            )
        )
    if (refusal := order_speaks_against(world, order)) is not None:
        return verdict(refusal)
    cap_mhz = snap_down_mhz(identity.supported_clocks_mhz, order.cap_mhz or 0)
    if cap_mhz is None:
        return verdict(no_clock(identity, order))
    foreign = foreign_lock(gpu) if order.conflict_policy is ConflictPolicy.SKIP else None
    hold = world.holds.get(key_of(order))
    idle = order.idle if key_of(order) in world.idle else None
    if idle is not None and hold is not None and hold.reason in _ABOUT_PROMPTS:
        hold = None
    for refusal in (process_speaks_against(world), gpu.conflict, foreign, gpu.refused, hold):
        if refusal is not None:
            return verdict(refusal, cap_mhz)
    if idle is None:
        return verdict(control_epoch(world, order), cap_mhz)
    lowest_mhz = identity.supported_clocks_mhz[0]
    idle_mhz = snap_down_mhz(identity.supported_clocks_mhz, idle.cap_mhz or lowest_mhz)
    if idle_mhz is None:
        return verdict(no_idle_clock(identity, idle), cap_mhz)
    return replace(verdict(None, cap_mhz), idle_mhz=min(idle_mhz, cap_mhz))


#: What holds an instance released because of the prompts that it computes: one without work computes none.
_ABOUT_PROMPTS = frozenset(
    {Reason.COMPUTES_PROMPTS, Reason.PREFILL_SHARE, Reason.PREFILL_UNKNOWN, Reason.PREFILL_NOT_TOLD}
)


#: Refusals of single GPUs that keep the rest of their instance from being locked.
_ABOUT_ONE_GPU = frozenset(
    {
        Reason.MIG_ENABLED,
        Reason.VIRTUAL_GPU,
        Reason.SHARED_GPU,
        Reason.HOLDER_CHANGED,
        Reason.CLOCKS_NOT_SUPPORTED,
        Reason.UNSUPPORTED_CLOCK,
        Reason.OTHER_WRITER,
        Reason.FOREIGN_LOCK,
        Reason.GPU_LOST,
        Reason.NO_PERMISSION,
        Reason.NVML_ERROR,
        Reason.JOURNAL_UNWRITABLE,
    }
)


def _alike(verdicts: list[_Verdict], refused: dict[InstanceKey, Refusal]) -> list[_Verdict]:
    """Let a GPU that cannot be locked keep the other GPUs of its instance from being locked."""
    refused = dict(refused)
    for verdict in verdicts:
        if verdict.refusal is not None and verdict.refusal.reason in _ABOUT_ONE_GPU:
            for key in verdict.instances:
                text = f"GPU {verdict.gpu.identity.uuid} of the same instance: {verdict.refusal.message}"
                refused.setdefault(key, Refusal(GpuState.RELEASED, verdict.refusal.reason, text))
    return [
        replace(verdict, refusal=refusal)
        if (verdict.refusal is None or verdict.refusal.reason == Reason.CONTROL_EPOCH)
        and (refusal := next((refused[key] for key in verdict.instances if key in refused), None)) is not None
        else verdict
        for verdict in verdicts
    ]


def _skips(verdict: _Verdict) -> bool:
    return verdict.order is not None and verdict.order.conflict_policy is ConflictPolicy.SKIP


def _in_force(verdict: _Verdict) -> bool:
    lock = verdict.gpu.lock
    return (
        verdict.order is not None
        and lock is not None
        and lock.cap_mhz == verdict.lock_mhz
        and (verdict.idle_mhz is not None or not lock.idle)
        and lock.pod_uid == verdict.order.pod_uid
    )


def _to_be_undone_first(verdict: _Verdict) -> bool:
    """Return whether the lower cap of an idle instance is on the GPU, which must not wait for another lock."""
    gpu = verdict.gpu
    awake = gpu.lock is not None and gpu.lock.idle and verdict.idle_mhz is None
    return gpu.recorded and not gpu.undone and (gpu.left_idle or awake)


def _decide(world: World, verdict: _Verdict, wait_until: Mapping[InstanceKey, float]) -> Decision:
    gpu = verdict.gpu
    uuid = gpu.identity.uuid
    refusal = verdict.refusal
    if refusal is not None:
        return _released(world, verdict, refusal)
    if verdict.order is None or verdict.cap_mhz is None or verdict.lock_mhz is None:  # cannot be without a refusal
        return Decision(uuid, GpuState.RELEASED, Reason.NO_ORDER, "no order")
    in_force, idle = _in_force(verdict), verdict.idle_mhz is not None
    wait_seconds = max((wait_until[key] for key in verdict.instances), default=0.0) - world.now_seconds
    action: Action = None
    if _to_be_undone_first(verdict):
        action = Release() if world.now_seconds >= gpu.release_not_before_seconds else None
    elif not in_force and wait_seconds <= 0:
        action = Lock(gpu.identity.supported_clocks_mhz[0], verdict.lock_mhz, idle)
    decision = Decision(
        *(uuid, GpuState.LOCKED, Reason.LOCKED, f"at most {verdict.cap_mhz} MHz", action, verdict.order),
        verdict.cap_mhz,
        in_force=in_force,
        idle=idle,
    )
    if gpu.contested:
        # One word and one sentence for as long as it lasts: it would change with every write of the other.
        return replace(decision, state=GpuState.CONFLICT, reason=Reason.CONTESTED, message=gpu.contested)
    if idle:
        text = f"no requests: at most {verdict.idle_mhz} MHz until the first one"
        decision = replace(decision, reason=Reason.IDLE, message=text)
    if in_force:
        return decision
    text = f"to be locked to at most {verdict.lock_mhz} MHz"
    if wait_seconds > 0:
        text += " in some seconds: writes are kept apart, and a low clock under load is watched before it is changed"
    state = GpuState.RELEASED if gpu.lock is None else GpuState.LOCKED
    reason = Reason.IDLE if idle else Reason.WAITING_TO_WRITE
    return replace(decision, state=state, reason=reason, message=text, settled=False)


def _released(world: World, verdict: _Verdict, refusal: Refusal) -> Decision:
    gpu = verdict.gpu
    requested_mhz = None
    if refusal.reason == Reason.CONTROL_EPOCH:
        requested_mhz = verdict.cap_mhz
        if gpu.contested:
            refusal = Refusal(GpuState.CONFLICT, Reason.CONTESTED, gpu.contested)
    decision = Decision(
        gpu.identity.uuid, refusal.state, refusal.reason, refusal.message, None, verdict.order, requested_mhz
    )
    # A lost GPU cannot be reset, and comes back without its lock. One whose readings fail can: that is another call.
    if not gpu.recorded or (gpu.fault is not None and gpu.fault.reason == Reason.GPU_LOST):
        return decision
    if gpu.conflict is not None:
        return replace(decision, action=Forget())
    if gpu.undone:
        text = f"{refusal.message}; released, but its record cannot be removed: {gpu.release_problem}"
        due = world.now_seconds >= gpu.release_not_before_seconds
        return replace(decision, message=text, action=Release() if due else None)
    left_over = replace(decision, state=GpuState.LOCKED, settled=False)
    if world.mode is not Mode.ENFORCE or not world.may_write:
        return replace(
            left_over,
            reason=Reason.NO_PERMISSION,
            message="an earlier agent left a lock that this one may not undo: "
            "run 'wattlock-agent reset' as root with the capability SYS_ADMIN on this node",
            settled=True,
        )
    # The lower cap of an idle instance never waits: nobody may have seen its page since the agent that wrote it.
    idle = gpu.left_idle or (gpu.lock is not None and gpu.lock.idle)
    if world.pending and not world.stopping and not idle:
        return replace(left_over, message=f"lock of an earlier agent: {refusal.message}")
    if world.now_seconds < gpu.release_not_before_seconds:
        return replace(left_over, message=f"{refusal.message}; cannot be released: {gpu.release_problem}")
    return replace(left_over, action=Release())
