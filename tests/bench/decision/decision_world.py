"""Simulated pools for the benchmark of the decision: boards, load, and what each setting of a lever does to them.

The physics are the simulator's. Boards of one product differ in power, as the real ones did that docs/hardware tells of
(three H200s drew 630, 574 and 626 W for the same decode); load moves the running batch as in the estimator's bench.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from wattlock_simulator.physics import (
    CLAMP_MHZ,
    DEFAULT_LIMIT_WATTS,
    Architecture,
    Phase,
    Product,
    Workload,
    board_watts,
    effective_cap_mhz,
    step_seconds,
    supported_clocks_mhz,
)

#: An epoch is simulated in so many equal parts.
PARTS = 4
EPOCH_SECONDS = 60
INSTANCES = 8
#: Power of the pool's boards over the simulator's: three as measured on real ones, the others between them.
BOARDS = tuple(watts / 610.0 for watts in (630, 574, 626, 590, 618, 602, 582, 610))
#: Of the logarithm of the running batch: from part to part, and in the course of ten minutes ("busy" in the
#: estimator's bench: ordinary traffic).
FAST, SLOW, SLOW_SECONDS = 0.1, 0.15, 600.0
#: Relative error of an epoch's energy, Student's t with 4 degrees of freedom.
SENSOR = 0.002
MAX_LOSS_PERCENT, MAX_LATENCY_PERCENT = 2.0, 3.0
#: Less than this is no saving (the tuner's own default).
MIN_SAVING_PERCENT = 1.0


@dataclass(frozen=True)
class Regime:
    """A kind of work."""

    name: str
    batch: float
    context: float
    held_at_mhz: int | None = None
    """The power limit is set so that the mean load of the mean board is held at about this clock."""


REGIMES = (
    Regime("small batch", 8, 4096),
    Regime("large batch", 128, 2048),
    Regime("long context", 32, 16384),
    Regime("near the power cap", 32, 4096, held_at_mhz=1860),
    Regime("deep in the power cap", 32, 4096, held_at_mhz=480),
)


@dataclass(frozen=True)
class Effect:
    """What a setting truly does to a pool, against the default governor, in percent."""

    saving: float
    throughput: float
    latency: float
    worst_latency: float
    """Of the instance that fares worst: boards are not alike."""

    @property
    def within(self) -> bool:
        """Whether it stays within the guardrail."""
        return self.throughput >= -MAX_LOSS_PERCENT and self.latency <= MAX_LATENCY_PERCENT


@dataclass(frozen=True)
class Cell:
    """One product, architecture and regime."""

    product: Product
    architecture: Architecture
    regime: Regime

    @property
    def name(self) -> str:
        return f"{self.product.value} {self.architecture.value}, {self.regime.name}"

    @cached_property
    def limit_watts(self) -> float:
        """The power limit of the boards."""
        if self.regime.held_at_mhz is None:
            return DEFAULT_LIMIT_WATTS
        mean = Workload(self.architecture, Phase.DECODE, self.regime.batch, self.regime.context)
        return min(DEFAULT_LIMIT_WATTS, round(board_watts(self.product, mean, self.regime.held_at_mhz)))

    @cached_property
    def physics(self) -> "Physics":
        return Physics(self)


class Physics:
    """Watts and step times over batch and clock, looked up instead of computed anew."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.clocks = np.array(supported_clocks_mhz(cell.product))
        low, high = np.log(cell.regime.batch) - 1.2, np.log(cell.regime.batch) + 1.2
        self.grid = np.linspace(max(0.0, low), high, 81)
        works = [
            Workload(cell.architecture, Phase.DECODE, float(np.exp(each)), cell.regime.context) for each in self.grid
        ]
        self._watts = np.array([[board_watts(cell.product, work, float(mhz)) for mhz in self.clocks] for work in works])
        self._seconds = np.array(
            [[step_seconds(cell.product, work, float(mhz)) for mhz in self.clocks] for work in works]
        )

    def tables(self, log_batch: np.ndarray, boards: np.ndarray) -> "Work":
        """Return watts and seconds of a step at every clock, under a load on these boards."""
        position = np.interp(log_batch, self.grid, np.arange(len(self.grid)))
        index = np.minimum(position.astype(int), len(self.grid) - 2)
        share = (position - index)[..., None]
        watts = self._watts[index] * (1 - share) + self._watts[index + 1] * share
        seconds = self._seconds[index] * (1 - share) + self._seconds[index + 1] * share
        return Work(self.clocks, watts * boards[..., None], seconds)


