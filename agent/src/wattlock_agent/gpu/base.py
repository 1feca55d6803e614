"""GPUs as the agent sees them: identities, readings, failures, and the calls it makes.

No NVML type leaves ``gpu.nvml``; everything else in the agent works on what is defined here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class GpuFault(StrEnum):
    """What kind of failure a driver call met, and so what the agent does about it."""

    NO_DRIVER = "NoDriver"
    """No driver library or no driver: wait, try again."""
    NOT_SUPPORTED = "NotSupported"
    """The GPU or driver cannot do this: never try again."""
    NO_PERMISSION = "NoPermission"
    """The process may not do this: report, try again only when something changed."""
    INVALID_ARGUMENT = "InvalidArgument"
    """The driver refused the value."""
    GPU_LOST = "GPULost"
    """The GPU fell off the bus or needs a reset: stop writing to it."""
    DRIVER_MISMATCH = "DriverMismatch"
    """Library and driver differ (an upgrade is under way): leave, to be started again with the new library."""
    TRANSIENT = "Transient"
    """Timeout, busy, unknown: try again a few times, then initialise anew."""


class GpuError(Exception):
    """A driver call failed. The message names the call, the GPU and what to do."""

    def __init__(self, fault: GpuFault, call: str, uuid: str | None, message: str) -> None:
        super().__init__(message)
        self.fault = fault
        self.call = call
        self.uuid = uuid


@dataclass(frozen=True)
class GpuIdentity:
    """What does not change while the driver is loaded."""

    uuid: str
    index: int
    minor: int | None
    product: str
    supported_clocks_mhz: tuple[int, ...]
    """Supported SM clocks, ascending; empty when the device does not tell."""
    mig_enabled: bool
    virtual: bool
    """vGPU guest or host of vGPUs: never written to. A GPU passed through whole is not virtual."""


@dataclass(frozen=True)
class LimiterNanoseconds:
    """The driver's cumulative counters of time spent below the requested clock, by cause, in ns.

    ``None`` means that the GPU does not have the counter. A counter that decreases tells of a driver reload.
    """

    power_cap: int | None = None
    thermal: int | None = None
    power_brake: int | None = None
    reliability: int | None = None
    board_limit: int | None = None


@dataclass(frozen=True)
class GpuReading:
    """One reading of one GPU. Values that the GPU does not offer are ``None``."""

    uuid: str
    at_seconds: float
    """Time of the energy read, by the clock of ``boottime``."""
    energy_mj: int | None
    """Energy counter in millijoules since driver load."""
    power_instant_mw: int | None
    power_limit_mw: int | None
    """Enforced power limit."""
    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    utilization_percent: int | None
    """Share of the last 200 ms in which any kernel ran."""
    event_reasons: int | None
    """Clock event reasons (bit field)."""
    limiters: LimiterNanoseconds


@dataclass(frozen=True)
class DriverInfo:
    """Versions of driver and NVML library."""

    driver_version: str
    nvml_version: str


class GpuDriver(Protocol):
    """The driver. Every call may raise GpuError and takes at most a few milliseconds for each GPU.

    Not thread-safe: the agent makes all calls from one worker thread.
    """

    def open(self) -> DriverInfo:
        """Initialise. Opening anew after ``close`` finds a reloaded driver."""

    def close(self) -> None:
        """Let go of the driver; never raises."""

    def list_gpus(self) -> tuple[GpuIdentity, ...]:
        """Return the GPUs of the node; one that fails to answer is left out and logged."""

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU."""

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        """Limit the SM clock to [low, high] MHz: both must be supported clocks."""

    def reset(self, uuid: str) -> None:
        """Return the SM clock to default management."""

    def may_write(self) -> bool:
        """Return whether the process has the capability that the driver asks for (no write is tried)."""
