"""NVML field values and clock lists as plain numbers. Pure.

The ids are the driver's ABI and defined here: their names drift between releases of the binding.
Source: NVML_FI_* in nvml.h 13.3.
"""

import math
from collections.abc import Mapping

from wattlock_agent.gpu.base import LimiterNanoseconds

POWER_POLICY = 74
THERMAL_POLICY = 75
BOARD_LIMIT_POLICY = 77
RELIABILITY_POLICY = 79
POWER_INSTANT = 186
RECOVERY_ACTION = 230
SW_THERMAL_SLOWDOWN = 269
HW_THERMAL_SLOWDOWN = 270
HW_POWER_BRAKE_SLOWDOWN = 271

#: What one reading asks for, in one call.
READING_FIELDS = (
    POWER_POLICY,
    POWER_INSTANT,
    SW_THERMAL_SLOWDOWN,
    HW_THERMAL_SLOWDOWN,
    HW_POWER_BRAKE_SLOWDOWN,
    BOARD_LIMIT_POLICY,
    RELIABILITY_POLICY,
    THERMAL_POLICY,
)

#: Member of the value union by nvmlValueType_t.
VALUE_MEMBERS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}

RECOVERY_ACTIONS = {1: "GPU reset", 2: "node reboot", 3: "draining of peer-to-peer traffic", 4: "drain and reset"}


def limiters(values: Mapping[int, int | None]) -> LimiterNanoseconds:
    """Return the limiter counters in ns from field values: no key, the GPU has no such field; None, no answer now.

    Thermal time is software plus hardware slowdown, where the GPU counts them, else the older common counter. A sum
    of which a part did not answer is None: a smaller sum would look like a restarted driver.
    """
    thermal_fields = [field for field in (SW_THERMAL_SLOWDOWN, HW_THERMAL_SLOWDOWN) if field in values]
    parts = [values.get(field) for field in thermal_fields or [THERMAL_POLICY]]
    known = [part for part in parts if part is not None]
    return LimiterNanoseconds(
        power_cap=values.get(POWER_POLICY),
        thermal=sum(known) if len(known) == len(parts) else None,
        power_brake=values.get(HW_POWER_BRAKE_SLOWDOWN),
        reliability=values.get(RELIABILITY_POLICY),
        board_limit=values.get(BOARD_LIMIT_POLICY),
    )


def supported_clocks(by_memory_clock: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the SM clocks in MHz, ascending, that can be locked whatever memory clock is in use while working.

    It is the list of the highest memory clock, intersected with those of other memory clocks that reach the same
    highest SM clock. Idle memory clocks (405 MHz on some GPUs) stop far below; with them the intersection would hold
    idle clocks alone, and a cap snapped down onto it would cripple the GPU.
    """
    if not by_memory_clock:
        return ()
    clocks = set(by_memory_clock[max(by_memory_clock)])
    highest = max(clocks, default=0)
    for others in by_memory_clock.values():
        if max(others, default=0) == highest:
            clocks &= set(others)
    return tuple(sorted(clock for clock in clocks if clock > 0))


def whole_number(value: float) -> int | None:
    """Return a field's value as a whole number; None for what no counter or power can be (negative, not finite)."""
    return int(value) if math.isfinite(value) and value >= 0 else None
