"""Pairs of pods that are gone: they were measured, and stay in the estimate. Pure.

An agent reports sums of the instances that it has now. Were pairs to vanish with their pod, every pod that goes would
be a second chance for the evidence to rise (what spoke against it is forgotten as often as what spoke for it), and a
pool that scales all day would never have enough. So the operator keeps the sums of instances that left, by cap, and
publishes them in status: a restarted operator goes on from there. What is known of instances that left lately is kept
apart, so that a node that was only away is not counted twice. A restarted operator does not know their names any more:
it relies on agents, which begin at zero with an instance that they had ceased to report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from wattlock_api.base import decimal_string
from wattlock_api.pairs import Moments, PairStats

from wattlock_operator.reports import PoolReport, number

#: Instances that left and are known by name; sums of earlier ones are added up.
MAX_ABSENT = 1024
MAX_CAPS = 15

Key = tuple[str, str]
"""Node, and key of the instance."""


@dataclass(frozen=True)
class Tally:
    """Sums over pairs: of log ratios and of their squares."""

    pairs: int = 0
    energy: tuple[float, float] = (0.0, 0.0)
    throughput: tuple[float, float] = (0.0, 0.0)
    latency_pairs: int = 0
    latency: tuple[float, float] = (0.0, 0.0)

    def __add__(self, other: "Tally") -> "Tally":
        """Add the pairs of another instance."""
        return Tally(
            self.pairs + other.pairs,
            (self.energy[0] + other.energy[0], self.energy[1] + other.energy[1]),
            (self.throughput[0] + other.throughput[0], self.throughput[1] + other.throughput[1]),
            self.latency_pairs + other.latency_pairs,
            (self.latency[0] + other.latency[0], self.latency[1] + other.latency[1]),
        )


Tallies = Mapping[int, Tally]
"""By cap in MHz."""


@dataclass(frozen=True)
class Ledger:
    """What a pool's instances have measured."""

    present: Mapping[Key, Tallies] = field(default_factory=dict)
    absent: Mapping[Key, Tallies] = field(default_factory=dict)
    """Left lately, in the order in which they did."""
    settled: Tallies = field(default_factory=dict)
    """Of earlier ones, and of instances that began anew."""

    @property
    def gone(self) -> Tallies:
        """Sums of all pairs that no agent reports any more."""
        return _added(self.settled, *self.absent.values())

    @property
    def departed(self) -> Tallies:
        """What of them status has room for: the caps with most pairs.

        Which caps those are changes as instances leave and come back: who counts from look to look takes all of them.
        """
        sums = self.gone
        kept = sorted(sums, key=lambda cap_mhz: sums[cap_mhz].pairs)[-MAX_CAPS:]
        return {cap_mhz: sums[cap_mhz] for cap_mhz in sums if cap_mhz in kept}


def _added(*all_tallies: Tallies) -> dict[int, Tally]:
    sums: dict[int, Tally] = {}
    for tallies in all_tallies:
        for cap_mhz, tally in tallies.items():
            sums[cap_mhz] = sums.get(cap_mhz, Tally()) + tally
    return {cap_mhz: tally for cap_mhz, tally in sums.items() if tally.pairs}


def _moments(moments: Moments) -> tuple[float, float]:
    return number(moments.total), number(moments.squares)


def tally_of(stats: PairStats) -> Tally:
    """Return the sums for one cap in a report."""
    return Tally(
        stats.pairs,
        _moments(stats.energy),
        _moments(stats.throughput),
        stats.latency_pairs,
        _moments(stats.latency),
    )


def tallies_of(stats: Sequence[PairStats]) -> Tallies:
    """Return the sums in a report."""
    return {each.cap_mhz: tally_of(each) for each in stats}


def published(tallies: Tallies) -> list[PairStats]:
    """Return sums as status keeps them."""

    def moments(sums: tuple[float, float]) -> Moments:
        return Moments(total=decimal_string(sums[0], 9), squares=decimal_string(sums[1], 9))

    return [
        PairStats(
            cap_mhz=cap_mhz,
            pairs=tally.pairs,
            energy=moments(tally.energy),
            throughput=moments(tally.throughput),
            latency_pairs=tally.latency_pairs,
            latency=moments(tally.latency),
        )
        for cap_mhz, tally in sorted(tallies.items())
    ]


def opening(departed: Sequence[PairStats]) -> Ledger:
    """Return the ledger as an operator finds it at its start: what the last status says of pods that are gone.

    Pods that left while no operator watched are lost to it.
    """
    return Ledger(settled=tallies_of(departed))


def advance(ledger: Ledger, report: PoolReport) -> Ledger:
    """Return the ledger after a report."""
    present = {(item.node, item.instance.key): tallies_of(item.instance.pair_stats) for item in report.instances}
    absent = dict(ledger.absent)
    lost: list[Tallies] = []
    for key, now in present.items():
        before = ledger.present.get(key) or absent.pop(key, None) or {}
        # Sums only grow. Fewer pairs than before: the counting began anew, and what there was is told no more.
        lost.append({cap: tally for cap, tally in before.items() if now.get(cap, Tally()).pairs < tally.pairs})
    absent |= {key: tallies for key, tallies in ledger.present.items() if key not in present}
    while len(absent) > MAX_ABSENT:
        lost.append(absent.pop(next(iter(absent))))
    return replace(ledger, present=present, absent=absent, settled=_added(ledger.settled, *lost))
