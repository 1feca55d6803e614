"""The status of one pool: sums and worst cases over its GPUs and instances, and why they are as they are."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import DecimalString, decimal_string
from wattlock_api.constants import GpuState, PowerCapVerdict, Reason, Role
from wattlock_api.energypolicy import Pool
from wattlock_api.nodeenergy import InstanceStatus, Order
from wattlock_api.policystatus import (
    CountedEnergy,
    Limiters,
    PoolReason,
    PoolStatus,
    PowerCap,
    ProfileStatus,
    RolloutStatus,
    Savings,
)
from wattlock_api.tuningstatus import TuningStatus

from wattlock_operator.accounting import JOULES_PER_KWH, Account, counted_capped_joules, counted_joules
from wattlock_operator.orders import Orders, hides_behind_its_node
from wattlock_operator.release import is_silent
from wattlock_operator.reports import NodeGpu, NodeInstance, PoolReport, number
from wattlock_operator.roofline import find_roofline
from wattlock_operator.selection import Member, selector_text, serves_metrics
from wattlock_operator.tokenenergy import idle_message, joules_per_token
from wattlock_operator.world import World

MAX_REASONS = 12
#: A control epoch is part of the cap's experiment: its GPUs count as capped, or the number would never stand still. So
#: do those of idle instances, whose order is in force with a lower cap.
CAPPED = (Reason.LOCKED.value, Reason.CONTROL_EPOCH.value, Reason.IDLE.value)
#: Share of the busy time at the power cap above which it counts as binding, in percent. The driver's counter trails
#: the load: on an H100 and an H200 it went on for up to 0.4 s after a load at the cap had ended, which is 0.7 % of the
#: shortest busy time that is judged.
BINDING_PERCENT = 1.0
#: A GPU that was busy for less says nothing yet.
MIN_BUSY_SECONDS = 60.0


@dataclass(frozen=True)
class PodProblem:
    """Why a pod's GPUs (if it has any) are not under an agent's control."""

    pod: str
    node: str
    reason: Reason
    message: str


def pod_problems(
    members: Sequence[Member], orders: Orders, uid: str, world: World, now_seconds: float
) -> dict[str, list[PodProblem]]:
    """Return the problems of a policy's pods, by pool: refused, no agent, a silent one, no GPU, no address ..."""
    agents = {pod.node for pod in world.agent_pods()}
    without_gpu = {member.pod.uid for member in orders.without_gpu.get(uid, ())}
    surplus = {member.pod.uid for member in orders.surplus.get(uid, ())}
    found: dict[str, list[PodProblem]] = {}
    for member in members:
        pod, problem = member.pod, None
        refused = orders.refused.get(uid)
        report = node.status if (node := world.node_energies.get(pod.node)) else None
        if refused is not None:
            problem = (refused.reason, refused.message)
        elif pod.uid in without_gpu:
            problem = (
                Reason.NO_GPUS,
                (
                    f"pod {pod.name} asks for no GPU (no nvidia.com/ resource and no resource claim): narrow the "
                    "selector of the pool, or add the GPU to the pod"
                ),
            )
        elif pod.uid in surplus:
            problem = (
                Reason.NO_AGENT,
                f"node {pod.node} has more selected pods than one agent serves: narrow the selectors",
            )
        elif pod.node not in agents and is_silent(report, now_seconds):
            problem = (
                Reason.NO_AGENT,
                (
                    f"no Wattlock agent runs on node {pod.node}, where pod {pod.name} is: check placement.nodeSelector "
                    f"and placement.tolerations, and the events of the wattlock-agent DaemonSets in namespace "
                    f"{world.agent_namespace}"
                ),
            )
        elif is_silent(report, now_seconds):
            problem = (
                Reason.AGENT_SILENT,
                (
                    f"the agent on node {pod.node} has not reported lately: see the logs of its pod in namespace "
                    f"{world.agent_namespace}"
                ),
            )
        elif hides_behind_its_node(pod, world) and serves_metrics(pod):
            problem = (
                Reason.HOST_NETWORK_METRICS,
                (
                    f"pod {pod.name} uses its node's network, where a port may be anybody's, so its serving metrics "
                    "are not read: power is measured, but no energy for each token, and neither guardrail nor "
                    "ComputesPrompts watches over it. Run it in a network of its own, or have the chart's value "
                    f"metrics.hostNetworkNamespaces name {pod.namespace}"
                ),
            )
        elif report is not None and report.agent.reason == Reason.JOURNAL_DAMAGED:
            problem = (
                Reason.JOURNAL_DAMAGED,
                f"node {pod.node}: {report.agent.message[:600]}. What this means and what to do: JournalDamaged in "
                "docs/runbooks/ready.md",
            )
        if problem is not None:
            found.setdefault(member.pool.name, []).append(PodProblem(pod.name, pod.node, *problem))
    return found


