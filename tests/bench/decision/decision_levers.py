"""The alternatives: the best static power cap, the published clock, the shipped profile, and the oracle."""

from dataclasses import dataclass

import numpy as np
from decision_world import MIN_SAVING_PERCENT, Cell, Effect, Levers, clocks_below_clamp
from wattlock_api.clockprofile import PUBLISHED
from wattlock_api.constants import Architecture
from wattlock_operator.clocks import find_row
from wattlock_simulator.physics import MIN_LIMIT_WATTS

NOTHING = Effect(0.0, 0.0, 0.0, 0.0)
#: Power caps are tried in steps of this, from the lowest that the board takes.
LIMIT_STEP_WATTS = 5


@dataclass(frozen=True)
class Alternatives:
    """What each static setting does to a cell."""

    oracle_mhz: int | None
    oracle: Effect
    """The best clock within the guardrail, known only to the simulator."""
    power_watts: int | None
    power: Effect
    """The best power cap within the guardrail."""
    published: Effect
    """1590 MHz whatever the GPU."""
    profile: Effect
    """Wattlock's shipped ClockProfile."""
    caps: tuple[Effect, ...]
    """All power caps, from the highest down."""

    @property
    def exists(self) -> bool:
        """Whether there is a saving at all."""
        return self.oracle.saving >= MIN_SAVING_PERCENT

    def power_at(self, throughput: float) -> float:
        """Return what the best power cap saves that costs no more throughput than this, in percent.

        Between two caps a straight line.
        """
        slower = [effect.throughput for effect in self.caps]
        saving = [effect.saving for effect in self.caps]
        at = float(np.interp(-throughput, [-each for each in slower], saving))
        return max([at, *(effect.saving for effect in self.caps if effect.throughput >= throughput)])


def compare(cell: Cell, levers: Levers) -> Alternatives:
    """Try every static setting."""
    clocks = {mhz: levers.effect(mhz) for mhz in clocks_below_clamp(cell.product)}
    oracle_mhz = max((mhz for mhz, effect in clocks.items() if effect.within), key=lambda mhz: clocks[mhz].saving)
    limits = range(int(cell.limit_watts), int(MIN_LIMIT_WATTS) - 1, -LIMIT_STEP_WATTS)
    caps = {watts: levers.effect(limit_watts=watts) for watts in limits}
    power_watts = max((watts for watts, effect in caps.items() if effect.within), key=lambda each: caps[each].saving)
    found = find_row(PUBLISHED, f"NVIDIA {cell.product.value}", Architecture(cell.architecture.value))
    return Alternatives(
        oracle_mhz=oracle_mhz,
        oracle=clocks[oracle_mhz],
        power_watts=power_watts,
        power=caps[power_watts],
        published=clocks[1590],
        profile=NOTHING if found is None else clocks[found.row.max_sm_clock_mhz],
        caps=tuple(caps.values()),
    )
