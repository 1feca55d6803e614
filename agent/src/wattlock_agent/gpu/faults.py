"""What each NVML return code means for the agent. Pure: numbers in, a fault and a sentence out.

The numbers are ours and not the binding's: they are the driver's ABI, and bindings lag behind it.
Source: nvmlReturn_t in nvml.h 13.3 (https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceEnumvs.html).
"""

from dataclasses import dataclass

from wattlock_agent.gpu.base import GpuError, GpuFault

SUCCESS = 0
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NOT_FOUND = 6
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
UNKNOWN = 999


@dataclass(frozen=True)
class _Meaning:
    name: str
    fault: GpuFault
    remedy: str


_RETRY = "it is tried again"
_DRIVER = (
    "check that the NVIDIA driver is loaded on the node and that the container runtime injects it "
    "(runtimeClassName nvidia, or spec.placement of the policy)"
)
_BUG = "the value did not fit this driver; please report it with the GPU product and driver version"
_RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset) or reboot"
_NEVER = "this GPU or driver does not offer it; the agent goes on without"

_MEANINGS: dict[int, _Meaning] = {
    1: _Meaning("uninitialized", GpuFault.NO_DRIVER, "the driver was closed; it is opened anew"),
    2: _Meaning("invalid argument", GpuFault.INVALID_ARGUMENT, _BUG),
    3: _Meaning("not supported", GpuFault.NOT_SUPPORTED, _NEVER),
    4: _Meaning(
        "no permission",
        GpuFault.NO_PERMISSION,
        "the agent needs the capability SYS_ADMIN in the host's user namespace (hostUsers must not be false) "
        "to change clocks; where reading fails, the container lost the device: restart the agent's pod",
    ),
    5: _Meaning("already initialized", GpuFault.TRANSIENT, _RETRY),
    6: _Meaning("not found", GpuFault.NOT_SUPPORTED, _NEVER),
    7: _Meaning("insufficient size", GpuFault.TRANSIENT, _RETRY),
    8: _Meaning("insufficient external power", GpuFault.GPU_LOST, "check the power cables of the GPU"),
    9: _Meaning("driver not loaded", GpuFault.NO_DRIVER, _DRIVER),
    10: _Meaning("timeout", GpuFault.TRANSIENT, _RETRY),
    11: _Meaning("interrupt request issue", GpuFault.GPU_LOST, "the kernel reports an interrupt problem; see dmesg"),
    12: _Meaning("library libnvidia-ml.so.1 not found", GpuFault.NO_DRIVER, _DRIVER),
    13: _Meaning("function not in the library", GpuFault.NOT_SUPPORTED, "the driver is too old for it; upgrade it"),
    14: _Meaning("corrupted infoROM", GpuFault.TRANSIENT, "the GPU's infoROM is corrupted; have it replaced"),
    15: _Meaning("GPU is lost", GpuFault.GPU_LOST, _RESET),
    16: _Meaning("GPU requires a reset", GpuFault.GPU_LOST, _RESET),
    17: _Meaning(
        "blocked by the operating system",
        GpuFault.NO_PERMISSION,
        "the device control group or seccomp blocks the device; restart the agent's pod, check its security profile",
    ),
    18: _Meaning(
        "driver and library versions differ",
        GpuFault.DRIVER_MISMATCH,
        "a driver upgrade is under way; the agent leaves and starts again with the new library",
    ),
    19: _Meaning("in use", GpuFault.TRANSIENT, _RETRY),
    20: _Meaning("insufficient memory", GpuFault.TRANSIENT, _RETRY),
    21: _Meaning("no data", GpuFault.TRANSIENT, _RETRY),
    22: _Meaning("not supported with ECC on a vGPU", GpuFault.NOT_SUPPORTED, _NEVER),
    23: _Meaning("insufficient resources", GpuFault.TRANSIENT, _RETRY),
    24: _Meaning("frequency not supported", GpuFault.INVALID_ARGUMENT, _BUG),
    25: _Meaning("argument version mismatch", GpuFault.NOT_SUPPORTED, "the driver is too old for it; upgrade it"),
    26: _Meaning("function removed", GpuFault.NOT_SUPPORTED, "the driver no longer has it; upgrade the agent"),
    27: _Meaning("not ready", GpuFault.TRANSIENT, _RETRY),
    28: _Meaning("GPU not found", GpuFault.GPU_LOST, _RESET),
    29: _Meaning("invalid state", GpuFault.TRANSIENT, _RETRY),
    30: _Meaning("reset type not supported", GpuFault.NOT_SUPPORTED, _NEVER),
    999: _Meaning(
        "unknown error",
        GpuFault.TRANSIENT,
        "it is tried again; if it stays, the container lost the device (systemctl daemon-reload on the host does "
        "that): restart the agent's pod",
    ),
}
KNOWN_CODES = frozenset(_MEANINGS)


def fault_of(code: int) -> GpuFault:
    """Return the kind of failure behind an NVML return code; codes that we do not know are transient."""
    meaning = _MEANINGS.get(code)
    return GpuFault.TRANSIENT if meaning is None else meaning.fault


def gpu_error(code: int, call: str, uuid: str | None) -> GpuError:
    """Return the error for a failed NVML call: it names the call, the GPU and what to do."""
    meaning = _MEANINGS.get(code, _Meaning("not known to this agent", GpuFault.TRANSIENT, _RETRY))
    where = f" on {uuid}" if uuid else ""
    return GpuError(meaning.fault, call, uuid, f"{call}{where}: {meaning.name} (NVML {code}); {meaning.remedy}")
