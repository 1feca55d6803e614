"""Simulated pools with a known truth: load, energy and tokens of many instances in the epochs of the real schedule.

Load moves the running batch; joules per token follow from the simulator's physics (they fall steeply with the batch,
and so does what a cap saves once the power limit binds). Every epoch is known under both arms, so the true effect of
each pair is known: the mean over both orders that the coin could have drawn. Axes of arrays: pool, instance, block.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from wattlock_api.schedule import Experiment, pair_of
from wattlock_simulator.physics import Architecture, Phase, Product, Workload, operating_point

CAP_MHZ = 1590
CONTEXT_TOKENS = 4096
#: An epoch is simulated in so many equal parts: bursts are shorter than an epoch.
PARTS = 4
DAY_SECONDS = 86_400
#: The schedule is a function of wall-clock time; this is when the simulated day begins.
BEGIN_UNIX_SECONDS = 1_800_000_000
_BATCHES = np.geomspace(1.0, 256.0, 161)


@dataclass(frozen=True)
class Scenario:
    """What a pool's load and sensors are like. Deviations are standard deviations of the logarithm."""

    name: str
    instances: int = 4
    batch: float = 32.0
    fast: float = 0.05
    """Of the running batch, independent from one part of an epoch to the next."""
    slow: float = 0.0
    """Of the running batch, correlated in time over ``slow_seconds``, each instance by itself."""
    slow_seconds: float = 600.0
    shared: float = 0.0
    """The same, for all instances of a pool at once."""
    shared_fast: float = 0.0
    """The same without memory: shocks of less than an epoch that hit all instances at once."""
    swing: float = 1.0
    """Highest over lowest load of the day."""
    beat: float = 0.0
    """Every other epoch is busier by this: what has a period of two epochs."""
    bursts: float = 0.0
    """Share of the parts of epochs in which a burst runs."""
    burst_factor: float = 3.0
    sensor: float = 0.002
    """Error of an epoch's energy, relative. With heavy tails (Student's t with 4 degrees of freedom)."""
    throttling: int = 0
    """So many instances throttle in and out, below the cap: tokens at half the speed for 0.8 of the power, in two of
    five parts of their epochs. The cap saves nothing there."""
    stalling: int = 0
    """So many instances stall in one of five epochs, for half of the usual energy on average, sometimes for much more.
    The cap saves nothing there."""
    differ: float = 0.0
    """Of the instances' true effects."""
    uneven: bool = False
    """Instances join in the course of the day."""
    effect: str = "physics"
    """physics: what the simulator says of the cap; none; or costs: 5 % more energy for each token."""
    epoch_seconds: int = 60
    control_share: float = 0.1
    hours: int = 24

    @property
    def blocks(self) -> int:
        """Blocks of the schedule in the simulated time: one pair each."""
        experiment = self.experiment("")
        return self.hours * 3600 // (experiment.block_epochs * experiment.epoch_seconds)

    def experiment(self, seed: str) -> Experiment:
        """Return the schedule of a pool."""
        return Experiment(seed, self.epoch_seconds, self.control_share)


@dataclass(frozen=True)
class Pairs:
    """The pairs of some pools: what was measured and what is true."""

    d: np.ndarray
    """log(joules per token, capped / released) as measured."""
    truth: np.ndarray
    """The effect of the cap in the pair: its mean over both orders."""
    done_seconds: np.ndarray
    """When the pair was complete, since the beginning; infinite: never."""


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return watts and tokens per second, released and capped, over the batches."""
    points = [
        operating_point(Product.H200, Workload(Architecture.GQA, Phase.DECODE, batch, CONTEXT_TOKENS), cap)
        for cap in (None, CAP_MHZ)
        for batch in _BATCHES
    ]
    watts, rates = ([getattr(point, name) for point in points] for name in ("watts", "tokens_per_second"))
    half = len(_BATCHES)
    return tuple(np.array(part) for part in (watts[:half], rates[:half], watts[half:], rates[half:]))  # type: ignore[return-value]


def _look_up(position: np.ndarray, table: np.ndarray) -> np.ndarray:
    index = position.astype(np.intp)
    low = table[index]
    return low + (position - index) * (table[index + 1] - low)


def epoch_power(log_batch: np.ndarray, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Return watts and tokens per second at a running batch, for the arm ``released`` or ``capped``."""
    watts, rates, capped_watts, capped_rates = _tables()
    scale = (len(_BATCHES) - 1) / np.log(_BATCHES[-1])
    position = np.clip(log_batch * scale, 0, len(_BATCHES) - 1.001)
    tables = (watts, rates) if arm == "released" else (capped_watts, capped_rates)
    return _look_up(position, tables[0]), _look_up(position, tables[1])


def log_joules_per_token(log_batch: np.ndarray, arm: str) -> np.ndarray:
    """Return log(joules / tokens) of epochs in an arm; the last axis are their parts."""
    watts, rates = epoch_power(log_batch, arm)
    return np.log(watts.mean(axis=-1) / rates.mean(axis=-1))


