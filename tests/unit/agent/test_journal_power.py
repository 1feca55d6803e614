"""The journal through power loss at any call, on a full and on a read-only disk, and how loud it is about damage."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from power_loss import FragileDirectory, PowerLostError
from wattlock_agent import journal_file
from wattlock_agent.journal import JournalError, LockRecord
from wattlock_agent.journal_file import VERSION, FileJournal, encode
from wattlock_agent.journal_keeper import JournalKeeper
from wattlock_agent.report import build_status

GPU, OTHER_GPU = "GPU-5c1a2b3c-0000", "GPU-ffffffff-0000"
RECORD = LockRecord(GPU, 1590, "policy-uid", "pod-uid", "boot-1", "2026-11-23T12:00:00Z")
OTHER = replace(RECORD, gpu_uuid=OTHER_GPU, cap_mhz=1200)
LATER = replace(RECORD, cap_mhz=1200, written_at="2026-11-23T12:05:00Z")


class Life:
    """What an agent does with two GPUs, and what may be on the disk at each moment of it."""

    def __init__(self, journal: FileJournal) -> None:
        self._journal = journal
        self.locked: set[str] = set()
        self.allowed: dict[str, set[LockRecord | None]] = {GPU: {None}, OTHER_GPU: {None}}

    def lock(self, record: LockRecord) -> None:
        self.allowed[record.gpu_uuid] |= {record}
        self._journal.add(record)
        self.allowed[record.gpu_uuid] = {record}
        self.locked.add(record.gpu_uuid)

    def release(self, gpu_uuid: str) -> None:
        self.locked.discard(gpu_uuid)
        self.allowed[gpu_uuid] |= {None}
        self._journal.remove(gpu_uuid)
        self.allowed[gpu_uuid] = {None}

    def live(self) -> None:
        self.lock(RECORD)
        self.lock(OTHER)
        self.lock(LATER)
        self.release(GPU)
        self.lock(RECORD)
        self.release(OTHER_GPU)
        self.release(GPU)


def test_power_loss_at_any_call_leaves_a_record_of_every_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was not flushed is lost or torn in every way: the old record, the new one or none, never a wrong one."""
    moment, looked_at, done = 0, 0, False
    while not done:
        disk = FragileDirectory(lose_power_at=moment)
        (tmp_path / f"live-{moment}").mkdir()
        journal = FileJournal(tmp_path / f"live-{moment}", "boot-1")
        life = Life(journal)
        with monkeypatch.context() as patch:
            patch.setattr(journal_file, "os", disk)
            journal.acquire()
            try:
                life.live()
                done = True
            except PowerLostError:
                pass
        journal.release()
        for number, files in enumerate(disk.leftovers()):
            directory = tmp_path / f"after-{moment}-{number}"
            directory.mkdir()
            for name, content in files.items():
                (directory / name).write_bytes(content)
            after = FileJournal(directory, "boot-2")
            after.acquire()
            records = after.records()
            after.release()
            what = f"power lost before call {moment}, leaving {files}"
            assert life.locked <= records.keys(), what
            assert after.problems == (), what
            assert all(records.get(gpu_uuid) in allowed for gpu_uuid, allowed in life.allowed.items()), what
            looked_at += 1
        moment += 1
    assert moment > 25
    assert looked_at > 70


