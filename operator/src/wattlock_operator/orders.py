"""Orders for the nodes' agents: what is wanted of the GPUs of every selected pod."""

import ipaddress
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wattlock_api.base import ObjectRef
from wattlock_api.constants import FINALIZER, ConflictPolicy, Mode, Reason, Role
from wattlock_api.nodeenergy import Hold, InstanceSpan, Order, OrderExperiment, OrderIdle, PolicyRef
from wattlock_api.policystatus import RolloutStatus

from wattlock_operator.clocks import Cap, cap_for, hold, products_of
from wattlock_operator.reports import PoolKey
from wattlock_operator.rolling import roll_out
from wattlock_operator.selection import (
    Member,
    Selection,
    group_of,
    missing_pods,
    peer_groups,
    select,
    serves_metrics,
)
from wattlock_operator.sharing import Refusal, refusals
from wattlock_operator.work import Watch
from wattlock_operator.world import PodView, World
from wattlock_operator.writers import controller_of

#: Bound of the list in the CustomResourceDefinition.
MAX_ORDERS_PER_NODE = 256
#: Nodes of an instance that its orders name. Of a larger one energy for each token stays unknown.
MAX_SPAN_NODES = 64


@dataclass(frozen=True)
class Orders:
    """All orders, and how they came about."""

    by_node: Mapping[str, tuple[Order, ...]]
    """Sorted by pod UID."""
    selection: Selection
    without_gpu: Mapping[str, tuple[Member, ...]]
    """By policy UID: members that ask for no GPU; there is nothing to order for them."""
    surplus: Mapping[str, tuple[Member, ...]]
    """By policy UID: members beyond what fits into a node's list."""
    refused: Mapping[str, Refusal]
    """By policy UID: why there are no orders for a policy at all."""
    rollouts: Mapping[PoolKey, RolloutStatus] = field(default_factory=dict)
    """Of the pools that have, or had, something to cap."""


def hides_behind_its_node(pod: PodView, world: World) -> bool:
    """Return whether the pod's address is its node's and its namespace may not have that asked.

    Port and path are the tenant's to write. At an address that is the pod's alone they reach what he runs himself; at
    the node's they reach every server there that trusts its node, the kubelet and other agents among them.
    """
    return pod.host_network and pod.namespace not in world.host_network_namespaces


def metrics_url(member: Member, world: World) -> str | None:
    """Return where the pod serves metrics: its own address, port and path by the rules of MetricsEndpoint."""
    pod, endpoint, hint = member.pod, member.pool.metrics, member.pod.hint
    if not serves_metrics(pod) or hides_behind_its_node(pod, world):
        return None
    try:
        address = ipaddress.ip_address(pod.ip)
    except ValueError:
        return None
    if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        return None  # no pod's: the agent itself, or what a cloud offers its nodes
    host = f"[{address}]" if address.version == 6 else str(address)
    port = endpoint.port or hint.annotated_port or hint.named_port or hint.gpu_container_port or 8000
    return f"http://{host}:{port}{endpoint.path or hint.annotated_path or '/metrics'}"


def _verdict(
    member: Member,
    world: World,
    peers: frozenset[tuple[str, ...]],
    tuned: Mapping[PoolKey, Cap | Hold],
    works: Mapping[PoolKey, Watch],
) -> Cap | Hold:
    """Return the cap of one pod of a pool that may be capped, or why it has none."""
    if member.rivals:
        return hold(
            Reason.POLICY_CONFLICT,
            f"pod {member.pod.name} is claimed by {' and by '.join(member.rivals)}: change the selectors so that "
            "one pool selects it",
        )
    if not member.policy.finalizer:
        return hold(
            Reason.WAITING_TO_WRITE,
            f"policy {member.policy.title} does not carry the finalizer {FINALIZER} yet, without which a lock could "
            "outlive the policy",
        )
    if member.pod.claims and member.spec.conflict_policy is ConflictPolicy.SKIP:
        other = controller_of(member.pod.claims[0])
        return hold(
            Reason.OTHER_CONTROLLER,
            f"pod {member.pod.name} has the annotation {other.annotation}, by which {other.name} {other.does}: two "
            "controllers of one GPU mix what is measured. Remove the annotation, or write conflictPolicy: Coexist",
        )
    if member.spec.require_prefill_peer and member.pool.role is Role.DECODE:  # a Mixed pod is meant to do without
        group = group_of(member.pod, member.spec.group_by)
        keys = ", ".join(member.spec.group_by)
        if group is None:
            return hold(
                Reason.NO_PREFILL_PEER,
                f"pod {member.pod.name} lacks a label of groupBy ({keys}), so its prefill peer cannot be found: add "
                "the label, or change groupBy",
            )
        if group not in peers:
            where = f" with the same {keys} ({', '.join(group)})" if group else ""
            return hold(
                Reason.NO_PREFILL_PEER,
                f"no ready prefill pod with a GPU{where}: the decode pods may be computing prompts themselves. They "
                "are capped as soon as one is ready; requirePrefillPeer: false turns this rule off",
            )
    node_energy = world.node_energies.get(member.pod.node)
    report = node_energy.status if node_energy else None
    key = (member.policy.uid, member.pool.name)
    products = products_of(report, member.pod.uid)
    return cap_for(member.pool, products, world.profiles, tuned.get(key), works.get(key, Watch()).regime)


