"""NvmlDriver against the simulated driver library, under the unchanged binding, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.gpu.capability import has_sys_admin
from wattlock_agent.gpu.faults import KNOWN_CODES, fault_of
from wattlock_simulator import control, driver
from wattlock_simulator.node import Node
from wattlock_simulator.physics import Architecture, Phase, Product, Workload
from wattlock_simulator.state import StateFile, clear_workload, set_workload

WORKER = Path(__file__).with_name("nvml_worker.py")
MAY_WRITE = has_sys_admin(Path("/proc/self/status").read_text())
Json = dict[str, Any]


class Agent:
    """An NvmlDriver in another process."""

    def __init__(self, library_directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            env={**os.environ, "LD_LIBRARY_PATH": str(library_directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, method: str, *arguments: Any) -> Json:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        answer: Json = json.loads(self._process.stdout.readline() or "null")
        assert answer is not None, "the agent's process died"
        return answer

    def value(self, method: str, *arguments: Any) -> Any:
        answer = self.ask(method, *arguments)
        assert "value" in answer, answer
        return answer["value"]

    def fault(self, method: str, *arguments: Any) -> str:
        answer = self.ask(method, *arguments)
        assert "fault" in answer, answer
        return str(answer["fault"])

    def stop(self) -> str:
        _, log = self._process.communicate(timeout=10)
        assert self._process.returncode == 0, log
        return log


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("driver")
    driver.build(directory)
    return directory


@pytest.fixture(scope="module")
def worker(directory: Path) -> Iterator[Agent]:
    with StateFile.create(directory, "node-a", Product.H200, 2):
        pass
    agent = Agent(directory)
    yield agent
    agent.stop()


@pytest.fixture
def node(directory: Path) -> Iterator[StateFile]:
    """The node's state, as new."""
    with StateFile.create(directory, "node-a", Product.H200, 2) as file:
        (directory / "writes.log").write_text("")
        for slots in (file.state.faults, *(gpu.faults for gpu in file.gpus)):
            control.clear_faults(slots)
        for gpu in file.gpus:
            gpu.condition.mig_current = gpu.condition.mig_pending = 0
            gpu.condition.virtualization_mode = gpu.condition.recovery_action = 0
        control.reset_gpus(file.gpus)
        Node(file).step(1.0)
        yield file


@pytest.fixture
def agent(worker: Agent, node: StateFile) -> Agent:
    """An open driver that has listed its GPUs."""
    worker.value("open")
    worker.value("list_gpus")
    return worker


def uuid_of(node: StateFile, index: int = 0) -> str:
    return str(node.gpus[index].identity.uuid.decode())


def writes(directory: Path) -> list[tuple[str, list[int], int]]:
    lines = [json.loads(line) for line in (directory / "writes.log").read_text().splitlines()]
    return [(line["function"], line["args"], line["result"]) for line in lines]


def test_versions_and_identities_are_read(agent: Agent, node: StateFile) -> None:
    versions = agent.value("open")
    assert versions["driver_version"]
    assert versions["nvml_version"]
    first, second = agent.value("list_gpus")
    assert first["uuid"] == uuid_of(node)
    assert second["uuid"] == uuid_of(node, 1)
    assert (first["index"], second["index"]) == (0, 1)
    assert first["product"] == "NVIDIA H200"
    assert first["supported_clocks_mhz"] == list(range(345, 1981, 15))
    assert (first["mig_enabled"], first["virtual"]) == (False, False)


def test_a_reading_has_every_value_that_a_hopper_gpu_offers(agent: Agent, node: StateFile) -> None:
    sensors = node.gpus[0].sensors
    reading = agent.value("read", uuid_of(node))
    assert reading["energy_mj"] == sensors.energy_mj
    assert reading["power_instant_mw"] == sensors.power_instant_mw
    assert reading["sm_mhz"] == sensors.sm_mhz
    assert reading["power_limit_mw"] == 700_000
    assert reading["memory_mhz"] == 3201
    assert reading["event_reasons"] == sensors.reasons
    assert [name for name, value in reading.items() if value is None] == []
    assert [name for name, value in reading["limiters"].items() if value is None] == []


@pytest.mark.parametrize(
    ("cause", "counter"), [("sw-thermal", "thermal"), ("hw-thermal", "thermal"), ("power-brake", "power_brake")]
)
def test_the_limiter_counter_of_its_cause_grows_and_no_other(
    agent: Agent, node: StateFile, cause: str, counter: str
) -> None:
    simulated, gpu = Node(node), node.gpus[0]
    set_workload(gpu, Workload(Architecture.GQA, Phase.DECODE, 32, 4096))
    control.set_limiter(gpu, cause, 900)
    before = agent.value("read", uuid_of(node))["limiters"]
    simulated.step(1.0)
    after = agent.value("read", uuid_of(node))["limiters"]
    control.set_limiter(gpu, "none", 0)
    clear_workload(gpu)
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert list(grown) == [counter]
    assert grown[counter] == pytest.approx(1e9, rel=0.2)


