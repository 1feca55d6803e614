"""One GPU through time: from what is asked of it to what its sensors show. Pure: no clock, no file, no randomness."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from wattlock_simulator import layout, physics
from wattlock_simulator.physics import Phase, Product, Workload

REFRESH_SECONDS = 0.1
"""Sensors change every 100 ms (measured: 100.6 ms)."""

AVERAGE_SECONDS = 1.0
"""``nvmlDeviceGetPowerUsage`` is the mean of the last second (measured)."""

NOISE_SHARE = 0.01
"""Standard deviation of the sensor noise on power, relative."""

REASON_IDLE = 0x1
REASON_POWER_CAP = 0x4
REASON_HW_SLOWDOWN = 0x8
REASON_SW_THERMAL = 0x20
REASON_HW_THERMAL = 0x40
REASON_POWER_BRAKE = 0x80

_COUNTER = {field_id: position for position, field_id in enumerate(layout.COUNTER_FIELDS)}

# Limiters on request: event reason bits, and the counters (NVML field ids) that grow while they hold the clock.
_LIMITERS: dict[int, tuple[int, tuple[int, ...]]] = {
    1: (REASON_SW_THERMAL, (75, 269)),
    2: (REASON_HW_SLOWDOWN | REASON_HW_THERMAL, (75, 270)),
    3: (REASON_HW_SLOWDOWN | REASON_POWER_BRAKE, (271,)),
}

# The limiter needs about a quarter of a refresh to catch a load step; POWER_INSTANT then shows a reading above the
# limit (measured: up to 946 W), the 1 s average hardly does. On the way up it takes 0.2-0.4 s (measured).
_OVERSHOOT_SHARE = 0.2
_RECOVERY_MHZ = 150

_NOISE_MEMORY = 0.9  # per refresh: the noise forgets itself within about a second
_NOISE_DRIVE: float = (1.0 - _NOISE_MEMORY**2) ** 0.5

_TEMPERATURE_SECONDS = 15.0
_CELSIUS_PER_WATT = {Product.H200: 0.037, Product.H100: 0.058}
_AMBIENT_CELSIUS = 30.0


@dataclass(frozen=True)
class Inputs:
    """What is asked of a GPU for the next refresh.

    Attributes:
        product: GPU product.
        workload: what it works on; None when no request runs.
        context_alive: whether a process has a model loaded.
        extra_step_seconds: idle time added to each model step, in s.
        lock_low_mhz: lower end of the locked range, 0 without a lock.
        lock_high_mhz: upper end of the locked range, None without a lock.
        limit_watts: power limit in W.
        limiter: code of a limiter on request, 0 for none.
        limiter_mhz: the clock that it allows, in MHz.
    """

    product: Product
    workload: Workload | None
    context_alive: bool = True
    extra_step_seconds: float = 0.0
    lock_low_mhz: int = 0
    lock_high_mhz: int | None = None
    limit_watts: float = physics.DEFAULT_LIMIT_WATTS
    limiter: int = 0
    limiter_mhz: int = 0


@dataclass(frozen=True)
class Model:
    """State of one GPU between two refreshes.

    Attributes:
        clock_mhz: SM clock.
        power_limited: whether the power limit held the clock in the last refresh.
        celsius: temperature.
        noise: relative error of the power sensor.
        energy_mj: energy counter in mJ, not rounded.
        counters_ns: limiter counters in ns, in the order of ``layout.COUNTER_FIELDS``.
        steps: model steps done.
        window: (seconds, watts) of the last second, oldest first.
        instant_watts: last reading of POWER_INSTANT.
        average_watts: mean over ``window``.
        reasons: clock event reasons.
        busy_share: share of the refresh in which a kernel ran.
    """

    clock_mhz: int = physics.MIN_CLOCK_MHZ
    power_limited: bool = False
    celsius: float = 33.0
    noise: float = 0.0
    energy_mj: float = 0.0
    counters_ns: tuple[int, ...] = (0,) * len(layout.COUNTER_FIELDS)
    steps: float = 0.0
    window: tuple[tuple[float, float], ...] = field(default=())
    instant_watts: float = 0.0
    average_watts: float = 0.0
    reasons: int = REASON_IDLE
    busy_share: float = 0.0


def restarted(model: Model) -> Model:
    """The GPU after a driver reload or a reset: energy and limiter counters begin again, the work done does not."""
    return Model(celsius=model.celsius, noise=model.noise, steps=model.steps)


def advance(model: Model, inputs: Inputs, seconds: float, gauss: float) -> Model:
    """Moves one GPU forward.

    Args:
        model: where it stands.
        inputs: what is asked of it.
        seconds: time to pass, usually one refresh; must be positive and at most a second.
        gauss: one draw from a standard normal distribution, for the sensor noise.
    """
    cap = physics.effective_cap_mhz(inputs.lock_high_mhz)
    held = inputs.limiter in _LIMITERS and inputs.limiter_mhz < cap
    if held:
        cap = physics.effective_cap_mhz(inputs.limiter_mhz)
    noise = _NOISE_MEMORY * model.noise + _NOISE_DRIVE * NOISE_SHARE * gauss
    if inputs.workload is None:
        clock, watts, peak = _idle(inputs, cap)
        power_limited, busy, steps = False, 0.0, 0.0
    else:
        clock, power_limited, watts, peak = _work(model, inputs, inputs.workload, cap)
        step_seconds = physics.step_seconds(inputs.product, inputs.workload, clock)
        busy = step_seconds / (step_seconds + inputs.extra_step_seconds)
        steps = seconds / (step_seconds + inputs.extra_step_seconds)
        if busy < 1.0:
            idle = physics.idle_watts(inputs.product, clock, context_alive=True)
            watts, peak = (busy * w + (1.0 - busy) * idle for w in (watts, peak))
    shown = watts * (1.0 + noise)
    window = _trim((*model.window, (seconds, shown)))
    grown, reasons = _limits(inputs, held, power_limited)
    nanoseconds = round(seconds * 1e9)
    target = _AMBIENT_CELSIUS + _CELSIUS_PER_WATT[inputs.product] * watts
    return replace(
        model,
        clock_mhz=clock,
        power_limited=power_limited,
        celsius=model.celsius + (target - model.celsius) * min(1.0, seconds / _TEMPERATURE_SECONDS),
        noise=noise,
        energy_mj=model.energy_mj + shown * seconds * 1000.0,
        counters_ns=tuple(
            value + nanoseconds if layout.COUNTER_FIELDS[i] in grown else value
            for i, value in enumerate(model.counters_ns)
        ),
        steps=model.steps + steps,
        window=window,
        instant_watts=peak * (1.0 + noise),
        average_watts=sum(s * w for s, w in window) / sum(s for s, _ in window),
        reasons=reasons,
        busy_share=busy,
    )


def counter_ns(model: Model, field_id: int) -> int:
    """A limiter counter in ns by its NVML field id.

    Raises:
        KeyError: not a counter that the simulator has.
    """
    return model.counters_ns[_COUNTER[field_id]]


def _idle(inputs: Inputs, cap_mhz: int) -> tuple[int, float, float]:
    """Clock in MHz and power in W (mean, peak) without work. A live context holds the clock up (measured)."""
    if inputs.context_alive:
        clock = cap_mhz
    else:
        clock = physics.effective_cap_mhz(max(physics.MIN_CLOCK_MHZ, min(inputs.lock_low_mhz, cap_mhz)))
    watts = physics.idle_watts(inputs.product, clock, context_alive=inputs.context_alive)
    return clock, watts, watts


def _work(model: Model, inputs: Inputs, workload: Workload, cap_mhz: int) -> tuple[int, bool, float, float]:
    """Clock in MHz, whether the power limit holds it, and power in W (mean, peak) under load."""
    product = inputs.product
    clock = physics.governed_clock_mhz(product, workload, cap_mhz, inputs.limit_watts)
    limited = clock < cap_mhz
    start = min(model.clock_mhz, cap_mhz)
    watts = peak = physics.board_watts(product, workload, clock)
    if limited and start > clock:  # the load came before the limiter saw it
        peak = physics.board_watts(product, workload, start)
        watts += _OVERSHOOT_SHARE * (peak - watts)
    elif model.power_limited and clock > start + _RECOVERY_MHZ:  # the limiter lets go slowly
        clock, limited = start + _RECOVERY_MHZ, True
        watts = peak = physics.board_watts(product, workload, clock)
    return clock, limited, watts, peak


def _limits(inputs: Inputs, held: bool, power_limited: bool) -> tuple[tuple[int, ...], int]:
    """NVML field ids of the counters that grow, and the event reasons."""
    if inputs.workload is None:
        if inputs.context_alive:
            return (), 0
        return (78, 80, 81), REASON_IDLE
    grown: tuple[int, ...] = ()
    reasons = 0
    if power_limited:
        grown, reasons = (74,), REASON_POWER_CAP
    if held:
        bits, fields = _LIMITERS[inputs.limiter]
        grown, reasons = grown + fields, reasons | bits
    return grown, reasons


def _trim(window: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    total = sum(seconds for seconds, _ in window)
    first = 0
    while total - window[first][0] > AVERAGE_SECONDS - 1e-6:
        total -= window[first][0]
        first += 1
    return window[first:]


def memory_percent(product: Product, workload: Workload | None) -> int:
    """Memory utilisation in percent, near the readings: 40-100 in decode, 28-50 in prefill."""
    if workload is None:
        return 0
    if workload.phase is Phase.PREFILL:
        return 28 if product is Product.H200 else 45
    seconds = physics.step_seconds(product, workload, physics.MAX_CLOCK_MHZ)
    empty = physics.step_seconds(product, replace(workload, batch=1e-6), physics.MAX_CLOCK_MHZ)
    return round(100 - 40 * empty / seconds)
