"""Makes NVML read-only for this process, and keeps a record of every call.

Two locks, either of which is enough: every function that pynvml looks up must be on the list of reads below, and the
process gives up all capabilities, so the driver itself would refuse a write (it asks for CAP_SYS_ADMIN).
"""

import ctypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

#: Getters change nothing; these other three are the library's own start, end and error texts.
_READ = re.compile(
    r"nvml(Init(WithFlags)?|Shutdown|ErrorString|(System|Unit|Device|Vgpu\w*|Gpm\w*)(Get|Query)\w*)(_v\d+)?"
)
_MAX_LATENCIES = 20_000
_FIELDS_FUNCTION = "nvmlDeviceGetFieldValues"
_SUCCESS = 0


class NotARead(BaseException):
    """A function that may change something was about to be called.

    Not an ``Exception``: the agent handles those and goes on, and this must end the run.
    """


@dataclass
class Calls:
    """What became of the calls of one function, or of one field of nvmlDeviceGetFieldValues."""

    codes: dict[int, int] = field(default_factory=dict)
    """Count by NVML return code; 0 is success."""
    latencies_us: list[float] = field(default_factory=list)
    """In microseconds; empty for fields, which share one call."""

    def note(self, code: int, latency_us: float | None = None) -> None:
        """Add one call."""
        self.codes[code] = self.codes.get(code, 0) + 1
        if latency_us is not None and len(self.latencies_us) < _MAX_LATENCIES:
            self.latencies_us.append(latency_us)


@dataclass
class CallLog:
    """Every NVML call of this process."""

    functions: dict[str, Calls] = field(default_factory=dict)
    fields: dict[int, Calls] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    """Functions that this driver's library does not have."""
    refused: list[str] = field(default_factory=list)
    """Functions that are no reads. Each attempt also raised ``NotARead``."""


class _Recorded:
    """A function of the library that notes how each call ended."""

    def __init__(self, name: str, function: Any, log: CallLog) -> None:
        object.__setattr__(self, "_parts", (name, function, log))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._parts[1], name, value)  # pynvml sets restype

    def __call__(self, *arguments: Any) -> Any:
        name, function, log = self._parts
        started = time.perf_counter()
        code = function(*arguments)
        latency_us = 1e6 * (time.perf_counter() - started)
        if isinstance(code, int):
            log.functions.setdefault(name, Calls()).note(code, latency_us)
        if name == _FIELDS_FUNCTION and code == _SUCCESS:
            for value in arguments[2]._obj:  # what pynvml wrapped with ctypes.byref
                log.fields.setdefault(int(value.fieldId), Calls()).note(int(value.nvmlReturn))
        return code


def is_read(name: str) -> bool:
    """Return whether an NVML function can change nothing."""
    return _READ.fullmatch(name) is not None


def guard(pynvml: ModuleType) -> CallLog:
    """Let ``pynvml`` call reads alone from now on, and return the record of its calls.

    Raises:
        RuntimeError: the binding looks its functions up in another way than we know; nothing may be called then.
    """
    look_up: Callable[[str], Any] | None = getattr(pynvml, "_nvmlGetFunctionPointer", None)
    if look_up is None:
        raise RuntimeError("pynvml has no _nvmlGetFunctionPointer: install nvidia-ml-py, not the package 'pynvml'")
    log = CallLog()

    def guarded(name: str) -> Any:
        if not is_read(name):
            log.refused.append(name)
            raise NotARead(f"{name} may change the GPU: the hardware tier only reads")
        try:
            return _Recorded(name, look_up(name), log)
        except pynvml.NVMLError:
            log.missing.add(name)
            raise

    pynvml._nvmlGetFunctionPointer = guarded  # type: ignore[attr-defined]
    return log


def give_up_capabilities() -> None:
    """Drop every capability of this thread and of those that it starts; for a process without any this is no change.

    Raises:
        OSError: the kernel refused.
    """

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits each
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(ctypes.byref(Header(0x20080522, 0)), nothing) != 0:
        code = ctypes.get_errno()
        raise OSError(code, "capset failed: cannot give up capabilities")
