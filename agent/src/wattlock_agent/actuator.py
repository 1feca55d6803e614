"""Carries out what the plan decided, in the order that makes every lock one that will be undone.

A lock is recorded durably **before** the driver is asked for it, and its record is removed **after** the reset has
succeeded. So whatever ends the process between two calls, a lock always has its record.
"""

import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from wattlock_api.base import timestamp
from wattlock_api.constants import GpuState, Reason
from wattlock_api.nodeenergy import Order

from wattlock_agent.gpu.base import GpuError, GpuFault, GpuIdentity
from wattlock_agent.journal import Journal, JournalError, LockRecord
from wattlock_agent.verify import CONTESTED_SECONDS
from wattlock_agent.world import (
    MIN_LOCK_INTERVAL_SECONDS,
    AppliedLock,
    Decision,
    Forget,
    GpuView,
    Lock,
    Refusal,
    Release,
)

_log = logging.getLogger(__name__)

RETRY_RELEASE_SECONDS = 2.0
RETRY_JOURNAL_SECONDS = 30.0
RETRY_UNLISTED_SECONDS = 5.0
MAX_TRANSIENT_LOCKS = 3

#: The driver refused: it did nothing, and will not do it until something changes.
_REFUSED = {
    GpuFault.NO_PERMISSION: (GpuState.OBSERVING, Reason.NO_PERMISSION),
    GpuFault.NOT_SUPPORTED: (GpuState.UNSUPPORTED, Reason.CLOCKS_NOT_SUPPORTED),
    GpuFault.INVALID_ARGUMENT: (GpuState.UNSUPPORTED, Reason.NVML_ERROR),
}

Fingerprint = tuple[str, int, str, int | None]


class Writer(Protocol):
    """The two calls that change a GPU."""

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        """Limit the SM clock. Raises GpuError."""

    def reset(self, uuid: str) -> None:
        """Return to default clocks. Raises GpuError."""


@dataclass
class _Held:
    lock: AppliedLock | None = None
    low_mhz: int = 0
    written_at_seconds: float = float("-inf")
    refused: Refusal | None = None
    conflict: Refusal | None = None
    contested: str = ""
    about: Fingerprint | None = None
    transient: int = 0
    lock_not_before_seconds: float = 0.0
    release_not_before_seconds: float = 0.0
    release_problem: str = ""
    undone: bool = False
    """The driver has reset the GPU since our last lock."""
    unlisted_lost: bool = False
    """It is not listed, and the driver said that it is lost when it was to be reset."""
    writes: int = 0


def fingerprint(order: Order) -> Fingerprint:
    """Return what must change before a refused write is worth another try."""
    return order.policy.uid, order.policy.generation, order.pod_uid, order.cap_mhz


