"""Energy of one GPU from the driver's counter. Pure.

The counter is the truth: over a whole record it agrees with the integral of instantaneous power to 0.1 %, while the
1 s average power is off by up to 12 % over windows of some seconds. Nothing else is ever put in its place: a GPU
without the counter has no energy and no power here.

The counter is a sum since the driver was loaded, so readings that were missed lose nothing: the next one tells. What
can go wrong, and what is done about it:

- It starts anew at about 0 (driver reload, GPU reset) and is seen to have fallen: the interval is left out.
- It starts anew unseen and has passed its old value by the next reading. Whoever knows of it (the driver was opened
  anew, the GPU was lost, another counter fell) calls ``interrupt``. If nobody knows, too little is counted and never
  too much: a counter shows what was used since it started, so ``new - old <= new <=`` what was used in between.
- It jumps by more than the board can use (a reading of 0 and back to the old sum, garbage): the interval is left out.
- Time. ``at_seconds`` is a clock that goes on while the machine is suspended and never steps (``clock.now_seconds``);
  readings that are not later than the last one are ignored.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

#: Two readings in a row may be missed. Between those that lie further apart nothing is interpolated.
MAX_GAP_SECONDS = 3.5
#: Mean power over less than this is not told: the counter moves every 0.1 s, so that each end of a window is off by up
#: to 0.1 s of power, here 2 %.
MIN_POWER_SECONDS = 5.0
#: More than this multiple of the power limit is no reading of a board at work. On an H100 and an H200 with a limit of
#: 700 W the counter never rose by more than 1.03 times the limit over a second, 1.5 times over 0.1 s
#: (tests/data, ``test_replay_traces``); the rest is room for other boards and for a limit that was lowered meanwhile.
IMPLAUSIBLE_LIMIT_FACTOR = 2.0
#: Where the GPU does not tell its limit: several times what any board may draw (1,400 W for a B300).
UNKNOWN_LIMIT_WATTS = 5000.0
#: The counter and the time of its reading may be off by so much: some refreshes of 0.1 s and a slow call.
_SLACK_SECONDS = 0.5
_KEPT_SECONDS = 120.0
_MAX_POINTS = 512


@dataclass(frozen=True)
class EnergyPoint:
    """The energy at a time."""

    at_seconds: float
    """Time of the reading, on the clock of ``clock.now_seconds``."""
    joules: float
    """Since metering began. What was used while the counter restarted is unknown and not in it."""
    life: int
    """Grows with each interval left out: energy between points of different lives is unknown."""


class EnergyMeter:
    """Adds up the counter over its restarts and remembers the last two minutes."""

    def __init__(self, joules: float | None = None, gaps: int = 0) -> None:
        """``joules`` and ``gaps`` are what an earlier agent had counted; ``None``: it had counted nothing.

        What was used between its last report and now is unknown: a gap.
        """
        self._sum_mj = round(1000 * (joules or 0.0))  # whole numbers: a sum over years loses nothing
        self.measured = joules is not None
        """Whether the counter was ever read. Without that there is no energy, not even 0."""
        self.life = 0
        self._earlier_gaps = gaps if joules is None else gaps + 1
        self._last: tuple[float, int] | None = None
        self._points: deque[EnergyPoint] = deque(maxlen=_MAX_POINTS)

    @property
    def joules(self) -> float:
        """Energy since metering began."""
        return self._sum_mj / 1000

    @property
    def gaps(self) -> int:
        """How many intervals were left out: what was used in them is in no sum."""
        return self._earlier_gaps + self.life

    def add(self, at_seconds: float, energy_mj: int | None, limit_watts: float | None = None) -> bool:
        """Add a reading of the counter, in millijoules; ``None`` (it has none) adds nothing.

        ``limit_watts`` is the board's power limit, where it is known.

        Returns:
            Whether the counter went back: the driver was reloaded or the GPU was reset.
        """
        if energy_mj is None or (self._points and at_seconds <= self._points[-1].at_seconds):
            return False
        self.measured = True
        restarted = False
        if self._last is not None:
            seconds, grown_mj = at_seconds - self._last[0], energy_mj - self._last[1]
            most_watts = UNKNOWN_LIMIT_WATTS if not limit_watts else IMPLAUSIBLE_LIMIT_FACTOR * limit_watts
            if grown_mj > 1000 * most_watts * (seconds + _SLACK_SECONDS):
                # Which of the two readings is wrong is not known: the next one begins anew.
                self.interrupt()
                return False
            restarted = grown_mj < 0
            if restarted:
                self.life += 1
            else:
                self._sum_mj += grown_mj
        self._last = (at_seconds, energy_mj)
        self._points.append(EnergyPoint(at_seconds, self.joules, self.life))
        while at_seconds - self._points[0].at_seconds > _KEPT_SECONDS:
            self._points.popleft()
        return restarted

    def interrupt(self) -> None:
        """End the interval: the counter may have restarted unseen."""
        if self._last is not None:
            self._last = None
            self.life += 1

    @property
    def newest_seconds(self) -> float:
        """Time of the newest reading; minus infinity without one."""
        return self._points[-1].at_seconds if self._points else float("-inf")

    def at(self, at_seconds: float) -> EnergyPoint | None:
        """Return the energy at a time between two readings of one life, by a straight line between them.

        ``None``: no readings on both sides, at most ``MAX_GAP_SECONDS`` apart.
        """
        index = bisect_left(self._points, at_seconds, key=lambda point: point.at_seconds)
        if index == len(self._points):
            return None
        after = self._points[index]
        if after.at_seconds == at_seconds:
            return after
        if index == 0:
            return None
        before = self._points[index - 1]
        gap_seconds = after.at_seconds - before.at_seconds
        if before.life != after.life or gap_seconds > MAX_GAP_SECONDS:
            return None
        share = (at_seconds - before.at_seconds) / gap_seconds
        return EnergyPoint(at_seconds, before.joules + share * (after.joules - before.joules), after.life)

    def mean_watts(self, window_seconds: float) -> float | None:
        """Return mean power over the newest readings, at most ``window_seconds``: the counter's rise by the time.

        ``None``: the readings of the counter's present life span less than 5 seconds.
        """
        if not self._points or self._last is None:
            return None
        last = self._points[-1]
        first = last
        for point in reversed(self._points):
            if point.life != last.life or last.at_seconds - point.at_seconds > window_seconds:
                break
            first = point
        seconds = last.at_seconds - first.at_seconds
        return (last.joules - first.joules) / seconds if seconds >= MIN_POWER_SECONDS else None