@dataclass(frozen=True)
class Work:
    """Watts and seconds of a step by clock (the last axis, highest first)."""

    clocks: np.ndarray
    watts: np.ndarray
    seconds: np.ndarray

    def under(self, cap_mhz: int | None, limit_watts: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return watts, seconds of a step and clock under a cap and a power limit."""
        first = int(np.argmax(self.clocks <= effective_cap_mhz(cap_mhz)))
        allowed = self.watts[..., first:] <= limit_watts
        allowed[..., -1] = True  # the lowest clock is always there
        chosen = first + allowed.argmax(axis=-1)

        def pick(values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]

        return pick(self.watts), pick(self.seconds), self.clocks[chosen]


def cells() -> list[Cell]:
    """Return all cells: products, architectures, regimes."""
    return [
        Cell(product, architecture, regime)
        for product in Product
        for architecture in Architecture
        for regime in REGIMES
    ]


class Load:
    """The running batch of the instances, epoch by epoch."""

    def __init__(self, regime: Regime, chance: np.random.Generator) -> None:
        self._regime, self._chance = regime, chance
        self._slow = chance.standard_normal(INSTANCES)

    def epoch(self) -> np.ndarray:
        """Return the log of the batch: instances by parts."""
        keep = np.exp(-EPOCH_SECONDS / PARTS / SLOW_SECONDS)
        parts = []
        for _ in range(PARTS):
            self._slow = keep * self._slow + np.sqrt(1 - keep**2) * self._chance.standard_normal(INSTANCES)
            parts.append(self._slow)
        fast = self._chance.standard_normal((INSTANCES, PARTS))
        return np.log(self._regime.batch) + SLOW * np.array(parts).T + FAST * fast


@cache
def _sample(regime: Regime, epochs: int) -> np.ndarray:
    """Return a load that every setting of every lever is judged by: instances, epochs, parts."""
    load = Load(regime, np.random.default_rng(20261126))
    return np.stack([load.epoch() for _ in range(epochs)], axis=1)


class Levers:
    """What any static setting does to a cell, in the same load."""

    def __init__(self, cell: Cell, epochs: int = 60) -> None:
        self._cell = cell
        load = _sample(cell.regime, epochs)
        boards = np.broadcast_to(np.array(BOARDS)[:, None, None], load.shape)
        self._batch, self._work = np.exp(load), cell.physics.tables(load, boards)
        self._default = self._totals(None, cell.limit_watts)

    def _totals(self, cap_mhz: int | None, limit_watts: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return watts, tokens per second and inter-token latency: instances by epochs."""
        watts, seconds, _ = self._work.under(cap_mhz, limit_watts)
        rate = (self._batch / seconds).mean(-1)
        return watts.mean(-1), rate, self._batch.mean(-1) / rate

    def effect(self, cap_mhz: int | None = None, limit_watts: float | None = None) -> Effect:
        """Return the effect of a clock cap or of a power limit, by the mean log ratio over instances and epochs."""
        limit = self._cell.limit_watts if limit_watts is None else min(limit_watts, self._cell.limit_watts)
        watts, rate, latency = self._totals(cap_mhz, limit)
        base_watts, base_rate, base_latency = self._default
        slower = np.log(latency / base_latency)
        return Effect(
            -100 * float(np.expm1(np.mean(np.log(watts / rate) - np.log(base_watts / base_rate)))),
            100 * float(np.expm1(np.mean(np.log(rate / base_rate)))),
            100 * float(np.expm1(np.mean(slower))),
            100 * float(np.expm1(slower.mean(axis=1).max())),
        )


def clocks_below_clamp(product: Product) -> list[int]:
    """Return the clocks that a lock can tell apart."""
    return [mhz for mhz in supported_clocks_mhz(product) if mhz <= CLAMP_MHZ]
