"""The tuners of all pools that ask for one: what each sees, and which cap it wants now. Pure."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from wattlock_api.base import MAX_CLOCK_MHZ, MIN_CLOCK_MHZ
from wattlock_api.constants import Mode, PowerCapVerdict, Reason
from wattlock_api.energypolicy import Guardrail, Pool, Tune
from wattlock_api.nodeenergy import ClockRange, Hold
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus
from wattlock_api.schedule import Experiment
from wattlock_api.tuningstatus import TuningStatus

from wattlock_operator.clocks import Cap, hold
from wattlock_operator.ledger import Ledger, Tally, advance, opening
from wattlock_operator.poolstatus import power_cap
from wattlock_operator.reports import NodeInstance, PoolKey, PoolReport
from wattlock_operator.selection import Member, Selection
from wattlock_operator.tuning.model import Goal, Objective, Observation, Patience, Phase, Regime, Tuning
from wattlock_operator.tuning.progress import describe
from wattlock_operator.tuning.record import from_status, to_status
from wattlock_operator.tuning.step import step
from wattlock_operator.work import measured_work
from wattlock_operator.world import PolicyView, World

#: While the tuner searches, so many of the epochs are released: the fastest that the schedule can compare.
SEARCH_CONTROL_SHARE = 0.5
#: Where the guardrail does not bound the latency against released. Throughput alone would not do: where it follows
#: demand, a slower GPU shows in the latency only.
DEFAULT_LATENCY_INCREASE_PERCENT = 3.0
#: Labels by which controllers tell pods of one template from those of another.
_TEMPLATE_LABELS = (
    "pod-template-hash",
    "controller-revision-hash",
    "leaderworkerset.sigs.k8s.io/template-revision-hash",
)
#: Supported clocks of a product, at most: ranges come from an agent's report.
_MAX_CLOCKS = 1000


@dataclass(frozen=True)
class Tuner:
    """The tuner of a pool after a look."""

    state: Tuning
    goal: Goal
    seen: Observation

    @property
    def order(self) -> Cap | Hold:
        """The cap that the pool is to have now, or why it has none."""
        cap_mhz = self.state.cap_mhz
        if cap_mhz is not None:
            searching = self.state.phase is Phase.SEARCHING
            return Cap(cap_mhz, SEARCH_CONTROL_SHARE if searching else None)
        reason = Reason.NO_CLOCK_PAYS if self.state.phase is Phase.RELEASED else Reason.TUNING
        return hold(reason, describe(self.state, self.goal, self.seen))

    @property
    def status(self) -> TuningStatus:
        """Where it is."""
        return to_status(self.state, self.goal, self.seen)


def goal_of(tune: Tune, guardrail: Guardrail) -> Goal:
    """Return what a pool's tuner looks for: its bounds are those of the guardrail."""
    latency = guardrail.max_inter_token_latency_increase_percent
    return Goal(
        objective=Objective(tune.objective),
        max_throughput_loss_percent=guardrail.max_throughput_loss_percent,
        max_latency_increase_percent=DEFAULT_LATENCY_INCREASE_PERCENT if latency is None else latency,
        min_saving_percent=tune.min_saving_percent,
        min_mhz=tune.min_mhz,
        max_mhz=tune.max_mhz,
    )


def patience_of(tune: Tune) -> Patience:
    """Return when a pool's tuner searches anew."""
    return Patience(float(tune.reopen_after_seconds), tune.rest_seconds)


def _clocks(ranges: Sequence[ClockRange]) -> set[int]:
    found: set[int] = set()
    for each in ranges:
        found.update(range(each.max_mhz, each.min_mhz - 1, -each.step_mhz)[:_MAX_CLOCKS])
    return set(sorted(found, reverse=True)[:_MAX_CLOCKS])


def supported_mhz(world: World, report: PoolReport) -> tuple[int, ...]:
    """Return the clocks that all GPUs of a pool support, highest first; empty while one is not known."""
    common: set[int] | None = None
    for node, product in sorted({(entry.node, entry.gpu.product) for entry in report.gpus}):
        told = node_energy.status if (node_energy := world.node_energies.get(node)) else None
        ranges = [each.ranges for each in told.agent.products if each.product == product] if told else []
        clocks = _clocks(ranges[0]) if ranges else set()
        common = clocks if common is None else common & clocks
    return tuple(sorted((mhz for mhz in common or () if MIN_CLOCK_MHZ <= mhz <= MAX_CLOCK_MHZ), reverse=True))


