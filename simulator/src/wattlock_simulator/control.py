"""What a person or a test does to the simulated GPUs from outside: reloads, faults, limits, foreign locks."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from wattlock_simulator import layout, physics, state
from wattlock_simulator.state import StateError, StateFile

_MAX_NVML_CODE = 999


def reload_driver(file: StateFile, *, end_sessions: bool = False) -> None:
    """A driver reload: locks and power limits go back to default, energy and limiter counters begin again.

    Args:
        file: the state file.
        end_sessions: every open NVML session answers GPU_IS_LOST from now on, until it initialises anew. Without
            it sessions live on, and only lost locks and falling counters tell.
    """
    reset_gpus(file.gpus)
    if end_sessions:
        file.state.session_generation += 1


def reboot(file: StateFile) -> None:
    """What a reboot of the node does to its GPUs and to the boot id. Its processes are ended by whoever reboots it."""
    reload_driver(file, end_sessions=True)
    state.write_boot_id(file.directory)


def reset_gpus(gpus: Sequence[layout.Gpu]) -> None:
    """A GPU reset: as a driver reload, for some GPUs; a pending MIG mode takes effect."""
    for gpu in gpus:
        gpu.request.lock_range_mhz = 0
        gpu.request.memory_lock_range_mhz = 0
        gpu.request.power_limit_mw = gpu.identity.max_limit_mw
        gpu.condition.mig_current = gpu.condition.mig_pending
        gpu.condition.reset_generation += 1


def inject_fault(
    slots: Sequence[layout.Fault], function: str, code: int, *, count: int = -1, delay_ms: int = 0
) -> None:
    """Lets calls of an NVML function fail.

    Args:
        slots: the fault slots of a GPU, or those of the state for calls that concern no GPU (``nvmlInit``).
        function: NVML name without version suffix, or ``*`` for every call but ``nvmlInit``.
        code: NVML return code; 0 with a delay makes a call slow.
        count: how many calls; -1 until cleared.
        delay_ms: the call blocks so long before it answers, in ms.

    Raises:
        StateError: an argument out of range, or no free slot.
    """
    if function != "*" and not function.startswith("nvml"):
        raise StateError(f"function {function!r}: give an NVML name such as nvmlDeviceSetGpuLockedClocks, or *")
    if len(function) > layout.Fault.function.size - 1 or not 0 <= code <= _MAX_NVML_CODE or delay_ms < 0:
        raise StateError(f"fault {function} with code {code} and {delay_ms} ms: out of range")
    if count < -1 or count == 0:
        raise StateError("count must be positive, or -1 for until cleared")
    for slot in slots:
        if slot.remaining == 0:
            slot.function, slot.code, slot.delay_ms = function.encode(), code, delay_ms
            slot.remaining = count  # last: from now on the library sees it
            return
    raise StateError(f"all {len(slots)} fault slots are in use: clear some first")


def clear_faults(slots: Sequence[layout.Fault]) -> None:
    """Ends all injected faults."""
    for slot in slots:
        slot.remaining = 0


def set_limiter(gpu: layout.Gpu, kind: str, clock_mhz: int) -> None:
    """Holds the clock down as a thermal or power-brake limiter does: bit and counter included.

    Args:
        gpu: the GPU.
        kind: a key of ``state.LIMITER_CODES``.
        clock_mhz: the highest clock it allows, in MHz.
    """
    gpu.condition.limiter_mhz = clock_mhz
    gpu.condition.limiter = state.LIMITER_CODES[kind]


def set_power_limit(gpu: layout.Gpu, watts: float) -> None:
    """Sets the power limit in W as an administrator would.

    Raises:
        StateError: out of the board's range.
    """
    if not physics.MIN_LIMIT_WATTS <= watts <= physics.DEFAULT_LIMIT_WATTS:
        raise StateError(f"{watts} W: the board takes {physics.MIN_LIMIT_WATTS:g} to {physics.DEFAULT_LIMIT_WATTS:g} W")
    gpu.request.power_limit_mw = round(watts * 1000)


def foreign_lock(file: StateFile, gpu: layout.Gpu, low_mhz: int, high_mhz: int) -> None:
    """Locks clocks as another writer (``nvidia-smi -lgc``) would; it needs no capability and is in the write log.

    Raises:
        StateError: not a range that the board takes.
    """
    if not (0 <= low_mhz <= high_mhz and physics.MIN_CLOCK_MHZ <= high_mhz <= physics.MAX_CLOCK_MHZ):
        raise StateError(f"{low_mhz}-{high_mhz} MHz is not within {physics.MIN_CLOCK_MHZ}-{physics.MAX_CLOCK_MHZ} MHz")
    gpu.request.lock_range_mhz = low_mhz << 32 | high_mhz
    _log_write(file.directory, gpu, "nvmlDeviceSetGpuLockedClocks", [low_mhz, high_mhz])


def foreign_unlock(file: StateFile, gpu: layout.Gpu) -> None:
    """Resets a lock as another writer (``nvidia-smi -rgc``) would."""
    gpu.request.lock_range_mhz = 0
    _log_write(file.directory, gpu, "nvmlDeviceResetGpuLockedClocks", [])


def _log_write(directory: Path, gpu: layout.Gpu, function: str, arguments: list[int]) -> None:
    """Appends to the write log in the format of the library (``driver/audit.c``)."""
    line = {
        "timeNs": time.time_ns(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "comm": "foreign-writer",
        "cmdline": " ".join(sys.argv),
        "function": function,
        "uuid": gpu.identity.uuid.decode(),
        "args": arguments,
        "result": 0,
    }
    descriptor = os.open(directory / state.LOG_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)
