"""The driver library under the unchanged pynvml, in a process of its own."""

import json
import time
from pathlib import Path

import pytest
from wattlock_simulator import control, layout, state
from wattlock_simulator.physics import Architecture, Phase, Product, Workload, operating_point
from wattlock_simulator.state import StateFile

DECODE = Workload(Architecture.GQA, Phase.DECODE, 32, 4096)
THROTTLED_DECODE = Workload(Architecture.GQA, Phase.DECODE, 128, 4096)
PREFILL = Workload(Architecture.GQA, Phase.PREFILL, 1, 4096)
SM = 1
INVENTORY = Path(__file__).parents[2] / "data" / "nvidia-h200-inventory.json"


def fields(client, uuid, *ids):
    return {f: v for f, code, v in client.call("nvmlDeviceGetFieldValues", *ids, gpu=uuid) if code == 0}


def test_answers_as_the_recorded_h200_does(simulated, client):
    inventory = json.loads(INVENTORY.read_text())
    recorded = {k: v["ok"] for k, v in inventory.items() if isinstance(v, dict) and "ok" in v}
    uuid = simulated.uuids[0]
    for getter in ("Name", "PersistenceMode", "EnforcedPowerLimit", "PowerManagementLimit", "MigMode", "Architecture"):
        assert client.call(f"nvmlDeviceGet{getter}", gpu=uuid) == recorded[getter], getter
    for getter in ("PowerManagementLimitConstraints", "SupportedClocksEventReasons", "PowerManagementDefaultLimit"):
        assert client.call(f"nvmlDeviceGet{getter}", gpu=uuid) == recorded[getter], getter
    assert client.call("nvmlSystemGetDriverVersion") == recorded["driver"]
    assert client.call("nvmlSystemGetNVMLVersion") == recorded["nvml"]
    assert client.call("nvmlDeviceGetSupportedMemoryClocks", gpu=uuid) == recorded["SupportedMemoryClocks"]
    for memory_mhz in (3201, 2201):
        clocks = client.call("nvmlDeviceGetSupportedGraphicsClocks", memory_mhz, gpu=uuid)
        assert clocks == recorded[f"SupportedGraphicsClocks.{memory_mhz}"]
    for kind, name in ((0, "graphics"), (1, "sm"), (2, "mem"), (3, "video")):
        assert client.call("nvmlDeviceGetMaxClockInfo", kind, gpu=uuid) == recorded[f"MaxClockInfo.{name}"]
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == recorded["ClockInfo.sm"]
    for threshold in range(4):
        value = client.call("nvmlDeviceGetTemperatureThreshold", threshold, gpu=uuid)
        assert value == recorded[f"TemperatureThreshold.{threshold}"]
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=uuid) == 1


def test_every_counter_field_and_power_field_answers(simulated, client):
    ids = [*layout.COUNTER_FIELDS, 83, *range(185, 193), 230]
    assert set(fields(client, simulated.uuids[0], *ids)) == set(ids)
    module_scope = client.call("nvmlDeviceGetFieldValues", [186, 1], gpu=simulated.uuids[0])
    assert module_scope[0][1] == 3


def test_handles_by_index_uuid_and_bus(simulated, client, nvml_code):
    assert client.call("nvmlDeviceGetCount") == 2
    for index, uuid in enumerate(simulated.uuids):
        assert client.call("nvmlDeviceGetIndex", gpu=uuid) == index
        bus = client.call("nvmlDeviceGetPciInfo", gpu=uuid)["busId"]
        client.call("nvmlDeviceGetHandleByPciBusId", bus)
    with pytest.raises(nvml_code, match=r"^6$"):
        client.call("nvmlDeviceGetHandleByUUID", "GPU-nonsense")
    with pytest.raises(nvml_code, match=r"^2$"):
        client.call("nvmlDeviceGetHandleByIndex", 2)


def test_a_container_sees_only_its_own_gpus(simulated, start_client):
    client = start_client(visible=simulated.uuids[1])
    assert client.call("nvmlDeviceGetCount") == 1
    assert client.call("nvmlDeviceGetIndex", gpu=simulated.uuids[1]) == 0


def test_a_lock_takes_effect_under_load_and_is_undone_by_a_reset(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.step(1.0)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 1980
    client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=uuid)
    simulated.step(0.1)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 1590
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=uuid) == 0
    client.call("nvmlDeviceResetGpuLockedClocks", gpu=uuid)
    simulated.step(0.1)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 1980


