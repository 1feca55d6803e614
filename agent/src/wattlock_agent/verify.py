"""Whether our lock is still there, judged by what the GPU does: a lock cannot be read back. Pure.

Two opposite findings: a clock **above** the cap under load means that the lock is gone (a driver reload, another
writer); a clock **below** it under load means that a limiter acts or, while no limiter's counter grows, that firmware
clamps the clock.
"""

from dataclasses import dataclass
from enum import StrEnum

#: Share of time with a kernel running from which on a GPU counts as under load.
BUSY_PERCENT = 50
#: Above the cap for so long, under load: the lock is gone.
LOST_SECONDS = 3.0
#: The sensors are refreshed every 0.1 s and a switch takes up to 0.5 s: earlier readings say nothing about a lock.
SETTLE_SECONDS = 2.0
MAX_LOSSES = 3
LOSSES_SECONDS = 600.0
FIRST_BACKOFF_SECONDS = 5.0
#: From the third loss on a lock is written again no sooner than this, where the policy says Coexist.
CONTESTED_SECONDS = 60.0
#: Readings further apart than this are not one stretch of time.
_MAX_GAP_SECONDS = 5.0


class Finding(StrEnum):
    """What a reading says about our lock."""

    FINE = "Fine"
    LOST = "Lost"
    CONFLICT = "Conflict"


@dataclass(frozen=True)
class LockWatch:
    """What was seen of a lock so far. Times are monotonic seconds."""

    above_since_seconds: float | None = None
    last_seconds: float = float("-inf")
    losses: tuple[float, ...] = ()
    """When the lock was found lost, within the last ten minutes."""


@dataclass(frozen=True)
class LockReading:
    """One reading of a GPU under our lock."""

    at_seconds: float
    sm_mhz: int | None
    busy: bool
    cap_mhz: int
    step_mhz: int
    lock_age_seconds: float


def check_lock(watch: LockWatch, reading: LockReading) -> tuple[LockWatch, Finding]:
    """Return what is now known and what is to be done.

    LOST: write it again after ``backoff_seconds``. CONFLICT: the third loss or a later one within ten minutes: leave
    the GPU alone, or write it again after ``backoff_seconds``, as the policy says.
    """
    if reading.lock_age_seconds < SETTLE_SECONDS or reading.sm_mhz is None:
        return LockWatch(losses=watch.losses), Finding.FINE
    if not reading.busy:
        return watch, Finding.FINE
    above = reading.sm_mhz > reading.cap_mhz + reading.step_mhz
    if not above:
        return LockWatch(losses=watch.losses, last_seconds=reading.at_seconds), Finding.FINE
    since_seconds = watch.above_since_seconds
    if since_seconds is None or reading.at_seconds - watch.last_seconds > _MAX_GAP_SECONDS:
        since_seconds = reading.at_seconds
    if reading.at_seconds - since_seconds < LOST_SECONDS:
        return LockWatch(since_seconds, reading.at_seconds, watch.losses), Finding.FINE
    recent = (*(at for at in watch.losses if reading.at_seconds - at < LOSSES_SECONDS), reading.at_seconds)
    return LockWatch(losses=recent), Finding.CONFLICT if len(recent) >= MAX_LOSSES else Finding.LOST


def backoff_seconds(watch: LockWatch) -> float:
    """Return how long to wait before the lock is written again: 5 s, 10 s, then a minute after each loss."""
    losses = len(watch.losses)
    return CONTESTED_SECONDS if losses >= MAX_LOSSES else FIRST_BACKOFF_SECONDS * 2.0 ** max(0, losses - 1)
