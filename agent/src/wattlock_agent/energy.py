"""Energy of one GPU from the driver's counter. Pure.

The counter is the truth: it agrees with the integral of instantaneous power to 0.1 %, while the 1 s average power is
off by up to 12 % over windows of some seconds. It starts anew at about 0 when the driver is loaded.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

#: Between readings that lie further apart nothing is interpolated.
MAX_GAP_SECONDS = 3.0
_KEPT_SECONDS = 120.0
_MAX_POINTS = 512


@dataclass(frozen=True)
class EnergyPoint:
    """The energy at a time."""

    at_seconds: float
    """Monotonic time."""
    joules: float
    """Since metering began. What was used while the counter restarted is unknown and not in it."""
    life: int
    """Grows with each restart: energy between points of different lives is unknown."""


class EnergyMeter:
    """Adds up the counter over its restarts and remembers the last two minutes."""

    def __init__(self, joules: float = 0.0) -> None:
        """``joules`` is what an earlier agent had counted."""
        self.joules = joules
        self.life = 0
        self._last_mj: int | None = None
        self._points: deque[EnergyPoint] = deque(maxlen=_MAX_POINTS)

    def add(self, at_seconds: float, energy_mj: int | None) -> bool:
        """Add a reading of the counter, in millijoules; ``None`` (it has none) adds nothing.

        Returns:
            Whether the counter went back: the driver was reloaded or the GPU was reset.
        """
        if energy_mj is None:
            return False
        restarted = self._last_mj is not None and energy_mj < self._last_mj
        if restarted:
            self.life += 1
        elif self._last_mj is not None:
            self.joules += (energy_mj - self._last_mj) / 1000
        self._last_mj = energy_mj
        if not self._points or at_seconds > self._points[-1].at_seconds:
            self._points.append(EnergyPoint(at_seconds, self.joules, self.life))
        while at_seconds - self._points[0].at_seconds > _KEPT_SECONDS:
            self._points.popleft()
        return restarted

    def interrupt(self) -> None:
        """End the interval: the driver was opened anew, so the counter may have restarted unseen."""
        self._last_mj = None
        self.life += 1

    @property
    def newest_seconds(self) -> float:
        """Time of the newest reading; minus infinity without one."""
        return self._points[-1].at_seconds if self._points else float("-inf")

    def at(self, at_seconds: float) -> EnergyPoint | None:
        """Return the energy at a time between two readings of one life, by a straight line between them.

        ``None``: no readings on both sides within three seconds of each other.
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
        """Return mean power over the newest readings, at most ``window_seconds``; ``None`` with fewer than two."""
        if not self._points:
            return None
        last = self._points[-1]
        first = last
        for point in reversed(self._points):
            if point.life != last.life or last.at_seconds - point.at_seconds > window_seconds:
                break
            first = point
        seconds = last.at_seconds - first.at_seconds
        return (last.joules - first.joules) / seconds if seconds > 0 else None
