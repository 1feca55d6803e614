"""Plays a recorded trace of a real GPU (tests/data/*-trace.json.gz) to the agent, as its driver.

The recording has the reason bits and no nanosecond counters. A counter is the time for which its bit was set, so the
counters are made from the bits: a row's bits hold until the next row. (Checked on a real H200, driver 580.159.04:
counter 74 grew by 45.23 s while the bit, read 50 times a second, was set for 45.32 s of 106 s.)
"""

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

from wattlock_agent.gpu.base import DriverInfo, GpuIdentity, GpuReading, LimiterNanoseconds

DATA = Path(__file__).parents[1] / "data"
UUID = "GPU-replayed"
POWER_LIMIT_MW = 700_000
"""Both recorded GPUs: EnforcedPowerLimit in tests/data/*-inventory.json."""
SUPPORTED_MHZ = tuple(range(345, 1981, 15))
_POWER_CAP = 0x4


@dataclass(frozen=True)
class Row:
    """One reading of the recording, 50 a second."""

    t: float
    """Seconds since the recording began."""
    mark: str
    power_mw: int
    power_instant_mw: int
    energy_mj: int
    sm_mhz: int
    mem_mhz: int
    temp_c: int
    clock_event_reasons: int
    gpu_util: int
    mem_util: int
    capped_ns: int = 0
    """The power cap's counter at this time."""

    @property
    def capped(self) -> bool:
        return bool(self.clock_event_reasons & _POWER_CAP)


@dataclass(frozen=True)
class Phase:
    """The rows of one phase of the recording."""

    mark: str
    rows: tuple[Row, ...]

    @property
    def seconds(self) -> float:
        return self.rows[-1].t - self.rows[0].t

    @property
    def steady(self) -> "Phase":
        """The last two thirds, over which tests/data/*-phases.json tells clocks and reasons: what a phase is like when
        the one before has died away."""
        return Phase(self.mark, self.rows[len(self.rows) // 3 :])


def load(product: str) -> tuple[Row, ...]:
    """The recording of "h100" or "h200"."""
    content = json.loads(gzip.decompress((DATA / f"nvidia-{product}-trace.json.gz").read_bytes()))
    return counted(Row(**dict(zip(content["columns"], row, strict=True))) for row in content["rows"])


def counted(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with the power cap's counter, which begins at 0."""
    rows = tuple(rows)
    capped_ns = 0
    done = [replace(rows[0], capped_ns=0)]
    for before, row in pairwise(rows):
        capped_ns += round((row.t - before.t) * 1e9) if before.capped else 0
        done.append(replace(row, capped_ns=capped_ns))
    return tuple(done)


def phases(rows: Sequence[Row]) -> list[Phase]:
    """The phases of two seconds and more, in order; not the gaps between them."""
    found = [Phase(mark, tuple(group)) for mark, group in groupby(rows, key=lambda row: row.mark)]
    return [phase for phase in found if phase.mark != "gap" and phase.seconds > 2]


def step_seconds(phase: Phase) -> float:
    """Mean distance of the phase's rows."""
    return phase.seconds / (len(phase.rows) - 1)


def prolonged(phase: Phase, seconds: float) -> tuple[Row, ...]:
    """The phase as it was, and then its steady part over and over, for at least so long.

    A round begins where a row after the last would be. The counter stands still in between: the energy of a round is
    the recorded difference and nothing is made up.
    """
    rows, steady = list(phase.rows), phase.steady.rows
    while rows[-1].t - rows[0].t < seconds:
        later = rows[-1].t + step_seconds(phase) - steady[0].t
        more_mj = rows[-1].energy_mj - steady[0].energy_mj
        rows += [replace(row, t=row.t + later, energy_mj=row.energy_mj + more_mj) for row in steady]
    return counted(rows)


class ReplayDriver:
    """A ``GpuDriver`` that reads from a recording. ``now_seconds`` is set by ``advance``, as in virtual time."""

    def __init__(self, rows: Sequence[Row], begin_seconds: float) -> None:
        """The recording begins at ``begin_seconds`` of the agent's time; until then its first row stands, idle."""
        self.rows = tuple(rows)
        self._times = [row.t for row in self.rows]
        self._begin_seconds = begin_seconds - self.rows[0].t
        self.now_seconds = begin_seconds
        self.writes: list[str] = []

    def advance(self, now_seconds: float) -> None:
        self.now_seconds = now_seconds

    def at(self, t: float) -> float:
        """The agent's time at which a row of the recording was taken."""
        return self._begin_seconds + t

    @property
    def row(self) -> Row:
        """The newest row that is not later than now."""
        return self.rows[max(0, bisect_right(self._times, self.now_seconds - self._begin_seconds + 1e-9) - 1)]

    def open(self) -> DriverInfo:
        return DriverInfo("580.159.04", "13.580")

    def close(self) -> None:
        pass

    def list_gpus(self) -> tuple[GpuIdentity, ...]:
        return (GpuIdentity(UUID, 0, 0, "replayed", SUPPORTED_MHZ, mig_enabled=False, virtual=False),)

    def read(self, uuid: str) -> GpuReading:
        row, begun = self.row, self.now_seconds > self.at(self.rows[0].t)
        return GpuReading(
            uuid=uuid,
            at_seconds=self.at(row.t) if begun else self.now_seconds,
            energy_mj=row.energy_mj,
            power_instant_mw=row.power_instant_mw,
            power_limit_mw=POWER_LIMIT_MW,
            sm_mhz=row.sm_mhz,
            memory_mhz=row.mem_mhz,
            temperature_c=row.temp_c,
            utilization_percent=row.gpu_util if begun else 0,
            event_reasons=row.clock_event_reasons,
            limiters=LimiterNanoseconds(row.capped_ns, 0, 0, 0, 0),
        )

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        self.writes.append(f"lock {high_mhz}")

    def reset(self, uuid: str) -> None:
        self.writes.append("reset")

    def may_write(self) -> bool:
        return True
