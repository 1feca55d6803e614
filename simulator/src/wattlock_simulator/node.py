"""The node process: moves the simulated GPUs forward and publishes their sensors in the state file."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from wattlock_simulator import dynamics, layout, state
from wattlock_simulator.dynamics import Inputs, Model
from wattlock_simulator.physics import Product, Workload
from wattlock_simulator.state import StateFile

_log = logging.getLogger(__name__)

_LONGEST_STEP_SECONDS = 1.0
_LONGEST_LEASE_NS = 60_000_000_000


class Node:
    """The GPUs of one node.

    Tests call ``step`` with a virtual clock; the node process calls ``run``.
    """

    def __init__(self, file: StateFile, *, seed: int = 0, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._state = file.state
        self._gpus = file.gpus
        self._products = [Product(g.identity.product.decode()) for g in self._gpus]
        self._random = random.Random(seed)  # noqa: S311 - noise, not secrets
        self._monotonic_ns = monotonic_ns
        self._models = [_load(gpu) for gpu in self._gpus]
        self._workloads: list[tuple[tuple[int, int, float, float], Workload | None]] = [
            ((0, 0, 0.0, 0.0), None) for _ in self._gpus
        ]

    def step(self, seconds: float = dynamics.REFRESH_SECONDS) -> None:
        """Moves all GPUs forward, in refreshes of at most 100 ms, and publishes each.

        Args:
            seconds: time to pass in s; more than 0.
        """
        refreshes = max(1, round(seconds / dynamics.REFRESH_SECONDS))
        for _ in range(refreshes):
            for index in range(len(self._gpus)):
                self._step_gpu(index, seconds / refreshes)
        self._state.node_heartbeat_ns = self._monotonic_ns()

    def run(self, stop: threading.Event) -> None:
        """Steps every 100 ms until told to stop; after a pause longer than a second the rest of the pause is lost."""
        last = self._monotonic_ns()
        due = last
        while not stop.is_set():
            due += int(dynamics.REFRESH_SECONDS * 1e9)
            stop.wait(max(0.0, (due - self._monotonic_ns()) / 1e9))
            now = self._monotonic_ns()
            elapsed = (now - last) / 1e9
            if elapsed > 0:
                self.step(min(elapsed, _LONGEST_STEP_SECONDS))
            last = now
            due = max(due, now - int(dynamics.REFRESH_SECONDS * 1e9))

    def _step_gpu(self, index: int, seconds: float) -> None:
        gpu = self._gpus[index]
        model = self._models[index]
        if gpu.condition.reset_generation != gpu.sensors.applied_generation:
            model = dynamics.restarted(model)
        inputs = self._inputs(index)
        model = dynamics.advance(model, inputs, seconds, self._random.gauss(0.0, 1.0))
        self._models[index] = model
        _publish(gpu, model, inputs, self._monotonic_ns())

    def _inputs(self, index: int) -> Inputs:
        gpu = self._gpus[index]
        request, condition, slot = gpu.request, gpu.condition, gpu.workload
        lock_range: int = request.lock_range_mhz
        lease_ns = slot.lease_until_ns - self._monotonic_ns() if slot.lease_until_ns else _LONGEST_LEASE_NS
        # A lease far ahead is one from before a reboot, when the monotonic clock was another.
        alive = slot.architecture != 0 and 0 < lease_ns <= _LONGEST_LEASE_NS
        return Inputs(
            product=self._products[index],
            workload=self._workload(index) if alive else None,
            context_alive=alive,
            extra_step_seconds=max(0.0, slot.extra_step_seconds),
            lock_low_mhz=lock_range >> 32,
            lock_high_mhz=lock_range & 0xFFFFFFFF if lock_range else None,
            limit_watts=request.power_limit_mw / 1000.0,
            limiter=condition.limiter,
            limiter_mhz=condition.limiter_mhz,
        )

    def _workload(self, index: int) -> Workload | None:
        """The registered workload; None when it has no batch or makes no sense (half-written)."""
        slot = self._gpus[index].workload
        key = (slot.architecture, slot.phase, slot.batch, slot.context)
        if self._workloads[index][0] != key:
            workload = None
            try:
                workload = Workload(state.ARCHITECTURES[key[0]], state.PHASES[key[1]], key[2], key[3])
            except (KeyError, ValueError):
                if key[2] > 0:
                    _log.warning("GPU %d has a workload that makes no sense: %s", index, key)
            self._workloads[index] = (key, workload)
        return self._workloads[index][1]


def _load(gpu: layout.Gpu) -> Model:
    """Where a GPU stood when the last node process stopped: energy, counters and work go on."""
    sensors = gpu.sensors
    sensors.sequence += sensors.sequence & 1  # a process that died while writing left it odd
    if sensors.updated_ns == 0:
        return Model()
    return Model(
        clock_mhz=sensors.sm_mhz,
        celsius=float(sensors.temperature_celsius),
        energy_mj=float(sensors.energy_mj),
        counters_ns=tuple(sensors.counters_ns),
        steps=sensors.steps,
    )


def _publish(gpu: layout.Gpu, model: Model, inputs: Inputs, now_ns: int) -> None:
    sensors = gpu.sensors
    sensors.sequence += 1
    sensors.sm_mhz = model.clock_mhz
    clocks = gpu.identity.memory_clocks_mhz
    memory_lock_mhz = gpu.request.memory_lock_range_mhz & 0xFFFFFFFF
    sensors.memory_mhz = clocks[1] if memory_lock_mhz and memory_lock_mhz < clocks[0] else clocks[0]
    sensors.video_mhz = 765 if model.clock_mhz <= 345 else 1545
    sensors.temperature_celsius = round(model.celsius)
    sensors.gpu_percent = round(100 * model.busy_share)
    sensors.memory_percent = round(model.busy_share * dynamics.memory_percent(inputs.product, inputs.workload))
    sensors.memory_used_mib = int(0.9 * (gpu.identity.memory_bytes >> 20)) if inputs.context_alive else 620
    sensors.power_average_mw = round(model.average_watts * 1000)
    sensors.power_instant_mw = round(model.instant_watts * 1000)
    sensors.reasons = model.reasons
    sensors.energy_mj = int(model.energy_mj)
    sensors.counters_ns[:] = model.counters_ns
    sensors.steps = model.steps
    sensors.updated_ns = now_ns
    sensors.applied_generation = gpu.condition.reset_generation
    sensors.sequence += 1
