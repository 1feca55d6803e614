"""The journal on disk: one file for each GPU, so that damage to one says nothing about the others.

A file is written beside its place, flushed to the disk and renamed over it, so a crash leaves the old record, the new
one or none, never half of one. Damage that comes later all the same (a full or failing disk, an editor) is found by a
checksum. As the file's name tells the GPU, even a damaged record keeps its one duty: that the GPU gets reset.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wattlock_agent.journal import JournalError, JournalHeldError, LockRecord

VERSION = 1
#: Kept by ``wattlock-agent sweep``. The second dot keeps it apart from the records of GPUs.
POWER_LIMITS_NAME = "sweep.power-limits.json"
_SUFFIX = ".json"
_TEMPORARY_SUFFIX = ".tmp"
_GPU_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,95}")
_MAX_FILE_BYTES = 16 * 1024
_MAX_FILES = 1_024
#: The kernel's own. A simulated node, which shares the kernel with others, has a file that tells of its own boots.
KERNEL_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def read_boot_id(path: Path = Path(KERNEL_BOOT_ID)) -> str:
    """Return the identity of this boot of the machine, as the file has it.

    Raises:
        JournalError: the kernel does not tell.
    """
    try:
        boot_id = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise JournalError(f"cannot read the boot id from {path}: {error}; is /proc mounted?") from error
    if not boot_id:
        raise JournalError(f"{path} is empty; is /proc mounted?")
    return boot_id


class FileJournal:
    """Journal in a directory of the host. ``acquire`` comes first; then one thread at a time may use it.

    Reading is done once, in ``acquire``: afterwards the lock keeps others out, and a disk that fails later takes
    away the power to add records, not the knowledge of what must be undone.
    """

    def __init__(self, directory: Path, boot_id: str) -> None:
        """``boot_id`` is what ``read_boot_id`` returns; damaged records are taken to be of this boot."""
        self._directory = directory
        self._boot_id = boot_id
        self._directory_fd: int | None = None
        self._records: dict[str, LockRecord] = {}
        self._problems: tuple[str, ...] = ()

    def acquire(self) -> None:
        """Create the directory, keep other agents out (until ``release`` or the end of the process), and read.

        Raises:
            JournalHeldError: another agent has it; try again.
            JournalError: the directory cannot be made or read.
        """
        if self._directory_fd is not None:
            return
        with self._explained("open"):
            self._make_directory()
            # The directory itself is locked: no lock file to leave behind, and it works where nothing can be written.
            directory_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._lock(directory_fd)
            with self._explained("read"):
                self._load(directory_fd)
        except BaseException:  # whatever ends it: a lock that nobody owns would keep every later agent out
            os.close(directory_fd)
            raise
        self._directory_fd = directory_fd

    def release(self) -> None:
        """Let another agent have the journal. Its files stay."""
        if self._directory_fd is not None:
            os.close(self._directory_fd)
            self._directory_fd = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What ``acquire`` could not read or did not understand, a sentence for each file; to be shown to people.

        The GPU of a damaged record is among ``records`` all the same, with a cap of 0 and no policy or pod.
        """
        return self._problems

    def records(self) -> dict[str, LockRecord]:
        """Return the records by GPU UUID.

        Raises:
            JournalError: not acquired.
        """
        self._held()
        return dict(self._records)

    def add(self, record: LockRecord) -> None:
        """Write the record, in place of an older one of the same GPU; on return the disk has it.

        Raises:
            JournalError: it could not be made durable: do not lock. ``records`` tells whether it is there all the same.
        """
        directory_fd = self._held()
        if not _GPU_NAME.fullmatch(record.gpu_uuid):
            raise JournalError(f"{record.gpu_uuid!r} is no GPU UUID; nothing was recorded")
        with self._explained("write"):
            _replace(directory_fd, record.gpu_uuid + _SUFFIX, encode(record))
            self._records[record.gpu_uuid] = record
            os.fsync(directory_fd)

    def remove(self, gpu_uuid: str) -> None:
        """Remove the record of a GPU, if there is one; on return the disk has forgotten it.

        Raises:
            JournalError: it could not be removed; the record stays, so that the reset is tried again.
        """
        directory_fd = self._held()
        if gpu_uuid not in self._records:
            return
        with self._explained("remove a record from"):
            with suppress(FileNotFoundError):
                os.unlink(gpu_uuid + _SUFFIX, dir_fd=directory_fd)
            os.fsync(directory_fd)
        del self._records[gpu_uuid]

    @property
    def power_limits(self) -> bytes | None:
        """Content of the sweep's file in which it keeps the power limits to go back to; ``None`` when there is none.

        The journal keeps it durably and does not look inside: agents change no power limits, so they cannot undo them.

        Raises:
            JournalError: not acquired, or there is one that cannot be read.
        """
        directory_fd = self._held()
        with self._explained("read"):
            try:
                return _read_file(directory_fd, POWER_LIMITS_NAME)
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise JournalError(f"{self._directory / POWER_LIMITS_NAME}: {error}; it is not Wattlock's") from None

    def keep_power_limits(self, content: bytes | None) -> None:
        """Write that file, or remove it; on return the disk has it.

        Raises:
            JournalError: it could not be made durable: change no power limit.
        """
        directory_fd = self._held()
        with self._explained("write"):
            if content is not None:
                _replace(directory_fd, POWER_LIMITS_NAME, content)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(POWER_LIMITS_NAME, dir_fd=directory_fd)
            os.fsync(directory_fd)

    def _held(self) -> int:
        if self._directory_fd is None:
            raise JournalError(f"the journal {self._directory} is not acquired; nothing may be locked")
        return self._directory_fd

    def _make_directory(self) -> None:
        """Create the directory; what is made is on the disk on return, else power loss could take it with its files."""
        missing = [each for each in (self._directory, *self._directory.parents) if not each.exists()]
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for each in missing:
            parent_fd = os.open(each.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent_fd)
            finally:
                os.close(parent_fd)

    def _lock(self, directory_fd: int) -> None:
        try:
            fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalHeldError(
                f"another Wattlock agent on this node holds the journal {self._directory}; "
                "only one may act: wait for it to stop, or remove the placement that starts two on one node"
            ) from None
        except OSError as error:
            raise JournalError(
                f"cannot lock the journal {self._directory}: {error}; use a local file system for it"
            ) from error

    def _load(self, directory_fd: int) -> None:
        records: dict[str, LockRecord] = {}
        problems: list[str] = []
        # Other people's files come last: however many there are, they hide no record.
        names = sorted(os.listdir(directory_fd), key=lambda name: (not _is_record(name), name))
        if len(names) > _MAX_FILES:
            problems.append(
                f"{self._directory}: {len(names)} files, only {_MAX_FILES} are read, those named after GPUs first; "
                "remove what is not Wattlock's"
            )
        for name in names[:_MAX_FILES]:
            gpu_uuid = name.removesuffix(_SUFFIX)
            if name.endswith(_SUFFIX + _TEMPORARY_SUFFIX):
                # A crash before the rename: the lock was never asked for under this record.
                with suppress(OSError):
                    os.unlink(name, dir_fd=directory_fd)
                continue
            if name == POWER_LIMITS_NAME:
                problems.append(
                    f"{self._directory / name}: a sweep was killed and left power limits changed; stop the agent "
                    "and run 'wattlock-agent reset' here, which sets them back"
                )
                continue
            if not _is_record(name):
                problems.append(f"{_shown(self._directory / name)}: not a file of Wattlock; remove it")
                continue
            try:
                records[gpu_uuid] = decode(_read_file(directory_fd, name), gpu_uuid)
            except (OSError, ValueError) as error:
                problems.append(
                    f"{self._directory / name}: damaged ({error}); taken as an unknown lock on {gpu_uuid}, which will "
                    "be reset"
                )
                records[gpu_uuid] = LockRecord(gpu_uuid, 0, "", "", self._boot_id, "")
        self._records, self._problems = records, tuple(problems)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(
                f"cannot {action} the journal {self._directory}: {error.strerror or error}; check that the hostPath "
                "volume is mounted writable and that its disk is neither full nor failing. Nothing is locked without it"
            ) from error


