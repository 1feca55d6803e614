"""What the rows of a sweep say. Pure.

The Pareto front, whether a power limit bites, how much the clock matters, which cap to take, where architectures cross.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from wattlock_agent.sweep.estimates import Row
from wattlock_agent.sweep.plan import STOCK, Lever, Shape, Workload

#: Time at the power limit below which it is called inert: the counter trails the load by up to 0.4 s.
INERT_SHARE = 0.02
#: Relative difference of throughput or of energy below which two points are the same.
SAME = 0.005
#: Elasticities that part the classes: halving the clock costs 3.4 % and 29 % of throughput.
MILD_ELASTICITY = 0.05
SENSITIVE_ELASTICITY = 0.5
#: Clocks below this share of the highest observed one say nothing about a cap that anybody would take.
_LOWEST_SHARE = 0.35


class Behaviour(StrEnum):
    """How throughput answers to the SM clock, by measured elasticity."""

    INSENSITIVE = "insensitive"
    MILDLY_SENSITIVE = "mildly sensitive"
    SENSITIVE = "sensitive"


class Verdict(StrEnum):
    """Whether a power limit held the clock down."""

    INERT = "Inert"
    BINDING = "Binding"
    UNKNOWN = "Unknown"


@dataclass(frozen=True)
class Elasticity:
    """Slope of log throughput over log clock: 0 means that the clock does not matter, 1 that throughput follows it."""

    slope: float
    points: int
    behaviour: Behaviour


@dataclass(frozen=True)
class Choice:
    """The cap that a sweep speaks for, with what it is sure to save in each of the decode workloads measured."""

    cap_mhz: int
    saving_percent: float
    """Of the workload in which it saves least."""
    throughput_percent: float
    """Change in the workload in which it loses most; negative is a loss."""
    pairs: int
    """Comparisons with stock, fewest of all workloads."""


@dataclass(frozen=True)
class Crossing:
    """Two architectures change places between two measured lengths."""

    shorter: str
    """Which one takes less energy for short requests."""
    longer: str
    length_tokens: float
    """Where, interpolated on logarithmic axes."""


def verdict(row: Row) -> Verdict:
    """Return what the limiter counter says."""
    if row.cap_share is None:
        return Verdict.UNKNOWN
    return Verdict.INERT if row.cap_share < INERT_SHARE else Verdict.BINDING


def front(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows of one workload that no other one beats, by throughput: more tokens for no more joules each.

    Differences below ``SAME`` count as none, so noise alone puts no point onto the front.
    """
    return tuple(
        sorted(
            (row for row in rows if not any(_beats(other, row) for other in rows)),
            key=lambda row: row.tokens_per_second,
        )
    )


def _beats(other: Row, row: Row) -> bool:
    more_tokens = math.log(other.tokens_per_second / row.tokens_per_second)
    fewer_joules = math.log(row.joules_per_token / other.joules_per_token)
    # The sum of both grows with every win, so no circle of points beats itself off the front.
    return min(more_tokens, fewer_joules) >= -SAME and max(more_tokens, fewer_joules) > SAME


def elasticity(rows: Sequence[Row]) -> Elasticity | None:
    """Return how the throughput of one workload answers to the clock, by least squares through stock and clock points.

    By the *observed* clock: a request that was clamped or that a limiter cut says nothing about the clock it names.
    ``None`` with fewer than three points, or with all of them at one clock.
    """
    measured = [
        (row.observed_mhz, row.tokens_per_second)
        for row in rows
        if row.setting.lever is not Lever.POWER and row.observed_mhz
    ]
    highest = max((clock for clock, _ in measured), default=0.0)
    logs = [(math.log(clock), math.log(rate)) for clock, rate in measured if clock >= _LOWEST_SHARE * highest]
    if len(logs) < 3:
        return None
    mean_x = math.fsum(x for x, _ in logs) / len(logs)
    mean_y = math.fsum(y for _, y in logs) / len(logs)
    spread = math.fsum((x - mean_x) ** 2 for x, _ in logs)
    if spread < 1e-6:
        return None
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    return Elasticity(slope, len(logs), behaviour(slope))


def behaviour(slope: float) -> Behaviour:
    """Return the class of an elasticity. Throughput that *falls* with a higher clock (slope below 0) is insensitive."""
    if slope < MILD_ELASTICITY:
        return Behaviour.INSENSITIVE
    return Behaviour.MILDLY_SENSITIVE if slope < SENSITIVE_ELASTICITY else Behaviour.SENSITIVE


def choose(rows: Sequence[Row], max_loss_percent: float) -> Choice | None:
    """Return the clock that saves most in decode, of those that are surely good for every decode workload.

    Surely: in each of them the interval of the saving lies above zero, and that of the loss below ``max_loss_percent``.
    Of several workloads the one that is served worst counts. ``None``: no clock is that good, or none was measured.
    """
    decode = [row for row in rows if row.workload.shape is Shape.DECODE]
    measured = {row.workload for row in decode}
    choices = []
    for setting in dict.fromkeys(row.setting for row in decode if row.setting.lever is Lever.CLOCK):
        own = [row for row in decode if row.setting == setting]
        changes = [(row.energy, row.throughput) for row in own if row.energy and row.throughput]
        if {row.workload for row in own} != measured or len(changes) < len(own):
            continue
        if all(energy.high_percent < 0 and rate.low_percent > -max_loss_percent for energy, rate in changes):
            choices.append(
                Choice(
                    setting.value,
                    min(-energy.percent for energy, _ in changes),
                    min(rate.percent for _, rate in changes),
                    min(energy.pairs for energy, _ in changes),
                )
            )
    return max(choices, key=lambda choice: choice.saving_percent, default=None)


def request_joules(rows: Sequence[Row]) -> dict[Workload, float]:
    """Return the energy of one whole request at stock, in J, by the decode workload: its prompt and its answer.

    Only where both phases were measured at that length.
    """
    stock = {row.workload: row.joules_per_token for row in rows if row.setting == STOCK}
    energies = {}
    for workload, joules in stock.items():
        if workload.shape is not Shape.DECODE:
            continue
        prefill = Workload(Shape.PREFILL, workload.concurrency, workload.length_tokens, 1)
        if prefill in stock:
            energies[workload] = workload.length_tokens * stock[prefill] + workload.output_tokens * joules
    return energies


def crossings(joules: Mapping[str, Mapping[int, float]]) -> tuple[Crossing, ...]:
    """Return where architectures change places.

    Args:
        joules: by architecture, energy by length; lengths that both have are compared.
    """
    found = []
    names = sorted(joules)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            lengths = sorted(set(joules[one]) & set(joules[other]))
            gaps = [math.log(joules[one][length] / joules[other][length]) for length in lengths]
            for position in range(1, len(lengths)):
                left, right = gaps[position - 1], gaps[position]
                if left * right >= 0:
                    continue
                share = left / (left - right)
                ends = math.log(lengths[position - 1]), math.log(lengths[position])
                where = math.exp(ends[0] + share * (ends[1] - ends[0]))
                shorter, longer = (one, other) if left < 0 else (other, one)
                found.append(Crossing(shorter, longer, where))
    return tuple(found)
