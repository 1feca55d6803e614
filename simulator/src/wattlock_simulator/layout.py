"""The state file that the driver library, the node process and the serving engines share: its one definition.

The C header ``driver/state_layout.h`` is generated from these structures (``python -m wattlock_simulator.layout``); the
compiler checks every offset, and a test checks that the header is up to date. All fields are naturally aligned, so a
64-bit store is one store on the machines we run on. Who writes what:

* ``Sensors``: the node process alone, under a sequence lock (odd while it writes). Python gives no memory barriers, so
  the lock relies on the store order of x86; a torn reading elsewhere would last for one read.
* ``Request``: NVML clients, through the library.
* ``Workload``: the serving engine that holds the GPU. ``Condition`` and ``Fault``: the control command.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

MAGIC = 0x574C_4F43_4B53_494D
VERSION = 1
MAX_GPUS = 16
MAX_FAULTS = 16

COUNTER_FIELDS = (74, 75, 76, 77, 78, 79, 80, 81, 269, 270, 271)
"""NVML field ids of ``Sensors.counters_ns``, in its order."""


class Fault(ctypes.Structure):
    """One injected fault. ``remaining``: 0 slot is free, -1 until cleared, n for the next n matching calls."""

    _fields_ = (
        ("function", ctypes.c_char * 56),
        ("code", ctypes.c_uint32),
        ("remaining", ctypes.c_int32),
        ("delay_ms", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class Identity(ctypes.Structure):
    """What never changes: names, clock table, limits, memory size."""

    _fields_ = (
        ("uuid", ctypes.c_char * 96),
        ("name", ctypes.c_char * 96),
        ("serial", ctypes.c_char * 32),
        ("product", ctypes.c_char * 16),
        ("index", ctypes.c_uint32),
        ("pci_bus", ctypes.c_uint32),
        ("max_clock_mhz", ctypes.c_uint32),
        ("min_clock_mhz", ctypes.c_uint32),
        ("clock_step_mhz", ctypes.c_uint32),
        ("memory_clocks_mhz", ctypes.c_uint32 * 2),
        ("min_limit_mw", ctypes.c_uint32),
        ("max_limit_mw", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("memory_bytes", ctypes.c_uint64),
    )


class Request(ctypes.Structure):
    """What NVML clients asked for. A lock is ``min << 32 | max`` in one word, 0 for none."""

    _fields_ = (
        ("lock_range_mhz", ctypes.c_uint64),
        ("memory_lock_range_mhz", ctypes.c_uint64),
        ("power_limit_mw", ctypes.c_uint32),
        ("persistence_mode", ctypes.c_uint32),
    )


class Condition(ctypes.Structure):
    """What the control command sets on a GPU. A new ``reset_generation`` is a GPU reset or driver reload."""

    _fields_ = (
        ("mig_current", ctypes.c_uint32),
        ("mig_pending", ctypes.c_uint32),
        ("virtualization_mode", ctypes.c_uint32),
        ("limiter", ctypes.c_uint32),
        ("limiter_mhz", ctypes.c_uint32),
        ("recovery_action", ctypes.c_uint32),
        ("reset_generation", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class WorkloadSlot(ctypes.Structure):
    """What the serving engine runs. ``architecture`` 0: none. ``lease_until_ns``: monotonic clock; 0 for ever."""

    _fields_ = (
        ("architecture", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("batch", ctypes.c_double),
        ("context", ctypes.c_double),
        ("extra_step_seconds", ctypes.c_double),
        ("lease_until_ns", ctypes.c_uint64),
    )


class Sensors(ctypes.Structure):
    """What the GPU shows, refreshed every 100 ms. ``steps``: model steps done since the state file was made."""

    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("sm_mhz", ctypes.c_uint32),
        ("memory_mhz", ctypes.c_uint32),
        ("video_mhz", ctypes.c_uint32),
        ("temperature_celsius", ctypes.c_uint32),
        ("gpu_percent", ctypes.c_uint32),
        ("memory_percent", ctypes.c_uint32),
        ("memory_used_mib", ctypes.c_uint32),
        ("power_average_mw", ctypes.c_uint32),
        ("power_instant_mw", ctypes.c_uint32),
        ("reasons", ctypes.c_uint64),
        ("energy_mj", ctypes.c_uint64),
        ("counters_ns", ctypes.c_uint64 * len(COUNTER_FIELDS)),
        ("steps", ctypes.c_double),
        ("updated_ns", ctypes.c_uint64),
        ("applied_generation", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class Gpu(ctypes.Structure):
    """One GPU."""

    _fields_ = (
        ("identity", Identity),
        ("request", Request),
        ("condition", Condition),
        ("workload", WorkloadSlot),
        ("sensors", Sensors),
        ("faults", Fault * MAX_FAULTS),
    )


class State(ctypes.Structure):
    """The whole file. A new ``session_generation`` ends every open NVML session."""

    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("gpu_count", ctypes.c_uint32),
        ("session_generation", ctypes.c_uint32),
        ("node_heartbeat_ns", ctypes.c_uint64),
        ("node_name", ctypes.c_char * 256),
        ("faults", Fault * MAX_FAULTS),
        ("gpus", Gpu * MAX_GPUS),
    )


_STRUCTURES: tuple[tuple[type[ctypes.Structure], str], ...] = (
    (Fault, "sim_fault"),
    (Identity, "sim_identity"),
    (Request, "sim_request"),
    (Condition, "sim_condition"),
    (WorkloadSlot, "sim_workload"),
    (Sensors, "sim_sensors"),
    (Gpu, "sim_gpu"),
    (State, "sim_state"),
)

_SCALARS: dict[Any, str] = {
    ctypes.c_char: "char",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_int32: "int32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_double: "double",
}


def _declaration(name: str, kind: Any) -> str:
    structs = {structure: f"struct {c_name}" for structure, c_name in _STRUCTURES}
    if kind in _SCALARS:
        return f"{_SCALARS[kind]} {name}"
    if kind in structs:
        return f"{structs[kind]} {name}"
    return f"{_declaration(name, kind._type_)}[{kind._length_}]"


def header() -> str:
    """Text of the C header."""
    lines = [
        "/* Layout of the state file. Generated by python -m wattlock_simulator.layout; do not edit. */",
        "#ifndef WATTLOCK_STATE_LAYOUT_H",
        "#define WATTLOCK_STATE_LAYOUT_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        f"#define SIM_MAGIC UINT64_C(0x{MAGIC:x})",
        f"#define SIM_VERSION {VERSION}u",
        f"#define SIM_MAX_GPUS {MAX_GPUS}",
        f"#define SIM_MAX_FAULTS {MAX_FAULTS}",
        f"#define SIM_COUNTERS {len(COUNTER_FIELDS)}",
        f"#define SIM_COUNTER_FIELDS {{{', '.join(map(str, COUNTER_FIELDS))}}}",
        "",
    ]
    for structure, name in _STRUCTURES:
        fields = structure._fields_
        lines.append(f"struct {name} {{")
        lines += [f"    {_declaration(field[0], field[1])};" for field in fields]
        lines += ["};", f'_Static_assert(sizeof(struct {name}) == {ctypes.sizeof(structure)}, "size of {name}");']
        for field in fields:
            offset = getattr(structure, field[0]).offset
            lines.append(
                f'_Static_assert(offsetof(struct {name}, {field[0]}) == {offset}, "offset of {name}.{field[0]}");'
            )
        lines.append("")
    return "\n".join([*lines, "#endif", ""])


def main() -> int:
    """Writes the header to the driver's sources, or to the path given as the only argument."""
    default = Path(__file__).resolve().parents[2] / "driver" / "state_layout.h"
    (Path(sys.argv[1]) if len(sys.argv) > 1 else default).write_text(header())
    return 0


if __name__ == "__main__":
    sys.exit(main())
