"""The write-ahead journal of locks: what must be undone, whatever happens to the agent."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class LockRecord:
    """A lock that was about to be, or has been, asked of the driver."""

    gpu_uuid: str
    cap_mhz: int
    policy_uid: str
    pod_uid: str
    boot_id: str
    """Boot of the machine in which it was written: a reboot has undone the lock."""
    written_at: str
    """RFC 3339 time, for people."""
    idle: bool = False
    """The lower cap of an instance without requests: whoever finds it undoes it at once, before anything is known."""


class JournalError(Exception):
    """The journal cannot be written or read. The message says what to check; nothing may be locked."""


class JournalHeldError(JournalError):
    """Another agent on this node holds the journal: wait for it to leave."""


class Journal(Protocol):
    """Durable records by GPU. When a call returns, the disk has it."""

    def records(self) -> dict[str, LockRecord]:
        """Return the records by GPU UUID."""

    def add(self, record: LockRecord) -> None:
        """Write the record before the lock is asked for. Raises JournalError: then do not lock."""

    def remove(self, gpu_uuid: str) -> None:
        """Remove the record after the reset has succeeded. Raises JournalError: the reset is tried again later."""


class NoJournal:
    """Stands in while the real journal cannot be had: nothing is recorded, so nothing can be locked."""

    def __init__(self, problem: str) -> None:
        """``problem`` says why, and what to check."""
        self._problem = problem

    def records(self) -> dict[str, LockRecord]:
        """Return no records."""
        return {}

    def add(self, record: LockRecord) -> None:
        """Refuse. Raises JournalError, always."""
        raise JournalError(self._problem)

    def remove(self, gpu_uuid: str) -> None:
        """Do nothing: there is no record."""
