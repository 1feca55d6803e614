"""The whole decision: what the world should look like, as a pure function of what it looks like."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from wattlock_api.nodeenergy import Order
from wattlock_api.policystatus import EnergyPolicyStatus, RolloutStatus

from wattlock_operator.accounting import Account
from wattlock_operator.events import Telling, Told, tell, tell_profiles, tell_tuning
from wattlock_operator.ledger import Ledger
from wattlock_operator.orders import Orders, give_orders
from wattlock_operator.peerpower import peer_powers
from wattlock_operator.placement import DaemonSets, TemplateError, plan_daemon_sets
from wattlock_operator.release import Release, locked_uuids, release_of
from wattlock_operator.reports import PoolKey, collect
from wattlock_operator.selection import select
from wattlock_operator.status import report_policy, unchanged_report, urgent_change
from wattlock_operator.tuning.pools import Tuner, tune_pools
from wattlock_operator.work import Watch, watch_pools
from wattlock_operator.world import NodeEnergyView, PolicyView, World

#: Numbers alone are written this often.
NUMBERS_SECONDS = 20.0
#: News about power on other nodes is written to a node this often at most: agents wait two minutes for it.
PEER_POWER_SECONDS = 20.0
#: The least time between two writes of a status.
STATES_SECONDS = 1.0
#: Statuses written in one pass, those that waited longest first. Orders are written at the begin of a pass: so a tenant
#: with a thousand policies does not keep others waiting for theirs.
MAX_STATUSES = 200


@dataclass(frozen=True)
class Written:
    """A status as it was last written."""

    status: EnergyPolicyStatus
    at_seconds: float


@dataclass(frozen=True)
class Memory:
    """What a decision must know of earlier ones. Losing it (a restart) loses nothing that matters."""

    accounts: Mapping[PoolKey, Account] = field(default_factory=dict)
    ledgers: Mapping[PoolKey, Ledger] = field(default_factory=dict)
    written: Mapping[str, Written] = field(default_factory=dict)
    """By policy UID."""
    ordered_nodes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Nodes that had orders of a policy, by its UID."""
    rollouts: Mapping[PoolKey, RolloutStatus] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    tuners: Mapping[PoolKey, Tuner] = field(default_factory=dict)
    works: Mapping[PoolKey, Watch] = field(default_factory=dict)
    powers_at: Mapping[str, float] = field(default_factory=dict)
    """When the annotation about power on other nodes was last written, by node."""
    failed: frozenset[str] = frozenset()
    """UIDs of the policies whose status could not be made at the last look."""


@dataclass(frozen=True)
class Decision:
    """What is to be done."""

    write_orders: Mapping[str, tuple[Order, ...]]
    """NodeEnergies to write, by node."""
    present: Mapping[str, NodeEnergyView]
    """The NodeEnergies that the decision looked at, by node."""
    peer_powers: Mapping[str, str]
    """Annotation of those of them that have one, by node."""
    delete_node_energies: tuple[str, ...]
    daemon_sets: DaemonSets
    statuses: Mapping[str, EnergyPolicyStatus]
    """Status of every policy, by UID: for metrics."""
    write_statuses: tuple[tuple[PolicyView, EnergyPolicyStatus], ...]
    tellings: tuple[Telling, ...]
    released: frozenset[str]
    """UIDs of deleted policies that may go."""
    failures: tuple[tuple[PolicyView, Exception], ...]
    """Policies whose status could not be made, so that it stays as it was."""
    again_soon: bool
    """Whether a status waits only for STATES_SECONDS to pass, or for its turn."""
    memory: Memory


def _orders_to_write(
    world: World, orders: Orders, powers: Mapping[str, str], fresh: Set[str]
) -> tuple[dict[str, tuple[Order, ...]], tuple[str, ...]]:
    agents = {pod.node for pod in world.agent_pods()}
    write: dict[str, tuple[Order, ...]] = {}
    delete = []
    for node in sorted({*agents, *orders.by_node, *world.node_energies}):
        wanted = orders.by_node.get(node, ())
        present = world.node_energies.get(node)
        if node not in world.nodes:
            if present is not None:
                delete.append(node)
        elif not wanted and node not in agents:
            if present is not None and (present.orders or not present.readable):
                write[node] = ()
            elif present is not None and not locked_uuids(present.status):
                delete.append(node)
        elif (
            present is None
            or present.orders != wanted
            or not present.readable
            or (present.peer_power != powers.get(node, "") and node not in fresh)
        ):
            write[node] = wanted
    return write, tuple(delete)


def _ordered_nodes(world: World, orders: Orders, memory: Memory) -> dict[str, frozenset[str]]:
    living = {policy.uid: policy for policy in world.policies}
    found = {uid: set(nodes) for uid, nodes in memory.ordered_nodes.items() if uid in living}
    for uid, policy in living.items():
        if not policy.deleting:
            found.setdefault(uid, set())
    given = ((node, order) for node, wanted in orders.by_node.items() for order in wanted)
    there = ((name, order) for name, entry in world.node_energies.items() for order in entry.orders)
    for node, order in (*given, *there):
        if order.policy.uid in found:
            found[order.policy.uid].add(node)
    return {uid: frozenset(nodes) for uid, nodes in found.items()}


