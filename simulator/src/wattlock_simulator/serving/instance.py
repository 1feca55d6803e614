"""An engine on its GPUs: registers the workload in the state file and books the steps that the GPUs did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from wattlock_simulator import layout, state
from wattlock_simulator.serving.control import Change, MetricsFault
from wattlock_simulator.serving.engine import Engine, Settings
from wattlock_simulator.serving.exposition import page
from wattlock_simulator.serving.requests import Request, RequestEngine

TICK_SECONDS = 0.2
_LOAD_SECONDS = 1.0
_LEASE_SECONDS = 3.0  # an instance that dies leaves its GPUs idle after this


class Instance:
    """One serving instance; all methods may be called from any thread.

    Attributes:
        model_name: name of the model that it serves.
    """

    def __init__(
        self,
        gpus: Sequence[layout.Gpu],
        settings: Settings,
        *,
        model_name: str = "simulated",
        seed: int = 0,
        by_requests: bool = False,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        time_seconds: Callable[[], float] = time.time,
    ) -> None:
        if not gpus:
            raise ValueError("an instance needs at least one GPU")
        self._gpus = tuple(gpus)
        self._monotonic_ns = monotonic_ns
        self._time_seconds = time_seconds
        kind = RequestEngine if by_requests else Engine
        self._engine = kind(settings, seed=seed, now_seconds=time_seconds())
        self.model_name = model_name
        self._fault = MetricsFault.NONE
        self._scrapes_backwards = 0
        self._load_due_ns = monotonic_ns()
        self._lock = threading.Lock()
        self._progressed = threading.Condition(self._lock)
        self._left = False
        self._seen = [state.read_sensors(g) for g in self._gpus]
        with self._lock:
            self._register()

    @property
    def metrics_fault(self) -> MetricsFault:
        """How the metrics page is broken at present."""
        return self._fault

    def tick(self) -> None:
        """Books the work since the last tick and renews workload and lease."""
        with self._lock:
            self._tick()

    def apply(self, change: Change) -> None:
        """Takes a checked change; work done before it is booked before it."""
        with self._lock:
            self._tick()
            if change.restart:
                self._engine.restart(self._time_seconds())
            self._engine.change(change.settings)
            if change.metrics_fault is not None:
                self._fault, self._scrapes_backwards = change.metrics_fault, 0
            self._register()

    @property
    def settings(self) -> Settings:
        """The present settings."""
        return self._engine.settings

    def describe(self) -> dict[str, Any]:
        """Settings and GPUs, for people."""
        return {
            "gpus": [g.identity.uuid.decode() for g in self._gpus],
            "metricsFault": self._fault,
            **asdict(self._engine.settings),
        }

    def page(self) -> bytes:
        """The metrics page of this moment, with the faults that concern its numbers."""
        with self._lock:
            self._tick()
            scale = 1.0
            if self._fault is MetricsFault.NAN:
                scale = float("nan")
            elif self._fault is MetricsFault.BACKWARDS:
                self._scrapes_backwards += 1
                scale = 0.9**self._scrapes_backwards
            return page(self._engine, self.model_name, scale=scale)

    def leave(self) -> None:
        """Takes model and context off the GPUs, for good: a late scrape must not put them back."""
        with self._lock:
            self._left = True
            self._progressed.notify_all()
            for gpu in self._gpus:
                state.clear_workload(gpu)

    def submit(self, request: Request) -> bool:
        """Takes a request; False when this instance makes up its load instead of being asked for it."""
        with self._lock:
            if not isinstance(self._engine, RequestEngine) or self._left:
                return False
            self._tick()
            self._engine.submit(request)
            self._register()
            return True

    def wait(self, request: Request, seen_tokens: int, timeout_seconds: float) -> tuple[int, bool]:
        """Waits until a request has more tokens than were seen, or is done.

        Returns:
            Whole tokens so far, and whether these are all.
        """
        with self._lock:
            self._progressed.wait_for(
                lambda: request.done or request.generated >= seen_tokens + 1 or self._left, timeout_seconds
            )
            return int(request.generated), request.done or self._left

    def withdraw(self, request: Request) -> None:
        """Forgets a request whose client has left."""
        with self._lock:
            if isinstance(self._engine, RequestEngine):
                self._engine.withdraw(request)

    def _tick(self) -> None:
        steps, seconds = self._progress()
        self._engine.account(steps, seconds)
        now = self._monotonic_ns()
        if now >= self._load_due_ns:
            self._engine.draw_load()
            self._load_due_ns = now + int(_LOAD_SECONDS * 1e9)
        self._register()
        self._progressed.notify_all()

    def _progress(self) -> tuple[float, float]:
        """Steps of the slowest GPU and the seconds that it took for them, since the last call."""
        slowest: tuple[float, float] | None = None
        for position, gpu in enumerate(self._gpus):
            now, before = state.read_sensors(gpu), self._seen[position]
            self._seen[position] = now
            done = (max(0.0, now.steps - before.steps), max(0, now.updated_ns - before.updated_ns) / 1e9)
            if slowest is None or done < slowest:
                slowest = done
        return slowest or (0.0, 0.0)

    def _register(self) -> None:
        if self._left:
            return
        lease_ns = self._monotonic_ns() + int(_LEASE_SECONDS * 1e9)
        for gpu in self._gpus:
            state.set_workload(
                gpu,
                self._engine.workload,
                extra_step_seconds=self._engine.settings.extra_step_seconds,
                lease_until_ns=lease_ns,
            )
