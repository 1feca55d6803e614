"""State file and library: one layout, kept over restarts."""

import ctypes
import re
import shutil

import pytest
from wattlock_simulator import driver, layout, state
from wattlock_simulator.physics import Product
from wattlock_simulator.state import StateError, StateFile


def test_the_committed_c_header_is_the_generated_one():
    assert (driver.SOURCES / "state_layout.h").read_text() == layout.header()


def test_a_wrong_offset_does_not_compile(tmp_path, monkeypatch):
    sources = tmp_path / "sources"
    shutil.copytree(driver.SOURCES, sources)
    header = (sources / "state_layout.h").read_text()
    (sources / "state_layout.h").write_text(header.replace("    uint32_t sm_mhz;", "    uint64_t sm_mhz;"))
    monkeypatch.setattr(driver, "SOURCES", sources)
    with pytest.raises(driver.DriverError, match=r"offset of sim_sensors\.memory_mhz"):
        driver.build(tmp_path / "out")
    assert not (tmp_path / "out" / driver.LIBRARY_NAME).exists()


def test_building_without_compiler_or_sources_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(driver.DriverError, match="gcc not found"):
        driver.build(tmp_path)
    monkeypatch.setattr(driver, "SOURCES", tmp_path)
    with pytest.raises(driver.DriverError, match="no C sources"):
        driver.build(tmp_path)


def test_install_prefers_the_compiled_library(tmp_path, monkeypatch):
    compiled = tmp_path / "compiled.so"
    compiled.write_bytes(b"elf")
    monkeypatch.setattr(driver, "PRECOMPILED", compiled)
    assert driver.install(tmp_path / "host").read_bytes() == b"elf"


def test_uuids_are_stable_distinct_and_well_formed():
    uuids = [state.gpu_uuid(node, index) for node in ("a", "b") for index in range(8)]
    assert len(set(uuids)) == 16
    assert uuids == [state.gpu_uuid(node, index) for node in ("a", "b") for index in range(8)]
    assert all(re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", u) for u in uuids)


def test_creating_again_keeps_locks_and_the_inode_and_another_node_starts_afresh(tmp_path):
    with StateFile.create(tmp_path, "a", Product.H200, 2) as file:
        file.gpus[0].request.lock_range_mhz = 345 << 32 | 1590
        inode = (tmp_path / state.STATE_NAME).stat().st_ino
    with StateFile.create(tmp_path, "a", Product.H200, 2) as file:
        assert file.gpus[0].request.lock_range_mhz == 345 << 32 | 1590
    with StateFile.create(tmp_path, "b", Product.H100, 1) as file:
        assert file.gpus[0].request.lock_range_mhz == 0
        assert len(file.gpus) == 1
    assert (tmp_path / state.STATE_NAME).stat().st_ino == inode


def test_the_state_file_is_writable_for_every_user(tmp_path):
    with StateFile.create(tmp_path, "a", Product.H200, 1):
        assert (tmp_path / state.STATE_NAME).stat().st_mode & 0o666 == 0o666
        assert (tmp_path / state.LOG_NAME).stat().st_mode & 0o666 == 0o666


@pytest.mark.parametrize("gpus", [0, 17])
def test_an_impossible_number_of_gpus_is_refused(tmp_path, gpus):
    with pytest.raises(ValueError, match="choose 1 to 16"):
        StateFile.create(tmp_path, "a", Product.H200, gpus)


def test_opening_what_is_not_a_state_file_is_refused(tmp_path):
    with pytest.raises(StateError, match="is `wattlock-simulator node` running"):
        StateFile.open(tmp_path)
    (tmp_path / state.STATE_NAME).write_bytes(b"short")
    with pytest.raises(StateError, match="another version"):
        StateFile.open(tmp_path)
    (tmp_path / state.STATE_NAME).write_bytes(bytes(ctypes.sizeof(layout.State)))
    with pytest.raises(StateError, match="not a state file"):
        StateFile.open(tmp_path)


def test_gpus_are_found_by_index_uuid_and_all(tmp_path):
    with StateFile.create(tmp_path, "a", Product.H200, 3) as file:
        uuid = state.gpu_uuid("a", 1)
        assert [g.identity.index for g in file.find("all")] == [0, 1, 2]
        assert [g.identity.index for g in file.find(uuid) + file.find("2")] == [1, 2]
        with pytest.raises(StateError, match="no GPU '3'"):
            file.find("3")
