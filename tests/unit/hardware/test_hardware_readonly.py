"""The hardware tier can write nothing: shown on the simulated driver, whose log knows every write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from readonly import is_read
from wattlock_simulator import driver
from wattlock_simulator.physics import Product
from wattlock_simulator.state import StateFile

HARDWARE = Path(__file__).parents[2] / "hardware"

WRITES = [
    "nvmlDeviceSetGpuLockedClocks",
    "nvmlDeviceResetGpuLockedClocks",
    "nvmlDeviceSetMemoryLockedClocks",
    "nvmlDeviceSetApplicationsClocks",
    "nvmlDeviceResetApplicationsClocks",
    "nvmlDeviceSetPowerManagementLimit",
    "nvmlDeviceSetPowerManagementLimit_v2",
    "nvmlDeviceSetPersistenceMode",
    "nvmlDeviceSetComputeMode",
    "nvmlDeviceSetMigMode",
    "nvmlDeviceSetDriverModel",
    "nvmlDeviceSetEccMode",
    "nvmlDeviceClearEccErrorCounts",
    "nvmlDeviceSetAutoBoostedClocksEnabled",
    "nvmlDeviceSetFanSpeed_v2",
    "nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1",
    "nvmlDevicePowerSmoothingActivatePresetProfile",
    "nvmlDeviceModifyDrainState",
    "nvmlDeviceRemoveGpu_v2",
    "nvmlGpuInstanceDestroy",
    "nvmlDeviceCreateGpuInstance",
    "nvmlDeviceSetGpcClkVfOffset",
    "nvmlSystemSetConfComputeGpusReadyState",
    "nvmlDeviceFreezeNvLinkUtilizationCounter",
    "nvmlDeviceClearAccountingPids",
    "nvmlDeviceSetConfComputeUnprotectedMemSize",
    "nvmlUnitSetLedState",
]

READS = [
    "nvmlInit_v2",
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlErrorString",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetMigMode",
]


@pytest.mark.parametrize("name", WRITES)
def test_no_function_that_writes_counts_as_a_read(name):
    assert not is_read(name)


@pytest.mark.parametrize("name", READS)
def test_reads_are_reads(name):
    assert is_read(name)


PROGRAM = """
import json, sys, pynvml
from readonly import NotARead, give_up_capabilities, guard
guarded = sys.argv[1] == "guarded"
log = guard(pynvml) if guarded else None
if sys.argv[2] == "capable":
    pass
else:
    give_up_capabilities()
pynvml.nvmlInit()
gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
name = pynvml.nvmlDeviceGetName(gpu)
fields = pynvml.nvmlDeviceGetFieldValues(gpu, [(186, 0), (999, 0)])
try:
    pynvml.nvmlDeviceSetGpuLockedClocks(gpu, 345, 1200)
    end = "locked"
except NotARead:
    end = "refused here"
except pynvml.NVMLError as error:
    end = f"refused by the driver: {error.value}"
print(json.dumps({"end": end, "name": name, "refused": log.refused if log else [],
    "reads": {n: c.codes for n, c in log.functions.items()} if log else {},
    "fields": {n: c.codes for n, c in log.fields.items()} if log else {}}))
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("driver")
    driver.build(directory)
    StateFile.create(directory, "node-a", Product.H200, 1)
    return directory


def run_program(directory, guard, capability):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, guard, capability],
        env={"LD_LIBRARY_PATH": str(directory), "NVIDIA_VISIBLE_DEVICES": "all", "PYTHONPATH": str(HARDWARE)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    writes = directory / "writes.log"
    lines = writes.read_text().splitlines() if writes.exists() else []
    return json.loads(done.stdout), [json.loads(line) for line in lines]


def test_the_guard_refuses_a_lock_and_records_the_reads(simulated):
    answer, writes = run_program(simulated, "guarded", "capable")
    assert answer["end"] == "refused here"
    assert answer["refused"] == ["nvmlDeviceSetGpuLockedClocks"]
    assert writes == []
    assert answer["name"] == "NVIDIA H200"
    assert answer["reads"]["nvmlDeviceGetName"] == {"0": 1}
    assert answer["fields"]["186"] == {"0": 1}
    assert "0" not in answer["fields"]["999"]


def test_without_the_guard_the_missing_capability_stops_the_lock(simulated):
    answer, writes = run_program(simulated, "bare", "incapable")
    assert answer["end"] == "refused by the driver: 4"
    assert [each["result"] for each in writes] == [4]
