"""Builds the status of the node's NodeEnergy and decides when it is worth writing. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from wattlock_api.base import ObjectRef, decimal_string, timestamp
from wattlock_api.constants import GpuState, Mode, Reason
from wattlock_api.nodeenergy import AgentStatus, GpuStatus, InstanceStatus, NodeEnergyStatus, ProductClocks
from wattlock_api.policystatus import Limiters
from wattlock_api.schedule import Arm, arm_of, epoch_at, epoch_start_seconds

from wattlock_agent.agent import Outlook
from wattlock_agent.clocks import to_ranges
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.instance import InstanceTrack
from wattlock_agent.limiters import LIMITER_NAMES
from wattlock_agent.orders import InstanceKey, key_of
from wattlock_agent.track import GpuTrack
from wattlock_agent.world import Decision, Refusal

MEASUREMENT_SECONDS = 20.0
MIN_SECONDS = 2.0
#: A status that says nothing new is written so often all the same, as a sign of life.
HEARTBEAT_SECONDS = 60.0
#: So long after a control epoch its GPUs still count as in it while they are not locked again.
TURN_SECONDS = 10.0
MAX_GPUS = 32
MAX_INSTANCES = 256
_MAX_MESSAGE = 1000


def build_status(
    outlook: Outlook,
    tracks: Mapping[str, GpuTrack],
    instances: Mapping[InstanceKey, InstanceTrack],
    version: str,
    pod_name: str,
    stopping: bool,
    parted: Sequence[InstanceStatus] = (),
) -> NodeEnergyStatus:
    """Return the status as it is now. ``parted``: instances without orders whose last joules are to be told."""
    gpus = [
        _gpu(outlook, identity.uuid, tracks.get(identity.uuid), instances) for identity in outlook.scan.gpus[:MAX_GPUS]
    ]
    return NodeEnergyStatus(
        observed_generation=outlook.settled_generation,
        reported_at=timestamp(outlook.clock.unix_seconds),
        phase="Stopping" if stopping else "Running",
        agent=_agent(outlook, version, pod_name),
        gpus=gpus,
        instances=[*_instances(outlook, instances), *parted][:MAX_INSTANCES],
        capped=f"{sum(gpu.reason in (Reason.LOCKED, Reason.CONTROL_EPOCH, Reason.IDLE) for gpu in gpus)}/{len(gpus)}",
        locked=sum(gpu.state is GpuState.LOCKED for gpu in gpus),
    )


def _agent(outlook: Outlook, version: str, pod_name: str) -> AgentStatus:
    scan = outlook.scan
    reason, message = _agent_problem(outlook)
    return AgentStatus(
        version=version,
        pod=pod_name,
        driver_version=scan.driver.driver_version if scan.driver else "",
        can_write=scan.may_write and outlook.world.mode is Mode.ENFORCE,
        reason=reason,
        message=message[:_MAX_MESSAGE],
        products=[
            ProductClocks(product=product, ranges=to_ranges(next(group).supported_clocks_mhz))
            for product, group in groupby(sorted(scan.gpus, key=lambda gpu: gpu.product), lambda gpu: gpu.product)
        ][:8],
    )


def _agent_problem(outlook: Outlook) -> tuple[str, str]:
    """Return why the agent cannot work as asked, the gravest cause first."""
    world = outlook.world
    if world.other_agent:
        return Reason.SECOND_AGENT, world.other_agent
    if outlook.scan.driver is None:
        problem = outlook.scan.problem
        missing = problem is None or problem.fault is GpuFault.NO_DRIVER
        return (Reason.NVML_NOT_FOUND if missing else Reason.NVML_ERROR), str(problem or "the driver is not open yet")
    if world.stale:
        return Reason.STALE_ORDERS, world.stale
    if world.holders is None:
        return Reason.KUBELET_UNREACHABLE, world.holders_problem
    if world.mode is Mode.ENFORCE and not world.may_write:
        return Reason.NO_PERMISSION, "the agent lacks the capability SYS_ADMIN: it measures and locks nothing"
    if world.journal_problem:
        return Reason.JOURNAL_UNWRITABLE, world.journal_problem
    if world.journal_damage:
        return Reason.JOURNAL_DAMAGED, world.journal_damage
    if world.orders is not None and world.orders.unreadable:
        return Reason.NO_ORDER, "orders that cannot be read: " + "; ".join(world.orders.unreadable)
    return "", ""


def _turning(decision: Decision, unix_seconds: float) -> bool:
    """Return whether the GPU is about to be locked again because its control epoch has just ended."""
    order = decision.order
    if decision.reason is not Reason.WAITING_TO_WRITE or order is None or order.experiment is None:
        return False
    schedule = order.experiment.experiment()
    epoch = epoch_at(schedule, unix_seconds)
    just_began = unix_seconds - epoch_start_seconds(schedule, epoch) < TURN_SECONDS
    return just_began and arm_of(schedule, order.instance, epoch - 1) is Arm.CONTROL


def _waking(decision: Decision, instances: Mapping[InstanceKey, InstanceTrack], now_seconds: float) -> bool:
    """Return whether the GPU is about to get the pool's clock back because its instance has just stopped to be idle."""
    instance = instances.get(key_of(decision.order)) if decision.order is not None else None
    waits = decision.reason is Reason.WAITING_TO_WRITE
    return waits and instance is not None and instance.idle.recovers(now_seconds)


