"""What is known of one GPU over time: energy, clocks, limiters and clamps, for its present holder. Pure."""

from collections import deque
from dataclasses import dataclass
from statistics import median_low

from wattlock_api.nodeenergy import GpuStatus

from wattlock_agent.energy import MAX_GAP_SECONDS, EnergyMeter
from wattlock_agent.gpu.base import GpuReading
from wattlock_agent.limiters import LIMITER_BITS, LIMITER_NAMES, RecentCap, growth
from wattlock_agent.verify import BUSY_PERCENT, SETTLE_SECONDS, Finding, LockReading, LockWatch, check_lock

#: "The last report interval" of the status.
WINDOW_SECONDS = 20.0
_CLAMP_WINDOW_SECONDS = 10.0
_CLAMP_MIN_READINGS = 5
#: Only a GPU that never rests shows by a low clock that something holds it down.
_CLAMP_BUSY_PERCENT = 90


@dataclass(frozen=True)
class _Moment:
    at_seconds: float
    sm_mhz: int | None
    busy_percent: int
    cap_mhz: int | None
    """The cap that was in force and settled; ``None``: released, or just switched."""
    released: bool
    limited: bool
    peak_mw: int | None


def busy_percent(reading: GpuReading) -> int:
    """Return the share of time with work; where the GPU does not tell, the idle bit decides."""
    if reading.utilization_percent is not None:
        return reading.utilization_percent
    if reading.event_reasons is not None:
        return 0 if reading.event_reasons & 0x1 else 100
    return 0


