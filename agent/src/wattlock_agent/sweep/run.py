"""Runs a sweep: load by load, point by point, and puts everything back at the end, whatever the end is."""

import time
from collections.abc import Callable
from pathlib import Path

from wattlock_api import boottime

from wattlock_agent.gpu.base import GpuError
from wattlock_agent.sweep.endpoint import EndpointError, EngineRestartedError
from wattlock_agent.sweep.estimates import Window
from wattlock_agent.sweep.levers import Levers, RestoreError, SweepDriver
from wattlock_agent.sweep.load import Load, LoadError
from wattlock_agent.sweep.meter import Meter
from wattlock_agent.sweep.plan import Plan, Setting, Workload
from wattlock_agent.sweep.record import COLUMNS, WINDOWS_NAME, csv_line, window_line

#: A load must stand within this time: prompts of 64 requests with 64k tokens take minutes.
READY_SECONDS = 600.0
_READY_POLL_SECONDS = 0.5
#: Windows in which the load had a gap are measured again, so often for each load.
_MAX_GAPS = 100
_MAX_FAILURES = 4
_RESTORE_TRIES = 5
_RESTORE_RETRY_SECONDS = 1.0


class Sweep:
    """One sweep."""

    def __init__(
        self,
        plan: Plan,
        levers: Levers,
        load: Load,
        meter: Meter,
        directory: Path,
        pause: Callable[[float], None],
        say: Callable[[str], None],
    ) -> None:
        """``pause`` waits so many seconds or raises; ``say`` shows a line to people."""
        self._plan = plan
        self._levers = levers
        self._load = load
        self._meter = meter
        self._directory = directory
        self._pause = pause
        self._say = say
        self._begun_seconds = 0.0

    def run(self) -> tuple[Window, ...]:
        """Measure everything; each window is on the disk before the next begins.

        Undoes nothing and may leave the load running: ``undo`` and the load's ``stop`` come after it, whatever it
        raised.
        """
        self._begun_seconds = boottime.now_seconds()
        windows: list[Window] = []
        with (self._directory / WINDOWS_NAME).open("w", encoding="utf-8") as file:
            file.write(csv_line(COLUMNS))
            for workload in self._plan.workloads:
                self._levers.apply(self._plan.settings[0])
                self._load.start(workload)
                self._await_load(workload)
                for setting in self._plan.settings:
                    window = self._measure(workload, setting)
                    windows.append(window)
                    file.write(window_line(window))
                    file.flush()
                    self._progress(window, len(windows))
                self._load.stop()
        return tuple(windows)

    def _await_load(self, workload: Workload) -> None:
        self._say(f"{workload}: waiting until all {workload.concurrency} requests run")
        since = boottime.now_seconds()
        while not self._load.ready():
            if boottime.now_seconds() - since > READY_SECONDS:
                raise LoadError(
                    f"{workload}: not all {workload.concurrency} requests ran within {READY_SECONDS:g} s; "
                    "lower --concurrency to what the engine takes at a time (vLLM: --max-num-seqs)"
                )
            self._pause(_READY_POLL_SECONDS)

    def _measure(self, workload: Workload, setting: Setting) -> Window:
        self._levers.apply(setting)
        failures = 0
        for _ in range(_MAX_GAPS):
            self._pause(self._plan.settle_seconds)
            if self._load.steady():
                begun = boottime.now_seconds()
                try:
                    measured = self._meter.measure(self._plan.window_seconds)
                except EngineRestartedError:
                    raise
                except EndpointError as error:  # a page that came too late under load is no reason to end
                    failures += 1
                    if failures == _MAX_FAILURES:
                        raise
                    self._say(f"{workload}, {setting}: {error}; measuring again")
                    continue
                if self._load.steady():
                    at_seconds = begun + measured.seconds / 2 - self._begun_seconds
                    return Window(workload, setting, at_seconds, **vars(measured))
            self._say(f"{workload}, {setting}: the load had a gap, measuring again")
            self._await_load(workload)
        raise LoadError(f"{workload}: the load never ran for {self._plan.window_seconds:g} s; shorten --window-seconds")

    def _progress(self, window: Window, done: int) -> None:
        gone = boottime.now_seconds() - self._begun_seconds
        planned = self._plan.remaining_seconds(0) - self._plan.remaining_seconds(done)
        left = self._plan.remaining_seconds(done) * max(1.0, gone / planned)
        clock = "-" if window.observed_mhz is None else f"{window.observed_mhz:.0f}"
        energy = f"{window.joules_per_token:.4f} J/token" if window.tokens_per_second > 0 else "no tokens"
        self._say(
            f"[{done}/{self._plan.windows}] {window.workload}, {window.setting}: {clock} MHz, {window.watts:.0f} W, "
            f"{window.tokens_per_second:,.0f} tokens/s, {energy}; {duration(left)} left"
        )


def undo(levers: Levers, driver: SweepDriver) -> None:
    """Put everything back, trying several times with the driver opened anew.

    Raises:
        RestoreError: something is not as it was; it is still recorded.
    """
    for attempt in range(_RESTORE_TRIES):
        try:
            levers.restore()
        except RestoreError:
            if attempt == _RESTORE_TRIES - 1:
                raise
            time.sleep(_RESTORE_RETRY_SECONDS)
            try:
                driver.open()
                driver.list_gpus()
            except GpuError:
                continue
        else:
            return


def duration(seconds: float) -> str:
    """Return a time for people."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
