"""NVML clients that we did not write see the same GPUs, clocks and joules as pynvml."""

import json
import os
import subprocess
import sys

import pytest
from wattlock_simulator import state
from wattlock_simulator.physics import Architecture, Phase, Workload

NVITOP = """
import json, nvitop
out = []
for d in nvitop.Device.all():
    out.append({"uuid": d.uuid(), "name": d.name(), "sm": d.sm_clock(), "max_sm": d.max_sm_clock(),
        "memory_clock": d.memory_clock(), "power_mw": d.power_usage(), "limit_mw": d.power_limit(),
        "celsius": d.temperature(), "util": d.gpu_utilization(), "bus": d.bus_id(), "memory": d.memory_total(),
        "mig": d.mig_mode(), "processes": len(d.processes()), "persistence": d.persistence_mode(),
        "capability": d.cuda_compute_capability()})
print(json.dumps({"driver": nvitop.Device.driver_version(), "gpus": out}))
"""

ZEUS = """
import json
from zeus.device.gpu import get_gpus
gpus = get_gpus()
out = []
for i in range(len(gpus)):
    clocks = gpus.get_supported_graphics_clocks(i, max(gpus.get_supported_memory_clocks(i)))
    out.append({"name": gpus.get_name(i), "power_mw": gpus.get_average_power_usage(i),
        "instant_mw": gpus.get_instant_power_usage(i), "energy_mj": gpus.get_total_energy_consumption(i),
        "limit_mw": gpus.get_power_management_limit(i), "celsius": gpus.get_gpu_temperature(i),
        "clocks": [min(clocks), max(clocks), len(clocks)]})
gpus.set_gpu_locked_clocks(0, 345, 1590)
print(json.dumps(out))
"""


@pytest.fixture
def busy(simulated):
    state.set_workload(simulated.file.gpus[1], Workload(Architecture.MLA, Phase.DECODE, 32, 4096))
    simulated.step(2.0)
    return simulated


def run(simulated, script):
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_LIBRARY_PATH": str(simulated.directory)},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nvitop_sees_the_same_gpus_and_clocks(busy, client):
    seen = run(busy, NVITOP)
    assert seen["driver"] == client.call("nvmlSystemGetDriverVersion")
    assert [g["uuid"] for g in seen["gpus"]] == busy.uuids
    for gpu in seen["gpus"]:
        uuid = gpu["uuid"]
        assert gpu["name"] == client.call("nvmlDeviceGetName", gpu=uuid)
        assert gpu["sm"] == client.call("nvmlDeviceGetClockInfo", 1, gpu=uuid)
        assert gpu["max_sm"] == client.call("nvmlDeviceGetMaxClockInfo", 1, gpu=uuid)
        assert gpu["memory_clock"] == client.call("nvmlDeviceGetClockInfo", 2, gpu=uuid)
        assert gpu["power_mw"] == client.call("nvmlDeviceGetPowerUsage", gpu=uuid)
        assert gpu["limit_mw"] == 700_000
        assert gpu["celsius"] == client.call("nvmlDeviceGetTemperature", 0, gpu=uuid)
        assert gpu["util"] == client.call("nvmlDeviceGetUtilizationRates", gpu=uuid)["gpu"]
        assert gpu["bus"] == client.call("nvmlDeviceGetPciInfo", gpu=uuid)["busId"]
        assert gpu["memory"] == client.call("nvmlDeviceGetMemoryInfo", gpu=uuid)["total"]
        assert (gpu["mig"], gpu["processes"], gpu["capability"]) == ("Disabled", 0, [9, 0])
    assert [g["sm"] for g in seen["gpus"]] == [345, 1980]


def test_zeus_sees_the_same_joules_and_its_lock_holds(busy, client):
    seen = run(busy, ZEUS)
    for uuid, gpu in zip(busy.uuids, seen, strict=True):
        assert gpu["name"] == client.call("nvmlDeviceGetName", gpu=uuid)
        assert gpu["energy_mj"] == client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid)
        assert gpu["power_mw"] == client.call("nvmlDeviceGetPowerUsage", gpu=uuid)
        assert gpu["instant_mw"] == client.call("nvmlDeviceGetFieldValues", [186, 0], gpu=uuid)[0][2]
        assert gpu["celsius"] == client.call("nvmlDeviceGetTemperature", 0, gpu=uuid)
        assert gpu["limit_mw"] == 700_000
        assert gpu["clocks"] == [345, 1980, 110]
    assert busy.file.gpus[0].request.lock_range_mhz == 345 << 32 | 1590
