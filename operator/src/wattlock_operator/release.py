"""Whether a policy that is being deleted may go: only when no GPU is under a lock of it."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from wattlock_api.base import parse_timestamp
from wattlock_api.constants import FORCE_RELEASE_ANNOTATION, STUCK_RELEASE_SECONDS, GpuState, Reason
from wattlock_api.nodeenergy import NodeEnergyStatus

from wattlock_operator.world import NodeEnergyView, PodView, PolicyView, World

#: An agent that has not reported for so long is taken for unreachable. Agents report at least every minute.
SILENT_SECONDS = 180.0
#: Of a condition's message in the contract. Names can be long; the way out must be said all the same.
MAX_SENTENCE = 1024


@dataclass(frozen=True)
class Waiting:
    """A node that a policy's deletion waits for."""

    node: str
    why: str
    reachable: bool
    stuck: bool = False
    """Its agent answers and has not let go for far longer than an agent needs: it cannot, or it is none of ours."""

    @property
    def hopeless(self) -> bool:
        """Whether waiting alone may never end it, so that a person may give it up."""
        return self.stuck or not self.reachable


@dataclass(frozen=True)
class Release:
    """How far the release of a policy's GPUs is."""

    waiting: tuple[Waiting, ...] = ()
    abandoned: tuple[Waiting, ...] = ()
    """Nodes that the policy's annotation gives up on: hopeless ones alone."""

    @property
    def complete(self) -> bool:
        """Whether the policy may go."""
        return not self.waiting

    @property
    def stuck(self) -> bool:
        """Whether a node that answers holds it up."""
        return any(entry.stuck for entry in self.waiting)


def report_age_seconds(report: NodeEnergyStatus, now_seconds: float) -> float | None:
    """Return the age of an agent's report, or None when it carries no readable time."""
    if report.reported_at is None:
        return None
    try:
        return now_seconds - parse_timestamp(report.reported_at)
    except ValueError:
        return None


def is_silent(report: NodeEnergyStatus | None, now_seconds: float) -> bool:
    """Return whether the agent has stopped reporting (or never began)."""
    if report is None:
        return True
    age = report_age_seconds(report, now_seconds)
    return age is None or age > SILENT_SECONDS


def locked_uuids(report: NodeEnergyStatus | None, policy_uid: str | None = None) -> tuple[str, ...]:
    """Return the GPUs that are or may be under a lock, of one policy or of any.

    A contested one is locked and unlocked by turns, under one and the same word.
    """
    gpus = report.gpus if report else []
    return tuple(
        gpu.uuid
        for gpu in gpus
        if (gpu.state is GpuState.LOCKED or gpu.reason == Reason.CONTESTED)
        and (policy_uid is None or gpu.policy_uid == policy_uid)
    )


def _are_last_words(report: NodeEnergyStatus | None, agents: Sequence[PodView]) -> bool:
    """Return whether the report is the last one of an agent that has released all, and no other is at work there.

    Of a new agent on the node the words of an earlier one say nothing: it may have locked GPUs since.
    """
    return report is not None and report.phase == "Stopping" and all(agent.name == report.agent.pod for agent in agents)


def _obstacle(node: NodeEnergyView, uid: str, agents: Sequence[PodView], was_ordered: bool) -> str | None:
    report = node.status
    if any(order.policy.uid == uid for order in node.orders):
        return "its orders are being withdrawn"
    locked = locked_uuids(report, uid)
    if locked:
        return f"its agent reports {len(locked)} GPU(s) still locked"
    known = report is not None and any(gpu.policy_uid == uid for gpu in report.gpus)
    if not (was_ordered or known) or _are_last_words(report, agents):
        return None
    if report is None:
        return "its agent has not reported yet" if agents else None
    if report.observed_generation < node.generation:
        return "its agent has not confirmed that the orders are gone"
    return None


def _is_overdue(policy: PolicyView, now_seconds: float) -> bool:
    """Return whether the deletion was asked for so long ago that every agent at work has let go."""
    try:
        return now_seconds - parse_timestamp(policy.deleted_at) > STUCK_RELEASE_SECONDS
    except ValueError:
        return False


def release_of(policy: PolicyView, world: World, ordered_nodes: Mapping[str, Set[str]], now_seconds: float) -> Release:
    """Return what the deletion of a policy still waits for.

    ``ordered_nodes`` are the nodes that had orders of a policy, by its UID. A policy that is missing there was
    deleted before this operator started: any node whose agent lags behind may then still hold a lock of it.
    Nodes that no longer exist do not count: their GPUs are gone with them.
    """
    agents: dict[str, list[PodView]] = {}
    for pod in world.agent_pods():
        agents.setdefault(pod.node, []).append(pod)
    overdue = _is_overdue(policy, now_seconds)
    ordered = ordered_nodes.get(policy.uid)
    waiting: list[Waiting] = []
    abandoned: list[Waiting] = []
    for name, node_energy in sorted(world.node_energies.items()):
        node = world.nodes.get(name)
        if node is None:
            continue
        there = agents.get(name, [])
        agent = there[-1] if there else None
        was_ordered = ordered is None or name in ordered
        why = _obstacle(node_energy, policy.uid, there, was_ordered)
        if why is None:
            continue
        silent = is_silent(node_energy.status, now_seconds)
        reachable = node.ready and agent is not None and not silent
        if not node.ready:
            why += "; the node is not ready"
        elif agent is None:
            why += "; no agent runs there"
        elif silent:
            why += f"; its agent {agent.name} has not reported for {SILENT_SECONDS / 60:.0f} minutes"
        # Its orders are ours to withdraw: an agent that still has one does what it was told.
        stuck = reachable and overdue and not any(order.policy.uid == policy.uid for order in node_energy.orders)
        entry = Waiting(name, why, reachable, stuck)
        (abandoned if policy.force_release and entry.hopeless else waiting).append(entry)
    return Release(tuple(waiting), tuple(abandoned))


def release_sentence(policy: PolicyView, release: Release) -> str:
    """Return what a deletion waits for and what to do about it, within the length of a condition's message."""
    if release.complete:
        return "every GPU of the policy is released"
    # Those first about which a person has to do something.
    ordered = sorted(release.waiting, key=lambda entry: not entry.hopeless)
    shown = "; ".join(f"{entry.node} ({entry.why})" for entry in ordered[:4])
    more = f" and {len(release.waiting) - 4} more" if len(release.waiting) > 4 else ""
    sentence = f"waiting for {len(release.waiting)} node(s) to release GPUs: {shown}{more}."
    advice = ""
    if release.stuck:
        advice += (
            f" An agent that answers should have let go within seconds, {STUCK_RELEASE_SECONDS // 60} minutes ago: "
            "read its log, and ask the driver on the node (nvidia-smi -q -d CLOCK)."
        )
    if any(not entry.reachable for entry in release.waiting):
        advice += (
            " Bring the unreachable nodes or their agents back, or delete their Node objects if they are gone for good."
        )
    if any(entry.hopeless for entry in release.waiting):
        advice += (
            f" To wait no longer: kubectl annotate energypolicy {policy.name} -n {policy.namespace} "
            f"{FORCE_RELEASE_ANNOTATION}=true. Their GPUs may then stay capped until an agent starts there again "
            "or the node reboots."
        )
    return sentence[: MAX_SENTENCE - len(advice)] + advice