def _reasons(
    fresh: Iterable[NodeGpu],
    instances: Sequence[NodeInstance],
    problems: Sequence[PodProblem],
    held: Sequence[Order],
    has_pods: bool,
    pool: Pool,
) -> list[PoolReason]:
    counts: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for entry in fresh:
        counts[entry.gpu.reason] += 1
        messages.setdefault(entry.gpu.reason, entry.gpu.message)
    for entry in fresh:
        if entry.gpu.energy_reason:
            counts[entry.gpu.energy_reason] += 1
            messages.setdefault(
                entry.gpu.energy_reason,
                f"GPU {entry.gpu.uuid} ({entry.gpu.product}) on node {entry.node} does not count its energy: energy, "
                "power and savings of the pool stay unknown",
            )
    # What the operator decided is told at once, whether or not an agent has reported it back.
    for order in held:
        if order.hold is not None:
            counts[order.hold.reason] += 0
            messages[order.hold.reason] = order.hold.message
    # About metrics, so beside the state of the GPUs: the count stays theirs.
    for item in instances:
        if item.instance.reason:
            counts[item.instance.reason] += 0
            messages.setdefault(item.instance.reason, f"instance {item.instance.instance}: {item.instance.message}")
    if idle := idle_message(pool.role, instances):
        counts[Reason.NO_TOKENS.value] += 0
        messages[Reason.NO_TOKENS.value] = idle
    for problem in problems:
        counts[problem.reason.value] += 0
        messages.setdefault(problem.reason.value, problem.message)
    if not has_pods:
        counts[Reason.NO_MATCHING_PODS.value] += 0
        messages[Reason.NO_MATCHING_PODS.value] = (
            f"no running pod of the policy's namespace has {selector_text(pool.selector)}: compare with "
            "kubectl get pods --show-labels"
        )
    return [
        PoolReason(reason=reason, gpus=gpus, message=messages[reason][:1024])
        for reason, gpus in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        if reason
    ][:MAX_REASONS]


def _limiters(gpus: Iterable[NodeGpu]) -> Limiters | None:
    """Return the sums over the GPUs that have the counter; one that none of them has is absent, not zero."""
    sums: dict[str, float] = {}
    for entry in gpus:
        for name in Limiters.model_fields:
            if (seconds := getattr(entry.gpu.limiters, name)) is not None:
                sums[name] = sums.get(name, 0.0) + number(seconds)
    return Limiters(**{name: decimal_string(seconds, 1) for name, seconds in sums.items()}) if sums else None


def power_cap(gpus: Sequence[NodeGpu]) -> PowerCap:
    """Return whether the power limit acted on the GPUs: their time at the cap as a share of their busy time.

    Both are sums over the last 15 minutes of busy time of each GPU that was busy for a minute.
    """
    limits = [entry.gpu.power_limit_watts for entry in gpus if entry.gpu.power_limit_watts is not None]
    peaks = [entry.gpu.peak_watts for entry in gpus if entry.gpu.peak_watts is not None and not entry.silent]
    judged = [
        (busy, number(entry.gpu.recent_power_cap_seconds))
        for entry in gpus
        if entry.gpu.recent_power_cap_seconds is not None
        and (busy := number(entry.gpu.recent_busy_seconds)) >= MIN_BUSY_SECONDS
    ]
    verdict, percent = PowerCapVerdict.UNKNOWN, None
    if judged:
        share = min(100.0, 100 * sum(capped for _, capped in judged) / sum(busy for busy, _ in judged))
        percent = decimal_string(share, 1)
        verdict = PowerCapVerdict.BINDING if share > BINDING_PERCENT else PowerCapVerdict.INERT
    return PowerCap(
        limit_watts=min(limits, default=None),
        peak_watts=max(peaks, default=None),
        time_at_cap_percent=percent,
        verdict=verdict,
    )


def _sum_of_all(items: Sequence[NodeInstance], rate: Callable[[InstanceStatus], DecimalString | None]) -> float | None:
    """Return the sum over a pool's instances, None unless all are known: a part would look like a loss of tokens.

    An instance on several nodes is known where one of them tells.
    """
    known = {item.instance.instance for item in items if not item.silent and rate(item.instance) is not None}
    if not known or known != {item.instance.instance for item in items}:
        return None
    return sum(number(rate(item.instance)) for item in items if not item.silent)