def test_the_directory_itself_is_flushed_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(journal_file.os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    journal = FileJournal(tmp_path / "lib" / "wattlock", "boot-1")
    journal.acquire()
    journal.release()
    assert set(flushed) == {str(tmp_path), str(tmp_path / "lib")}
    flushed.clear()
    journal.acquire()
    journal.release()
    assert flushed == []


def test_other_peoples_files_hide_no_record(tmp_path: Path) -> None:
    for number in range(1_100):
        (tmp_path / f"0-{number}.txt").touch()
    (tmp_path / f"{GPU}.json").write_bytes(encode(RECORD))
    journal = FileJournal(tmp_path, "boot-1")
    journal.acquire()
    assert journal.records() == {GPU: RECORD}
    assert "1101 files" in journal.problems[0]
    journal.release()


def test_a_file_name_of_any_bytes_can_be_reported(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.json")).touch()
    journal = FileJournal(tmp_path, "boot-1")
    journal.acquire()
    (problem,) = journal.problems
    problem.encode()
    journal.release()


def damaged(tmp_path, node, content):
    (tmp_path / "GPU-0.json").write_bytes(content)
    (tmp_path / "GPU-1.json").write_bytes(encode(LockRecord("GPU-1", 1590, "p", "uid-decode-1", "boot-1", "t")))
    node.driver.locks = {"GPU-0": (345, 1590), "GPU-1": (345, 1590)}
    return FileJournal(tmp_path, "boot-1")


NEWER = encode(replace(RECORD, gpu_uuid="GPU-0")).replace(b'"version": %d' % VERSION, b'"version": %d' % (VERSION + 1))


@pytest.mark.parametrize("content", [b"", b"\0" * 300, NEWER, encode(RECORD)[:100]])
def test_an_unreadable_record_is_reset_and_told_in_log_and_status(make_node, make_order, tmp_path, caplog, content):
    node = make_node()
    journal = damaged(tmp_path, node, content)
    with caplog.at_level(logging.ERROR):
        JournalKeeper(journal).open(node.agent, node.now_seconds)
    assert [f"{tmp_path}/GPU-0.json" in each for each in caplog.messages] == [True]
    node.order(make_order("decode-1"))
    node.run(3)
    assert node.locked() == {"GPU-1"}
    assert ("reset", "GPU-0") in node.driver.log
    assert ("reset", "GPU-1") not in node.driver.log
    assert not (tmp_path / "GPU-0.json").exists()
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False).agent
    assert status.reason == "JournalDamaged"
    assert "GPU-0.json" in status.message
    assert status.can_write
    journal.release()


def test_a_second_agent_says_who_has_the_journal_and_takes_over_when_it_is_gone(make_node, make_order, tmp_path):
    first = FileJournal(tmp_path, "boot-1")
    first.acquire()
    first.add(LockRecord("GPU-1", 1590, "p", "gone", "boot-1", "t"))
    node = make_node()
    node.driver.locks = {"GPU-1": (345, 1590)}
    keeper = JournalKeeper(second := FileJournal(tmp_path, "boot-1"))
    node.order(make_order())
    for _ in range(10):
        keeper.open(node.agent, node.now_seconds)
        node.run(1)
    assert node.driver.log == []
    assert node.reasons()["GPU-0"] == "SecondAgent"
    assert "another Wattlock agent" in node.agent.outlook.world.other_agent
    assert node.agent.outlook.settled_generation == 0, "not ready: what the other has locked is not known here"
    first.release()
    for _ in range(10):
        keeper.open(node.agent, node.now_seconds)
        node.run(1)
    assert node.locked() == {"GPU-0"}
    assert set(second.records()) == {"GPU-0"}
    assert node.agent.outlook.settled_generation == 1
    second.release()


class ReadOnly:
    """A journal on a disk that became read-only under it."""

    def __init__(self, *records: LockRecord) -> None:
        self.problems: tuple[str, ...] = ()
        self._records = {record.gpu_uuid: record for record in records}

    def acquire(self) -> None:
        pass

    def records(self) -> dict[str, LockRecord]:
        return dict(self._records)

    def add(self, record: LockRecord) -> None:
        raise JournalError("read-only file system; mount it writable")

    def remove(self, gpu_uuid: str) -> None:
        raise JournalError("read-only file system; mount it writable")


def test_a_record_that_cannot_be_removed_is_no_reason_to_reset_again_and_again(make_node):
    node = make_node()
    node.driver.locks = {"GPU-0": (345, 1590)}
    JournalKeeper(ReadOnly(replace(RECORD, gpu_uuid="GPU-0"))).open(node.agent, node.now_seconds)
    node.run(40)
    assert node.driver.log == [("reset", "GPU-0")]
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
    assert status.locked == 0
    assert "cannot be removed: read-only" in status.gpus[0].message
    node.driver.locks = {"GPU-0": (1200, 1200)}  # a person with nvidia-smi, meanwhile
    node.run(20)
    assert node.driver.locks == {"GPU-0": (1200, 1200)}


def test_a_record_of_an_earlier_boot_that_could_not_be_removed_goes_later_and_resets_nothing(make_node):
    node = make_node(gpus=1)
    node.journal.disk["GPU-0"] = replace(RECORD, gpu_uuid="GPU-0", boot_id="boot-0")
    node.journal.broken = True
    node.start()
    node.run(5)
    assert node.journal.disk
    node.journal.broken = False
    node.run(40)
    assert node.journal.disk == {}
    assert node.driver.log == []


def test_a_record_of_an_earlier_boot_that_cannot_be_removed_hides_no_lock_of_this_one(make_node):
    node = make_node()
    node.driver.locks = {"GPU-1": (345, 1590)}
    old = replace(RECORD, gpu_uuid="GPU-0", boot_id="boot-0")
    JournalKeeper(ReadOnly(old, replace(OTHER, gpu_uuid="GPU-1"))).open(node.agent, node.now_seconds)
    node.run(40)
    assert node.driver.log == [("reset", "GPU-1")]


IN_NAMESPACE = """
import json, os, sys
from pathlib import Path
from wattlock_agent.journal import JournalError, LockRecord
from wattlock_agent.journal_file import FileJournal

directory, what = Path(sys.argv[1]), sys.argv[2]
journal = FileJournal(directory / "journal", "boot-1")
journal.acquire()
known = LockRecord("GPU-known", 1590, "p", "q", "boot-1", "t")
journal.add(known)
if what == "full":
    with open(directory / "ballast", "wb", buffering=0) as ballast:
        try:
            while ballast.write(b"x" * 4096):
                pass
        except OSError:
            pass
else:
    assert os.system(f"mount -o remount,ro {directory}") == 0
said = []
for call in (
    lambda: journal.add(LockRecord("GPU-new", 1590, "p", "q", "boot-1", "t")),
    lambda: journal.remove("GPU-known"),
):
    try:
        call()
        said.append("")
    except JournalError as error:
        said.append(str(error))
journal.release()
again = FileJournal(directory / "journal", "boot-1")
again.acquire()
print(json.dumps([said, sorted(again.records())]))
"""


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_real_full_or_read_only_disk_refuses_the_lock_and_says_what_to_do(tmp_path: Path, what: str) -> None:
    """On a file system of 64 KiB of its own, in a mount namespace of its own."""
    script = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", IN_NAMESPACE, str(tmp_path), what]
    if os.geteuid() != 0:
        command[1:1] = ["--map-root-user"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    (added, removed), left = json.loads(done.stdout)
    assert ("No space left" if what == "full" else "Read-only file system") in added
    assert "hostPath volume is mounted writable" in added
    assert "Nothing is locked without it" in added
    if what == "full":  # what is known can still be forgotten, so a GPU can still be released for good
        assert (removed, left) == ("", [])
    else:
        assert "cannot remove a record" in removed
        assert left == ["GPU-known"]