def test_a_lock_outlives_its_writer_and_the_node_process(simulated, start_client):
    uuid = simulated.uuids[0]
    start_client().call("nvmlDeviceSetGpuLockedClocks", 345, 900, gpu=uuid)
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.start_process()
    assert start_client().call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 900


@pytest.mark.parametrize("requested_mhz", [1830, 1905, 1980])
def test_requests_at_or_above_1830_are_clamped_without_a_limiter(simulated, client, requested_mhz):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    client.call("nvmlDeviceSetGpuLockedClocks", 345, requested_mhz, gpu=uuid)
    simulated.step(3.0)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 1830
    assert set(fields(client, uuid, *layout.COUNTER_FIELDS[:6], 269, 270, 271).values()) <= {
        simulated.file.gpus[0].sensors.counters_ns[4],  # low utilisation, from before the load
        0,
    }


def test_the_symbols_lock_at_tdp_and_reset(simulated, client, nvml_code):
    tdp, unlimited = 0xFFFFFF01, 0xFFFFFF02
    uuid, gpu = simulated.uuids[0], simulated.file.gpus[0]
    client.call("nvmlDeviceSetGpuLockedClocks", unlimited, tdp, gpu=uuid)
    assert gpu.request.lock_range_mhz == 345 << 32 | 1590
    client.call("nvmlDeviceSetGpuLockedClocks", unlimited, unlimited, gpu=uuid)
    assert gpu.request.lock_range_mhz == 0
    with pytest.raises(nvml_code, match=r"^2$"):
        client.call("nvmlDeviceSetGpuLockedClocks", 345, tdp, gpu=uuid)


@pytest.mark.parametrize("lock", [(1590, 345), (0, 300), (345, 1995), (2000, 2000)])
def test_nonsense_ranges_are_invalid_arguments(simulated, client, nvml_code, lock):
    with pytest.raises(nvml_code, match=r"^2$"):
        client.call("nvmlDeviceSetGpuLockedClocks", *lock, gpu=simulated.uuids[0])
    assert simulated.file.gpus[0].request.lock_range_mhz == 0


def test_writes_without_cap_sys_admin_are_refused_and_readings_are_not(simulated, start_client, nvml_code):
    client = start_client(privileged=False)
    uuid = simulated.uuids[0]
    assert client.call("nvmlDeviceGetPowerUsage", gpu=uuid) > 0
    for call in (("nvmlDeviceSetGpuLockedClocks", 345, 1590), ("nvmlDeviceResetGpuLockedClocks",)):
        with pytest.raises(nvml_code, match=r"^4$"):
            client.call(*call, gpu=uuid)
    with pytest.raises(nvml_code, match=r"^4$"):
        client.call("nvmlDeviceSetPowerManagementLimit", 500_000, gpu=uuid)
    assert simulated.file.gpus[0].request.lock_range_mhz == 0
    assert [w["result"] for w in simulated.writes] == [4, 4, 4]


def test_every_write_is_logged_with_its_caller(simulated, client):
    before_ns = time.time_ns()
    uuid = simulated.uuids[1]
    client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=uuid)
    client.call("nvmlDeviceResetGpuLockedClocks", gpu=uuid)
    first, second = simulated.writes
    assert (first["function"], first["uuid"], first["args"], first["result"]) == (
        "nvmlDeviceSetGpuLockedClocks",
        uuid,
        [345, 1590],
        0,
    )
    assert first["pid"] == client.pid
    assert "sim_nvml_client.py" in first["cmdline"]
    assert before_ns <= first["timeNs"] <= second["timeNs"] <= time.time_ns()
    assert (second["function"], second["args"]) == ("nvmlDeviceResetGpuLockedClocks", [])


def test_the_energy_counter_is_the_integral_of_power(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.step(2.0)
    start_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid)
    integral_mj = 0.0
    for _ in range(50):
        simulated.step(0.1)
        integral_mj += fields(client, uuid, 186)[186] * 0.1
    energy_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid) - start_mj
    assert energy_mj == pytest.approx(integral_mj, rel=1e-3)
    assert energy_mj / 5.0 == pytest.approx(operating_point(Product.H200, DECODE).watts * 1000, rel=0.02)


