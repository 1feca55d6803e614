"""The status of policies, put together from orders, reports and accounts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import parse_timestamp
from wattlock_api.constants import Mode, Reason, RolloutPhase, SavingsVerdict
from wattlock_api.energypolicy import Pool
from wattlock_api.pairs import PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus, ProfileStatus, Summary
from wattlock_api.tuningstatus import TuningStatus

from wattlock_operator.accounting import JOULES_PER_KWH, Account, Saved, Sums, open_or_advance
from wattlock_operator.conditions import OTHERS_WRITE, Facts, dated, find_conditions
from wattlock_operator.ledger import Ledger, advance, opening
from wattlock_operator.orders import Orders
from wattlock_operator.pooling import saving_percent
from wattlock_operator.poolstatus import CAPPED, held_orders, pod_problems, pool_status
from wattlock_operator.release import Release
from wattlock_operator.reports import PoolKey, PoolReport, number
from wattlock_operator.rows import rows_in_use
from wattlock_operator.savings import Finding, find_saving, with_totals
from wattlock_operator.tuning.evidence import MAX_TRIALS
from wattlock_operator.tuning.pools import Tuner
from wattlock_operator.work import Watch, told_watch
from wattlock_operator.world import PolicyView, World

#: Agents that start for a new policy are given this time before their absence is a warning.
STARTING_SECONDS = 90.0
#: An agent that has not acted on an arm of a tuner after so long is told of: it acts within a few seconds, and reports
#: every 15 s at most.
ARM_SECONDS = 60.0


@dataclass(frozen=True)
class PolicyReport:
    """The status of a policy and the accounts behind it."""

    status: EnergyPolicyStatus
    accounts: Mapping[PoolKey, Account]
    ledgers: Mapping[PoolKey, Ledger]


def lagging_nodes(world: World, orders: Orders, uid: str) -> tuple[str, ...]:
    """Return nodes with orders of the policy that were not written yet, or that their agent has not acted on."""
    found = []
    for name, wanted in orders.by_node.items():
        if not any(order.policy.uid == uid for order in wanted):
            continue
        node_energy = world.node_energies.get(name)
        report = node_energy.status if node_energy else None
        written = node_energy is not None and node_energy.orders == wanted
        if not written or report is None or node_energy is None or report.observed_generation < node_energy.generation:
            found.append(name)
    return tuple(sorted(found))


def _changes_arm(policy: PolicyView, tuners: Mapping[PoolKey, Tuner], now_seconds: float) -> bool:
    """Return whether a tuner of the policy has just changed what it wants: its agents need a moment, each time."""
    changed = (tuner.state.changed_seconds for (uid, _), tuner in tuners.items() if uid == policy.uid)
    return any(at is not None and now_seconds - at < ARM_SECONDS for at in changed)


def suspects(world: World, reports: Sequence[PoolReport]) -> Mapping[str, Sequence[str]]:
    """Return the pods that look like programs which set clocks or power of GPUs, by node where somebody does."""
    found: dict[str, list[str]] = {
        each.node: [] for report in reports for each in report.gpus if each.gpu.reason in OTHERS_WRITE
    }
    for pod in world.pods if found else ():
        if pod.writer and pod.node in found and not pod.finished:
            found[pod.node].append(f"{pod.writer} (pod {pod.namespace}/{pod.name})")
    return {node: sorted(names) for node, names in found.items()}


def _range(numbers: Sequence[int]) -> str | None:
    distinct = sorted(set(numbers))
    if not distinct:
        return None
    return f"{distinct[0]}MHz" if len(distinct) == 1 else f"{distinct[0]}-{distinct[-1]}MHz"


def _clock(asked: Sequence[int], capped: Sequence[PoolStatus]) -> str | None:
    """Return the caps asked for, with how far they have come while a rollout is under way: 1590MHz(2/8)."""
    clocks = _range(asked)
    rolling = [pool.rollout for pool in capped if pool.rollout and pool.rollout.phase is not RolloutPhase.COMPLETE]
    if clocks is None or not rolling:
        return clocks
    return f"{clocks}({sum(each.updated for each in rolling)}/{sum(each.instances for each in rolling)})"


def _saved_kwh(pools: Sequence[PoolStatus]) -> str | None:
    """Return the sum over the pools for reading: four places below a kilowatt-hour, fewer and fewer above."""
    known = [number(pool.savings.saved_kwh) for pool in pools if pool.savings and pool.savings.saved_kwh is not None]
    if not known:
        return None
    total = sum(known)
    places = next((places for places, least in enumerate((100, 10, 1)) if abs(total) >= least), 4)
    return f"{total:.{places}f}"


def _saved(findings: Sequence[Finding]) -> str | None:
    """Return the pool with the most pairs in a word."""
    best = max(findings, key=lambda finding: finding.savings.pairs, default=None)
    if best is None:
        return None
    if best.savings.verdict is SavingsVerdict.VERIFIED and best.energy is not None:
        saving = saving_percent(best.energy)
        return f"{saving.value:.1f}%±{saving.half_width:.1f}"
    return best.savings.verdict.value


def _asked_mhz(pool: PoolStatus) -> int | None:
    """Return the cap asked for: the tuner's own word, so that it and the arm beside it belong together."""
    tuning = pool.tuning
    return tuning.cap_mhz if tuning is not None and tuning.phase in ("Searching", "Settled") else pool.requested_mhz