def draw_schedule(scenario: Scenario, pools: range) -> tuple[np.ndarray, np.ndarray]:
    """Return the first epoch of each pair within its block, and whether the first is the released one.

    Straight from the product's schedule, one call for each block.
    """
    length = scenario.experiment("").block_epochs
    begin = BEGIN_UNIX_SECONDS // scenario.epoch_seconds
    assert begin % length == 0
    shape = (len(pools), scenario.instances, scenario.blocks)
    first, control_first = np.empty(shape, np.int16), np.empty(shape, bool)
    for row, number in enumerate(pools):
        experiment = scenario.experiment(f"pool-{number}")
        for instance in range(scenario.instances):
            name = f"llm/decode-{instance}"
            for block in range(scenario.blocks):
                pair = pair_of(experiment, name, begin + block * length)
                control_first[row, instance, block] = pair.control < pair.cap
                first[row, instance, block] = min(pair.control, pair.cap) % length
    return first, control_first


def _remembering(steps: np.ndarray, keep: np.ndarray | float) -> np.ndarray:
    """Return a stationary process along the last axis from independent steps; ``keep``: correlation with the last."""
    out = np.empty_like(steps)
    out[..., 0] = steps[..., 0]
    keep = np.broadcast_to(keep, steps.shape)
    drive = np.sqrt(1 - keep**2)
    for index in range(1, steps.shape[-1]):
        out[..., index] = keep[..., index] * out[..., index - 1] + drive[..., index] * steps[..., index]
    return out


def draw_load(scenario: Scenario, first: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Return the log of the running batch, with the axes epoch of the pair and part of the epoch at the end."""
    pools, instances, blocks = first.shape
    length = scenario.experiment("").block_epochs
    part_seconds = scenario.epoch_seconds / PARTS
    shape = (pools, instances, blocks, 2, PARTS)
    load = np.log(scenario.batch) + scenario.fast * chance.standard_normal(shape)
    # The number of each part since the beginning of the day.
    epoch = (np.arange(blocks) * length + first)[..., None, None] + np.arange(2)[:, None]
    part = epoch * PARTS + np.arange(PARTS)
    if scenario.swing > 1:
        phase = 2 * np.pi * chance.random((pools, 1, 1, 1, 1))
        wave = np.sin(2 * np.pi * part * part_seconds / DAY_SECONDS + phase)
        load += 0.5 * np.log(scenario.swing) * wave
    if scenario.slow:
        steps = chance.standard_normal((pools, instances, blocks * 2 * PARTS))
        gaps = np.diff(part.reshape(pools, instances, -1), axis=-1, prepend=0)
        keep = np.exp(-gaps * part_seconds / scenario.slow_seconds)
        load += scenario.slow * _remembering(steps, keep).reshape(shape)
    if scenario.shared or scenario.shared_fast:
        whole = chance.standard_normal((pools, blocks * length * PARTS))
        if scenario.shared:
            keep_all = float(np.exp(-part_seconds / scenario.slow_seconds))
            path = scenario.shared * _remembering(whole, keep_all)
        else:
            path = np.zeros_like(whole)
        path += scenario.shared_fast * chance.standard_normal(path.shape)
        rows = np.arange(pools)[:, None]
        load += path[rows, part.reshape(pools, -1)].reshape(shape)
    if scenario.beat:
        load += scenario.beat * (epoch % 2)
    if scenario.bursts:
        load += np.log(scenario.burst_factor) * (chance.random(shape) < scenario.bursts)
    return load


def simulate(
    scenario: Scenario, schedule: tuple[np.ndarray, np.ndarray], chance: np.random.Generator, known: bool = True
) -> Pairs:
    """Return the pairs of the pools of a schedule. ``known``: with the truth, else that is left empty."""
    return pairs_of(scenario, schedule, draw_load(scenario, schedule[0], chance), chance, known)


def pairs_of(
    scenario: Scenario,
    schedule: tuple[np.ndarray, np.ndarray],
    load: np.ndarray,
    chance: np.random.Generator,
    known: bool = True,
) -> Pairs:
    """Return the pairs under a given load, the log of the running batch."""
    first, control_first = schedule
    pools, instances, blocks = first.shape
    if scenario.effect == "physics":
        released, capped = log_joules_per_token(load, "released"), log_joules_per_token(load, "capped")
    else:
        released = log_joules_per_token(load, "released")
        capped = released + np.log(1.05) if scenario.effect == "costs" else released
    if scenario.differ:
        capped = capped + scenario.differ * chance.standard_normal((pools, instances, 1, 1))
    if scenario.throttling or scenario.stalling:
        released, capped = released.copy(), capped.copy()
        ill = slice(0, max(scenario.throttling, scenario.stalling))
        shape = released[:, ill].shape
        if scenario.throttling:
            share = (chance.random((*shape, PARTS)) < 0.4).mean(axis=-1)
            released[:, ill] += np.log((1 - 0.2 * share) / (1 - 0.5 * share))
        else:
            released[:, ill] += (chance.random(shape) < 0.2) * chance.exponential(0.5, shape)
        capped[:, ill] = released[:, ill]
    error = chance.standard_t(4, released.shape) / np.sqrt(2) * scenario.sensor
    sign = np.where(control_first, 1.0, -1.0)
    # With s = 1 the first epoch is released: d = capped(second) - released(first).
    middle = ((capped - released).sum(axis=-1)) / 2
    apart = (capped + released + 2 * error) / 2
    done = ((np.arange(blocks) * scenario.experiment("").block_epochs + first + 2) * scenario.epoch_seconds).astype(
        float
    )
    if scenario.uneven:
        begin = chance.random((pools, instances, 1)) ** 0.5 * scenario.hours * 3600
        begin[:, 0] = 0.0
        done[done < begin] = np.inf
    return Pairs(middle + sign * (apart[..., 1] - apart[..., 0]), middle if known else np.empty(0), done)