class GpuTrack:
    """Sums and recent readings of one GPU. Begins anew when the holder changes."""

    def __init__(self, holder_uid: str, before: GpuStatus | None = None) -> None:
        """``before`` is what an earlier agent had reported; it counts when it was for the same holder."""
        same = before is not None and before.holder is not None and before.holder.uid == holder_uid
        earlier = before if before is not None and same else None
        self.holder_uid = holder_uid
        counted = earlier.energy_joules if earlier else None
        self.meter = EnergyMeter(None if counted is None else float(counted), earlier.energy_gaps if earlier else 0)
        self.busy_seconds = float(earlier.busy_seconds or 0) if earlier else 0.0
        self.clamp_seconds = float(earlier.clamp_seconds or 0) if earlier else 0.0
        self.limiter_seconds = {
            name: float(getattr(earlier.limiters, f"{name}_seconds") or 0) if earlier else 0.0 for name in LIMITER_NAMES
        }
        self.recent_cap = RecentCap()
        if earlier and earlier.recent_busy_seconds is not None and earlier.recent_power_cap_seconds is not None:
            self.recent_cap = RecentCap(float(earlier.recent_busy_seconds), float(earlier.recent_power_cap_seconds))
        self.last: GpuReading | None = None
        self.clamped = False
        """Whether firmware held the clock below the present cap when the GPU was last loaded under it: neither a
        control epoch nor a lull undoes the finding."""
        self.observed_mhz: int | None = None
        """Median SM clock while busy and capped, in MHz, over the last report interval under the last cap: a control
        epoch does not change it."""
        self.released_mhz: int | None = None
        """Median SM clock while busy and released, in MHz, over the last report interval."""
        self.watch = LockWatch()
        self._cap_mhz: int | None = None
        self._recent: deque[_Moment] = deque(maxlen=64)

    def interrupt(self) -> None:
        """End the interval: the driver was opened anew or lost the GPU, so any counter may have restarted unseen."""
        self.meter.interrupt()
        self.last = None

    def add(
        self,
        reading: GpuReading,
        cap_mhz: int | None,
        step_mhz: int,
        lock_age_seconds: float | None,
        idle: bool = False,
    ) -> tuple[Finding, bool]:
        """Add a reading taken while our lock asked for ``cap_mhz`` (``None``: released).

        ``idle``: that is the lower cap of an instance without requests. What was seen under the ordinary one stands.

        Returns:
            What it says about the lock, and whether a counter went back.
        """
        before, self.last = self.last, reading
        elapsed_seconds = reading.at_seconds - before.at_seconds if before is not None else 0.0
        grown = growth(before.limiters, reading.limiters, elapsed_seconds) if before is not None else None
        if grown is not None and grown.restarted:
            self.meter.interrupt()  # a restart is one of all counters, also where the energy has passed its old value
        limit_mw = max((each.power_limit_mw or 0 for each in (before, reading) if each is not None), default=0)
        restarted = self.meter.add(reading.at_seconds, reading.energy_mj, limit_mw / 1000 or None)
        restarted = restarted or (grown is not None and grown.restarted)
        busy = busy_percent(reading)
        # Over a longer gap it is not known how long the GPU was busy; the counters tell even then.
        seconds = elapsed_seconds if not restarted and 0 < elapsed_seconds <= MAX_GAP_SECONDS else 0.0
        limited = self._add_limiters(reading, {} if restarted or grown is None else grown.seconds, seconds, busy)
        self.busy_seconds += seconds * busy / 100
        settled = lock_age_seconds is not None and lock_age_seconds >= SETTLE_SECONDS and not idle
        self._recent.append(
            _Moment(
                reading.at_seconds,
                reading.sm_mhz,
                busy,
                cap_mhz if settled else None,
                cap_mhz is None,
                limited,
                reading.power_instant_mw,
            )
        )
        if cap_mhz is not None and cap_mhz != self._cap_mhz and not idle:
            # What was observed belongs to another request.
            self._cap_mhz, self.observed_mhz, self.clamped = cap_mhz, None, False
        if cap_mhz is not None and settled:
            self._judge(cap_mhz, step_mhz, seconds)
        self.released_mhz = self._median_mhz([each for each in self._within(WINDOW_SECONDS) if each.released])
        if cap_mhz is None or lock_age_seconds is None:
            self.watch = LockWatch(losses=self.watch.losses)
            return Finding.FINE, restarted
        self.watch, finding = check_lock(
            self.watch,
            LockReading(reading.at_seconds, reading.sm_mhz, busy >= BUSY_PERCENT, cap_mhz, step_mhz, lock_age_seconds),
        )
        return finding, restarted

    def watts(self) -> float | None:
        """Return mean power over the last report interval, from the energy counter."""
        return self.meter.mean_watts(WINDOW_SECONDS)

    def peak_watts(self) -> float | None:
        """Return the highest instantaneous power of the last report interval."""
        peaks = [moment.peak_mw for moment in self._within(WINDOW_SECONDS) if moment.peak_mw is not None]
        return max(peaks) / 1000 if peaks else None

    def _within(self, window_seconds: float) -> list[_Moment]:
        if not self._recent:
            return []
        newest = self._recent[-1].at_seconds
        return [moment for moment in self._recent if newest - moment.at_seconds <= window_seconds]

    @staticmethod
    def _median_mhz(moments: list[_Moment]) -> int | None:
        busy = [each.sm_mhz for each in moments if each.sm_mhz is not None and each.busy_percent >= BUSY_PERCENT]
        return median_low(busy) if busy else None

    def _judge(self, cap_mhz: int, step_mhz: int, seconds: float) -> None:
        """Note the clock under this cap, and whether firmware holds it down by more than a step with no limiter acting.

        Readings under another cap do not count: after a rise they would look like a clamp. ``seconds``: since the
        reading before.
        """
        moments = [m for m in self._within(WINDOW_SECONDS) if m.cap_mhz == cap_mhz and m.sm_mhz is not None]
        self.observed_mhz = self._median_mhz(moments)
        newest = self._recent[-1]
        loaded = [
            moment
            for moment in moments
            if moment.busy_percent >= _CLAMP_BUSY_PERCENT
            and newest.at_seconds - moment.at_seconds <= _CLAMP_WINDOW_SECONDS
        ]
        if len(loaded) >= _CLAMP_MIN_READINGS and loaded[-1] is newest:
            # The finding stands until a loaded GPU shows otherwise: in a lull nothing is learned.
            limited = any(moment.limited for moment in loaded)
            median_mhz = median_low([moment.sm_mhz or 0 for moment in loaded])
            self.clamped = not limited and median_mhz < cap_mhz - step_mhz
            if self.clamped:
                self.clamp_seconds += seconds

    def _add_limiters(self, reading: GpuReading, grown: dict[str, float], seconds: float, busy: int) -> bool:
        """Add what the counters grew by; returns whether any limiter acted.

        ``seconds``: for how long it is known whether the GPU was busy, 0 over a gap.
        """
        for name, grown_seconds in grown.items():
            self.limiter_seconds[name] += grown_seconds
        if seconds and "power_cap" in grown:
            self.recent_cap.add(seconds * busy / 100, grown["power_cap"])
        counted = any(getattr(reading.limiters, name) is not None for name in LIMITER_NAMES)
        if not counted and reading.event_reasons is not None:
            return bool(reading.event_reasons & LIMITER_BITS)
        return any(grown_seconds > 0 for grown_seconds in grown.values())
