"""Measures one window: energy, tokens, clocks and limiters between two moments."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wattlock_api import boottime

from wattlock_agent.gpu.base import GpuDriver, GpuReading
from wattlock_agent.limiters import growth
from wattlock_agent.sweep.endpoint import EndpointError, Tokens, TokenSource

#: The sensors refresh every 100 ms (measured on H100 and H200); one that has not after so long is taken as it is.
_REFRESH_SECONDS = 0.3
_POLL_SECONDS = 0.005
_SAMPLE_SECONDS = 0.5
#: How long the engine may take to tell its tokens, relative to the window: half of it may be the error of each end.
_SLOWEST_SHARE = 0.02
_LEAST_SLOWEST_SECONDS = 0.05
_EDGE_TRIES = 50


class MeterError(Exception):
    """The window is no measurement. The message says why."""


@dataclass(frozen=True)
class Edge:
    """The counters at one end of a window."""

    readings: tuple[GpuReading, ...]
    tokens: Tokens


@dataclass(frozen=True)
class Measured:
    """Means over a window; see ``estimates.Window`` for the fields."""

    seconds: float
    watts: float
    generated_per_second: float
    prompt_per_second: float
    observed_mhz: float | None
    cap_share: float | None
    celsius: float | None


class Meter:
    """Measures windows on the GPUs of one endpoint."""

    def __init__(
        self,
        driver: GpuDriver,
        uuids: Sequence[str],
        tokens: TokenSource,
        pause: Callable[[float], None],
        now_seconds: Callable[[], float] = boottime.now_seconds,
    ) -> None:
        """``pause`` waits so many seconds, or raises to end the sweep."""
        self._driver = driver
        self._uuids = tuple(uuids)
        self._tokens = tokens
        self._pause = pause
        self._now_seconds = now_seconds

    def measure(self, seconds: float) -> Measured:
        """Measure for so long.

        Raises:
            MeterError: no energy counter, a driver reload, or GPUs that did nothing.
            GpuError: the driver failed.
            EndpointError: the tokens could not be read.
        """
        slowest_seconds = max(_LEAST_SLOWEST_SECONDS, _SLOWEST_SHARE * seconds)
        before = self._edge(slowest_seconds)
        end_seconds = self._now_seconds() + seconds
        samples: list[GpuReading] = []
        while (left_seconds := end_seconds - self._now_seconds()) > 0:
            self._pause(min(_SAMPLE_SECONDS, left_seconds))
            samples += self._read()
        return combine(before, self._edge(slowest_seconds), samples)

    def _edge(self, slowest_seconds: float) -> Edge:
        """Read energy and tokens of one moment: again, until the engine answers so quickly that it is one."""
        for _ in range(_EDGE_TRIES):
            self._await_refresh()
            readings, tokens = self._read(), self._tokens.read()
            if tokens.took_seconds <= slowest_seconds:
                return Edge(readings, tokens)
            self._pause(_POLL_SECONDS)
        raise EndpointError(
            f"the engine's metrics never came within {slowest_seconds:g} s, so tokens and energy would be of different "
            "moments; take longer windows (--window-seconds)"
        )

    def _await_refresh(self) -> None:
        """Wait for the next refresh of the sensors: else up to 100 ms of energy is on the wrong side of the edge."""
        first = self._driver.read(self._uuids[0])
        give_up_seconds = self._now_seconds() + _REFRESH_SECONDS
        while self._now_seconds() < give_up_seconds:
            if self._driver.read(self._uuids[0]).energy_mj != first.energy_mj:
                break
            self._pause(_POLL_SECONDS)

    def _read(self) -> tuple[GpuReading, ...]:
        return tuple(self._driver.read(uuid) for uuid in self._uuids)


def combine(before: Edge, after: Edge, samples: Sequence[GpuReading]) -> Measured:
    """Return the means between two edges; clocks and temperature from the samples taken between them.

    Raises:
        MeterError: as ``Meter.measure``.
    """
    watts = 0.0
    shares: list[float] = []
    for old, new in zip(before.readings, after.readings, strict=True):
        if old.energy_mj is None or new.energy_mj is None:
            raise MeterError(f"{new.uuid} has no energy counter: nothing can be measured on it")
        seconds = new.at_seconds - old.at_seconds
        if new.energy_mj < old.energy_mj or seconds <= 0:
            raise MeterError(
                f"the energy counter of {new.uuid} began anew: the driver was reloaded, and the point lost"
            )
        watts += (new.energy_mj - old.energy_mj) / 1000 / seconds
        capped_seconds = growth(old.limiters, new.limiters, seconds).seconds.get("power_cap")
        if capped_seconds is not None:
            shares.append(min(1.0, capped_seconds / seconds))
    if samples and all(sample.utilization_percent == 0 for sample in samples):
        raise MeterError(
            "the GPUs did nothing while the endpoint was under load: --gpus must name the GPUs that it runs on"
        )
    token_seconds = after.tokens.at_seconds - before.tokens.at_seconds
    clocks = [sample.sm_mhz for sample in samples if sample.sm_mhz is not None]
    temperatures = [sample.temperature_c for sample in samples if sample.temperature_c is not None]
    return Measured(
        seconds=token_seconds,
        watts=watts,
        generated_per_second=(after.tokens.generated - before.tokens.generated) / token_seconds,
        prompt_per_second=(after.tokens.prompt - before.tokens.prompt) / token_seconds,
        observed_mhz=float(statistics.median(clocks)) if clocks else None,
        cap_share=statistics.fmean(shares) if len(shares) == len(after.readings) else None,
        celsius=statistics.fmean(temperatures) if temperatures else None,
    )