class Actuator:
    """Locks, releases and remembers. Nothing else writes to GPUs or to the journal."""

    def __init__(self, writer: Writer, journal: Journal, boot_id: str) -> None:
        self._writer = writer
        self._journal = journal
        self._boot_id = boot_id
        self._held: dict[str, _Held] = {}
        self._journal_problem = ""
        self._journal_retry_at_seconds = 0.0
        self._void_records = False
        self._void_retry_at_seconds = 0.0

    def drop_records_of_other_boots(self) -> None:
        """Remove the records that a reboot has made void, without touching a GPU.

        One that cannot be removed (a disk that became read-only) counts for nothing; ``apply`` tries again.
        """
        self._void_records = False
        for uuid, record in self._journal.records().items():
            if record.boot_id == self._boot_id:
                continue
            try:
                self._journal.remove(uuid)
                _log.info("gpu=%s lock of an earlier boot, undone by the reboot", uuid)
            except JournalError as error:
                self._void_records = True
                _log.warning("gpu=%s record of an earlier boot: %s", uuid, error)

    def journal_problem(self, now_seconds: float) -> str:
        """Return why nothing can be recorded; empty when it can or is worth another try."""
        return self._journal_problem if now_seconds < self._journal_retry_at_seconds else ""

    def records(self) -> Mapping[str, LockRecord]:
        """Return the journal's records of this boot by GPU UUID."""
        return {uuid: each for uuid, each in self._journal.records().items() if each.boot_id == self._boot_id}

    def writes(self, uuid: str) -> int:
        """Return how many locks and resets the driver has accepted for the GPU."""
        return self._held[uuid].writes if uuid in self._held else 0

    def lock_age_seconds(self, uuid: str, now_seconds: float) -> float | None:
        """Return how long our lock on the GPU has been in force; ``None`` without one."""
        held = self._held.get(uuid)
        return None if held is None or held.lock is None else now_seconds - held.written_at_seconds

    def view(self, identity: GpuIdentity, fault: Refusal | None) -> GpuView:
        """Return the GPU as the plan needs it."""
        held = self._held.setdefault(identity.uuid, _Held())
        record = self.records().get(identity.uuid)
        return GpuView(
            identity=identity,
            lock=held.lock,
            recorded=record is not None,
            left_idle=record is not None and record.idle and held.lock is None and not held.undone,
            undone=held.undone,
            fault=fault,
            refused=held.refused,
            conflict=held.conflict,
            contested=held.contested,
            lock_not_before_seconds=held.lock_not_before_seconds,
            release_not_before_seconds=held.release_not_before_seconds,
            release_problem=held.release_problem,
        )

    def orders_changed(self, orders: Iterable[Order]) -> None:
        """Forget refusals and conflicts that were about orders which are no longer there."""
        current = {fingerprint(order) for order in orders}
        for held in self._held.values():
            if held.about is not None and held.about not in current:
                held.about = held.refused = held.conflict = None
                held.contested = ""
                held.transient = 0

    def driver_reopened(self) -> None:
        """Take all locks for lost: they are written again where they are still wanted."""
        for held in self._held.values():
            held.lock = held.refused = None
            held.transient = 0

    def lock_lost(self, uuid: str, not_before_seconds: float) -> None:
        """Take the lock of one GPU for lost, to be written again at ``not_before_seconds`` at the earliest."""
        held = self._held.setdefault(uuid, _Held())
        held.lock = None
        held.lock_not_before_seconds = max(held.lock_not_before_seconds, not_before_seconds)

    def give_up(self, uuid: str, order: Order, message: str) -> None:
        """Leave the GPU to another writer until the order changes."""
        held = self._held.setdefault(uuid, _Held())
        held.lock = None
        held.about = fingerprint(order)
        held.conflict = Refusal(GpuState.CONFLICT, Reason.OTHER_WRITER, message)

    def contest(self, uuid: str, order: Order, message: str) -> None:
        """Go on locking a GPU that another writer also sets, seldom, until ``uncontest`` or a change of the order."""
        held = self._held.setdefault(uuid, _Held())
        held.about = fingerprint(order)
        held.contested = message

    def uncontest(self, uuid: str) -> None:
        """The other writer has been quiet for long enough."""
        held = self._held.setdefault(uuid, _Held())
        held.contested = ""

    def apply(self, decisions: Mapping[str, Decision], now_seconds: float, unix_seconds: float) -> bool:
        """Carry out the actions: first all releases, then the locks, GPUs of one instance after each other.

        All GPUs are reset before the first record is removed: the last one must not wait for the disk.

        Returns:
            Whether anything was tried.
        """
        if self._void_records and now_seconds >= self._void_retry_at_seconds:
            self._void_retry_at_seconds = now_seconds + RETRY_JOURNAL_SECONDS
            self.drop_records_of_other_boots()
        locks: list[tuple[Decision, Lock]] = []
        released: list[str] = []
        tried = False
        for decision in decisions.values():
            action = decision.action
            if isinstance(action, Lock):
                locks.append((decision, action))
            elif isinstance(action, Release):
                if self._release(decision, now_seconds):
                    released.append(decision.uuid)
                tried = True
            elif isinstance(action, Forget):
                self._forget(decision.uuid, now_seconds)
                tried = True
        for uuid in released:
            self._forget(uuid, now_seconds)
        locks.sort(key=lambda lock: (lock[0].order.instance if lock[0].order else "", lock[0].uuid))
        for decision, lock in locks:
            self._lock(decision, lock, now_seconds, unix_seconds)
        return tried or bool(locks)

    def release_unlisted(self, listed: Set[str], now_seconds: float) -> frozenset[str]:
        """Undo the locks of GPUs that the driver does not list (any more): whose they are cannot be seen.

        Returns:
            Those that may still be locked. A lost GPU is not among them: it comes back without its lock, if at all.
        """
        left: set[str] = set()
        for uuid in self.records().keys() - listed:
            held = self._held.setdefault(uuid, _Held())
            if now_seconds >= held.release_not_before_seconds:
                held.unlisted_lost = False
                try:
                    if not held.undone:
                        self._writer.reset(uuid)
                except GpuError as error:
                    _log.warning("gpu=%s is not listed by the driver, and its release failed: %s", uuid, error)
                    held.release_not_before_seconds = now_seconds + RETRY_UNLISTED_SECONDS
                    held.unlisted_lost = error.fault is GpuFault.GPU_LOST
                else:
                    _log.warning("gpu=%s released: the driver does not list it any more", uuid)
                    held.lock = None
                    held.writes += not held.undone
                    held.undone = True
                    self._forget(uuid, now_seconds)
            if uuid in self.records() and not held.unlisted_lost:
                left.add(uuid)
        return frozenset(left)

    def release_all(self) -> None:
        """Undo every lock that the journal knows, trying all of them.

        Raises:
            GpuError: at least one was not undone.
            JournalError: at least one record was not removed.
        """
        failure: GpuError | JournalError | None = None
        for uuid in self.records():
            try:
                if not self._held.setdefault(uuid, _Held()).undone:
                    self._writer.reset(uuid)
                self._journal.remove(uuid)
                self._held.pop(uuid, None)
            except (GpuError, JournalError) as error:
                failure = error
        if failure is not None:
            raise failure

    def _lock(self, decision: Decision, lock: Lock, now_seconds: float, unix_seconds: float) -> None:
        order = decision.order
        if order is None:
            return
        uuid = decision.uuid
        held = self._held.setdefault(uuid, _Held())
        # Whatever the lock is for, after a loss or after a control epoch: two programs must not beat one GPU.
        held.lock_not_before_seconds = now_seconds + (
            CONTESTED_SECONDS if held.contested else MIN_LOCK_INTERVAL_SECONDS
        )
        known = uuid in self.records()
        record = LockRecord(
            gpu_uuid=uuid,
            cap_mhz=lock.cap_mhz,
            policy_uid=order.policy.uid,
            pod_uid=order.pod_uid,
            boot_id=self._boot_id,
            written_at=timestamp(unix_seconds),
            idle=lock.idle,
        )
        try:
            self._journal.add(record)
        except JournalError as error:
            self._journal_failed(error, now_seconds)
            return
        self._journal_problem = ""
        held.undone = False
        try:
            self._writer.lock(uuid, lock.low_mhz, lock.cap_mhz)
        except GpuError as error:
            self._lock_failed(uuid, order, error, known, now_seconds)
            return
        held.lock = AppliedLock(lock.cap_mhz, order.pod_uid, lock.idle)
        held.written_at_seconds = now_seconds
        held.refused = None
        held.transient = 0
        held.writes += 1
        _log.info(
            "gpu=%s locked to %d-%d MHz policy=%s/%s pod=%s/%s",
            *(uuid, lock.low_mhz, lock.cap_mhz, order.policy.namespace, order.policy.name),
            *(order.pod.namespace, order.pod.name),
        )

    def _lock_failed(self, uuid: str, order: Order, error: GpuError, known: bool, now_seconds: float) -> None:
        held = self._held[uuid]
        held.lock = None
        _log.warning("gpu=%s lock failed: %s", uuid, error)
        if error.fault in _REFUSED:
            held.refused = Refusal(*_REFUSED[error.fault], str(error))
            held.about = fingerprint(order)
            if not known:  # the driver did nothing, so nothing is to be undone
                self._forget(uuid, now_seconds)
            return
        # It may have been done all the same: the record stays.
        held.transient += 1
        if held.transient >= MAX_TRANSIENT_LOCKS:
            lost = error.fault is GpuFault.GPU_LOST
            state, reason = (GpuState.LOST, Reason.GPU_LOST) if lost else (GpuState.RELEASED, Reason.NVML_ERROR)
            held.refused = Refusal(state, reason, str(error))
            held.about = fingerprint(order)

    def _release(self, decision: Decision, now_seconds: float) -> bool:
        """Reset the GPU; returns whether its record is to be removed."""
        uuid = decision.uuid
        held = self._held.setdefault(uuid, _Held())
        if held.undone:  # only its record is still there: whoever has locked the GPU since is not us
            return True
        try:
            self._writer.reset(uuid)
        except GpuError as error:
            held.release_not_before_seconds = now_seconds + RETRY_RELEASE_SECONDS
            held.release_problem = str(error)
            _log.warning("gpu=%s release failed: %s", uuid, error)
            return False
        held.lock = None
        held.release_problem = ""
        held.undone = True
        held.writes += 1
        if decision.reason == Reason.WAITING_TO_WRITE:  # a lower cap went so that a higher one can come: writes apart
            held.lock_not_before_seconds = max(held.lock_not_before_seconds, now_seconds + MIN_LOCK_INTERVAL_SECONDS)
        _log.info("gpu=%s released reason=%s %s", uuid, decision.reason, decision.message)
        return True

    def _forget(self, uuid: str, now_seconds: float) -> None:
        held = self._held.setdefault(uuid, _Held())
        try:
            self._journal.remove(uuid)
        except JournalError as error:
            held.release_not_before_seconds = now_seconds + RETRY_RELEASE_SECONDS
            held.release_problem = str(error)
            self._journal_failed(error, now_seconds)

    def _journal_failed(self, error: JournalError, now_seconds: float) -> None:
        if str(error) != self._journal_problem:
            _log.error("journal: %s", error)
        self._journal_problem = str(error)
        self._journal_retry_at_seconds = now_seconds + RETRY_JOURNAL_SECONDS
