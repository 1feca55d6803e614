"""What speaks against a lock: each rule with the words for it, and what to do about it. Pure."""

from wattlock_api.constants import GpuState, Mode, Reason, Role
from wattlock_api.nodeenergy import Order, OrderIdle
from wattlock_api.schedule import Arm, arm_of, epoch_at

from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.orders import InstanceKey, key_of, pod_of
from wattlock_agent.world import GpuView, Refusal, World


def no_basis(world: World) -> Refusal:
    """Return why nothing can be decided: no orders, or nobody knows who holds the GPUs."""
    if world.orders is None:
        return Refusal(GpuState.RELEASED, Reason.NO_ORDER, "no orders have come from the API server yet")
    return Refusal(
        GpuState.RELEASED,
        Reason.KUBELET_UNREACHABLE,
        world.holders_problem or "the kubelet has not told yet which pod holds which GPU",
    )


def unsuitable(identity: GpuIdentity, holders: Holders, pods: tuple[PodName, ...]) -> Refusal | None:
    """Return why the GPU's clock would change for others too."""
    unsupported = GpuState.UNSUPPORTED
    if identity.mig_enabled:
        return Refusal(unsupported, Reason.MIG_ENABLED, "MIG is on: a clock belongs to the whole GPU, not to a slice")
    if identity.virtual:
        return Refusal(unsupported, Reason.VIRTUAL_GPU, "a virtual GPU's clock belongs to its host")
    if len(pods) > 1 or identity.uuid in holders.shared:
        names = ", ".join(f"{pod.namespace}/{pod.name}" for pod in pods[:4])
        return Refusal(unsupported, Reason.SHARED_GPU, f"shared GPU (now held by {names}): one clock would slow all")
    return None


def order_speaks_against(world: World, order: Order) -> Refusal | None:
    """Return why the order asks for no lock now, or may not be followed."""
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
    if not order.may_be_capped:
        return Refusal(released, Reason.MIXED_POOL, "the pool also computes prompts and has no clock: it is left alone")
    if world.stale:
        return Refusal(released, Reason.STALE_ORDERS, world.stale)
    if order.hold is not None:
        return Refusal(released, order.hold.reason, order.hold.message)
    if order.cap_mhz is None:
        return Refusal(released, Reason.NO_ORDER, "the order has no cap")
    return None


def no_clock(identity: GpuIdentity, order: Order) -> Refusal:
    """Return why the GPU has no clock at or below the cap of the order."""
    if not identity.supported_clocks_mhz:
        return Refusal(
            GpuState.UNSUPPORTED, Reason.CLOCKS_NOT_SUPPORTED, f"{identity.product} does not tell which clocks it takes"
        )
    return Refusal(
        GpuState.UNSUPPORTED,
        Reason.UNSUPPORTED_CLOCK,
        f"{order.cap_mhz} MHz is below {identity.supported_clocks_mhz[0]} MHz, the lowest clock of {identity.product}",
    )


def no_idle_clock(identity: GpuIdentity, idle: OrderIdle) -> Refusal:
    """Return why the GPU has no clock at or below the cap for idle instances."""
    return Refusal(
        GpuState.UNSUPPORTED,
        Reason.UNSUPPORTED_CLOCK,
        f"idle.maxSMClockMHz: {idle.cap_mhz} MHz is below {identity.supported_clocks_mhz[0]} MHz, the lowest clock of "
        f"{identity.product}: write a higher one, or leave it out to get the lowest",
    )


def process_speaks_against(world: World) -> Refusal | None:
    """Return why this process may lock nothing."""
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


def foreign_lock(gpu: GpuView) -> Refusal | None:
    """Return why a GPU that somebody else seems to have locked is left alone."""
    if gpu.foreign_mhz is None:
        return None
    return Refusal(
        GpuState.CONFLICT,
        Reason.FOREIGN_LOCK,
        f"runs at {gpu.foreign_mhz} MHz under load although no limiter acts and Wattlock has not locked it: another "
        "program's lock seems to stand. Undo it with 'nvidia-smi -rgc' on the node (it is capped as soon as it runs "
        "faster), or write conflictPolicy: Coexist to replace it",
    )


def control_epoch(world: World, order: Order) -> Refusal | None:
    """Return that the epoch is one of comparison, if it is."""
    if order.experiment is None:
        return None
    experiment = order.experiment.experiment()
    if arm_of(experiment, order.instance, epoch_at(experiment, world.unix_seconds)) is Arm.CAP:
        return None
    return Refusal(GpuState.RELEASED, Reason.CONTROL_EPOCH, "released for comparison in this epoch")


def unknown_devices(world: World) -> dict[InstanceKey, Refusal]:
    """Return the instances one of whose pods holds a device that is no GPU of the node."""
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
