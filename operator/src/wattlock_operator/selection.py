"""Which pods belong to which pool of which policy, and what serving instance they are part of."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import LabelSelector, LabelSelectorRequirement
from wattlock_api.constants import Role
from wattlock_api.energypolicy import EnergyPolicySpec, Pool

from wattlock_operator.world import PodView, PolicyView

#: Claims on one pod that are told.
MAX_RIVALS_SHOWN = 8

_LWS_NAME = "leaderworkerset.sigs.k8s.io/name"
_LWS_GROUP = "leaderworkerset.sigs.k8s.io/group-index"
_LWS_WORKER = "leaderworkerset.sigs.k8s.io/worker-index"


@dataclass(frozen=True)
class Member:
    """A pod in a pool. A pod that several pools claim is a member of the oldest policy's first one."""

    policy: PolicyView
    spec: EnergyPolicySpec
    pool: Pool
    pod: PodView
    instance: str
    rivals: tuple[str, ...] = ()
    """The first claims on the pod, as "namespace/policy pool NAME", when there is more than one."""


@dataclass(frozen=True)
class Selection:
    """Members by policy UID, and the pods that more than one pool claims."""

    members: Mapping[str, tuple[Member, ...]]
    disputes: Mapping[str, tuple[Member, ...]]
    """By policy UID, for every policy that takes part in the dispute: also the ones that lost the pod."""


def selector_text(selector: LabelSelector) -> str:
    """Return a selector as kubectl writes it, e.g. ``app=vllm,tier in (gpu)``."""
    terms = [f"{key}={value}" for key, value in selector.match_labels.items()]
    for term in selector.match_expressions:
        values = f"({', '.join(term.values)})"
        match term.operator:
            case "In":
                terms.append(f"{term.key} in {values}")
            case "NotIn":
                terms.append(f"{term.key} notin {values}")
            case "Exists":
                terms.append(term.key)
            case "DoesNotExist":
                terms.append(f"!{term.key}")
    return ",".join(terms)


def requirement_holds(requirement: LabelSelectorRequirement, labels: Mapping[str, str]) -> bool:
    """Return whether the labels meet one expression, by Kubernetes' rules.

    NotIn and DoesNotExist hold for a label that is absent.
    """
    match requirement.operator:
        case "In":
            return labels.get(requirement.key) in requirement.values
        case "NotIn":
            return labels.get(requirement.key) not in requirement.values
        case "Exists":
            return requirement.key in labels
        case "DoesNotExist":
            return requirement.key not in labels


def matches(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Return whether the labels meet the selector. An empty selector matches nothing."""
    if not selector.match_labels and not selector.match_expressions:
        return False
    return all(labels.get(key) == value for key, value in selector.match_labels.items()) and all(
        requirement_holds(requirement, labels) for requirement in selector.match_expressions
    )


def instance_of(pod: PodView) -> str:
    """Return the serving instance: the group of a LeaderWorkerSet (``name/index``), else the pod itself.

    A pod's name has no slash, so the two never meet.
    """
    name, group = pod.labels.get(_LWS_NAME), pod.labels.get(_LWS_GROUP)
    return f"{name}/{group}" if name and group else pod.name


def missing_pods(members: Iterable[Member]) -> dict[str, int]:
    """Return for each instance how many of its pods are not among the members, where its pods tell their number."""
    present: dict[str, set[str]] = defaultdict(set)
    wanted: dict[str, int] = {}
    for member in members:
        present[member.instance].add(member.pod.uid)
        wanted[member.instance] = max(wanted.get(member.instance, 0), member.pod.group_size or 0)
    return {name: max(0, wanted[name] - len(pods)) for name, pods in present.items()}


def serves_metrics(pod: PodView) -> bool:
    """Return whether the pod may serve metrics: of a LeaderWorkerSet's group only the leader does."""
    return pod.labels.get(_LWS_WORKER, "0") == "0"


def selectable(pod: PodView) -> bool:
    """Return whether a pod can hold a GPU now: on a node and not finished. Terminating pods still do."""
    return bool(pod.node) and not pod.finished


def _rivals(claims: Sequence[tuple[PolicyView, EnergyPolicySpec, Pool]]) -> tuple[str, ...]:
    """Return the claims on a pod for a sentence; none when there is one alone.

    A thousand policies about a thousand pods are a million claims: few of each pod are kept.
    """
    if len(claims) < 2:
        return ()
    shown = [f"{policy.title} pool {pool.name}" for policy, _, pool in claims[:MAX_RIVALS_SHOWN]]
    return (*shown, f"{len(claims) - len(shown)} more") if len(claims) > len(shown) else tuple(shown)


def select(policies: Iterable[PolicyView], pods: Iterable[PodView]) -> Selection:
    """Return the members of all policies that are not being deleted."""
    by_namespace: dict[str, list[PolicyView]] = defaultdict(list)
    for policy in sorted(policies, key=lambda policy: policy.age_key):
        if policy.spec is not None and not policy.deleting:
            by_namespace[policy.namespace].append(policy)
    members: dict[str, list[Member]] = defaultdict(list)
    disputes: dict[str, list[Member]] = defaultdict(list)
    for pod in pods:
        if not selectable(pod):
            continue
        claims = [
            (policy, policy.spec, pool)
            for policy in by_namespace.get(pod.namespace, ())
            if policy.spec is not None
            for pool in policy.spec.pools
            if matches(pool.selector, pod.labels)
        ]
        if not claims:
            continue
        rivals = _rivals(claims)
        first, spec, pool = claims[0]
        member = Member(first, spec, pool, pod, instance_of(pod), rivals)
        members[first.uid].append(member)
        if rivals:
            for uid in dict.fromkeys(policy.uid for policy, _, _ in claims):
                disputes[uid].append(member)
    return Selection(
        members={uid: tuple(found) for uid, found in members.items()},
        disputes={uid: tuple(found) for uid, found in disputes.items()},
    )


def group_of(pod: PodView, group_by: Iterable[str]) -> tuple[str, ...] | None:
    """Return the values of the grouping labels, or None when the pod lacks one: it is then in no group."""
    values = [pod.labels.get(key) for key in group_by]
    return None if None in values else tuple(value for value in values if value is not None)


def peer_groups(members: Iterable[Member]) -> frozenset[tuple[str, ...]]:
    """Return the groups of one policy that have a prefill pod at work: ready, with a GPU, not going, claimed once.

    A pod without a GPU computes no prompts, whatever its labels say. Members are pods of the policy's own namespace,
    so a group of the same name elsewhere is none of theirs.
    """
    groups = (
        group_of(member.pod, member.spec.group_by)
        for member in members
        if member.pool.role is Role.PREFILL
        if member.pod.ready and member.pod.wants_gpu and not member.pod.terminating and not member.rivals
    )
    return frozenset(group for group in groups if group is not None)
