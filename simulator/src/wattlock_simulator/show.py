"""The simulated GPUs as the driver itself knows them, for people and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wattlock_simulator import layout, state
from wattlock_simulator.state import StateFile


def describe(file: StateFile) -> dict[str, Any]:
    """All GPUs and injected faults as a JSON object; units are in the names.

    ``lock_mhz`` is the upper end of the locked range, or null without a lock: what no NVML call can tell.
    """
    node = file.state.node_name.decode()
    return {
        "node": node,
        "gpus": [_gpu(gpu, node) for gpu in file.gpus],
        "faults": _faults(file.state.faults),
    }


def _gpu(gpu: layout.Gpu, node: str) -> dict[str, Any]:
    sensors, lock_range = state.read_sensors(gpu), gpu.request.lock_range_mhz
    return {
        "node": node,
        "index": gpu.identity.index,
        "uuid": gpu.identity.uuid.decode(),
        "product": gpu.identity.product.decode(),
        "sm_mhz": sensors.sm_mhz,
        "lock_mhz": lock_range & 0xFFFFFFFF if lock_range else None,
        "lock_min_mhz": lock_range >> 32 if lock_range else None,
        "watts": sensors.power_average_mw / 1000,
        "limit_watts": gpu.request.power_limit_mw / 1000,
        "energy_joules": sensors.energy_mj / 1000,
        "celsius": sensors.temperature_celsius,
        "reasons": sensors.reasons,
        "workload": _workload(gpu.workload),
        "mig": bool(gpu.condition.mig_current),
        "faults": _faults(gpu.faults),
    }


def _workload(slot: layout.WorkloadSlot) -> dict[str, Any] | None:
    if not slot.architecture:
        return None
    return {
        "architecture": state.ARCHITECTURES.get(slot.architecture),
        "phase": state.PHASES.get(slot.phase) if slot.batch > 0 else "idle",
        "batch": slot.batch,
        "context": slot.context,
    }


def _faults(slots: Sequence[layout.Fault]) -> list[dict[str, Any]]:
    return [
        {"function": slot.function.decode(), "code": slot.code, "remaining": slot.remaining, "delay_ms": slot.delay_ms}
        for slot in slots
        if slot.remaining
    ]


def table(shown: dict[str, Any]) -> str:
    """What ``describe`` returns as lines for people."""
    lines = [f"{'GPU':<42} {'MHZ':>5} {'LOCK':>9} {'W':>6} {'LIMIT':>6} {'C':>3} {'REASONS':>7} WORKLOAD"]
    for gpu in shown["gpus"]:
        lock = f"{gpu['lock_min_mhz']}-{gpu['lock_mhz']}" if gpu["lock_mhz"] else "-"
        work = gpu["workload"]
        text = f"{work['architecture']} {work['phase']} {work['batch']:.1f} x {work['context']:g}" if work else "-"
        text += " MIG" if gpu["mig"] else ""
        text += "".join(f" fault:{f['function']}={f['code']}" for f in gpu["faults"])
        lines.append(
            f"{gpu['uuid']:<42} {gpu['sm_mhz']:>5} {lock:>9} {gpu['watts']:>6.1f} {gpu['limit_watts']:>6.0f} "
            f"{gpu['celsius']:>3} {gpu['reasons']:>#7x} {text}"
        )
    lines += [f"fault on all: {f['function']}={f['code']}" for f in shown["faults"]]
    return "\n".join(lines)