def summary(policy: PolicyView, pools: Sequence[PoolStatus], findings: Sequence[Finding]) -> Summary:
    """Return the policy in a line."""
    names = policy.spec.capped_pools if policy.spec is not None else frozenset()
    capped = [pool for pool in pools if pool.name in names]
    asked = [mhz for pool in capped if (mhz := _asked_mhz(pool)) is not None]
    if not asked and policy.spec is not None and policy.spec.mode is Mode.ENFORCE:
        fixed = [pool.clock.max_sm_clock_mhz for pool in policy.spec.pools if pool.clock is not None]
        asked = [mhz for mhz in fixed if mhz is not None]
    searching = next((pool.tuning for pool in capped if pool.tuning is not None and pool.tuning.arm is not None), None)
    arm = f"({searching.arm}/{searching.arms})" if searching is not None else ""
    powers = [pool.power_watts for pool in pools if pool.gpus]
    per_token = [pool.joules_per_generated_token for pool in capped if pool.joules_per_generated_token is not None]
    return Summary(
        gpus=sum(pool.gpus for pool in pools),
        capped=f"{sum(pool.capped for pool in capped)}/{sum(pool.gpus for pool in capped)}" if capped else None,
        locked=sum(pool.locked for pool in pools),
        clock=f"{clock}{arm}" if arm and (clock := _range(asked)) else _clock(asked, capped),
        power=f"{sum(watts or 0 for watts in powers)}W" if powers and None not in powers else None,
        saved=_saved(findings),
        saved_kwh=_saved_kwh(pools),
        observed=_range([pool.observed_mhz for pool in capped if pool.observed_mhz is not None]),
        joules_per_token=f"{number(max(per_token, key=number)):.3f}" if per_token else None,
    )


def _is_young(policy: PolicyView, now_seconds: float) -> bool:
    try:
        return now_seconds - parse_timestamp(policy.created) < STARTING_SECONDS
    except ValueError:
        return False


