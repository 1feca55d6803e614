"""Arithmetic on the list of clocks that a GPU supports. Pure."""

from collections.abc import Sequence

from wattlock_api.nodeenergy import ClockRange

_MAX_RANGES = 64


def snap_down_mhz(supported_mhz: Sequence[int], cap_mhz: int) -> int | None:
    """Return the highest supported clock that is not above ``cap_mhz``; ``None`` when all of them are above it."""
    fitting = [clock for clock in supported_mhz if clock <= cap_mhz]
    return max(fitting) if fitting else None


def step_mhz(supported_mhz: Sequence[int], clock_mhz: int) -> int:
    """Return the distance from ``clock_mhz`` to its nearest other supported clock: the driver's rounding.

    1 MHz where the list has no other clock.
    """
    return min((abs(clock - clock_mhz) for clock in supported_mhz if clock != clock_mhz), default=1)


def to_ranges(supported_mhz: Sequence[int]) -> list[ClockRange]:
    """Return ascending clocks as ranges of equal steps; what does not fit into 64 ranges (the highest) is left out."""
    ranges: list[ClockRange] = []
    index = 0
    while index < len(supported_mhz) and len(ranges) < _MAX_RANGES:
        first = last = supported_mhz[index]
        step = supported_mhz[index + 1] - first if index + 1 < len(supported_mhz) else 1
        index += 1
        while index < len(supported_mhz) and supported_mhz[index] - last == step:
            last = supported_mhz[index]
            index += 1
        ranges.append(ClockRange(min_mhz=first, max_mhz=last, step_mhz=step))
    return ranges