@pytest.mark.parametrize("code", sorted(KNOWN_CODES | {31, 500}))
def test_no_error_of_the_driver_ends_the_agent(agent: Agent, node: StateFile, code: int) -> None:
    uuid = uuid_of(node)
    control.inject_fault(node.state.faults, "*", code)
    for method, arguments in (("list_gpus", ()), ("reset", (uuid,)), ("open", ())):
        answer = agent.ask(method, *arguments)
        assert answer.get("fault") == fault_of(code)
        assert f"NVML {code}" in answer["message"]
    control.clear_faults(node.state.faults)
    control.inject_fault(node.state.faults, "nvmlInit", code)
    assert agent.fault("open") == fault_of(code)
    control.clear_faults(node.state.faults)
    agent.value("open")
    assert len(agent.value("list_gpus")) == 2


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_mj"),
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit_mw"),
        ("nvmlDeviceGetFieldValues", "power_instant_mw"),
    ],
)
def test_a_value_that_the_gpu_lacks_is_unknown_and_asked_for_once(
    worker: Agent, node: StateFile, function: str, name: str
) -> None:
    control.inject_fault(node.gpus[0].faults, function, 3, count=1)
    worker.value("open")
    worker.value("list_gpus")
    # The fault was used up when the GPU was met: the answer is remembered.
    assert worker.value("read", uuid_of(node))[name] is None
    assert worker.value("read", uuid_of(node, 1))[name] is not None
    worker.value("open")
    worker.value("list_gpus")
    assert worker.value("read", uuid_of(node))[name] is not None


def test_an_old_driver_without_new_functions_is_read_through_the_old_ones(worker: Agent, node: StateFile) -> None:
    control.inject_fault(node.state.faults, "nvmlDeviceGetTemperatureV", 13)
    worker.value("open")
    worker.value("list_gpus")
    reading = worker.value("read", uuid_of(node))
    assert reading["temperature_c"] == node.gpus[0].sensors.temperature_celsius > 0


def test_a_passing_error_while_meeting_a_gpu_does_not_hide_its_values(worker: Agent, node: StateFile) -> None:
    control.inject_fault(node.gpus[0].faults, "nvmlDeviceGetTotalEnergyConsumption", 999, count=1)
    worker.value("open")
    assert len(worker.value("list_gpus")) == 2
    assert worker.value("read", uuid_of(node))["energy_mj"] is not None


def test_a_lost_gpu_is_left_out_and_the_others_go_on(agent: Agent, node: StateFile) -> None:
    control.inject_fault(node.gpus[0].faults, "*", 15)
    assert agent.fault("read", uuid_of(node)) == GpuFault.GPU_LOST
    assert [gpu["uuid"] for gpu in agent.value("list_gpus")] == [uuid_of(node, 1)]
    assert agent.fault("read", uuid_of(node)) == GpuFault.GPU_LOST
    assert agent.value("read", uuid_of(node, 1))["sm_mhz"]
    control.clear_faults(node.gpus[0].faults)
    assert len(agent.value("list_gpus")) == 2


def test_a_gpu_that_stumbles_while_listed_can_still_be_reset(agent: Agent, node: StateFile) -> None:
    node.gpus[0].request.lock_range_mhz = 345 << 32 | 1590
    control.inject_fault(node.gpus[0].faults, "nvmlDeviceGetMigMode", 999, count=1)
    assert [gpu["uuid"] for gpu in agent.value("list_gpus")] == [uuid_of(node, 1)]
    answer = agent.ask("reset", uuid_of(node))
    assert answer.get("fault") == (None if MAY_WRITE else GpuFault.NO_PERMISSION)
    assert (node.gpus[0].request.lock_range_mhz == 0) is MAY_WRITE
    assert len(agent.value("list_gpus")) == 2


def test_a_gpu_that_was_never_listed_can_be_reset_and_one_that_is_not_there_is_lost(
    worker: Agent, node: StateFile
) -> None:
    node.gpus[0].request.lock_range_mhz = 345 << 32 | 1590
    control.inject_fault(node.gpus[0].faults, "nvmlDeviceGetMigMode", 999)
    worker.value("open")
    assert [gpu["uuid"] for gpu in worker.value("list_gpus")] == [uuid_of(node, 1)]
    answer = worker.ask("reset", uuid_of(node))
    assert answer.get("fault") == (None if MAY_WRITE else GpuFault.NO_PERMISSION)
    assert (node.gpus[0].request.lock_range_mhz == 0) is MAY_WRITE
    assert worker.fault("reset", "GPU-00000000-0000-0000-0000-000000000000") == GpuFault.GPU_LOST


@pytest.mark.parametrize("function", ["nvmlDeviceGetUUID", "nvmlDeviceGetMigMode"])
def test_a_driver_upgrade_under_way_is_no_failure_of_one_gpu(agent: Agent, node: StateFile, function: str) -> None:
    control.inject_fault(node.gpus[1].faults, function, 18)
    assert agent.fault("list_gpus") == GpuFault.DRIVER_MISMATCH


