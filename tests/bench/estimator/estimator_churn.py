"""Pods that come and go: what the ledger is for, and what happens without it."""

import numpy as np
from estimator_checks import REPORT_SECONDS, Watch, chunks_of, pooled
from estimator_world import DAY_SECONDS, Pairs, Scenario
from wattlock_api.constants import Reason
from wattlock_api.nodeenergy import InstanceStatus, Moments, PairStats
from wattlock_operator.ledger import Ledger, advance
from wattlock_operator.pooling import Sample
from wattlock_operator.reports import NodeInstance, PoolReport
from wattlock_operator.verdict import VERIFIED, judge

CAP_MHZ = 1590


def _report(samples: dict[str, Sample]) -> PoolReport:
    instances = []
    for name, sample in samples.items():
        moments = Moments(total=f"{sample.total:.9f}", squares=f"{sample.squares:.9f}")
        stats = PairStats(cap_mhz=CAP_MHZ, pairs=sample.pairs, energy=moments)
        status = InstanceStatus(key=f"p/{name}", policy_uid="p", pool="decode", instance=name, pair_stats=[stats])
        instances.append(NodeInstance("n", status, False))
    return PoolReport((), tuple(instances))


def watch_churn(scenario: Scenario, pools: range, mean_life_seconds: float) -> tuple[Watch, Watch]:
    """Look every minute for a day while pods are replaced, each after a random time.

    Returns:
        What the product does (its ledger keeps the pairs of pods that are gone), and what it would do without.
    """
    kept, forgotten = Watch(), Watch()
    chance = np.random.default_rng([7, pools.start])
    for pairs in chunks_of(scenario, pools, known=False):
        for row in range(pairs.d.shape[0]):
            for found, verdicts in zip((kept, forgotten), _day(pairs, row, chance, mean_life_seconds), strict=True):
                found.pools += 1
                found.verified += verdicts[0]
                found.one_look += verdicts[1]
                found.looks += verdicts[2]
    return kept, forgotten


def _day(pairs: Pairs, row: int, chance: np.random.Generator, mean_life_seconds: float) -> list[list[int]]:
    """Return for both rules: ever verified, ever by one look alone, number of looks."""
    events: list[tuple[float, int, float | None]] = []
    for slot, (d, done) in enumerate(zip(pairs.d[row], pairs.done_seconds[row], strict=True)):
        events += zip((done + REPORT_SECONDS).tolist(), [slot] * len(d), d.tolist(), strict=True)
        died = np.cumsum(chance.exponential(mean_life_seconds, int(3 * DAY_SECONDS / mean_life_seconds) + 20))
        events += [(at, slot, None) for at in died[died < DAY_SECONDS].tolist()]
    life = [0] * pairs.d.shape[1]
    samples: dict[str, Sample] = {}
    ledger, gone = Ledger(), Sample(0, 0.0, 0.0)
    verdicts = [[0, 0, 0], [0, 0, 0]]
    for _, slot, d in sorted(events, key=lambda event: event[0]):
        name = f"decode-{slot}-{life[slot]}"
        if d is None:
            if name in samples:
                ledger = advance(ledger, _report(samples))
                del samples[name]
                ledger = advance(ledger, _report(samples))
                tally = ledger.departed[CAP_MHZ]
                gone = Sample(tally.pairs, *tally.energy)
            life[slot] += 1
        else:
            old = samples.get(name, Sample(0, 0.0, 0.0))
            samples[name] = Sample(old.pairs + 1, old.total + d, old.squares + d * d)
        for verdict, each in zip(verdicts, ([*samples.values(), gone], list(samples.values())), strict=True):
            reason = judge(pooled(each))
            verdict[0] |= reason in VERIFIED
            verdict[1] |= reason in VERIFIED or reason is Reason.NEEDS_MORE_EVIDENCE
            verdict[2] += 1
    return verdicts
