"""Decides what is to be done with every GPU now. Pure and total: it holds the promises about writing.

A GPU is locked only when all of this holds: the process may write (mode Enforce, capability, a journal that can be
written), orders are fresh, exactly one pod holds the GPU whole, that pod has an order of mode Enforce and role Decode
with a cap that the GPU supports, the arm of the epoch is the cap, and neither the operator, the guardrail, the
prompts that the pod computes nor another writer (unless the policy says Coexist) speak against it. In every other case
our lock, if there is one, is undone at once.

The GPUs of an instance on this node act alike: where one of them cannot be locked, none is, because the slowest GPU
of a tensor-parallel group sets the pace of all, so that a lock on some would save little and hide what it costs.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wattlock_api.constants import ConflictPolicy, GpuState, Mode, Reason, Role
from wattlock_api.nodeenergy import Order
from wattlock_api.schedule import Arm, arm_of, epoch_at

from wattlock_agent.clocks import snap_down_mhz
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.orders import InstanceKey, Orders, key_of, pod_of

#: Frequent writes are known to stall NCCL (https://github.com/NVIDIA/nccl/issues/1551): one lock a GPU in this time.
MIN_LOCK_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class Lock:
    """Limit the SM clock to [low, cap] MHz; both are supported clocks."""

    low_mhz: int
    cap_mhz: int


@dataclass(frozen=True)
class Release:
    """Undo our lock, then remove its record."""


@dataclass(frozen=True)
class Forget:
    """Remove our record without touching the GPU: another writer has replaced our lock."""


Action = Lock | Release | Forget | None


@dataclass(frozen=True)
class Refusal:
    """Why a GPU is not to be locked."""

    state: GpuState
    reason: str
    message: str


@dataclass(frozen=True)
class AppliedLock:
    """A lock that the driver has accepted and that nothing has undone since, as far as we know."""

    cap_mhz: int
    pod_uid: str


@dataclass(frozen=True)
class GpuView:
    """One GPU as far as the plan needs to know it."""

    identity: GpuIdentity
    lock: AppliedLock | None = None
    """``None`` also when unknown, e.g. after a driver reload or a restart of the agent."""
    recorded: bool = False
    """Whether the journal has a record of a lock of ours."""
    undone: bool = False
    """The driver has reset the GPU since; if there is a record it could not be removed."""
    fault: Refusal | None = None
    """The GPU does not answer: nothing is written to it while this stands."""
    refused: Refusal | None = None
    """The driver or the disk refused the last write; stands until something has changed."""
    conflict: Refusal | None = None
    """Another writer keeps undoing our lock, and the policy says Skip."""
    contested: str = ""
    """The same where the policy says Coexist, in words; empty: nobody does."""
    foreign_mhz: int | None = None
    """The clock at which a lock that is not ours seems to hold the GPU."""
    suspected_until_seconds: float = 0.0
    """Monotonic time until which it is watched for such a lock."""
    lock_not_before_seconds: float = 0.0
    """Monotonic time before which no lock may be written: rate limit and back-off."""
    release_not_before_seconds: float = 0.0
    """Monotonic time before which a release that failed is not tried again."""
    release_problem: str = ""
    """Why the last release failed."""


@dataclass(frozen=True)
class World:
    """All that the plan depends on."""

    now_seconds: float
    """Monotonic time."""
    unix_seconds: float
    """Wall-clock time, for the schedule of arms alone."""
    mode: Mode
    """Mode of the process."""
    may_write: bool
    orders: Orders | None
    """``None``: none received yet."""
    stale: str
    """Why the orders are no longer to be followed; empty: they are."""
    holders: Holders | None
    """``None``: the kubelet has not answered, or too long ago."""
    holders_problem: str
    gpus: tuple[GpuView, ...]
    holds: Mapping[InstanceKey, Refusal]
    """Instances that the guardrail or their own prompts hold released."""
    journal_problem: str
    """Why nothing can be recorded; empty: it can."""
    pending: bool
    """At the start, while orders, holders or a sign of the operator may still come: locks of an earlier agent wait."""
    stopping: bool = False
    journal_damage: str = ""
    """What of the journal could not be read when this agent began; decides nothing, is shown to people."""
    other_agent: str = ""
    """Another agent of ours acts on this node, in words: this one knows nothing of the locks and writes nothing."""


@dataclass(frozen=True)
class Decision:
    """What is to be done with a GPU, and the words for it."""

    uuid: str
    state: GpuState
    reason: str
    message: str
    action: Action = None
    order: Order | None = None
    """The order of the only holder of the GPU."""
    requested_mhz: int | None = None
    """The cap that is, or in a control epoch would be, in force."""
    settled: bool = True
    """Whether the order is in force or refused, so that nothing is left to do."""
    in_force: bool = False
    """Whether our lock is on the GPU, as far as we know."""


@dataclass(frozen=True)
class _Verdict:
    gpu: GpuView
    order: Order | None
    refusal: Refusal | None
    instances: tuple[InstanceKey, ...] = ()
    """Instances that the refusal is about."""
    cap_mhz: int | None = None


def plan(world: World) -> dict[str, Decision]:
    """Return a decision for each GPU, by UUID."""
    verdicts = _alike([_judge(world, gpu) for gpu in world.gpus], _unknown_devices(world))
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
        return _Verdict(gpu, None, _no_basis(world))
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
    if (refusal := _unsuitable(identity, world.holders, pods)) is not None:
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
    if (refusal := _order_speaks_against(world, order)) is not None:
        return verdict(refusal)
    cap_mhz = snap_down_mhz(identity.supported_clocks_mhz, order.cap_mhz or 0)
    if cap_mhz is None:
        return verdict(_no_clock(identity, order))
    foreign = _foreign_lock(gpu) if order.conflict_policy is ConflictPolicy.SKIP else None
    holds = world.holds.get(key_of(order))
    for refusal in (_process_speaks_against(world), gpu.conflict, foreign, gpu.refused, holds):
        if refusal is not None:
            return verdict(refusal, cap_mhz)
    return verdict(_control_epoch(world, order), cap_mhz)


def _no_basis(world: World) -> Refusal:
    if world.orders is None:
        return Refusal(GpuState.RELEASED, Reason.NO_ORDER, "no orders have come from the API server yet")
    return Refusal(
        GpuState.RELEASED,
        Reason.KUBELET_UNREACHABLE,
        world.holders_problem or "the kubelet has not told yet which pod holds which GPU",
    )


def _unsuitable(identity: GpuIdentity, holders: Holders, pods: tuple[PodName, ...]) -> Refusal | None:
    unsupported = GpuState.UNSUPPORTED
    if identity.mig_enabled:
        return Refusal(unsupported, Reason.MIG_ENABLED, "MIG is on: a clock belongs to the whole GPU, not to a slice")
    if identity.virtual:
        return Refusal(unsupported, Reason.VIRTUAL_GPU, "a virtual GPU's clock belongs to its host")
    if len(pods) > 1 or identity.uuid in holders.shared:
        names = ", ".join(f"{pod.namespace}/{pod.name}" for pod in pods[:4])
        return Refusal(unsupported, Reason.SHARED_GPU, f"shared GPU (now held by {names}): one clock would slow all")
    return None


def _order_speaks_against(world: World, order: Order) -> Refusal | None:
    observing = GpuState.OBSERVING
    released = GpuState.RELEASED
    if world.stopping:
        return Refusal(released, Reason.AGENT_STOPPING, "the agent is stopping")
    if world.mode is not Mode.ENFORCE:
        return Refusal(
            observing, Reason.OBSERVE_MODE, "this agent runs in Observe mode: it measures and writes nothing"
        )
    if order.mode is not Mode.ENFORCE:
        return Refusal(observing, Reason.OBSERVE_MODE, "the policy's mode is Observe: it measures and writes nothing")
    if order.role is Role.PREFILL:
        return Refusal(released, Reason.PREFILL_POOL, "prefill is limited by compute: its clock is left alone")
    if order.role is not Role.DECODE:
        return Refusal(released, Reason.MIXED_POOL, "the pool also computes prompts: its clock is left alone")
    if world.stale:
        return Refusal(released, Reason.STALE_ORDERS, world.stale)
    if order.hold is not None:
        return Refusal(released, order.hold.reason, order.hold.message)
    if order.cap_mhz is None:
        return Refusal(released, Reason.NO_ORDER, "the order has no cap")
    return None


def _no_clock(identity: GpuIdentity, order: Order) -> Refusal:
    if not identity.supported_clocks_mhz:
        return Refusal(
            GpuState.UNSUPPORTED, Reason.CLOCKS_NOT_SUPPORTED, f"{identity.product} does not tell which clocks it takes"
        )
    return Refusal(
        GpuState.UNSUPPORTED,
        Reason.UNSUPPORTED_CLOCK,
        f"{order.cap_mhz} MHz is below {identity.supported_clocks_mhz[0]} MHz, the lowest clock of {identity.product}",
    )


def _process_speaks_against(world: World) -> Refusal | None:
    if not world.may_write:
        return Refusal(
            GpuState.OBSERVING,
            Reason.NO_PERMISSION,
            "the agent lacks the capability SYS_ADMIN, which the driver asks of those who change clocks",
        )
    if world.other_agent:
        return Refusal(GpuState.RELEASED, Reason.SECOND_AGENT, world.other_agent)
    if world.journal_problem:
        return Refusal(GpuState.RELEASED, Reason.JOURNAL_UNWRITABLE, world.journal_problem)
    return None


def _foreign_lock(gpu: GpuView) -> Refusal | None:
    if gpu.foreign_mhz is None:
        return None
    return Refusal(
        GpuState.CONFLICT,
        Reason.FOREIGN_LOCK,
        f"runs at {gpu.foreign_mhz} MHz under load although no limiter acts and Wattlock has not locked it: another "
        "program's lock seems to stand. Undo it with 'nvidia-smi -rgc' on the node (it is capped as soon as it runs "
        "faster), or write conflictPolicy: Coexist to replace it",
    )


def _control_epoch(world: World, order: Order) -> Refusal | None:
    if order.experiment is None:
        return None
    experiment = order.experiment.experiment()
    if arm_of(experiment, order.instance, epoch_at(experiment, world.unix_seconds)) is Arm.CAP:
        return None
    return Refusal(GpuState.RELEASED, Reason.CONTROL_EPOCH, "released for comparison in this epoch")


def _unknown_devices(world: World) -> dict[InstanceKey, Refusal]:
    if world.holders is None or world.orders is None:
        return {}
    return {
        key_of(order): Refusal(
            GpuState.RELEASED,
            Reason.UNKNOWN_DEVICE,
            f"pod {order.pod.namespace}/{order.pod.name} also holds {', '.join(devices[:4])[:200]}, "
            "which is no GPU that NVML shows here",
        )
        for order in world.orders.orders
        if (devices := world.holders.unknown.get(pod_of(order)))
    }


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
        and lock.cap_mhz == verdict.cap_mhz
        and lock.pod_uid == verdict.order.pod_uid
    )


def _decide(world: World, verdict: _Verdict, wait_until: Mapping[InstanceKey, float]) -> Decision:
    gpu = verdict.gpu
    uuid = gpu.identity.uuid
    refusal = verdict.refusal
    if refusal is not None:
        return _released(world, verdict, refusal)
    if verdict.order is None or verdict.cap_mhz is None:  # cannot be: no refusal means that both are there
        return Decision(uuid, GpuState.RELEASED, Reason.NO_ORDER, "no order")
    in_force = _in_force(verdict)
    wait_seconds = max((wait_until[key] for key in verdict.instances), default=0.0) - world.now_seconds
    lock = None if in_force or wait_seconds > 0 else Lock(gpu.identity.supported_clocks_mhz[0], verdict.cap_mhz)
    if gpu.contested:
        # One word and one sentence for as long as it lasts: it would change with every write of the other.
        state, reason, text = GpuState.CONFLICT, Reason.CONTESTED, gpu.contested
        return Decision(uuid, state, reason, text, lock, verdict.order, verdict.cap_mhz, in_force=in_force)
    text = f"at most {verdict.cap_mhz} MHz"
    if in_force:
        state = GpuState.LOCKED
        return Decision(uuid, state, Reason.LOCKED, text, None, verdict.order, verdict.cap_mhz, in_force=True)
    state = GpuState.RELEASED if gpu.lock is None else GpuState.LOCKED
    text = f"to be locked to {text}"
    if wait_seconds > 0:
        text += " in some seconds: writes are kept apart, and a low clock under load is watched before it is changed"
    return Decision(uuid, state, Reason.WAITING_TO_WRITE, text, lock, verdict.order, verdict.cap_mhz, settled=False)


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
    if not gpu.recorded or gpu.fault is not None:
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
    if world.pending and not world.stopping:
        return replace(left_over, message=f"lock of an earlier agent: {refusal.message}")
    if world.now_seconds < gpu.release_not_before_seconds:
        return replace(left_over, message=f"{refusal.message}; cannot be released: {gpu.release_problem}")
    return replace(left_over, action=Release())