def test_power_usage_trails_by_a_second_and_the_instant_field_does_not(simulated, client):
    uuid = simulated.uuids[0]
    simulated.step(2.0)
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.step(0.5)
    instant, average = fields(client, uuid, 186)[186], client.call("nvmlDeviceGetPowerUsage", gpu=uuid)
    assert instant == pytest.approx(637_000, rel=0.05)
    assert average == pytest.approx((83_000 + 637_000) / 2, rel=0.05)


def test_an_energy_read_takes_four_milliseconds(simulated, client):
    start = time.perf_counter()
    for _ in range(5):
        client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=simulated.uuids[0])
    assert time.perf_counter() - start >= 5 * 0.004


def test_the_power_limit_lowers_the_clock_and_grows_its_counter(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], THROTTLED_DECODE)
    simulated.step(2.0)
    before = fields(client, uuid, 74)[74]
    simulated.step(1.0)
    assert fields(client, uuid, 74)[74] - before == pytest.approx(1e9, rel=1e-6)
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=uuid) == 0x4
    assert 1500 < client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) < 1980
    client.call("nvmlDeviceSetPowerManagementLimit", 500_000, gpu=uuid)
    simulated.step(2.0)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=uuid) < 515_000


def test_the_power_limit_is_silent_where_a_lock_keeps_power_below_it(simulated, client):
    uuid = simulated.uuids[0]
    client.call("nvmlDeviceSetGpuLockedClocks", 345, 1200, gpu=uuid)
    state.set_workload(simulated.file.gpus[0], THROTTLED_DECODE)
    simulated.step(2.0)
    assert fields(client, uuid, 74)[74] == 0


def test_prefill_starts_with_a_reading_above_the_limit(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.step(2.0)
    state.set_workload(simulated.file.gpus[0], PREFILL)
    simulated.step(0.1)
    assert 800_000 < fields(client, uuid, 186)[186] < 1_000_000
    averages = []
    for _ in range(20):
        simulated.step(0.1)
        averages.append(client.call("nvmlDeviceGetPowerUsage", gpu=uuid))
    assert max(averages) < 725_000


def test_after_prefill_the_limiter_lets_go_slowly(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], PREFILL)
    simulated.step(2.0)
    state.set_workload(simulated.file.gpus[0], DECODE)
    clocks, reasons = [], []
    for _ in range(5):
        simulated.step(0.1)
        clocks.append(client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid))
        reasons.append(client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=uuid))
    assert clocks[0] < 1980 == clocks[-1]
    assert (reasons[0], reasons[-1]) == (0x4, 0)


@pytest.mark.parametrize(
    ("kind", "bits", "counters"),
    [("sw-thermal", 0x20, {75, 269}), ("hw-thermal", 0x48, {75, 270}), ("power-brake", 0x88, {271})],
)
def test_limiters_on_request(simulated, client, kind, bits, counters):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.step(0.1)
    before = fields(client, uuid, *layout.COUNTER_FIELDS)
    control.set_limiter(simulated.file.gpus[0], kind, 1200)
    simulated.step(1.0)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 1200
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=uuid) == bits
    after = fields(client, uuid, *layout.COUNTER_FIELDS)
    assert {f for f in after if after[f] > before[f]} == counters


def test_a_reboot_is_a_reload_and_a_new_boot_id(simulated, client):
    client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=simulated.uuids[0])
    boot_id = simulated.directory / state.BOOT_ID_NAME
    before = boot_id.read_text()
    name = simulated.file.state.node_name.decode()
    StateFile.create(simulated.directory, name, Product.H200, len(simulated.uuids)).close()
    assert boot_id.read_text() == before, "the node's process starting anew is no reboot"
    assert any(gpu.request.lock_range_mhz for gpu in simulated.file.gpus)
    control.reboot(simulated.file)
    assert boot_id.read_text() != before
    assert not any(gpu.request.lock_range_mhz for gpu in simulated.file.gpus)


def test_a_driver_reload_loses_locks_and_restarts_counters(simulated, client, nvml_code):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=uuid)
    simulated.step(5.0)
    before = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid)
    control.reload_driver(simulated.file)
    simulated.step(0.2)
    assert client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid) < before / 5
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 1980
    control.reload_driver(simulated.file, end_sessions=True)
    with pytest.raises(nvml_code, match=r"^15$"):
        client.call("nvmlDeviceGetCount")
    client.call("nvmlShutdown")
    client.call("nvmlInit")
    assert client.call("nvmlDeviceGetCount") == 2