def _agree(verdicts: Sequence[Cap | Hold]) -> Cap | Hold:
    """Return what all pods of an instance do together: one pod on hold holds them all."""
    holds = [verdict for verdict in verdicts if isinstance(verdict, Hold)]
    if holds:
        return holds[0]
    found = [verdict for verdict in verdicts if isinstance(verdict, Cap)]
    if len(caps := sorted({verdict.mhz for verdict in found})) > 1:
        return hold(
            Reason.PRODUCT_UNKNOWN,
            f"the pods of this instance run on different GPU products, whose caps differ ({caps} MHz): write one "
            "clock.maxSMClockMHz for the pool",
        )
    return found[0]


@dataclass(frozen=True)
class _Instance:
    """An instance over all its nodes."""

    span: InstanceSpan | None
    speaker: str | None
    """UID of the one pod whose metrics count."""


def _instances(members: Sequence[Member], with_gpu: Sequence[Member], world: World) -> Mapping[str, _Instance]:
    """Return the instances of a policy by name.

    One that is on one node, with all its pods, has no span. Of several pods that serve metrics the first by name
    speaks: the tokens of one instance must be counted once, by one agent.
    """
    missing = missing_pods(members)
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in with_gpu:
        groups[member.instance].append(member)
    found: dict[str, _Instance] = {}
    for name, group in groups.items():
        nodes = sorted({member.pod.node for member in group})
        speakers = sorted(
            (member.pod.name, member.pod.uid) for member in group if metrics_url(member, world) is not None
        )
        whole = len(nodes) == 1 and not missing[name]
        span = None if whole else InstanceSpan(nodes=nodes[:MAX_SPAN_NODES], missing_pods=missing[name])
        if len(nodes) > MAX_SPAN_NODES:
            span = InstanceSpan(nodes=nodes[:MAX_SPAN_NODES], missing_pods=missing[name] + len(group))
        found[name] = _Instance(span, speakers[0][1] if speakers else None)
    return found


def _unseen_prefill(member: Member, instance: _Instance) -> Hold | None:
    """Return why a Mixed instance over several nodes has no cap: only one of its agents sees when it must go."""
    if member.pool.role is not Role.MIXED or instance.span is None:
        return None
    return hold(
        Reason.SPANS_NODES,
        f"instance {member.instance} of the Mixed pool {member.pool.name} has pods on several nodes, or pods that the "
        "pool does not select: only the agent that reads its metrics sees how much it prefills, and the others would "
        "release too late. Such instances are capped in Decode pools alone",
    )


def _released_elsewhere(world: World, member: Member, span: InstanceSpan | None) -> Hold | None:
    """Return why the agent of another node released the instance: its GPUs have one clock, on all nodes.

    The agent that reads the metrics trips alone and at once; the others hear of it here.
    """
    if span is None:
        return None
    key = f"{member.policy.uid}/{member.instance}"
    for node in span.nodes:
        node_energy = world.node_energies.get(node)
        if node == member.pod.node or node_energy is None or node_energy.status is None:
            continue
        for instance in node_energy.status.instances:
            if instance.key != key:
                continue
            if instance.guardrail_tripped:
                return hold(Reason.GUARDRAIL, f"released on node {node}: {instance.guardrail_message}")
            if instance.computes_prompts:
                return hold(Reason.COMPUTES_PROMPTS, f"released on node {node}: the instance computes prompts")
    return None