def _told_rollouts(world: World) -> dict[PoolKey, RolloutStatus]:
    """Return the rollouts as the policies' statuses have them: where a restarted operator goes on."""
    return {
        (policy.uid, pool.name): pool.rollout
        for policy in world.policies
        for pool in (policy.status.pools if policy.status else ())
        if pool.rollout is not None
    }


def decide(world: World, template: Mapping[str, Any] | None, memory: Memory, now_seconds: float) -> Decision:
    """Return what to do now. Total: bad input leads to a condition with a reason, never to an exception."""
    reports = collect(world, now_seconds)
    selection = select(world.policies, world.pods)
    tuners = tune_pools(world, selection, reports, memory.ledgers, memory.tuners, now_seconds)
    works = watch_pools(world, reports, memory.works, now_seconds)
    orders = give_orders(
        world,
        {**_told_rollouts(world), **memory.rollouts},
        now_seconds,
        {key: tuner.order for key, tuner in tuners.items()},
        selection,
        works,
    )
    powers = peer_powers(world, orders.by_node)
    fresh = {node for node, at_seconds in memory.powers_at.items() if now_seconds - at_seconds < PEER_POWER_SECONDS}
    write, delete = _orders_to_write(world, orders, powers, fresh)
    powers_at = {node: now_seconds if node in write else memory.powers_at.get(node, 0.0) for node in powers}
    ordered_nodes = _ordered_nodes(world, orders, memory)
    releases: dict[str, Release] = {
        policy.uid: release_of(policy, world, ordered_nodes, now_seconds)
        for policy in world.policies
        if policy.deleting
    }
    daemon_sets, template_problem = DaemonSets(), ""
    if template is not None:
        try:
            pending = [uid for uid, release in releases.items() if not release.complete]
            daemon_sets = plan_daemon_sets(world, template, pending)
        except TemplateError as error:
            template_problem = f"the agents cannot be rolled out: {error}. Upgrade or repair the Helm release"
    statuses: dict[str, EnergyPolicyStatus] = {}
    accounts: dict[PoolKey, Account] = {}
    ledgers: dict[PoolKey, Ledger] = {}
    due: list[tuple[float, PolicyView, EnergyPolicyStatus, EnergyPolicyStatus | None]] = []
    written: dict[str, Written] = {}
    failures: dict[str, tuple[PolicyView, Exception]] = {}
    again_soon = False
    for policy in world.policies:
        last = memory.written.get(policy.uid)
        before = last.status if last else policy.status
        try:
            report = report_policy(
                policy,
                world,
                orders,
                reports,
                memory.accounts,
                memory.ledgers,
                tuners,
                works,
                before,
                releases.get(policy.uid),
                template_problem,
                daemon_sets.overruled.get(policy.uid, ""),
                now_seconds,
            )
        except Exception as error:
            # Broad, for it stands for what nobody thought of: a status is made of numbers and words that tenants' pods
            # can move, and a mistake about those of one must not keep the orders and releases of all from being
            # written. What is caught is a bug, and told of as one.
            failures[policy.uid] = (policy, error)
            report = unchanged_report(policy, memory.accounts, memory.ledgers, before)
        accounts.update(report.accounts)
        ledgers.update(report.ledgers)
        statuses[policy.uid] = report.status
        since = now_seconds - last.at_seconds if last else float("inf")
        urgent = urgent_change(before, report.status)
        pause = STATES_SECONDS if urgent else NUMBERS_SECONDS
        again_soon |= urgent and since < pause
        if since >= pause and policy.status != report.status and policy.uid not in failures:
            due.append((since, policy, report.status, before))
        if last is not None:
            written[policy.uid] = last
    due.sort(key=lambda entry: -entry[0])
    told, tellings = memory.told, list[Telling]()
    for _, policy, status, before in due[:MAX_STATUSES]:
        more, told = tell(policy, before.conditions if before else (), status.conditions, told, now_seconds)
        tellings.extend(more)
        for tell_pools in (tell_tuning, tell_profiles):
            more, told = tell_pools(policy, before.pools if before else (), status.pools, told, now_seconds)
            tellings.extend(more)
        written[policy.uid] = Written(status, now_seconds)
    return Decision(
        write_orders=write,
        present=world.node_energies,
        peer_powers={node: text for node, text in powers.items() if node in write},
        delete_node_energies=delete,
        daemon_sets=daemon_sets,
        statuses=statuses,
        write_statuses=tuple((policy, status) for _, policy, status, _ in due[:MAX_STATUSES]),
        tellings=tuple(tellings),
        released=frozenset(uid for uid, release in releases.items() if release.complete),
        failures=tuple(failures.values()),
        again_soon=again_soon or len(due) > MAX_STATUSES,
        memory=Memory(
            accounts=accounts,
            ledgers=ledgers,
            written=written,
            ordered_nodes=ordered_nodes,
            rollouts=orders.rollouts,
            told=told,
            tuners=tuners,
            works=works,
            powers_at=powers_at,
            failed=frozenset(failures),
        ),
    )