def encode(record: LockRecord) -> bytes:
    """Return the content of a record's file."""
    body = asdict(record)
    return json.dumps({"version": VERSION, "sha256": _digest(body), "record": body}, indent=1).encode() + b"\n"


def decode(content: bytes, gpu_uuid: str) -> LockRecord:
    """Return the record in a file's content, for the GPU that the file is named after.

    Raises:
        ValueError: it is damaged, of a newer version or of another GPU.
    """
    try:
        document: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(document, dict) or not isinstance(body := document.get("record"), dict):
        raise ValueError("no record in it")
    if document.get("version") != VERSION:
        raise ValueError(f"version {document.get('version')!r}, this agent reads {VERSION}")
    if document.get("sha256") != _digest(body):
        raise ValueError("checksum does not match")
    names = ("gpu_uuid", "policy_uid", "pod_uid", "boot_id", "written_at")
    texts = {name: text for name in names if isinstance(text := body.get(name), str)}
    cap_mhz = body.get("cap_mhz")
    if len(texts) < len(names) or type(cap_mhz) is not int:
        raise ValueError("fields missing")
    if texts["gpu_uuid"] != gpu_uuid:
        raise ValueError("it is about another GPU than its name")
    # Absent in records of before there were such caps.
    return LockRecord(cap_mhz=cap_mhz, idle=body.get("idle") is True, **texts)


def _replace(directory_fd: int, name: str, content: bytes) -> None:
    """Put a file in place of an older one, whole or not at all; the caller flushes the directory."""
    temporary = name + _TEMPORARY_SUFFIX
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=directory_fd), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory_fd)
        raise


def _is_record(name: str) -> bool:
    return name.endswith(_SUFFIX) and _GPU_NAME.fullmatch(name.removesuffix(_SUFFIX)) is not None


def _shown(path: Path) -> str:
    """Return a path fit for logs and status: a file name may be any bytes."""
    return str(path).encode(errors="backslashreplace").decode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_file(directory_fd: int, name: str) -> bytes:
    # O_NONBLOCK: a pipe put in the place of a file must not stop the agent.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=directory_fd), "rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1) or b""
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError("too long")
    return content