def _order(member: Member, verdict: Cap | Hold | None, instance: _Instance, world: World) -> Order:
    policy, spec = member.policy, member.spec
    # In Observe mode the cap is left out on purpose: an agent that misread the mode would still write nothing.
    cap = verdict.mhz if isinstance(verdict, Cap) and spec.mode is Mode.ENFORCE else None
    idle = None
    if cap is not None and member.pool.idle is not None:
        wanted = member.pool.idle
        idle = OrderIdle(cap_mhz=wanted.max_sm_clock_mhz, after_seconds=wanted.after_seconds)
    experiment = None
    if cap is not None and isinstance(verdict, Cap) and spec.verification.method == "Switchback":
        experiment = OrderExperiment(
            seed=policy.uid,
            epoch_seconds=spec.verification.epoch_seconds,
            control_share=verdict.control_share or spec.verification.control_share,
        )
    return Order(
        policy=PolicyRef(namespace=policy.namespace, name=policy.name, uid=policy.uid, generation=policy.generation),
        pool=member.pool.name,
        role=member.pool.role,
        pod=_reference(member.pod),
        pod_uid=member.pod.uid,
        instance=member.instance,
        mode=spec.mode,
        cap_mhz=cap,
        hold=verdict if isinstance(verdict, Hold) else None,
        experiment=experiment,
        guardrail=spec.guardrail if member.pool.may_be_capped else None,
        metrics_url=metrics_url(member, world) if member.pod.uid == instance.speaker else None,
        span=instance.span,
        conflict_policy=spec.conflict_policy,
        max_prefill_percent=member.pool.max_prefill_percent,
        idle=idle,
    )


def _reference(pod: PodView) -> ObjectRef:
    return ObjectRef(namespace=pod.namespace, name=pod.name, uid=pod.uid)


def give_orders(
    world: World,
    rollouts: Mapping[PoolKey, RolloutStatus] | None = None,
    now_seconds: float = 0.0,
    tuned: Mapping[PoolKey, Cap | Hold] | None = None,
    selection: Selection | None = None,
    works: Mapping[PoolKey, Watch] | None = None,
) -> Orders:
    """Return the orders for all nodes.

    Args:
        world: as it is.
        rollouts: their states of before.
        now_seconds: since 1970.
        tuned: what the tuners of pools want.
        selection: who is selected, where the caller knows already.
        works: what the pools with a profile do.
    """
    tuned, works = tuned or {}, works or {}
    selection = selection or select(world.policies, world.pods)
    refused = refusals(world.policies, world.allowed_placements)
    by_node: dict[str, list[tuple[Member, Order]]] = defaultdict(list)
    without_gpu: dict[str, tuple[Member, ...]] = {}
    surplus: dict[str, list[Member]] = defaultdict(list)
    kept_rollouts: dict[PoolKey, RolloutStatus] = {}
    for uid, members in selection.members.items():
        if uid in refused:
            continue
        with_gpu = [member for member in members if member.pod.wants_gpu]
        without_gpu[uid] = tuple(member for member in members if not member.pod.wants_gpu)
        instances = _instances(members, with_gpu, world)
        peers = peer_groups(members)
        verdicts: dict[str, list[Cap | Hold]] = defaultdict(list)
        for member in with_gpu:
            if member.pool.may_be_capped:
                unseen = _unseen_prefill(member, instances[member.instance])
                verdicts[member.instance].append(unseen or _verdict(member, world, peers, tuned, works))
        agreed = {instance: _agree(found) for instance, found in verdicts.items()}
        turns, states = roll_out(world, with_gpu, agreed, rollouts or {}, now_seconds)
        agreed |= turns
        kept_rollouts |= states
        for member in with_gpu:
            verdict = agreed[member.instance] if member.pool.may_be_capped else None
            if isinstance(verdict, Cap) and member.spec.mode is Mode.ENFORCE:
                verdict = _released_elsewhere(world, member, instances[member.instance].span) or verdict
            if member.rivals and verdict is None:
                # A pool that is never capped is in dispute: say so.
                verdict = _verdict(member, world, peers, tuned, works)
            by_node[member.pod.node].append((member, _order(member, verdict, instances[member.instance], world)))
    final: dict[str, tuple[Order, ...]] = {}
    for node, entries in by_node.items():
        entries.sort(key=lambda entry: (entry[0].policy.age_key, entry[0].pod.name))
        for member, _ in entries[MAX_ORDERS_PER_NODE:]:
            surplus[member.policy.uid].append(member)
        kept = [order for _, order in entries[:MAX_ORDERS_PER_NODE]]
        final[node] = tuple(sorted(kept, key=lambda order: order.pod_uid))
    return Orders(
        by_node=final,
        selection=selection,
        without_gpu=without_gpu,
        surplus={uid: tuple(found) for uid, found in surplus.items()},
        rollouts=kept_rollouts,
        refused=refused,
    )