def test_a_driver_that_fails_while_it_is_opened_is_closed_again(worker: Agent, node: StateFile) -> None:
    control.inject_fault(node.state.faults, "nvmlSystemGetDriverVersion", 999, count=1)
    assert worker.fault("open") == GpuFault.TRANSIENT
    assert worker.fault("list_gpus") == GpuFault.NO_DRIVER


def test_a_lock_is_the_range_that_was_asked_for_and_a_reset_undoes_it(agent: Agent, node: StateFile) -> None:
    if not MAY_WRITE:
        assert agent.fault("lock", uuid_of(node), 345, 1590) == GpuFault.NO_PERMISSION
        return
    agent.value("lock", uuid_of(node), 345, 1590)
    assert node.gpus[0].request.lock_range_mhz == 345 << 32 | 1590
    assert node.gpus[1].request.lock_range_mhz == 0
    agent.value("reset", uuid_of(node))
    assert node.gpus[0].request.lock_range_mhz == 0


@pytest.mark.parametrize(("low", "high"), [(345, 1591), (344, 1590), (1590, 345), (0, 1590), (345, 0xFFFFFF01)])
def test_clocks_off_the_list_never_reach_the_driver(
    agent: Agent, node: StateFile, directory: Path, low: int, high: int
) -> None:
    assert agent.fault("lock", uuid_of(node), low, high) == GpuFault.INVALID_ARGUMENT
    assert writes(directory) == []


@pytest.mark.parametrize("mode", ["mig", "vgpu", "host-vgpu", "recovery"])
def test_gpus_that_must_not_be_written_are_not(agent: Agent, node: StateFile, directory: Path, mode: str) -> None:
    condition = node.gpus[0].condition
    if mode == "mig":
        condition.mig_current = 1
    elif mode == "recovery":
        condition.recovery_action = 1
    else:
        condition.virtualization_mode = {"vgpu": 2, "host-vgpu": 3}[mode]
    first, second = agent.value("list_gpus")
    assert (first["mig_enabled"], first["virtual"]) == (mode == "mig", "vgpu" in mode)
    assert (second["mig_enabled"], second["virtual"]) == (False, False)
    expected = GpuFault.GPU_LOST if mode == "recovery" else GpuFault.NOT_SUPPORTED
    assert agent.fault("lock", uuid_of(node), 345, 1590) == expected
    assert writes(directory) == []


def test_a_gpu_passed_through_whole_is_not_virtual(agent: Agent, node: StateFile) -> None:
    node.gpus[0].condition.virtualization_mode = 1
    assert agent.value("list_gpus")[0]["virtual"] is False


def test_a_refused_write_is_told_with_the_remedy(agent: Agent, node: StateFile) -> None:
    control.inject_fault(node.gpus[0].faults, "nvmlDeviceSetGpuLockedClocks", 4)
    answer = agent.ask("lock", uuid_of(node), 345, 1590)
    assert answer["fault"] == GpuFault.NO_PERMISSION
    assert "SYS_ADMIN" in answer["message"]
    assert uuid_of(node) in answer["message"]


def test_a_reloaded_driver_is_found_by_opening_anew(agent: Agent, node: StateFile) -> None:
    control.reload_driver(node, end_sessions=True)
    assert agent.fault("read", uuid_of(node)) == GpuFault.GPU_LOST
    assert agent.fault("list_gpus") == GpuFault.GPU_LOST
    agent.value("close")
    assert agent.fault("list_gpus") == GpuFault.NO_DRIVER
    agent.value("open")
    assert len(agent.value("list_gpus")) == 2
    assert agent.value("read", uuid_of(node))["sm_mhz"]


def test_closing_never_raises(agent: Agent, node: StateFile) -> None:
    control.inject_fault(node.state.faults, "*", 999)
    agent.value("close")
    agent.value("close")
    control.clear_faults(node.state.faults)
    assert agent.fault("read", uuid_of(node)) == GpuFault.GPU_LOST


def test_the_capability_is_the_process_own(worker: Agent) -> None:
    assert worker.value("may_write") is MAY_WRITE


def test_a_node_without_a_driver_library_says_what_to_check(tmp_path: Path) -> None:
    (tmp_path / driver.LIBRARY_NAME).write_text("not a library")
    agent = Agent(tmp_path)
    answer = agent.ask("open")
    agent.stop()
    assert answer["fault"] == GpuFault.NO_DRIVER
    assert "runtimeClassName" in answer["message"]


def test_a_library_without_a_driver_is_waited_for(directory: Path, tmp_path: Path) -> None:
    (tmp_path / driver.LIBRARY_NAME).write_bytes((directory / driver.LIBRARY_NAME).read_bytes())
    agent = Agent(tmp_path)
    assert agent.fault("open") == GpuFault.NO_DRIVER
    with StateFile.create(tmp_path, "node-b", Product.H100, 1) as file:
        Node(file).step(0.1)
        agent.value("open")
        assert [gpu["product"] for gpu in agent.value("list_gpus")] == ["NVIDIA H100 80GB HBM3"]
    agent.stop()