def _gpu(
    outlook: Outlook, uuid: str, track: GpuTrack | None, instances: Mapping[InstanceKey, InstanceTrack]
) -> GpuStatus:
    identity = next(gpu for gpu in outlook.scan.gpus if gpu.uuid == uuid)
    decision = outlook.decisions.get(uuid) or Decision(uuid, GpuState.RELEASED, Reason.NO_ORDER, "")
    if _turning(decision, outlook.clock.unix_seconds):
        # Part of every turn between the arms and no news: conditions would change with each epoch.
        text = f"was released for comparison, {decision.message}"
        decision = replace(decision, reason=Reason.CONTROL_EPOCH, message=text)
    elif _waking(decision, instances, outlook.clock.now_seconds):
        # The same: requests come and go all day.
        decision = replace(decision, reason=Reason.IDLE, message=f"was idle until a moment ago, {decision.message}")
    order = decision.order
    status = GpuStatus(
        uuid=uuid,
        index=identity.index,
        product=identity.product,
        state=decision.state,
        reason=decision.reason,
        message=decision.message[:_MAX_MESSAGE],
        holder=ObjectRef(**order.pod.model_dump()) if order else None,
        policy_uid=order.policy.uid if order else None,
        pool=order.pool if order else None,
        instance=order.instance if order else None,
        requested_mhz=decision.requested_mhz,
    )
    if track is None or track.last is None or uuid not in outlook.scan.readings:
        return status
    watts, peak, limit_mw = track.watts(), track.peak_watts(), track.last.power_limit_mw
    limiters = {
        f"{name}_seconds": decimal_string(track.limiter_seconds[name], 3)
        for name in LIMITER_NAMES
        if getattr(track.last.limiters, name) is not None or track.limiter_seconds[name] > 0
    }
    capped, measured = decision.requested_mhz is not None, track.meter.measured
    return status.model_copy(
        update={
            "observed_mhz": track.observed_mhz if capped else track.released_mhz,
            "power_watts": round(watts) if watts is not None else None,
            "peak_watts": round(peak) if peak is not None else None,
            "power_limit_watts": round(limit_mw / 1000) if limit_mw is not None else None,
            "energy_joules": decimal_string(track.meter.joules, 1) if measured else None,
            "energy_reason": "" if measured else Reason.NO_ENERGY_COUNTER,
            "energy_gaps": track.meter.gaps,
            "busy_seconds": decimal_string(track.busy_seconds, 1),
            "recent_busy_seconds": decimal_string(track.recent_cap.busy_seconds, 1),
            "recent_power_cap_seconds": decimal_string(track.recent_cap.capped_seconds, 3)
            if track.last.limiters.power_cap is not None
            else None,
            "clamped": track.clamped and capped,
            "clamp_seconds": decimal_string(track.clamp_seconds, 1),
            "limiters": Limiters.model_validate(limiters),
        }
    )


def _instances(outlook: Outlook, instances: Mapping[InstanceKey, InstanceTrack]) -> list[InstanceStatus]:
    without_gpu: dict[InstanceKey, Refusal] = {}
    if outlook.world.orders is not None:
        for order in outlook.world.orders.orders:
            refusal = outlook.pods_without_gpu.get(order.pod_uid)
            if refusal is not None:
                without_gpu.setdefault(key_of(order), refusal)
    return [track.status(outlook.clock.now_seconds, without_gpu.get(key)) for key, track in sorted(instances.items())]


@dataclass(frozen=True)
class Reported:
    """What was last handed over for writing. Times are monotonic seconds."""

    at_seconds: float = float("-inf")
    status: NodeEnergyStatus | None = None


def is_due(reported: Reported, status: NodeEnergyStatus, now_seconds: float, jitter: float) -> bool:
    """Return whether ``status`` is to be written now.

    At once (at most every 2 s) when a state changed; measurements every 20 s, spread by ``jitter`` in [-1, 1] so that
    agents do not report in step; one that says nothing new as a sign of life only.
    """
    age_seconds = now_seconds - reported.at_seconds
    if age_seconds < MIN_SECONDS:
        return False
    if reported.status is None:
        return True
    if standing(status) != standing(reported.status):
        return True
    if age_seconds < MEASUREMENT_SECONDS * (1 + 0.1 * jitter):
        return False
    same = status.model_copy(update={"reported_at": None}) == reported.status.model_copy(update={"reported_at": None})
    return not same or age_seconds >= HEARTBEAT_SECONDS


def standing(status: NodeEnergyStatus) -> tuple[object, ...]:
    """Return what people and the operator wait for: everything but the measurements."""
    return (
        status.observed_generation,
        status.phase,
        status.locked,
        (status.agent.can_write, status.agent.driver_version, status.agent.reason),
        tuple((gpu.uuid, gpu.state, gpu.reason, gpu.holder, gpu.requested_mhz) for gpu in status.gpus),
        tuple(
            (each.key, each.reason, each.computes_prompts, each.guardrail_tripped, each.guardrail_trips)
            for each in status.instances
        ),
    )
