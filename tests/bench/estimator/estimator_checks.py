"""Simulated pools through the product: what it publishes against what is true."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from estimator_world import Pairs, Scenario, draw_schedule, simulate
from wattlock_api.constants import Mode, Reason
from wattlock_api.energypolicy import Verification
from wattlock_api.nodeenergy import InstanceStatus, Moments, PairStats
from wattlock_operator.pooling import Effect, Sample, pool, saving_percent, t_quantile_975
from wattlock_operator.reports import NodeInstance, PoolReport
from wattlock_operator.savings import find_saving
from wattlock_operator.sequential import interval_at_every_look
from wattlock_operator.verdict import VERIFIED, Pooled, judge

#: Pools that are simulated at a time: bounds the memory.
CHUNK = 250
#: One pool in so many is also put into reports and read back from what find_saving publishes.
PUBLISHED_EVERY = 25
#: Agents close an epoch and report within this time after its end.
REPORT_SECONDS = 20.0


@dataclass
class Coverage:
    """What the intervals of many pools at one look are worth."""

    pools: int = 0
    hits: int = 0
    half_widths: list[float] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Share of the intervals that hold the truth."""
        return 100 * self.hits / max(1, self.pools)

    def add(self, low: float, high: float, truth: float, pairs: int) -> None:
        """Add a pool; all but ``pairs`` in percent."""
        self.pools += 1
        self.hits += low <= truth <= high
        self.half_widths.append((high - low) / 2)
        self.pairs.append(pairs)

    def merge(self, other: "Coverage") -> None:
        """Add the pools of another part of the run."""
        self.pools, self.hits = self.pools + other.pools, self.hits + other.hits
        self.half_widths += other.half_widths
        self.pairs += other.pairs


@dataclass
class Watch:
    """What someone sees who looks every minute for a day, where the cap does nothing."""

    pools: int = 0
    verified: int = 0
    """Pools that were called Verified at any look."""
    one_look: int = 0
    """Pools that the interval of one look alone would have called verified at any look."""
    looks: int = 0

    def merge(self, other: "Watch") -> None:
        """Add the pools of another part of the run."""
        self.pools, self.verified = self.pools + other.pools, self.verified + other.verified
        self.one_look, self.looks = self.one_look + other.one_look, self.looks + other.looks


def _chunks(pools: range) -> Iterator[range]:
    for start in range(pools.start, pools.stop, CHUNK):
        yield range(start, min(start + CHUNK, pools.stop))


def chunks_of(scenario: Scenario, pools: range, known: bool = True) -> Iterator[Pairs]:
    """Yield the pairs of pools, some at a time. The same pools are the same in every run."""
    for chunk in _chunks(pools):
        name = [ord(letter) for letter in scenario.name]
        chance = np.random.default_rng([20261123, chunk.start, *name])
        yield simulate(scenario, draw_schedule(scenario, chunk), chance, known)


def samples_at(pairs: Pairs, row: int, seconds: float) -> tuple[list[Sample], float]:
    """Return what the instances of a pool have reported by then, and the true effect in those pairs (log units)."""
    ready = pairs.done_seconds[row] <= seconds - REPORT_SECONDS
    d = np.where(ready, pairs.d[row], 0.0)
    counts = ready.sum(axis=-1)
    samples = [
        Sample(int(count), float(total), float(squares))
        for count, total, squares in zip(counts, d.sum(axis=-1), (d * d).sum(axis=-1), strict=True)
    ]
    truth = float(pairs.truth[row][ready].mean()) if len(pairs.truth) and ready.any() else 0.0
    return samples, truth


def pooled(samples: list[Sample]) -> Pooled | None:
    """Return what the product makes of the samples."""
    effect = pool(samples)
    if effect is None:
        return None
    return Pooled(effect, sum(each.total for each in samples), sum(each.squares for each in samples))


def check_published(samples: list[Sample], effect: Effect, scenario: Scenario) -> None:
    """Assert that reports with these samples lead to a status with this interval and this verdict."""
    reports = []
    for number, sample in enumerate(samples):
        moments = Moments(total=f"{sample.total:.9f}", squares=f"{sample.squares:.9f}")
        stats = PairStats(cap_mhz=1590, pairs=sample.pairs, energy=moments)
        status = InstanceStatus(
            key=f"p/{number}",
            policy_uid="p",
            pool="decode",
            instance=str(number),
            pair_stats=[stats] * bool(sample.pairs),
        )
        reports.append(NodeInstance("n", status, False))
    verification = Verification(epoch_seconds=scenario.epoch_seconds, control_share=scenario.control_share)
    savings = find_saving(verification, Mode.ENFORCE, PoolReport((), tuple(reports))).savings
    saving, reason = saving_percent(effect), judge(pooled(samples))
    if reason is Reason.TOO_FEW_PAIRS:
        return
    assert savings.reason == reason.value, (savings, reason)
    assert (savings.verdict.value == "Verified") == (reason in VERIFIED)
    assert savings.ci95 is not None
    shown = [float(savings.energy_percent or "nan"), *map(float, savings.ci95)]
    assert np.allclose(shown, (saving.value, saving.low, saving.high), atol=0.0051), (shown, saving)


