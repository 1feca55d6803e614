"""The journal on disk: durable before the lock, whole after any crash, never silent about damage."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wattlock_agent import journal_file
from wattlock_agent.journal import Journal, JournalError, JournalHeldError, LockRecord
from wattlock_agent.journal_file import FileJournal, decode, encode, read_boot_id

GPU = "GPU-5c1a2b3c-0000-1111-2222-333344445555"
OTHER_GPU = "GPU-ffffffff-0000-1111-2222-333344445555"
RECORD = LockRecord(GPU, 1590, "policy-uid", "pod-uid", "boot-1", "2026-11-23T12:00:00Z")
OTHER = LockRecord(OTHER_GPU, 1200, "policy-uid", "pod-uid-2", "boot-1", "2026-11-23T12:00:01Z")
UNKNOWN = LockRecord(GPU, 0, "", "", "boot-2", "")


def opened(directory: Path, boot_id: str = "boot-2") -> FileJournal:
    journal = FileJournal(directory, boot_id)
    journal.acquire()
    return journal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[FileJournal]:
    journal = opened(tmp_path / "state" / "journal")
    yield journal
    journal.release()


def reopened(journal: FileJournal) -> FileJournal:
    journal.release()
    return opened(journal._directory)


def test_records_outlive_the_agent(journal: FileJournal) -> None:
    seam: Journal = journal
    seam.add(RECORD)
    seam.add(OTHER)
    after = reopened(journal)
    assert after.records() == {GPU: RECORD, OTHER_GPU: OTHER}
    assert after.problems == ()
    after.remove(GPU)
    assert after.records() == {OTHER_GPU: OTHER}
    assert reopened(after).records() == {OTHER_GPU: OTHER}


def test_a_record_replaces_the_one_before_and_removing_twice_is_fine(journal: FileJournal) -> None:
    later = LockRecord(GPU, 1200, "policy-uid", "pod-uid", "boot-1", "2026-11-23T12:05:00Z")
    journal.add(RECORD)
    journal.add(later)
    journal.remove(GPU)
    journal.remove(GPU)
    journal.add(later)
    assert reopened(journal).records() == {GPU: later}


@pytest.mark.parametrize("size", range(len(encode(RECORD))))
def test_a_record_cut_at_any_byte_still_says_which_gpu_to_reset(tmp_path: Path, size: int) -> None:
    (tmp_path / f"{GPU}.json").write_bytes(encode(RECORD)[:size])
    (tmp_path / f"{OTHER_GPU}.json").write_bytes(encode(OTHER))
    journal = opened(tmp_path)
    # Only the line feed at the end may be missing without harm.
    whole = size == len(encode(RECORD)) - 1
    assert journal.records() == {GPU: RECORD if whole else UNKNOWN, OTHER_GPU: OTHER}
    assert len(journal.problems) == (0 if whole else 1)
    journal.release()


@settings(max_examples=60)
@given(position=st.integers(0, len(encode(RECORD)) - 2), value=st.integers(0, 255))
def test_a_changed_byte_never_passes_for_another_record(position: int, value: int) -> None:
    content = bytearray(encode(RECORD))
    content[position] = value
    try:
        record = decode(bytes(content), GPU)
    except ValueError:
        return
    assert record == RECORD


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 512,
        b"[" * 10_000,
        b"null",
        b'{"version": 1, "record": 7}',
        b"x" * 20_000,
        encode(OTHER),
        encode(RECORD).replace(b'"version": 1', b'"version": 2'),
        encode(RECORD).replace(b"1590", b"1980"),
    ],
)
def test_damage_is_reported_and_taken_as_an_unknown_lock_of_this_boot(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{GPU}.json").write_bytes(content)
    journal = opened(tmp_path)
    assert journal.records() == {GPU: UNKNOWN}
    assert GPU in journal.problems[0]
    assert "reset" in journal.problems[0]
    journal.remove(GPU)
    assert reopened(journal).records() == {}


def test_files_of_others_are_reported_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "..json").write_text("mine too")
    (tmp_path / f"{GPU}.json").write_bytes(encode(RECORD))
    journal = opened(tmp_path)
    assert journal.records() == {GPU: RECORD}
    assert len(journal.problems) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_pipe_or_link_in_the_place_of_a_record_does_not_stop_the_agent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{GPU}.json")
    (tmp_path / f"{OTHER_GPU}.json").symlink_to("/etc/hostname")
    journal = opened(tmp_path)
    assert set(journal.records()) == {GPU, OTHER_GPU}
    assert len(journal.problems) == 2


def test_a_crash_before_the_rename_leaves_the_old_record(journal: FileJournal, tmp_path: Path) -> None:
    journal.add(RECORD)
    leftover = tmp_path / "state" / "journal" / f"{GPU}.json.tmp"
    leftover.write_bytes(encode(RECORD)[:40])
    after = reopened(journal)
    assert after.records() == {GPU: RECORD}
    assert after.problems == ()
    assert not leftover.exists()


class Disk:
    """Lets one call of the os module fail, and notes the order of those that reach the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        for name in ("open", "replace", "unlink", "fsync"):
            monkeypatch.setattr(journal_file.os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if name in self.failing:
                raise OSError(self.failing[name], os.strerror(self.failing[name]))
            return call(*arguments, **named)

        return wrapped


def test_the_content_is_on_the_disk_before_its_name(journal: FileJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    journal.add(RECORD)
    assert disk.calls == ["open", "fsync", "replace", "fsync"]
    disk.calls.clear()
    journal.remove(GPU)
    assert disk.calls == ["unlink", "fsync"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_refuses_the_lock_and_keeps_what_was_known(
    journal: FileJournal, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    journal.add(OTHER)
    journal.add(RECORD)
    with monkeypatch.context() as patch:
        Disk(patch).failing[call] = code
        with pytest.raises(JournalError, match="hostPath"):
            journal.add(LockRecord(GPU, 1200, "policy-uid", "pod-uid", "boot-1", "later"))
    assert journal.records() == {GPU: RECORD, OTHER_GPU: OTHER}
    assert reopened(journal).records() == {GPU: RECORD, OTHER_GPU: OTHER}


def test_a_record_that_could_not_be_removed_stays(journal: FileJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.add(RECORD)
    with monkeypatch.context() as patch:
        Disk(patch).failing["unlink"] = errno.EROFS
        with pytest.raises(JournalError, match="remove a record"):
            journal.remove(GPU)
    assert journal.records() == {GPU: RECORD}


def test_a_full_device_is_told_by_the_real_kernel(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    (tmp_path / f"{GPU}.json.tmp").symlink_to("/dev/full")
    with pytest.raises(JournalError):
        journal.add(RECORD)
    assert journal.records() == {}


def test_a_directory_that_vanishes_is_an_error_and_not_a_lost_record(journal: FileJournal) -> None:
    journal.add(RECORD)
    directory = journal._directory
    (directory / f"{GPU}.json").unlink()
    directory.rmdir()
    with pytest.raises(JournalError):
        journal.add(OTHER)
    assert journal.records() == {GPU: RECORD}


def test_a_path_that_cannot_be_a_directory_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="hostPath"):
        FileJournal(tmp_path / "file" / "journal", "boot-1").acquire()


def test_only_one_agent_acts_and_the_next_follows_when_it_is_gone(journal: FileJournal) -> None:
    journal.add(RECORD)
    second = FileJournal(journal._directory, "boot-2")
    with pytest.raises(JournalHeldError, match="another Wattlock agent"):
        second.acquire()
    with pytest.raises(JournalError, match="not acquired"):
        second.records()
    journal.release()
    second.acquire()
    assert second.records() == {GPU: RECORD}
    with pytest.raises(JournalError, match="not acquired"):
        journal.add(OTHER)
    second.release()


def test_a_killed_agent_leaves_its_records_and_no_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from wattlock_agent.journal import LockRecord\n"
        "from wattlock_agent.journal_file import FileJournal\n"
        "journal = FileJournal(Path(sys.argv[1]), 'boot-1')\n"
        "journal.acquire()\n"
        f"journal.add({RECORD!r})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=20, check=False)
    assert done.returncode == -9, done.stderr
    journal = opened(tmp_path)
    assert journal.records() == {GPU: RECORD}
    assert journal.problems == ()
    journal.release()


@pytest.mark.parametrize("name", ["../escape", "", ".hidden", "a/b", "GPU-x.json", "x" * 97])
def test_a_record_without_a_proper_gpu_is_refused(journal: FileJournal, name: str) -> None:
    with pytest.raises(JournalError, match="no GPU UUID"):
        journal.add(LockRecord(name, 1590, "p", "q", "b", "t"))
    assert list(journal._directory.iterdir()) == []


@settings(max_examples=60)
@given(st.builds(LockRecord, st.just(GPU), st.integers(0, 10_000), st.text(), st.text(), st.text(), st.text()))
def test_what_is_written_is_what_is_read(record: LockRecord) -> None:
    assert decode(encode(record), GPU) == record


def test_the_boot_id_is_the_kernels(tmp_path: Path) -> None:
    assert len(read_boot_id()) == 36
    (tmp_path / "empty").write_text("\n")
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(JournalError, match="/proc"):
            read_boot_id(path)


def test_files_are_for_their_owner_alone_and_readable_for_people(journal: FileJournal) -> None:
    journal.add(RECORD)
    path = journal._directory / f"{GPU}.json"
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(path.read_text())["record"]["cap_mhz"] == 1590
