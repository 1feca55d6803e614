"""Speed and power of a simulated GPU: pure functions of product, workload and SM clock.

Two sources are joined here, and they do not agree on everything:

* Absolute numbers (ms per step, watts at the clock the GPU ran at) are fitted to our own readings of one H200 and one
  H100 (``tests/data/nvidia-*-phases.json``). The constants are in ``fitted.py``, written by ``fit.py``.
* The effect of the *clock* was never measured by us (locks were not allowed there). It follows the published relative
  deltas of arXiv 2605.11999 for decode on the H200. The absolute watts of that paper (137-300 W) are far below what we
  measured (343-701 W); only its percentages are used.

The shapes (voltage floor, smooth maximum of memory and compute time) are assumptions, marked as such below. Nothing in
this module is a prediction for real hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from math import log2

from wattlock_simulator import fitted


class Product(StrEnum):
    """GPU products that the simulator knows."""

    H200 = "H200"
    H100 = "H100"


class Architecture(StrEnum):
    """Attention architectures, with the names of the Wattlock API."""

    GQA = "GQA"
    MLA = "MLA"
    GATED_DELTA_NET = "GatedDeltaNet"
    MAMBA2 = "Mamba2"


class Phase(StrEnum):
    """What a model step does."""

    PREFILL = "prefill"
    DECODE = "decode"


MAX_CLOCK_MHZ = 1980
"""Highest SM clock of both products (measured, ``tests/data/*-inventory.json``)."""

MIN_CLOCK_MHZ = 345
"""Lowest supported SM clock of both products (measured)."""

CLOCK_STEP_MHZ = 15
"""Distance of two supported SM clocks (measured)."""

CLAMP_MHZ = 1830
"""A lock at or above this acts like this (arXiv 2605.11999, second-hand; free-running boost is not affected)."""

DEFAULT_LIMIT_WATTS = 700.0
"""Default and highest power limit of both products (measured)."""

MIN_LIMIT_WATTS = 200.0
"""Lowest settable power limit of both products (measured)."""

MEMORY_CLOCKS_MHZ: dict[Product, tuple[int, int]] = {Product.H200: (3201, 2201), Product.H100: (2619, 1593)}
"""Supported memory clocks, highest first (measured)."""

IDLE_WATTS: dict[Product, float] = {Product.H200: 83.0, Product.H100: 71.0}
"""Board power without a CUDA context, at the lowest clock (measured)."""

LOADED_IDLE_WATTS: dict[Product, float] = {Product.H200: 127.0, Product.H100: 131.0}
"""Board power with a live context and no work, at the highest clock (measured)."""

# Voltage over clock: flat up to 1200 MHz, then linear to 1 at the top (assumption). With it, dynamic power that is
# sized by the deltas at 780 MHz also gives the published 7-13 % between 1830 and 1590 MHz.
_VOLTAGE_KNEE_MHZ = 1200.0
_VOLTAGE_FLOOR = 0.75

# Share of decode energy that a lock at 780 MHz saves, at batch 1 and batch 32. GatedDeltaNet is the only row that the
# notes on arXiv 2605.11999 give; the others are put inside its 24-32 % range (assumption).
_SAVING_CLOCK_MHZ = 780
_DECODE_SAVING: dict[Architecture, tuple[float, float]] = {
    Architecture.GQA: (0.24, 0.28),
    Architecture.MLA: (0.25, 0.29),
    Architecture.GATED_DELTA_NET: (0.30, 0.32),
    Architecture.MAMBA2: (0.28, 0.31),
}

# Dynamic share of prefill power: 1980 MHz without the limiter must come to the highest POWER_INSTANT that we read at
# the start of a prefill (946 W on the H200), and 700 W to the 1577 MHz that followed.
_PREFILL_DYNAMIC_SHARE = 0.657

# Decode time is a smooth maximum of memory time and compute time. The compute share at 1980 MHz is chosen so that
# 1590 MHz costs under 0.1 % and 780 MHz under 1 % up to batch 32 (arXiv 2605.11999); larger batches lose more.
_SMOOTHNESS = 6.0
_COMPUTE_SHARE_AT_BATCH_1 = 0.20
_COMPUTE_SHARE_PER_OCTAVE = 0.008


@dataclass(frozen=True)
class Workload:
    """What a GPU works on.

    Attributes:
        architecture: attention architecture of the model.
        phase: decode (one token for each of ``batch`` sequences per step) or prefill (``batch`` prompts of
            ``context`` tokens per step).
        batch: sequences in the step; may be fractional (a mean), must be positive.
        context: tokens per sequence, must be positive.
    """

    architecture: Architecture
    phase: Phase
    batch: float
    context: float

    def __post_init__(self) -> None:
        if not (0 < self.batch <= 65536 and 0 < self.context <= 4_194_304):
            raise ValueError(f"batch {self.batch} or context {self.context} is not positive or far too large")


@dataclass(frozen=True)
class OperatingPoint:
    """Steady state of one GPU under one workload.

    Attributes:
        clock_mhz: SM clock in MHz.
        watts: board power in W.
        step_seconds: time of one model step in s; for decode that is the inter-token latency.
        tokens_per_second: generated (decode) or computed prompt (prefill) tokens per second.
        joules_per_token: board energy per such token in J.
        power_limited: whether the power limit holds the clock down.
    """

    clock_mhz: int
    watts: float
    step_seconds: float
    tokens_per_second: float
    joules_per_token: float
    power_limited: bool


@dataclass(frozen=True)
class Saving:
    """What a cap truly does to one workload, in the simulator's world.

    Attributes:
        control: steady state with no lock.
        capped: steady state with the lock.
        energy_percent: saved share of joules per token, in percent; negative means that it costs energy.
        throughput_change_percent: change of tokens per second, in percent; negative means slower.
    """

    control: OperatingPoint
    capped: OperatingPoint
    energy_percent: float
    throughput_change_percent: float


@cache
def supported_clocks_mhz(product: Product) -> tuple[int, ...]:
    """Supported SM clocks in MHz, highest first (measured: the same 110 values on both products)."""
    del product
    return tuple(range(MAX_CLOCK_MHZ, MIN_CLOCK_MHZ - 1, -CLOCK_STEP_MHZ))


def dynamic_power(clock_mhz: float) -> float:
    """Frequency times voltage squared, relative to 1980 MHz (1.0 there).

    Args:
        clock_mhz: SM clock in MHz.
    """
    rise = max(0.0, clock_mhz - _VOLTAGE_KNEE_MHZ) / (MAX_CLOCK_MHZ - _VOLTAGE_KNEE_MHZ)
    voltage = _VOLTAGE_FLOOR + (1.0 - _VOLTAGE_FLOOR) * rise
    return clock_mhz / MAX_CLOCK_MHZ * voltage * voltage


def compute_share(batch: float) -> float:
    """Compute time over memory time of a decode step at 1980 MHz (assumption, see the constants)."""
    return _COMPUTE_SHARE_AT_BATCH_1 + _COMPUTE_SHARE_PER_OCTAVE * log2(max(1.0, batch))


def slowdown(batch: float, clock_mhz: float) -> float:
    """Decode step time at a clock over that at 1980 MHz; 1.0 at 1980 MHz and never below it for lower clocks.

    Args:
        batch: sequences per step.
        clock_mhz: SM clock in MHz.
    """
    share = compute_share(batch)
    at_top = 1.0 + share**_SMOOTHNESS
    at_clock = 1.0 + (share * MAX_CLOCK_MHZ / clock_mhz) ** _SMOOTHNESS
    return float((at_clock / at_top) ** (1.0 / _SMOOTHNESS))


def dynamic_share(workload: Workload) -> float:
    """Share of the board power at 1980 MHz that follows ``dynamic_power``.

    For decode it is what makes 780 MHz save the published share of energy per token, linear in log2(batch) between
    and beyond the two published batches, up to batch 128.
    """
    if workload.phase is Phase.PREFILL:
        return _PREFILL_DYNAMIC_SHARE
    at_1, at_32 = _DECODE_SAVING[workload.architecture]
    octaves = min(7.0, log2(max(1.0, workload.batch)))
    saving = at_1 + (at_32 - at_1) * octaves / 5.0
    power_ratio = (1.0 - saving) / slowdown(min(workload.batch, 128.0), _SAVING_CLOCK_MHZ)
    return (1.0 - power_ratio) / (1.0 - dynamic_power(_SAVING_CLOCK_MHZ))


def relative_watts(workload: Workload, clock_mhz: float) -> float:
    """Board power at a clock over that at 1980 MHz, with the workload's own work rate."""
    return 1.0 - dynamic_share(workload) * (1.0 - dynamic_power(clock_mhz))


def step_seconds(product: Product, workload: Workload, clock_mhz: float) -> float:
    """Time of one model step in seconds.

    Args:
        product: GPU product.
        workload: what it works on.
        clock_mhz: SM clock in MHz.
    """
    if workload.phase is Phase.PREFILL:
        prefill = fitted.PREFILL[product, workload.architecture]
        cycles = prefill.cycles_per_token + prefill.cycles_per_token_and_token * workload.context
        return workload.batch * workload.context * cycles / (clock_mhz * 1e6)
    decode = fitted.DECODE[product, workload.architecture]
    return decode.seconds(workload.batch, workload.context) * slowdown(workload.batch, clock_mhz)


def tokens_per_step(workload: Workload) -> float:
    """Tokens that one step makes (decode) or reads (prefill)."""
    return workload.batch * (workload.context if workload.phase is Phase.PREFILL else 1.0)


def board_watts(product: Product, workload: Workload, clock_mhz: float) -> float:
    """Board power in W of a busy GPU at a clock, with no power limit in the way."""
    if workload.phase is Phase.PREFILL:
        full = fitted.PREFILL[product, workload.architecture].watts
    else:
        full = fitted.DECODE[product, workload.architecture].watts(
            workload.batch, workload.context, fitted.JOULES_PER_TOKEN[product], fitted.STREAM_EXPONENT
        )
    return full * relative_watts(workload, clock_mhz)


def idle_watts(product: Product, clock_mhz: float, *, context_alive: bool) -> float:
    """Board power in W with no work.

    Args:
        product: GPU product.
        clock_mhz: SM clock in MHz.
        context_alive: whether a process holds a CUDA context (a loaded model).
    """
    floor = IDLE_WATTS[product]
    rise = LOADED_IDLE_WATTS[product] - floor
    if not context_alive:
        rise *= 0.5  # a lock with a floor keeps idle clocks, and so idle power, up; how much is an assumption
    low = dynamic_power(MIN_CLOCK_MHZ)
    return floor + rise * (dynamic_power(clock_mhz) - low) / (1.0 - low)


def effective_cap_mhz(cap_mhz: int | None) -> int:
    """Highest clock that a lock lets through: the clamp, then down to a supported clock.

    Args:
        cap_mhz: upper end of the locked range in MHz, or None for no lock.
    """
    if cap_mhz is None:
        return MAX_CLOCK_MHZ
    if cap_mhz >= CLAMP_MHZ:
        return CLAMP_MHZ
    return max(MIN_CLOCK_MHZ, cap_mhz - (cap_mhz - MIN_CLOCK_MHZ) % CLOCK_STEP_MHZ)


def governed_clock_mhz(product: Product, workload: Workload, cap_mhz: int, limit_watts: float) -> int:
    """Highest supported clock up to a cap at which the board stays within the power limit.

    Args:
        product: GPU product.
        workload: what it works on.
        cap_mhz: effective cap in MHz, a supported clock.
        limit_watts: power limit in W.

    Returns:
        The clock in MHz; the lowest supported one if even that draws more than the limit.
    """
    if board_watts(product, workload, cap_mhz) <= limit_watts:
        return cap_mhz
    low, high = 0, (cap_mhz - MIN_CLOCK_MHZ) // CLOCK_STEP_MHZ  # in steps above the minimum; high is too much
    while high - low > 1:
        middle = (low + high) // 2
        if board_watts(product, workload, MIN_CLOCK_MHZ + middle * CLOCK_STEP_MHZ) <= limit_watts:
            low = middle
        else:
            high = middle
    return MIN_CLOCK_MHZ + low * CLOCK_STEP_MHZ


def operating_point(
    product: Product, workload: Workload, cap_mhz: int | None = None, limit_watts: float = DEFAULT_LIMIT_WATTS
) -> OperatingPoint:
    """Steady state of a fully busy GPU under a lock (or none) and a power limit."""
    cap = effective_cap_mhz(cap_mhz)
    clock = governed_clock_mhz(product, workload, cap, limit_watts)
    watts = board_watts(product, workload, clock)
    seconds = step_seconds(product, workload, clock)
    rate = tokens_per_step(workload) / seconds
    return OperatingPoint(clock, watts, seconds, rate, watts / rate, clock < cap)


def true_saving(product: Product, workload: Workload, cap_mhz: int, limit_watts: float = DEFAULT_LIMIT_WATTS) -> Saving:
    """What a lock truly changes against the unlocked governor, for the same workload.

    Args:
        product: GPU product.
        workload: what it works on.
        cap_mhz: upper end of the locked range in MHz.
        limit_watts: power limit in W.
    """
    control = operating_point(product, workload, None, limit_watts)
    capped = operating_point(product, workload, cap_mhz, limit_watts)
    return Saving(
        control,
        capped,
        100.0 * (1.0 - capped.joules_per_token / control.joules_per_token),
        100.0 * (capped.tokens_per_second / control.tokens_per_second - 1.0),
    )
