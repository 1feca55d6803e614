"""Locks that were there before ours: a lock cannot be read back, so they are inferred from what the GPU does. Pure.

A GPU that nobody holds down runs at its highest clock under load, unless a limiter acts, which its counters tell
(recorded on a real H100 and H200: tests/data). So one that is released by us, busy all the time, and sits flat and far
below its highest clock while no limiter acts is suspected to be under a lock of somebody else. Firmware clamps act on
locked clocks near the top alone (requests at or above 1830 of 1980 MHz, arXiv 2605.11999), and are less than a tenth
below it: neither can be taken for a foreign lock.

Not found: a lock within a tenth of the highest clock, and one on a GPU that is idle when ours is written.
"""

from dataclasses import dataclass, replace

from wattlock_agent.gpu.base import GpuIdentity, GpuReading
from wattlock_agent.limiters import LIMITER_BITS, growth

#: Suspected for so long: then it is a lock, or not a steady clock and so none. Much longer than what clock and
#: sensors need after a release of ours (a second).
CONFIRM_SECONDS = 8.0
MIN_READINGS = 6
#: Above what the foreign lock allows for so long, under load: it is gone.
CLEAR_SECONDS = 3.0
#: A lock holds the clock flat; a governor moves it.
FLAT_STEPS = 2
LOW_SHARE = 0.9
#: Only a GPU that never rests shows by a low clock that something holds it down.
BUSY_PERCENT = 90
#: Readings further apart than this are not one stretch of time.
_MAX_GAP_SECONDS = 5.0


@dataclass(frozen=True)
class _Stretch:
    """Consecutive readings of one kind."""

    since_seconds: float
    last_seconds: float
    readings: int
    lowest_mhz: int
    highest_mhz: int

    def plus(self, at_seconds: float, sm_mhz: int) -> "_Stretch":
        return _Stretch(
            self.since_seconds,
            at_seconds,
            self.readings + 1,
            min(self.lowest_mhz, sm_mhz),
            max(self.highest_mhz, sm_mhz),
        )

    @property
    def seconds(self) -> float:
        return self.last_seconds - self.since_seconds


@dataclass(frozen=True)
class FreeReading:
    """One reading of a GPU that is not under a lock of ours."""

    at_seconds: float
    sm_mhz: int | None
    busy_percent: int
    limited: bool | None
    """Whether a limiter acted since the reading before; ``None``: not known."""
    highest_mhz: int
    """The highest clock that the GPU supports."""
    step_mhz: int
    """Distance of the supported clocks below it."""


@dataclass(frozen=True)
class ForeignWatch:
    """What is known of foreign locks on a GPU. Times are monotonic seconds."""

    found_mhz: int | None = None
    """The clock at which a suspected foreign lock holds the GPU."""
    low: _Stretch | None = None
    high: _Stretch | None = None

    def suspected_until_seconds(self, now_seconds: float) -> float:
        """Return until when no lock of ours should be written over what may be one of somebody else; 0: at once."""
        if self.low is None or self.found_mhz is not None:
            return 0.0
        until = self.low.since_seconds + CONFIRM_SECONDS + 1.0
        return until if until > now_seconds and now_seconds - self.low.last_seconds <= _MAX_GAP_SECONDS else 0.0


def _longer(before: _Stretch | None, reading: FreeReading, sm_mhz: int) -> _Stretch:
    if before is None or reading.at_seconds - before.last_seconds > _MAX_GAP_SECONDS:
        return _Stretch(reading.at_seconds, reading.at_seconds, 1, sm_mhz, sm_mhz)
    return before.plus(reading.at_seconds, sm_mhz)


def watch_free(watch: ForeignWatch, reading: FreeReading) -> ForeignWatch:
    """Return what is known after one more reading. A finding stands until a loaded GPU shows otherwise."""
    sm_mhz = reading.sm_mhz
    if sm_mhz is None or reading.busy_percent < BUSY_PERCENT:
        return replace(watch, low=None, high=None)  # at rest nothing is learned
    margin_mhz = FLAT_STEPS * reading.step_mhz
    if watch.found_mhz is not None:
        if sm_mhz <= watch.found_mhz + margin_mhz:
            return replace(watch, high=None)
        high = _longer(watch.high, reading, sm_mhz)
        return ForeignWatch() if high.seconds >= CLEAR_SECONDS else replace(watch, high=high)
    if sm_mhz >= LOW_SHARE * reading.highest_mhz or reading.limited is not False:
        return ForeignWatch()
    low = _longer(watch.low, reading, sm_mhz)
    flat = low.highest_mhz - low.lowest_mhz <= margin_mhz
    if low.seconds >= CONFIRM_SECONDS and low.readings >= MIN_READINGS and flat:
        return ForeignWatch(found_mhz=low.highest_mhz)
    return ForeignWatch(low=low)


class ForeignLocks:
    """The watches of a node's GPUs. They are about GPUs, whoever holds them."""

    def __init__(self) -> None:
        self._watches: dict[str, ForeignWatch] = {}
        self._before: dict[str, GpuReading] = {}

    def add(self, identity: GpuIdentity, reading: GpuReading, busy_percent: int, ours: bool) -> int | None:
        """Add a reading; ``ours``: a lock of ours is or may be on the GPU.

        Returns:
            The clock of a foreign lock that is suspected from this reading on.
        """
        before = self._before.get(reading.uuid)
        self._before[reading.uuid] = reading
        watch = self._watches.get(reading.uuid, ForeignWatch())
        clocks = identity.supported_clocks_mhz
        if ours or len(clocks) < 2:
            self._watches[reading.uuid] = ForeignWatch()
            return None
        free = FreeReading(
            reading.at_seconds,
            reading.sm_mhz,
            busy_percent,
            _limited(before, reading),
            clocks[-1],
            clocks[-1] - clocks[-2],
        )
        after = self._watches[reading.uuid] = watch_free(watch, free)
        return after.found_mhz if watch.found_mhz is None else None

    def found_mhz(self, uuid: str) -> int | None:
        """Return the clock of a suspected foreign lock on the GPU."""
        return self._watches[uuid].found_mhz if uuid in self._watches else None

    def suspected_until_seconds(self, uuid: str, now_seconds: float) -> float:
        """Return until when a lock of ours should wait; 0: it need not."""
        return self._watches[uuid].suspected_until_seconds(now_seconds) if uuid in self._watches else 0.0


def _limited(before: GpuReading | None, reading: GpuReading) -> bool | None:
    """Return whether a limiter acts, by counters and bits together; ``None`` where neither can be read."""
    bits = reading.event_reasons
    if bits is not None and bits & LIMITER_BITS:
        return True
    if before is None:
        return None if bits is None else False
    grown = growth(before.limiters, reading.limiters, reading.at_seconds - before.at_seconds)
    if grown.restarted or any(seconds > 0 for seconds in grown.seconds.values()):
        return True
    return False if grown.seconds or bits is not None else None
