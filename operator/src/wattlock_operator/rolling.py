"""Whose turn it is: the rollouts of a policy's pools, from what orders and reports say about their instances."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from wattlock_api.constants import Mode, Reason, RolloutPhase
from wattlock_api.nodeenergy import Hold
from wattlock_api.policystatus import RolloutStatus

from wattlock_operator.clocks import Cap, hold, products_of
from wattlock_operator.reports import PoolKey
from wattlock_operator.rollout import Breach, Candidate, Plan, plan_rollout
from wattlock_operator.selection import Member
from wattlock_operator.world import World


def _candidate(world: World, group: Sequence[Member], cap: Cap) -> Candidate:
    """Return an instance as its rollout sees it; ``group`` are its pods with GPUs."""
    ordered: set[int | None] = set()
    products: set[str] = set()
    breaches: list[Breach] = []
    acted, cools_down = True, False
    for member in group:
        node_energy = world.node_energies.get(member.pod.node)
        report = node_energy.status if node_energy else None
        if node_energy is None or report is None:
            ordered.add(None)
            acted = False
            continue
        written = next((order.cap_mhz for order in node_energy.orders if order.pod_uid == member.pod.uid), None)
        has_acted = report.observed_generation >= node_energy.generation
        ordered.add(written)
        acted &= has_acted
        # Also where the pool has one number: the clock of before may be a profile's.
        found = products_of(report, member.pod.uid)
        products |= found if len(found) == 1 else frozenset()
        key = f"{member.policy.uid}/{member.instance}"
        told = next((each for each in report.instances if each.key == key and each.guardrail_tripped), None)
        # A cool-down that began under an order of before is no breach of this one; it only keeps it from being proved.
        if told is not None and told.guardrail_withdrawn:
            cools_down = True
        elif told is not None:
            breaches.append(Breach(told.guardrail_message or "the guardrail tripped", written, has_acted))
    clock = group[0].pool.clock
    return Candidate(
        name=group[0].instance,
        product=min(products, default=""),
        cap_mhz=cap.mhz,
        ready=all(member.pod.ready for member in group),
        ordered_mhz=next(iter(ordered)) if len(ordered) == 1 else None,
        acted=acted,
        breaches=tuple(breaches),
        cools_down=cools_down,
        by_product=clock is not None and clock.profile is not None,
    )


def roll_out(
    world: World,
    members: Sequence[Member],
    agreed: Mapping[str, Cap | Hold],
    before: Mapping[PoolKey, RolloutStatus],
    now_seconds: float,
) -> tuple[dict[str, Cap | Hold], dict[PoolKey, RolloutStatus]]:
    """Return what the rollouts of a policy's pools leave of the instances' verdicts, and how they stand."""
    verdicts: dict[str, Cap | Hold] = {}
    found: dict[PoolKey, RolloutStatus] = {}
    pools: dict[str, dict[str, list[Member]]] = defaultdict(lambda: defaultdict(list))
    for member in members:
        # A tuner's caps are arms of an experiment: all instances have the same one, or it could not be judged.
        tuned = member.pool.clock is not None and member.pool.clock.tune is not None
        if member.pool.may_be_capped and member.spec.mode is Mode.ENFORCE and not tuned:
            pools[member.pool.name][member.instance].append(member)
    for name, groups in pools.items():
        candidates = [
            _candidate(world, group, cap)
            for instance, group in groups.items()
            if isinstance(cap := agreed.get(instance), Cap)
        ]
        first = next(iter(groups.values()))[0]
        key = (first.policy.uid, name)
        plan = plan_rollout(
            first.spec.rollout, before.get(key), candidates, first.policy.uid, first.policy.generation, now_seconds
        )
        if plan is not None:
            found[key] = plan.status
            verdicts |= {each.name: _in_turn(plan, each, name) for each in candidates}
    return verdicts, found


def _in_turn(plan: Plan, candidate: Candidate, pool: str) -> Cap | Hold:
    mhz = plan.cap_mhz(candidate)
    if mhz is not None:
        return Cap(mhz)
    status = plan.status
    if status.phase is RolloutPhase.ROLLED_BACK:
        return hold(Reason.ROLLED_BACK, f"the rollout of pool {pool} went back: {status.message}")
    return hold(
        Reason.ROLLOUT_PENDING,
        f"its turn comes later in the rollout of pool {pool}: step {status.step} of {status.steps} is under way",
    )
