"""Time under each limiter, and how much of the busy time the power limit took. Pure.

The driver counts, in nanoseconds, the time for which each cause held the clock down. Differences of these counters are
exact however seldom they are read; the event-reason bits are only samples.
"""

from collections import deque
from dataclasses import dataclass, fields

from wattlock_agent.gpu.base import LimiterNanoseconds

LIMITER_NAMES = tuple(field.name for field in fields(LimiterNanoseconds))
#: Event-reason bits of limiters (power cap, hardware slowdown, thermal, power brake, board limit, reliability): used
#: where the counters are missing. https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
LIMITER_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | 0x200 | 0x400
#: The power cap is judged by the last 15 minutes of busy time: a sum over weeks would hide that it binds since an hour.
RECENT_BUSY_SECONDS = 900.0
_BUCKET_SECONDS = 60.0
#: Thermal time is the sum of two counters (software, hardware), so it may grow twice as fast as time.
_MOST_PER_SECOND = 2.0
#: Counter and clock are not read at one instant, and how often the driver moves the counters is not documented.
_SLACK_SECONDS = 1.0


@dataclass(frozen=True)
class Growth:
    """By how much the counters grew between two readings."""

    seconds: dict[str, float]
    """By limiter, those that the GPU has and that grew or stood still."""
    restarted: bool
    """Whether one of them fell: the driver was reloaded, and nothing is known of the time between."""


def growth(before: LimiterNanoseconds, after: LimiterNanoseconds, elapsed_seconds: float) -> Growth:
    """Return the seconds that each counter grew by, ``elapsed_seconds`` after the reading before.

    What a counter cannot have counted in that time is left out: it is no measurement.
    """
    grown: dict[str, float] = {}
    restarted = False
    for name in LIMITER_NAMES:
        old_ns, new_ns = getattr(before, name), getattr(after, name)
        if old_ns is None or new_ns is None:
            continue
        if new_ns < old_ns:
            restarted = True
        elif (new_ns - old_ns) / 1e9 <= _MOST_PER_SECOND * elapsed_seconds + _SLACK_SECONDS:
            grown[name] = (new_ns - old_ns) / 1e9
    return Growth({} if restarted else grown, restarted)


class RecentCap:
    """Busy time, and time at the power cap in it, over the last 15 minutes of busy time."""

    def __init__(self, busy_seconds: float = 0.0, capped_seconds: float = 0.0) -> None:
        """What an earlier agent had found."""
        self._buckets: deque[tuple[float, float]] = deque([(busy_seconds, capped_seconds)])

    def add(self, busy_seconds: float, capped_seconds: float) -> None:
        """Add an interval of which both are known."""
        busy, capped = self._buckets[-1]
        if busy >= _BUCKET_SECONDS:
            self._buckets.append((busy_seconds, capped_seconds))
        else:
            self._buckets[-1] = (busy + busy_seconds, capped + capped_seconds)
        while self.busy_seconds - self._buckets[0][0] >= RECENT_BUSY_SECONDS:
            self._buckets.popleft()

    @property
    def busy_seconds(self) -> float:
        """Busy time."""
        return sum(busy for busy, _ in self._buckets)

    @property
    def capped_seconds(self) -> float:
        """Time at the power cap. May pass the busy time a little: the counter trails the load by up to 0.4 s."""
        return sum(capped for _, capped in self._buckets)