def _latency_ms(instances: Sequence[NodeInstance]) -> float | None:
    """Return the mean inter-token latency, each instance weighed by its tokens."""
    known = [
        (number(item.instance.inter_token_latency_ms), number(item.instance.tokens_per_second))
        for item in instances
        if item.instance.inter_token_latency_ms is not None
    ]
    weight = sum(tokens for _, tokens in known)
    if weight > 0:
        return sum(latency * tokens for latency, tokens in known) / weight
    return None


def pool_status(
    pool: Pool,
    members: Sequence[Member],
    report: PoolReport,
    account: Account,
    savings: Savings | None,
    tuning: TuningStatus | None,
    held: Sequence[Order],
    problems: Sequence[PodProblem],
    rollout: RolloutStatus | None = None,
    profile: ProfileStatus | None = None,
) -> PoolStatus:
    """Return what is to be said about a pool. A number that was not measured is absent."""
    fresh = [entry for entry in report.gpus if not entry.silent]
    instances = [item for item in report.instances if not item.silent]
    locked = [entry for entry in fresh if entry.gpu.state is GpuState.LOCKED]
    capped = [entry for entry in fresh if entry.gpu.reason in CAPPED]
    requested = [entry.gpu.requested_mhz for entry in fresh if entry.gpu.requested_mhz is not None]
    observed = [
        entry.gpu.observed_mhz
        for entry in fresh
        if entry.gpu.observed_mhz is not None and entry.gpu.requested_mhz is not None
    ]
    powers = [entry.gpu.power_watts for entry in fresh if entry.gpu.power_watts is not None]
    tokens = _sum_of_all(report.instances, lambda instance: instance.tokens_per_second)
    prompt_tokens = _sum_of_all(report.instances, lambda instance: instance.prompt_tokens_per_second)
    joules = joules_per_token(pool.role, members, fresh, instances)
    # A prompt token costs about a hundredth of a generated one: as many digits that say something.
    joules_text = None if joules is None else decimal_string(joules, 6 if pool.role is Role.PREFILL else 4)
    latency = _latency_ms(instances)
    clamped = sum(entry.gpu.clamped for entry in fresh)
    clamps = [number(entry.gpu.clamp_seconds) for entry in report.gpus if entry.gpu.clamp_seconds is not None]
    uncounted = any(entry.gpu.energy_reason for entry in report.gpus)
    # That of some GPUs would look like that of all. And a board that was measured has used some: none is not known yet.
    energy = None if uncounted else account.energy_joules or None
    return PoolStatus(
        name=pool.name,
        role=pool.role,
        instances=len({member.instance for member in members}),
        pods=len(members),
        gpus=len(report.gpus),
        capped=len(capped),
        locked=len(locked),
        requested_mhz=min(requested, default=None),
        observed_mhz=min(observed, default=None),
        # Half of a pool's power would look like a saving: all of its GPUs have to be known.
        power_watts=sum(powers) if powers and len(powers) == len(report.gpus) else None,
        energy_kwh=None if energy is None else decimal_string(energy / JOULES_PER_KWH, 6),
        counted_joules=None if energy is None else decimal_string(counted_joules(report), 1),
        counted_capped_joules=[
            CountedEnergy(cap_mhz=cap, joules=decimal_string(joules, 1))
            for cap, joules in counted_capped_joules(report).items()
        ],
        tokens_per_second=None if tokens is None else decimal_string(tokens, 1),
        prompt_tokens_per_second=None if prompt_tokens is None else decimal_string(prompt_tokens, 1),
        joules_per_generated_token=None if pool.role is Role.PREFILL else joules_text,
        joules_per_prompt_token=joules_text if pool.role is Role.PREFILL else None,
        inter_token_latency_ms=None if latency is None else decimal_string(latency, 2),
        limiters=_limiters(report.gpus),
        clamped_gpus=clamped if clamps or clamped else None,
        clamp_seconds=decimal_string(sum(clamps), 1) if clamps else None,
        power_cap=power_cap(report.gpus),
        roofline=find_roofline(fresh, instances),
        savings=savings,
        rollout=rollout,
        tuning=tuning,
        profile=profile,
        reasons=_reasons(fresh, instances, problems, held, bool(members), pool),
    )


def held_orders(orders: Orders, uid: str) -> Mapping[str, list[Order]]:
    """Return the orders of a policy that hold a cap back, by pool."""
    found: dict[str, list[Order]] = {}
    for node_orders in orders.by_node.values():
        for order in node_orders:
            if order.policy.uid == uid and order.hold is not None:
                found.setdefault(order.pool, []).append(order)
    return found
