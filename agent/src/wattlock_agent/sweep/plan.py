"""What a sweep measures, and in which order. Pure."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from wattlock_agent.clocks import snap_down_mhz

#: Clocks that are measured unless told otherwise, relative to the highest supported one. On the H200 (1980 MHz):
#: 1830, 1710, 1590, 1395, 1200, 990 and 780 MHz. Close together near the top, where the knee of decode is expected.
_CLOCK_SHARES = (0.925, 0.865, 0.8035, 0.71, 0.607, 0.5, 0.394)
_POWER_LIMITS = 6


class Lever(StrEnum):
    """What is changed about a GPU."""

    STOCK = "stock"
    """Nothing: no lock, and the power limit that was found."""
    CLOCK = "clock"
    """The SM clock is locked to [lowest supported, value in MHz]."""
    POWER = "power"
    """The power limit is set to the value, in W, and the clock is not locked."""


@dataclass(frozen=True, order=True)
class Setting:
    """One point of the sweep."""

    lever: Lever
    value: int = 0
    """MHz or W; 0 for stock."""

    def __str__(self) -> str:
        units = {Lever.STOCK: "stock", Lever.CLOCK: f"clock {self.value} MHz", Lever.POWER: f"limit {self.value} W"}
        return units[self.lever]


STOCK = Setting(Lever.STOCK)


class Shape(StrEnum):
    """Which phase the requests make most of."""

    DECODE = "decode"
    """Prompts that the engine has in its prefix cache and many generated tokens."""
    PREFILL = "prefill"
    """Prompts that the engine has never seen and one generated token."""


@dataclass(frozen=True, order=True)
class Workload:
    """Requests of one kind, of which a fixed number is always on the way."""

    shape: Shape
    concurrency: int
    length_tokens: int
    """Length of the prompts."""
    output_tokens: int
    """Tokens that each request generates; 1 for prefill."""

    def __str__(self) -> str:
        return f"{self.shape} {self.concurrency} x {self.length_tokens}"


@dataclass(frozen=True)
class Plan:
    """Everything that will be measured."""

    workloads: tuple[Workload, ...]
    settings: tuple[Setting, ...]
    """In the order in which they are set, the same for each workload; stock comes first, last, and between."""
    settle_seconds: float
    window_seconds: float

    @property
    def windows(self) -> int:
        """Number of measurements."""
        return len(self.workloads) * len(self.settings)

    def remaining_seconds(self, done: int) -> float:
        """Return how long the rest takes, after so many windows; the time until the load stands is not in it."""
        return (self.windows - done) * (self.settle_seconds + self.window_seconds)


class PlanError(ValueError):
    """Points that this GPU cannot take. The message says what to write instead."""


def clock_points(supported_mhz: Sequence[int], wanted_mhz: Sequence[int] | None) -> tuple[int, ...]:
    """Return the clocks to measure, highest first, each one that the GPU supports.

    Args:
        supported_mhz: the GPU's list.
        wanted_mhz: what was asked for, snapped down onto the list; ``None`` for seven from the whole range,
            empty for none.

    Raises:
        PlanError: the GPU has no clock as low as that.
    """
    if not supported_mhz:
        raise PlanError("this GPU lists no clocks that could be locked: nothing to sweep")
    if wanted_mhz is None:
        wanted_mhz = [round(share * max(supported_mhz)) for share in _CLOCK_SHARES]
    points = set()
    for wanted in wanted_mhz:
        clock = snap_down_mhz(supported_mhz, wanted)
        if clock is None:
            raise PlanError(f"{wanted} MHz is below the lowest clock, write {min(supported_mhz)} MHz or more")
        points.add(clock)
    return tuple(sorted(points, reverse=True))


def power_points(low_watts: float, high_watts: float, wanted_watts: Sequence[int] | None) -> tuple[int, ...]:
    """Return the power limits to measure, highest first.

    Args:
        low_watts: lowest limit that the GPU takes.
        high_watts: the limit that was found, which is the stock point and so not among the points.
        wanted_watts: what was asked for; ``None`` for six limits evenly over the range, empty for none.

    Raises:
        PlanError: outside the range.
    """
    if wanted_watts is None:
        span = high_watts - low_watts
        # Upwards to whole watts, as the lowest limit may be 52.5 W; in a narrow range that may reach the highest one.
        points = {math.ceil(low_watts + span * each / _POWER_LIMITS) for each in range(_POWER_LIMITS)}
        return tuple(sorted((each for each in points if low_watts <= each < high_watts), reverse=True))
    for wanted in wanted_watts:
        if not low_watts <= wanted <= high_watts:
            raise PlanError(
                f"{wanted} W is out of range: this GPU stands at {high_watts:g} W and takes {low_watts:g} W or more"
            )
    return tuple(sorted({wanted for wanted in wanted_watts if wanted < high_watts}, reverse=True))


def interleaved(points: Sequence[Setting], repeats: int, stock_every: int, seed: str) -> tuple[Setting, ...]:
    """Return all points ``repeats`` times, stock before, after and between them.

    Each repeat is a block with an order of its own, drawn from the seed, so that no point always follows the same one
    and a slow drift (temperature) falls on all of them. At most ``stock_every`` points lie between two stock points,
    which are their controls. A block begins and ends with stock points of its own: repeats that shared one would not
    be independent, and intervals over them too narrow (90 instead of 95 % at five repeats).
    """
    order: list[Setting] = []
    for repeat in range(repeats):
        block = sorted(points, key=lambda point: hashlib.sha256(f"{seed}/{repeat}/{point}".encode()).digest())
        order.append(STOCK)
        for start in range(0, len(block), stock_every):
            order += [*block[start : start + stock_every], STOCK]
    return tuple(order)


def workloads(
    shapes: Sequence[Shape], concurrencies: Sequence[int], lengths_tokens: Sequence[int], output_tokens: int
) -> tuple[Workload, ...]:
    """Return every combination, prefill before decode, short before long."""
    return tuple(
        Workload(shape, concurrency, length, 1 if shape is Shape.PREFILL else output_tokens)
        for shape in sorted(set(shapes), reverse=True)
        for concurrency in sorted(set(concurrencies))
        for length in sorted(set(lengths_tokens))
    )