def _sums(pool: PoolStatus | None) -> Sums:
    """Return the sums that the last status tells. A saving without an interval is nobody's word: not taken over."""
    if pool is None:
        return Sums()
    savings, saved = pool.savings, None
    if savings is not None and savings.saved_kwh is not None and len(savings.saved_kwh_ci95 or ()) == 2:
        amounts = (number(text) * JOULES_PER_KWH for text in (savings.saved_kwh, *(savings.saved_kwh_ci95 or ())))
        saved = Saved(*amounts)
    return Sums(
        energy_joules=None if pool.energy_kwh is None else number(pool.energy_kwh) * JOULES_PER_KWH,
        saved=saved,
        counted_joules=None if pool.counted_joules is None else number(pool.counted_joules),
        counted_capped_joules={entry.cap_mhz: number(entry.joules) for entry in pool.counted_capped_joules},
        verified=savings is not None and savings.verdict is SavingsVerdict.VERIFIED,
    )


def departed_pairs(pool: PoolStatus | None) -> Sequence[PairStats]:
    """Return what a status says about the pairs of pods that are gone."""
    return pool.savings.departed if pool is not None and pool.savings is not None else ()


def _remembered(pool: PoolStatus) -> PoolStatus:
    """Return what of a pool's status stays while nobody knows what the pool is: sums, findings and states.

    An operator that was rolled back does not understand what a newer one allowed. It goes on from here when it does.
    What was measured about the moment does not stay: no GPU is selected any more.
    """
    return PoolStatus(
        name=pool.name,
        role=pool.role,
        energy_kwh=pool.energy_kwh,
        counted_joules=pool.counted_joules,
        counted_capped_joules=pool.counted_capped_joules,
        savings=pool.savings,
        rollout=pool.rollout,
        tuning=pool.tuning,
        profile=pool.profile,
    )


def unchanged_report(
    policy: PolicyView,
    accounts: Mapping[PoolKey, Account],
    ledgers: Mapping[PoolKey, Ledger],
    before: EnergyPolicyStatus | None,
) -> PolicyReport:
    """Return the last status of a policy with the accounts as they were, to go on from when it can be made again."""
    return PolicyReport(
        before or EnergyPolicyStatus(),
        {key: account for key, account in accounts.items() if key[0] == policy.uid},
        {key: ledger for key, ledger in ledgers.items() if key[0] == policy.uid},
    )


def _tuning(pool: Pool, tuner: Tuner | None, before: PoolStatus | None) -> TuningStatus | None:
    """Return where the pool's tuner is; one that rests (mode Observe) keeps what it knew."""
    if tuner is not None:
        return tuner.status
    return before.tuning if before is not None and pool.clock is not None and pool.clock.tune is not None else None


def _profile(pool: Pool, work: Watch | None, report: PoolReport, world: World) -> ProfileStatus | None:
    """Return which rows of its ClockProfile a pool uses."""
    if work is None or pool.clock is None or pool.clock.profile is None:
        return None
    told, profile = told_watch(pool.clock.profile, work), world.profiles.get(pool.clock.profile)
    if profile is None:
        return told
    products = {entry.gpu.product for entry in report.gpus} - {""}
    rows = rows_in_use(profile, products, pool.architecture, work.regime)
    return told.model_copy(update={"rows": rows})