def test_faults_hit_one_function_of_one_gpu_a_number_of_times(simulated, client, nvml_code):
    first, second = simulated.uuids
    control.inject_fault(simulated.file.gpus[0].faults, "nvmlDeviceSetGpuLockedClocks", 999, count=2)
    for _ in range(2):
        with pytest.raises(nvml_code, match=r"^999$"):
            client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=first)
        client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=second)
    client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=first)
    assert [w["result"] for w in simulated.writes if w["uuid"] == first] == [999, 999, 0]


def test_a_lost_gpu_answers_nothing_until_cleared(simulated, client, nvml_code):
    first, second = simulated.uuids
    control.inject_fault(simulated.file.gpus[0].faults, "*", 15)
    for _ in range(3):
        with pytest.raises(nvml_code, match=r"^15$"):
            client.call("nvmlDeviceGetPowerUsage", gpu=first)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=second) > 0
    control.clear_faults(simulated.file.gpus[0].faults)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=first) > 0


def test_initialisation_can_fail_and_an_absent_state_file_is_no_driver(simulated, start_client, nvml_code):
    client = start_client(init=False)
    with pytest.raises(nvml_code, match=r"^1$"):
        client.call("nvmlDeviceGetCount")
    control.inject_fault(simulated.file.state.faults, "nvmlInit", 18, count=1)
    with pytest.raises(nvml_code, match=r"^18$"):
        client.call("nvmlInit")
    client.call("nvmlInit")
    (simulated.directory / "state.bin").unlink()
    with pytest.raises(nvml_code, match=r"^9$"):
        start_client()


def test_mig_hides_utilisation_and_takes_effect_at_the_reset(simulated, client, nvml_code):
    uuid, gpu = simulated.uuids[0], simulated.file.gpus[0]
    gpu.condition.mig_pending = 1
    assert client.call("nvmlDeviceGetMigMode", gpu=uuid) == [0, 1]
    control.reset_gpus([gpu])
    assert client.call("nvmlDeviceGetMigMode", gpu=uuid) == [1, 1]
    with pytest.raises(nvml_code, match=r"^3$"):
        client.call("nvmlDeviceGetUtilizationRates", gpu=uuid)


def test_a_vgpu_guest_cannot_write(simulated, client, nvml_code):
    simulated.file.gpus[0].condition.virtualization_mode = state.VIRTUALIZATION_CODES["vgpu"]
    with pytest.raises(nvml_code, match=r"^3$"):
        client.call("nvmlDeviceSetGpuLockedClocks", 345, 1590, gpu=simulated.uuids[0])


def test_a_node_process_that_died_while_writing_does_not_hang_readers(simulated, client):
    simulated.file.gpus[0].sensors.sequence += 1
    assert client.call("nvmlDeviceGetPowerUsage", gpu=simulated.uuids[0]) > 0
    simulated.start_process()
    assert simulated.file.gpus[0].sensors.sequence % 2 == 0


def test_an_instance_that_died_leaves_an_idle_gpu(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE, lease_until_ns=simulated.now_ns + 3_000_000_000)
    simulated.step(2.0)
    assert client.call("nvmlDeviceGetUtilizationRates", gpu=uuid)["gpu"] == 100
    simulated.step(2.0)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=uuid) == 345
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=uuid) == 1


def test_a_workload_from_before_a_reboot_is_gone(simulated, client):
    state.set_workload(simulated.file.gpus[0], DECODE, lease_until_ns=simulated.now_ns + 10**15)
    simulated.step(1.0)
    assert client.call("nvmlDeviceGetClockInfo", SM, gpu=simulated.uuids[0]) == 345


def test_a_restarted_node_process_goes_on_with_energy_and_work(simulated, client):
    uuid = simulated.uuids[0]
    state.set_workload(simulated.file.gpus[0], DECODE)
    simulated.step(2.0)
    energy, steps = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid), simulated.file.gpus[0].sensors.steps
    simulated.start_process()
    assert energy < client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=uuid) < energy + 100_000
    assert simulated.file.gpus[0].sensors.steps > steps > 0
