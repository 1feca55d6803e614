"""Keeps the driver open and reads all GPUs; turns each kind of driver failure into what the agent does about it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from wattlock_agent.gpu.base import DriverInfo, GpuDriver, GpuError, GpuFault, GpuIdentity, GpuReading

_log = logging.getLogger(__name__)

#: How long to wait before a driver that could not be opened is tried again.
REOPEN_SECONDS = 5.0
#: MIG mode and the set of GPUs can change while the driver is loaded.
LIST_SECONDS = 60.0
#: The same while a GPU is lost: only the list finds it again, and its lock may still be on it.
LIST_LOST_SECONDS = 15.0
#: Passing failures of one GPU in a row after which the driver is opened anew.
MAX_TRANSIENT = 3


class DriverMismatchError(Exception):
    """Library and driver differ: the process must leave, to be started again with the new library."""


@dataclass(frozen=True)
class Scan:
    """One pass over all GPUs."""

    session: int
    """Grows each time the driver is opened: locks of an earlier session may be gone."""
    driver: DriverInfo | None
    """``None``: the driver is not open."""
    gpus: tuple[GpuIdentity, ...] = ()
    readings: Mapping[str, GpuReading] = field(default_factory=dict)
    """By UUID; a GPU that did not answer is absent."""
    faults: Mapping[str, GpuError] = field(default_factory=dict)
    """By UUID: why a GPU did not answer."""
    problem: GpuError | None = None
    """Why the driver is not open."""
    may_write: bool = False


def _all_lost(faults: Mapping[str, GpuError]) -> bool:
    return bool(faults) and all(error.fault is GpuFault.GPU_LOST for error in faults.values())


class DriverSession:
    """The open driver. All calls come from one thread."""

    def __init__(self, driver: GpuDriver) -> None:
        self._driver = driver
        self._session = 0
        self._info: DriverInfo | None = None
        self._gpus: tuple[GpuIdentity, ...] = ()
        self._listed_at_seconds = 0.0
        self._known: frozenset[str] = frozenset()
        """UUIDs of all GPUs that this session has listed."""
        self._present: frozenset[str] = frozenset()
        """Those that answered at the last reading, or failed for a passing reason."""
        self._reopen_at_seconds = float("-inf")
        self._problem: GpuError | None = None
        self._transient: dict[str, int] = {}
        self._all_lost = 0
        """Sessions in a row that ended because every GPU was lost."""
        self._all_lost_next_seconds = float("-inf")
        self.errors: dict[tuple[str, str], int] = {}
        """Failures so far, by (call, fault)."""

    def scan(self, now_seconds: float) -> Scan:
        """Read all GPUs; opens the driver first where necessary.

        Raises:
            DriverMismatchError: library and driver differ.
        """
        if self._info is None and now_seconds >= self._reopen_at_seconds:
            self._open(now_seconds)
        if self._info is None:
            return Scan(self._session, None, problem=self._problem)
        try:
            if now_seconds - self._listed_at_seconds >= self._list_seconds():
                self._list(now_seconds)
            readings, faults = self._read_all()
            may_write = self._driver.may_write()
        except GpuError as error:
            self._failed(error)
            self._close(error, now_seconds)
            return Scan(self._session, None, problem=error)
        scan = Scan(self._session, self._info, self._gpus, readings, faults, None, may_write)
        if readings:
            self._all_lost, self._all_lost_next_seconds = 0, float("-inf")
        if any(count >= MAX_TRANSIENT for count in self._transient.values()):
            _log.warning("a GPU failed %d times in a row, opening the driver anew", MAX_TRANSIENT)
            self._close(next(iter(faults.values()), None), now_seconds - REOPEN_SECONDS)
        elif not readings and _all_lost(faults) and now_seconds >= self._all_lost_next_seconds:
            # One GPU may fall off its bus; all at once means that our session is dead, as after a reload of the driver.
            _log.warning("every GPU is lost, opening the driver anew")
            pause_seconds = min(REOPEN_SECONDS * 2**self._all_lost, LIST_SECONDS)
            self._all_lost, self._all_lost_next_seconds = min(self._all_lost + 1, 8), now_seconds + pause_seconds
            self._close(next(iter(faults.values())), now_seconds - REOPEN_SECONDS)
        return scan

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        """As GpuDriver.lock; failures are counted.

        Raises:
            GpuError: as the driver.
        """
        try:
            self._driver.lock(uuid, low_mhz, high_mhz)
        except GpuError as error:
            self._failed(error)
            raise

    def reset(self, uuid: str) -> None:
        """As GpuDriver.reset; failures are counted.

        Raises:
            GpuError: as the driver.
        """
        try:
            self._driver.reset(uuid)
        except GpuError as error:
            self._failed(error)
            raise

    def close(self) -> None:
        """Let go of the driver."""
        if self._info is not None:
            self._driver.close()
            self._info = None

    def _open(self, now_seconds: float) -> None:
        self._reopen_at_seconds = now_seconds + REOPEN_SECONDS
        try:
            info = self._driver.open()
            self._known = frozenset()
            self._list(now_seconds)
        except GpuError as error:
            self._failed(error)
            self._driver.close()
            if self._problem is None or str(self._problem) != str(error):
                _log.warning("driver not open: %s", error)
            self._problem = error
            return
        self._info, self._problem = info, None
        self._session += 1
        self._transient.clear()
        _log.info("driver %s open, %d GPUs", info.driver_version, len(self._gpus))

    def _list(self, now_seconds: float) -> None:
        self._gpus, self._listed_at_seconds = self._driver.list_gpus(), now_seconds
        self._known |= {gpu.uuid for gpu in self._gpus}

    def _list_seconds(self) -> float:
        return LIST_LOST_SECONDS if self._known - self._present else LIST_SECONDS

    def _close(self, error: GpuError | None, reopen_from_seconds: float) -> None:
        self.close()
        self._transient.clear()
        self._problem = error
        self._reopen_at_seconds = reopen_from_seconds + REOPEN_SECONDS

    def _read_all(self) -> tuple[dict[str, GpuReading], dict[str, GpuError]]:
        readings: dict[str, GpuReading] = {}
        faults: dict[str, GpuError] = {}
        present: set[str] = set()
        for gpu in self._gpus:
            try:
                readings[gpu.uuid] = self._driver.read(gpu.uuid)
                present.add(gpu.uuid)
                self._transient.pop(gpu.uuid, None)
            except GpuError as error:
                if error.fault in (GpuFault.NO_DRIVER, GpuFault.DRIVER_MISMATCH):
                    raise
                self._failed(error)
                faults[gpu.uuid] = error
                if error.fault is not GpuFault.GPU_LOST:
                    present.add(gpu.uuid)
                    self._transient[gpu.uuid] = self._transient.get(gpu.uuid, 0) + 1
        self._present = frozenset(present)
        return readings, faults

    def _failed(self, error: GpuError) -> None:
        key = (error.call, error.fault.value)
        self.errors[key] = self.errors.get(key, 0) + 1
        if error.fault is GpuFault.DRIVER_MISMATCH:
            raise DriverMismatchError(str(error)) from error