def report_policy(
    policy: PolicyView,
    world: World,
    orders: Orders,
    reports: Mapping[PoolKey, PoolReport],
    accounts: Mapping[PoolKey, Account],
    ledgers: Mapping[PoolKey, Ledger],
    tuners: Mapping[PoolKey, Tuner],
    works: Mapping[PoolKey, Watch],
    before: EnergyPolicyStatus | None,
    release: Release | None,
    template_problem: str,
    overruled: str,
    now_seconds: float,
) -> PolicyReport:
    """Return the status of a policy. ``before`` is the last one: its times and sums go on."""
    before = before or EnergyPolicyStatus()
    members = orders.selection.members.get(policy.uid, ())
    problems = pod_problems(members, orders, policy.uid, world, now_seconds)
    held = held_orders(orders, policy.uid)
    previous = {pool.name: pool for pool in before.pools}
    pools, pool_reports, findings = [], [], []
    kept: dict[PoolKey, Account] = {}
    kept_ledgers: dict[PoolKey, Ledger] = {}
    if policy.spec is None:
        unchanged = unchanged_report(policy, accounts, ledgers, before)
        kept, kept_ledgers = dict(unchanged.accounts), dict(unchanged.ledgers)
    for pool in policy.spec.pools if policy.spec else ():
        key = (policy.uid, pool.name)
        report = reports.get(key, PoolReport())
        finding = None
        if policy.spec is not None and pool.may_be_capped:
            ledger = ledgers.get(key) or opening(departed_pairs(previous.get(pool.name)))
            ledger = kept_ledgers[key] = advance(ledger, report)
            chances = MAX_TRIALS if pool.clock is not None and pool.clock.tune is not None else 1
            finding = find_saving(policy.spec.verification, policy.spec.mode, report, ledger.departed, chances)
            findings.append(finding)
        worth = finding.worth if finding else None
        account = kept[key] = open_or_advance(accounts, key, report, _sums(previous.get(pool.name)), worth)
        savings = None
        if finding is not None and policy.spec is not None:
            savings = with_totals(finding.savings, account.saved, policy.spec.cost)
        own = [member for member in members if member.pool.name == pool.name]
        tuning = _tuning(pool, tuners.get(key), previous.get(pool.name))
        found = problems.get(pool.name, ())
        pools.append(
            pool_status(
                *(pool, own, report, account, savings, tuning, held.get(pool.name, ()), found),
                orders.rollouts.get(key),
                _profile(pool, works.get(key), report, world),
            )
        )
        pool_reports.append(report)
    facts = Facts(
        policy=policy,
        pools=pools,
        reports=pool_reports,
        disputes=orders.selection.disputes.get(policy.uid, ()) if release is None else (),
        claimed=[each for each in members if each.pod.claims and each.pod.wants_gpu and each.pool.may_be_capped],
        suspects=suspects(world, pool_reports),
        lagging_nodes=() if _changes_arm(policy, tuners, now_seconds) else lagging_nodes(world, orders, policy.uid),
        release=release,
        template_problem=template_problem,
        refusal=orders.refused.get(policy.uid),
        overruled=overruled,
        young=_is_young(policy, now_seconds),
    )
    times = [report.measured_at for report in pool_reports if report.measured_at]
    # Not before the conditions, which are about what is the case now.
    pools = pools if policy.spec is not None else [_remembered(pool) for pool in before.pools]
    status = EnergyPolicyStatus(
        observed_generation=policy.generation,
        conditions=dated(find_conditions(facts), before.conditions, policy.generation, now_seconds),
        summary=summary(policy, pools, findings),
        pools=pools,
        measured_at=max(times, default=before.measured_at),
    )
    return PolicyReport(status, kept, kept_ledgers)


def urgent_change(before: EnergyPolicyStatus | None, after: EnergyPolicyStatus) -> bool:
    """Return whether people should see the new status at once: a state changed, not only numbers."""

    def routine(reason: str) -> str:
        # GPUs take turns between the arms of the experiment all day, and traffic comes and goes: how many GPUs are in a
        # control epoch or idle at the moment is a number.
        return Reason.LOCKED.value if reason in CAPPED else reason

    def essence(status: EnergyPolicyStatus) -> object:
        return (
            status.observed_generation,
            {(condition.type, condition.status, condition.reason) for condition in status.conditions},
            (status.summary.gpus, status.summary.clock),
            [pool.rollout for pool in status.pools],
            [(pool.name, pool.profile.rows, pool.profile.since) for pool in status.pools if pool.profile is not None],
            {(pool.name, pool.tuning.phase, pool.tuning.cap_mhz) for pool in status.pools if pool.tuning is not None},
            {
                (pool.name, pool.pods, routine(entry.reason))
                for pool in status.pools
                for entry in pool.reasons
                if entry.reason != Reason.NO_TOKENS  # traffic comes and goes all day
            },
        )

    return before is None or essence(before) != essence(after)
