"""The two times that decisions need, taken together."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """One moment."""

    now_seconds: float
    """Time for durations: never steps, goes on in suspend (``boottime``). Called monotonic elsewhere."""
    unix_seconds: float
    """Wall-clock time: for the schedule of epochs, which agents on several nodes share, and for time stamps."""

    @property
    def offset_seconds(self) -> float:
        """Wall-clock time minus the time for durations."""
        return self.unix_seconds - self.now_seconds
