"""Moves the GPUs from one point of a sweep to the next, and back at its end, whatever the end is.

A lock is recorded in the journal before the driver is asked for it, like an agent's. Power limits are recorded once,
all of them, before the first one is changed. So after ``kill -9`` at any instant ``wattlock-agent reset`` knows what to
undo; an agent that is started instead undoes the lock and says what is left.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from wattlock_agent.gpu.base import GpuDriver, GpuError, GpuFault, GpuIdentity
from wattlock_agent.journal import Journal, JournalError, LockRecord
from wattlock_agent.sweep.plan import Lever, Setting

#: Stands in the journal where a pod's UID stands for an agent's lock.
SWEEP = "wattlock-agent sweep"
_VERSION = 1


@dataclass(frozen=True)
class PowerLimits:
    """Power limits of one GPU, in mW."""

    set_mw: int
    """The limit that is set now."""
    low_mw: int
    high_mw: int


class SweepDriver(GpuDriver, Protocol):
    """The driver, and what a sweep alone may do with it. Every call may raise GpuError."""

    def power_limits(self, uuid: str) -> PowerLimits:
        """Return the power limits of a GPU."""

    def set_power_limit(self, uuid: str, limit_mw: int) -> None:
        """Set the power limit of a GPU."""


class SweepJournal(Journal, Protocol):
    """The journal, with the place where power limits are kept."""

    @property
    def power_limits(self) -> bytes | None:
        """What is kept. Raises JournalError."""

    def keep_power_limits(self, content: bytes | None) -> None:
        """Keep the content durably, or with ``None`` forget it. Raises JournalError."""


class RestoreError(Exception):
    """Something is not as it was before the sweep. The message names each GPU and the way out."""


class PowerLimitChangedError(Exception):
    """Somebody else sets power limits of these GPUs while they are swept. The message names the GPU."""


class Levers:
    """Sets points and undoes them. ``restore`` must be called however the sweep ends; it may be called twice."""

    def __init__(
        self,
        driver: SweepDriver,
        journal: SweepJournal,
        gpus: Sequence[GpuIdentity],
        boot_id: str,
        written_at: str,
        limits: PowerLimits | None,
    ) -> None:
        """Prepare; nothing is changed yet.

        Args:
            driver: open, its GPUs are listed.
            journal: held by this process.
            gpus: what is swept.
            boot_id: of this boot of the machine.
            written_at: the RFC 3339 time that goes into the records, for people.
            limits: of each GPU when the points were planned; ``None`` where there are no points of power limits.
        """
        self._driver = driver
        self._journal = journal
        self._gpus = tuple(gpus)
        self._boot_id = boot_id
        self._written_at = written_at
        self._before: dict[str, int] = {}
        """Power limits in mW to go back to, by UUID; empty until one is changed."""
        self._left = dict.fromkeys((gpu.uuid for gpu in gpus), limits.set_mw) if limits else {}
        """Power limits in mW as we found or left them, by UUID."""
        self._begun = False

    def apply(self, setting: Setting) -> None:
        """Set a point on all GPUs; what the point before had changed is undone first.

        Before the first one, locks of others are undone: else they would be part of stock until the first clock point
        is, and of no stock point after it.

        Raises:
            GpuError, JournalError, PowerLimitChangedError: call ``restore``.
        """
        if not self._begun:
            self._release_locks_of_others()
            self._begun = True
        if setting.lever is not Lever.CLOCK:
            self._unlock()
        if setting.lever is not Lever.POWER:
            self._set_limits_back()
        if setting.lever is Lever.CLOCK:
            for gpu in self._gpus:
                self._lock(gpu, setting.value)
        elif setting.lever is Lever.POWER:
            self._limit(setting.value * 1000)

    def restore(self) -> None:
        """Undo everything, trying every GPU, and remove the records of what is undone.

        Raises:
            RestoreError: something could not be undone; its record is still there.
        """
        problems = undo_locks(self._driver, self._journal, self._boot_id, lambda _: None)
        problems += undo_power_limits(self._driver, self._journal, self._boot_id, lambda _: None)
        if problems:
            raise RestoreError(
                f"{'; '.join(problems)}; run 'wattlock-agent reset' on this machine: it undoes what is still recorded"
            )
        self._left |= self._before
        self._before = {}

    def _release_locks_of_others(self) -> None:
        """Undo whatever lock there is, as the driver does not tell; recorded first, like all that is undone."""
        for gpu in self._gpus:
            self._record(gpu, gpu.supported_clocks_mhz[-1])
            try:
                self._driver.reset(gpu.uuid)
            except GpuError as error:
                if error.fault is not GpuFault.NOT_SUPPORTED:  # then nobody can have locked it
                    raise
            self._journal.remove(gpu.uuid)

    def _record(self, gpu: GpuIdentity, cap_mhz: int) -> None:
        self._journal.add(LockRecord(gpu.uuid, cap_mhz, "", SWEEP, self._boot_id, self._written_at))

    def _lock(self, gpu: GpuIdentity, cap_mhz: int) -> None:
        self._record(gpu, cap_mhz)
        self._driver.lock(gpu.uuid, gpu.supported_clocks_mhz[0], cap_mhz)

    def _unlock(self) -> None:
        records = self._journal.records()
        for gpu in self._gpus:
            if gpu.uuid in records:
                self._driver.reset(gpu.uuid)
                self._journal.remove(gpu.uuid)

    def _limit(self, limit_mw: int) -> None:
        self._refuse_limits_of_others()  # so that each point, planned below the limit at the start, is below this one
        if not self._before:
            before = {gpu.uuid: self._left[gpu.uuid] for gpu in self._gpus}  # no limit known, none changed
            self._journal.keep_power_limits(encode_limits(before, self._boot_id))
            self._before = before
        for gpu in self._gpus:
            self._write_limit(gpu.uuid, limit_mw)

    def _set_limits_back(self) -> None:
        if self._before:
            self._refuse_limits_of_others()
        for uuid, limit_mw in self._before.items():
            if self._left[uuid] != limit_mw:
                self._write_limit(uuid, limit_mw)

    def _write_limit(self, uuid: str, limit_mw: int) -> None:
        self._driver.set_power_limit(uuid, limit_mw)
        self._left[uuid] = self._driver.power_limits(uuid).set_mw  # as the board took it: it may round

    def _refuse_limits_of_others(self) -> None:
        """Raise PowerLimitChangedError where a limit is not the one that we left.

        A site's power manager may have lowered it: a point may then be above it, and what was measured under it is
        nothing to compare with.
        """
        for uuid, left_mw in self._left.items():
            found_mw = self._driver.power_limits(uuid).set_mw
            if found_mw != left_mw:
                raise PowerLimitChangedError(
                    f"the power limit of {uuid} was changed by somebody else from {left_mw / 1000:g} to "
                    f"{found_mw / 1000:g} W: what was measured since cannot be compared; let nobody else set it while "
                    "a sweep runs, or sweep clocks alone (--power-limits none)"
                )


def undo_locks(driver: GpuDriver, journal: Journal, boot_id: str, say: Callable[[str], None]) -> list[str]:
    """Undo every lock that the journal knows; the driver is open and its GPUs are listed.

    Returns:
        What failed, a sentence each. The records of those are kept.
    """
    problems = []
    for uuid, record in journal.records().items():
        try:
            if record.boot_id == boot_id:  # else a reboot has undone it
                driver.reset(uuid)
            journal.remove(uuid)
            say(f"{uuid}: released")
        except (GpuError, JournalError) as error:
            problems.append(f"{uuid}: {error}")
    return problems


def undo_power_limits(
    driver: SweepDriver, journal: SweepJournal, boot_id: str, say: Callable[[str], None]
) -> list[str]:
    """Set back the power limits that a sweep has recorded; the driver is open and its GPUs are listed.

    Returns:
        What failed, a sentence each. The record is then kept.
    """
    try:
        content = journal.power_limits
        if content is None:
            return []
        recorded_boot_id, limits = decode_limits(content)
    except (JournalError, ValueError) as error:
        return [f"the record of power limits: {error}; set them by hand (nvidia-smi -pl) and remove it"]
    problems = []
    for uuid, limit_mw in limits.items() if recorded_boot_id == boot_id else ():
        try:
            driver.set_power_limit(uuid, limit_mw)
            say(f"{uuid}: power limit back at {limit_mw / 1000:g} W")
        except GpuError as error:
            problems.append(f"{uuid}: power limit not set back to {limit_mw / 1000:g} W: {error}")
    if not problems:
        try:
            journal.keep_power_limits(None)
        except JournalError as error:
            problems.append(str(error))
    return problems


def encode_limits(limits_mw: dict[str, int], boot_id: str) -> bytes:
    """Return the record of the power limits to go back to, in mW by UUID."""
    return json.dumps({"version": _VERSION, "boot_id": boot_id, "limits_mw": limits_mw}, indent=1).encode() + b"\n"


def decode_limits(content: bytes) -> tuple[str, dict[str, int]]:
    """Return boot id and limits in mW by UUID.

    Raises:
        ValueError: damaged, or of another version.
    """
    try:
        document: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError(f"not of version {_VERSION}")
    boot_id, limits = document.get("boot_id"), document.get("limits_mw")
    if not isinstance(boot_id, str) or not isinstance(limits, dict):
        raise ValueError("fields missing")
    if not all(type(limit) is int and limit > 0 for limit in limits.values()):
        raise ValueError("a limit is no number of milliwatts")
    return boot_id, limits