def _regime(world: World, members: Sequence[Member], report: PoolReport) -> Regime | None:
    work = measured_work(report)
    if work is None:
        return None
    drivers = {
        told.agent.driver_version
        for node in {entry.node for entry in report.gpus}
        if (node_energy := world.node_energies.get(node)) is not None and (told := node_energy.status) is not None
    }
    parts = [
        sorted({entry.gpu.product for entry in report.gpus} - {""}),
        sorted(drivers - {""}),
        sorted({member.pod.labels.get(label, "") for member in members for label in _TEMPLATE_LABELS} - {""}),
    ]
    verdict = power_cap(report.gpus).verdict
    return replace(
        work,
        kind=hashlib.sha256(repr(parts).encode()).hexdigest()[:16],
        power_limited=None if verdict is PowerCapVerdict.UNKNOWN else verdict is PowerCapVerdict.BINDING,
        products=tuple(parts[0]),
        drivers=tuple(parts[1]),
    )


def _released_mhz(report: PoolReport) -> int | None:
    clocks = [
        mhz
        for entry in report.gpus
        if not entry.silent and entry.gpu.requested_mhz is None
        # A search begins below it, so it has to be a clock that may be asked for.
        if (mhz := entry.gpu.observed_mhz) is not None and MIN_CLOCK_MHZ <= mhz <= MAX_CLOCK_MHZ
    ]
    return statistics.median_low(clocks) if clocks else None


def pair_sums(ledger: Ledger) -> dict[int, Tally]:
    """Return the sums over all pairs of a pool, by cap: also of those of which status has no room to tell."""
    sums = dict(ledger.gone)
    for tallies in ledger.present.values():
        for cap_mhz, tally in tallies.items():
            sums[cap_mhz] = sums.get(cap_mhz, Tally()) + tally
    return sums


def _serving(items: Sequence[NodeInstance]) -> list[NodeInstance]:
    """Return the instances by the node that counts their tokens.

    One in its cool-down is there although its page cannot be read: else the tuner would not wait for it.
    """
    return [
        item
        for item in items
        if not item.silent and (item.instance.tokens_per_second is not None or item.instance.guardrail_tripped)
    ]


def observe(
    world: World,
    policy: PolicyView,
    members: Sequence[Member],
    report: PoolReport,
    ledger: Ledger,
    now_seconds: float,
) -> Observation:
    """Return what a pool's tuner sees."""
    serving = _serving(report.instances)
    epoch_seconds = policy.spec.verification.epoch_seconds if policy.spec is not None else 60
    experiment = Experiment("", epoch_seconds, SEARCH_CONTROL_SHARE)
    return Observation(
        now_seconds=now_seconds,
        instances=len(serving),
        tallies=pair_sums(ledger),
        tripped=sum(item.instance.guardrail_tripped for item in serving),
        regime=_regime(world, members, report),
        released_mhz=_released_mhz(report),
        supported_mhz=supported_mhz(world, report),
        pair_seconds=float(experiment.block_epochs * experiment.epoch_seconds),
    )


def _last(policy: PolicyView, before: EnergyPolicyStatus | None, pool: Pool) -> PoolStatus | None:
    status = before or policy.status
    return next((each for each in status.pools if each.name == pool.name), None) if status is not None else None


def tune_pools(
    world: World,
    selection: Selection,
    reports: Mapping[PoolKey, PoolReport],
    ledgers: Mapping[PoolKey, Ledger],
    memory: Mapping[PoolKey, Tuner],
    now_seconds: float,
) -> Mapping[PoolKey, Tuner]:
    """Return the tuners after a look. They rest in mode Observe: a search writes to GPUs."""
    tuners: dict[PoolKey, Tuner] = {}
    for policy in world.policies:
        spec = policy.spec
        if spec is None or spec.mode is not Mode.ENFORCE or policy.deleting or not policy.finalizer:
            continue
        for pool in spec.pools:
            if pool.clock is None or pool.clock.tune is None:
                continue
            key = (policy.uid, pool.name)
            goal, before = goal_of(pool.clock.tune, spec.guardrail), _last(policy, None, pool)
            known = memory.get(key)
            if known is not None and known.goal == goal:
                state = known.state
            else:
                state = from_status(before.tuning if before else None, goal) if known is None else Tuning()
            report = reports.get(key, PoolReport())
            departed = before.savings.departed if before is not None and before.savings is not None else ()
            ledger = advance(ledgers.get(key) or opening(departed), report)
            members = [each for each in selection.members.get(policy.uid, ()) if each.pool.name == pool.name]
            seen = observe(world, policy, members, report, ledger, now_seconds)
            tuners[key] = Tuner(step(state, goal, seen, patience_of(pool.clock.tune)), goal, seen)
    return tuners
