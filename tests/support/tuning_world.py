"""A pool for the tuner without a simulator: effects by clock as plain curves, pairs with noise."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from wattlock_operator.ledger import Tally
from wattlock_operator.tuning.model import PATIENCE, Goal, Observation, Patience, Phase, Regime, Tuning
from wattlock_operator.tuning.step import step

CLOCKS_MHZ = tuple(range(1980, 344, -15))
PAIR_SECONDS = 120.0

Effects = Callable[[int], tuple[float, float]]
"""Saving and loss of throughput of a cap, as shares."""


def memory_bound(cap_mhz: int) -> tuple[float, float]:
    """Save a third at most; the loss passes 2 % at about 670 MHz and the saving turns there."""
    loss = 0.02 * (670 / cap_mhz) ** 6
    return 0.33 * (1 - (cap_mhz / 1980) ** 1.5) - 0.5 * loss, loss


def nothing_saved(cap_mhz: int) -> tuple[float, float]:
    """A cap does nothing until it only costs speed."""
    return 0.0, 0.05 * (670 / cap_mhz) ** 6


@dataclass
class PoolUnderTest:
    """Pairs come in at each look; what the tuner asks for is what is measured."""

    effects: Effects = memory_bound
    goal: Goal = field(default_factory=Goal)
    instances: int = 8
    noise: float = 0.01
    seed: int = 0
    regime: Regime | None = field(default_factory=lambda: Regime(32, 0.008, "a"))
    released_mhz: int | None = 1980
    patience: Patience = PATIENCE
    tripped: int = 0
    trips_below_mhz: int = 0
    """The guardrail releases all instances at once under a cap below this."""
    latency_is_served: bool = True
    now_seconds: float = 1e9
    state: Tuning = field(default_factory=Tuning)
    tallies: dict[int, Tally] = field(default_factory=dict)
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def observation(self) -> Observation:
        cap_mhz = self.state.cap_mhz
        tripped = self.instances if cap_mhz is not None and cap_mhz < self.trips_below_mhz else self.tripped
        return Observation(
            now_seconds=self.now_seconds,
            instances=self.instances,
            tallies=dict(self.tallies),
            tripped=tripped,
            regime=self.regime,
            released_mhz=self.released_mhz if cap_mhz is None else None,
            supported_mhz=CLOCKS_MHZ,
            pair_seconds=PAIR_SECONDS,
        )

    def measure(self) -> None:
        """Each instance adds a pair under the present cap."""
        cap_mhz = self.state.cap_mhz
        if cap_mhz is None:
            return
        saving, loss = self.effects(cap_mhz)
        for _ in range(self.instances):
            energy = math.log1p(-saving) + self.chance.gauss(0, self.noise)
            speed = math.log1p(-loss) + self.chance.gauss(0, 1.5 * self.noise)
            latency = -math.log1p(-loss) + self.chance.gauss(0, self.noise)
            pair = Tally(1, (energy, energy**2), (speed, speed**2))
            if self.latency_is_served:
                pair = replace(pair, latency_pairs=1, latency=(latency, latency**2))
            self.tallies[cap_mhz] = self.tallies.get(cap_mhz, Tally()) + pair

    def look(self, seconds: float = PAIR_SECONDS) -> Tuning:
        """Let time pass, measure, and let the tuner look."""
        self.now_seconds += seconds
        self.measure()
        self.state = step(self.state, self.goal, self.observation(), self.patience)
        return self.state

    def looks(self, most: int = 2000) -> Iterator[Tuning]:
        """Look until the search is over."""
        for _ in range(most):
            yield self.look()
            if self.state.phase in (Phase.SETTLED, Phase.RELEASED):
                return
        raise AssertionError(f"no end after {most} looks: {self.state}")

    def search(self, most: int = 2000) -> Tuning:
        """Return the state at the end of the search."""
        *_, last = self.looks(most)
        return last
