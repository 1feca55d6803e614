"""Whatever ends a sweep, at whatever instant: what it changed is recorded, and the record is enough to undo it."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.gpu.base import GpuError, GpuFault, GpuIdentity
from wattlock_agent.journal import JournalError, LockRecord
from wattlock_agent.journal_file import POWER_LIMITS_NAME, FileJournal, JournalHeldError
from wattlock_agent.sweep import run
from wattlock_agent.sweep.levers import (
    Levers,
    PowerLimitChangedError,
    PowerLimits,
    RestoreError,
    decode_limits,
    encode_limits,
    undo_locks,
    undo_power_limits,
)
from wattlock_agent.sweep.plan import STOCK, Lever, Setting

BOOT = "boot-1"
CLOCKS = tuple(range(345, 1981, 15))
GPUS = tuple(GpuIdentity(f"GPU-{number}", number, number, "NVIDIA H200", CLOCKS, False, False) for number in range(2))
ORDER = (
    STOCK,
    Setting(Lever.CLOCK, 1590),
    Setting(Lever.CLOCK, 990),
    Setting(Lever.POWER, 500),
    STOCK,
    Setting(Lever.POWER, 300),
    Setting(Lever.CLOCK, 780),
    Setting(Lever.POWER, 400),
    Setting(Lever.POWER, 350),
    STOCK,
)


class KilledError(BaseException):
    """kill -9 between two effects."""


@dataclass
class World:
    """Disk and driver: what outlives the process."""

    locks: dict[str, tuple[int, int]] = field(default_factory=dict)
    limits_mw: dict[str, int] = field(default_factory=lambda: {"GPU-0": 650_000, "GPU-1": 650_000, "GPU-9": 700_000})
    records: dict[str, LockRecord] = field(default_factory=dict)
    kept: bytes | None = None
    kill_at: int | None = None
    effects: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """How many times a call still fails, by name."""
    fault: GpuFault = GpuFault.TRANSIENT
    rounds_to_mw: int = 1
    opened: int = 0

    def effect(self, name):
        if self.faults.get(name, 0):
            self.faults[name] -= 1
            kind = JournalError if name in ("add", "remove", "keep") else None
            raise kind(name) if kind else GpuError(self.fault, name, None, f"{name} failed")
        if self.effects == self.kill_at:
            raise KilledError
        self.effects += 1


class Journal:
    def __init__(self, world):
        self._world = world

    def records(self):
        return dict(self._world.records)

    def add(self, record):
        self._world.effect("add")
        self._world.records[record.gpu_uuid] = record

    def remove(self, uuid):
        self._world.effect("remove")
        self._world.records.pop(uuid, None)

    @property
    def power_limits(self):
        return self._world.kept

    def keep_power_limits(self, content):
        self._world.effect("keep")
        self._world.kept = content


class Driver:
    """Refuses, as the rules of the house do, whatever is not recorded."""

    def __init__(self, world):
        self._world = world

    def open(self):
        self._world.opened += 1

    def list_gpus(self):
        return GPUS

    def lock(self, uuid, low_mhz, high_mhz):
        assert self._world.records[uuid].cap_mhz == high_mhz, "a lock that is not recorded"
        assert low_mhz == 345
        self._world.effect("lock")
        self._world.locks[uuid] = (low_mhz, high_mhz)

    def reset(self, uuid):
        assert uuid in self._world.records, "a reset of a GPU that the journal does not name"
        self._world.effect("reset")
        self._world.locks.pop(uuid, None)

    def power_limits(self, uuid):
        return PowerLimits(self._world.limits_mw[uuid], 200_000, 700_000)

    def set_power_limit(self, uuid, limit_mw):
        assert uuid in decode_limits(self._world.kept)[1], "a power limit that is not recorded"
        self._world.effect("limit")
        self._world.limits_mw[uuid] = limit_mw - limit_mw % self._world.rounds_to_mw


def levers_of(world):
    limits = PowerLimits(650_000, 200_000, 700_000)
    return Levers(Driver(world), Journal(world), GPUS, BOOT, "2026-01-01T00:00:00Z", limits)


def whole_sweep(world):
    levers = levers_of(world)
    for setting in ORDER:
        levers.apply(setting)
    levers.restore()


def assert_untouched(world):
    assert world.locks == {}
    assert world.limits_mw == {"GPU-0": 650_000, "GPU-1": 650_000, "GPU-9": 700_000}
    assert (world.records, world.kept) == ({}, None)


def reset(world, boot_id=BOOT):
    """What ``wattlock-agent reset`` does."""
    problems = undo_locks(Driver(world), Journal(world), boot_id, lambda _: None)
    return problems + undo_power_limits(Driver(world), Journal(world), boot_id, lambda _: None)


def test_each_point_is_set_alone():
    world = World()
    levers = levers_of(world)
    for setting in ORDER:
        levers.apply(setting)
        locks = set(world.locks.values())
        limits = {world.limits_mw[gpu.uuid] for gpu in GPUS}
        assert locks == ({(345, setting.value)} if setting.lever is Lever.CLOCK else set())
        assert limits == {setting.value * 1000 if setting.lever is Lever.POWER else 650_000}
    levers.restore()
    levers.restore()
    assert_untouched(world)


def test_stock_is_without_the_locks_of_others_from_the_first_point_on():
    foreign = {"GPU-0": (345, 1200), "GPU-9": (345, 1200)}
    world = World(locks=dict(foreign))
    levers = levers_of(world)
    levers.apply(STOCK)
    assert world.locks == {"GPU-9": (345, 1200)}  # of a GPU that is not swept
    assert world.records == {}
    effects = world.effects
    levers.apply(STOCK)
    assert world.effects == effects
    for kill_at in range(effects):
        world = World(locks=dict(foreign), kill_at=kill_at)
        with pytest.raises(KilledError):
            levers_of(world).apply(STOCK)
        world.kill_at = None
        assert reset(world) == []
        assert world.records == {}


def test_a_gpu_that_cannot_be_locked_can_be_swept_over_power_limits():
    world = World(faults={"reset": 2}, fault=GpuFault.NOT_SUPPORTED)
    levers = levers_of(world)
    levers.apply(Setting(Lever.POWER, 300))
    assert world.faults == {"reset": 0}
    levers.restore()
    assert_untouched(world)


@pytest.mark.parametrize("before", [(STOCK,), (Setting(Lever.POWER, 400),), (Setting(Lever.POWER, 400), STOCK)])
@pytest.mark.parametrize("to_mw", [300_000, 700_000])
def test_a_power_limit_that_somebody_else_changed_ends_the_sweep_before_one_is_written(before, to_mw):
    world = World()
    levers = levers_of(world)
    for setting in before:
        levers.apply(setting)
    was = world.limits_mw["GPU-1"] // 1000
    world.limits_mw["GPU-1"] = to_mw
    limits = dict(world.limits_mw)
    sentence = f"limit of GPU-1 was changed by somebody else from {was} to {to_mw // 1000} W"
    with pytest.raises(PowerLimitChangedError, match=sentence):
        levers.apply(Setting(Lever.POWER, 500))
    assert world.limits_mw == limits
    if before != (STOCK,):
        with pytest.raises(PowerLimitChangedError, match=sentence):
            levers.apply(STOCK)
        levers.restore()
        assert_untouched(world)
    else:
        levers.restore()
        assert world.limits_mw == limits  # nothing of it was ours
        assert (world.records, world.kept) == ({}, None)


def test_who_sweeps_clocks_alone_does_not_look_at_power_limits():
    world = World()
    levers = levers_of(world)
    levers.apply(STOCK)
    world.limits_mw["GPU-0"] = 500_000
    levers.apply(Setting(Lever.CLOCK, 990))
    levers.restore()
    assert world.limits_mw["GPU-0"] == 500_000


def test_a_limit_that_the_board_rounded_was_changed_by_nobody():
    world = World(rounds_to_mw=3000)
    levers = levers_of(world)
    for setting in (STOCK, Setting(Lever.POWER, 500), Setting(Lever.POWER, 400), STOCK, Setting(Lever.POWER, 300)):
        levers.apply(setting)
    assert world.limits_mw["GPU-0"] == 300_000


def test_killed_before_any_effect_reset_restores_everything():
    whole = World()
    whole_sweep(whole)
    assert whole.effects > 30
    for kill_at in range(whole.effects):
        world = World(kill_at=kill_at)
        with pytest.raises(KilledError):
            whole_sweep(world)
        world.kill_at = None
        assert reset(world) == []
        assert_untouched(world)


def test_a_reset_that_is_killed_itself_can_be_run_again():
    for kill_at in range(6):
        world = World()
        levers = levers_of(world)
        levers.apply(Setting(Lever.POWER, 300))
        levers.apply(Setting(Lever.CLOCK, 1590))
        world.limits_mw["GPU-0"] = 300_000
        world.kill_at = world.effects + kill_at
        with pytest.raises(KilledError):
            reset(world)
        world.kill_at = None
        assert reset(world) == []
        assert_untouched(world)


@given(
    st.lists(st.sampled_from(ORDER), max_size=12), st.sampled_from(["lock", "limit", "add", "keep", "remove", "reset"])
)
def test_a_failure_of_any_call_is_undone(chosen, call):
    world = World(faults={call: 1})
    levers = levers_of(world)
    try:
        for setting in chosen:
            levers.apply(setting)
    except (GpuError, JournalError):
        pass
    try:
        levers.restore()
    except RestoreError:
        levers.restore()  # the fault fell into the restoring
    assert_untouched(world)


def test_what_cannot_be_undone_stays_recorded_and_the_way_out_is_named():
    world = World()
    levers = levers_of(world)
    levers.apply(Setting(Lever.POWER, 300))
    levers.apply(Setting(Lever.CLOCK, 1590))
    levers.apply(Setting(Lever.POWER, 300))
    levers.apply(Setting(Lever.CLOCK, 1590))
    world.faults = {"reset": 1, "limit": 99}
    with pytest.raises(RestoreError, match="wattlock-agent reset"):
        levers.restore()
    assert list(world.records) == ["GPU-0"]  # the other one was undone all the same
    assert world.kept is not None
    world.faults = {}
    levers.restore()
    assert_untouched(world)


def test_restoring_is_tried_again_with_the_driver_opened_anew(monkeypatch):
    monkeypatch.setattr(run, "_RESTORE_RETRY_SECONDS", 0.0)
    world = World()
    levers = levers_of(world)
    levers.apply(Setting(Lever.CLOCK, 1590))
    world.faults = {"reset": 3}
    run.undo(levers, Driver(world))
    assert world.opened >= 1
    assert_untouched(world)
    levers.apply(Setting(Lever.CLOCK, 1590))
    world.faults = {"reset": 999}
    with pytest.raises(RestoreError):
        run.undo(levers, Driver(world))


def test_after_a_reboot_nothing_is_written_for_what_the_reboot_undid():
    world = World()
    levers = levers_of(world)
    levers.apply(Setting(Lever.POWER, 300))
    levers.apply(Setting(Lever.CLOCK, 1590))
    world.limits_mw.update({"GPU-0": 700_000, "GPU-1": 700_000})  # the driver's default
    world.locks, before = {}, world.effects
    assert reset(world, boot_id="boot-2") == []
    assert world.effects == before + 3  # three records removed, no call of the driver
    assert (world.records, world.kept) == ({}, None)


def test_a_record_of_power_limits_reads_back_and_damage_is_told():
    limits = {"GPU-0": 650_000}
    assert decode_limits(encode_limits(limits, BOOT)) == (BOOT, limits)
    for damaged in (
        b"",
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "boot_id": "b", "limits_mw": {"GPU-0": true}}',
    ):
        with pytest.raises(ValueError):
            decode_limits(damaged)
    world = World(kept=b"nonsense")
    (problem,) = reset(world)
    assert "nvidia-smi -pl" in problem
    assert world.kept == b"nonsense"


def test_the_journal_keeps_power_limits_across_processes_and_tells_an_agent_of_them(tmp_path: Path):
    journal = FileJournal(tmp_path, BOOT)
    journal.acquire()
    assert journal.power_limits is None
    journal.keep_power_limits(b"limits")
    with pytest.raises(JournalHeldError):
        FileJournal(tmp_path, BOOT).acquire()
    journal.release()
    agents = FileJournal(tmp_path, BOOT)
    agents.acquire()
    assert agents.records() == {}  # it is no record of a GPU, which an agent would reset and remove
    (problem,) = agents.problems
    assert "wattlock-agent reset" in problem
    assert agents.power_limits == b"limits"
    agents.keep_power_limits(None)
    agents.keep_power_limits(None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_sweep_writes_power_limits():
    sources = Path(run.__file__).parents[1]
    writers = {
        path.relative_to(sources).as_posix()
        for path in sources.rglob("*.py")
        if "SetPowerManagementLimit" in path.read_text() or "PowerManagementLimit_v" in path.read_text()
    }
    assert writers == {"sweep/nvml_power.py"}


def test_the_path_of_the_record_is_no_name_of_a_gpu():
    assert "." in POWER_LIMITS_NAME.removesuffix(".json")