def coverage(scenario: Scenario, pools: range, hours: tuple[float, ...]) -> dict[float, Coverage]:
    """Return, by the time of the look, how often the published interval holds the truth."""
    found = {each: Coverage() for each in hours}
    number = 0
    for pairs in chunks_of(scenario, pools):
        for row in range(pairs.d.shape[0]):
            number += 1
            for hour in hours:
                samples, truth = samples_at(pairs, row, hour * 3600 + 2 * REPORT_SECONDS)
                effect = pool(samples)
                assert effect is not None
                saving = saving_percent(effect)
                found[hour].add(saving.low, saving.high, 100 * (1 - np.exp(truth)), effect.pairs)
                if number % PUBLISHED_EVERY == 0:
                    check_published(samples, effect, scenario)
    return found


def watch(scenario: Scenario, pools: range) -> Watch:
    """Look at each pool every minute for a day until it is called Verified, by the product's own rule.

    Minutes in which no pair was added are not computed again: the status is a function of the reports.
    """
    found = Watch()
    for pairs in chunks_of(scenario, pools, known=False):
        for row in range(pairs.d.shape[0]):
            verified = one_look = False
            for reason in reasons_of_a_day(pairs, row, found):
                verified |= reason in VERIFIED
                one_look |= reason in VERIFIED or reason is Reason.NEEDS_MORE_EVIDENCE
                if verified:
                    break
            found.pools += 1
            found.verified += verified
            found.one_look += one_look
    return found


def reasons_of_a_day(pairs: Pairs, row: int, found: Watch) -> Iterator[Reason]:
    """Yield the reason at each minute of the day at which there is something new."""
    instances = pairs.d.shape[1]
    minutes = np.ceil((pairs.done_seconds[row] + REPORT_SECONDS) / 60)
    order = np.argsort(minutes, axis=None, kind="stable")
    samples = [Sample(0, 0.0, 0.0)] * instances
    values, when = pairs.d[row].ravel()[order], minutes.ravel()[order]
    who = np.unravel_index(order, pairs.d[row].shape)[0]
    last = len(order) - 1
    for index, (d, minute, instance) in enumerate(zip(values.tolist(), when.tolist(), who.tolist(), strict=True)):
        if minute == np.inf:
            return
        old = samples[instance]
        samples[instance] = Sample(old.pairs + 1, old.total + d, old.squares + d * d)
        if index < last and when[index + 1] == minute:
            continue
        found.looks += 1
        yield judge(pooled(samples))


def coverage_at_every_look(scenario: Scenario, pools: range, hours: tuple[float, ...]) -> Coverage:
    """Return how often the interval for every look holds the pool's truth at all of these looks."""
    found = Coverage()
    for pairs in chunks_of(scenario, pools):
        for row in range(pairs.d.shape[0]):
            truth = float(pairs.truth[row].mean())
            low, high, count = -np.inf, np.inf, 0
            for hour in hours:
                samples, _ = samples_at(pairs, row, hour * 3600 + 2 * REPORT_SECONDS)
                count = sum(each.pairs for each in samples)
                ends = interval_at_every_look(
                    count, sum(each.total for each in samples), sum(each.squares for each in samples)
                )
                low, high = max(low, ends[0]), min(high, ends[1])
            found.add(100 * low, 100 * high, 100 * truth, count)
    return found


def cluster_robust(samples: list[Sample]) -> tuple[float, float]:
    """Return the interval that takes the instance as the unit: CR2 with Bell and McCaffrey's degrees of freedom.

    Not what the product publishes: the alternative that it is compared with. G. Imbens and M. Kolesár, "Robust standard
    errors in small samples", Review of Economics and Statistics 98 (2016) 701-712, for a mean with independent pairs.
    """
    used = [each for each in samples if each.pairs]
    whole = sum(each.pairs for each in used)
    mean = sum(each.total for each in used) / whole
    if len(used) < 2:
        return -np.inf, np.inf
    counts = np.array([each.pairs for each in used], float)
    adjust = 1 / (1 - counts / whole)
    variance = float((adjust * (np.array([each.total for each in used]) - counts * mean) ** 2).sum()) / whole**2
    weights = adjust * counts**2
    trace = float((counts**2).sum() + (weights.sum() ** 2 - (weights**2).sum()) / whole**2)
    margin = t_quantile_975(max(1.0, whole**2 / trace)) * variance**0.5
    return mean - margin, mean + margin


def compare(scenario: Scenario, pools: range, hour: float) -> tuple[Coverage, Coverage]:
    """Return the coverage of the product's interval and of the cluster-robust one at a look."""
    ours, theirs = Coverage(), Coverage()
    for pairs in chunks_of(scenario, pools):
        for row in range(pairs.d.shape[0]):
            samples, truth = samples_at(pairs, row, hour * 3600 + 2 * REPORT_SECONDS)
            effect = pool(samples)
            assert effect is not None
            ours.add(100 * effect.low, 100 * effect.high, 100 * truth, effect.pairs)
            low, high = cluster_robust(samples)
            theirs.add(100 * low, 100 * high, 100 * truth, effect.pairs)
    return ours, theirs
