"""The clock for durations: it never steps, and it goes on while the machine is suspended.

CLOCK_MONOTONIC stands still in suspend while the GPU's energy counter and the API server go on: power over such an
interval would be too high by orders of magnitude, orders of hours ago would look fresh, and an operator that slept
would take itself for the leader.
CLOCK_BOOTTIME is the same clock with the time in suspend added (clock_gettime(2), Linux 2.6.39).
"""

import time

# Other systems than Linux, where the tests may run as well, do not have it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_seconds() -> float:
    """Return the time, in seconds since some moment before the process began."""
    return time.clock_gettime(_CLOCK)
