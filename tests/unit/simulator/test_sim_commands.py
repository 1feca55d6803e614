"""The command line: as processes for what runs, in this process for what answers at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from wattlock_simulator import physics, state
from wattlock_simulator.__main__ import main
from wattlock_simulator.physics import Architecture, Phase, Product, Workload
from wattlock_simulator.state import StateFile

DEADLINE_SECONDS = 15.0


def wait_for(condition):
    """Polls until a condition holds and returns its value."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("not in time")


def control(simulated, *arguments):
    return main(["control", "--directory", str(simulated.directory), *arguments])


def test_truth_prints_what_the_physics_says(capsys):
    assert main(["truth", "--batch", "8", "--context", "1024", "--cap", "1200", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    saving = physics.true_saving(Product.H200, Workload(Architecture.GQA, Phase.DECODE, 8, 1024), 1200)
    assert said["energy_percent"] == saving.energy_percent
    assert said["capped"]["clock_mhz"] == 1200
    assert main(["truth"]) == 0
    assert re.search(r"true saving +14\.\d\d % energy per token", capsys.readouterr().out)


def test_nonsense_is_refused_with_a_sentence(capsys, tmp_path):
    assert main(["truth", "--batch", "0"]) == 1
    assert "batch 0" in capsys.readouterr().err
    assert main(["control", "--directory", str(tmp_path), "show"]) == 1
    assert "is `wattlock-simulator node` running?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--role", "Decode"])


def test_serving_without_gpus_says_what_to_set(capsys, simulated):
    done = subprocess.run(
        [sys.executable, "-m", "wattlock_simulator", "serve", "--directory", str(simulated.directory), "--gpus", ""],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert "set NVIDIA_VISIBLE_DEVICES" in done.stderr


def test_control_does_to_the_gpus_what_it_says(simulated, capsys):
    gpu, other = simulated.file.gpus
    assert control(simulated, "workload", "--gpu", "0", "--architecture", "MLA", "--batch", "4") == 0
    assert control(simulated, "limiter", "--gpu", "0", "--kind", "sw-thermal", "--mhz", "900") == 0
    simulated.step(1.0)
    assert gpu.sensors.sm_mhz == 900
    assert control(simulated, "power-limit", "--gpu", "0", "--watts", "300") == 0
    assert (gpu.request.power_limit_mw, other.request.power_limit_mw) == (300_000, 700_000)
    assert control(simulated, "lock", "--gpu", "1", "--max", "1200") == 0
    assert other.request.lock_range_mhz == 345 << 32 | 1200
    assert control(simulated, "mig", "--gpu", "1", "--mode", "on") == 0
    assert (other.condition.mig_current, other.request.lock_range_mhz) == (1, 0)
    assert control(simulated, "virtualization", "--mode", "passthrough") == 0
    assert gpu.condition.virtualization_mode == 1
    assert control(simulated, "fault", "--gpu", "0", "--function", "*", "--code", "15") == 0
    assert control(simulated, "fault", "--gpu", "driver", "--function", "nvmlInit", "--code", "9", "--count", "3") == 0
    assert (gpu.faults[0].code, simulated.file.state.faults[0].remaining) == (15, 3)
    simulated.step(1.0)
    capsys.readouterr()
    assert control(simulated, "show") == 0
    shown = capsys.readouterr().out
    assert "MLA decode 4.0 x 4096 fault:*=15" in shown
    assert "fault on all: nvmlInit=9" in shown
    assert control(simulated, "clear-faults") == 0
    assert (gpu.faults[0].remaining, simulated.file.state.faults[0].remaining) == (0, 0)
    assert control(simulated, "workload", "--phase", "idle") == 0
    assert control(simulated, "reload", "--end-sessions") == 0
    assert gpu.request.power_limit_mw == 700_000
    assert control(simulated, "workload", "--phase", "none") == 0
    simulated.step(0.1)
    assert gpu.sensors.sm_mhz == 345


def test_show_as_json_tells_what_no_nvml_call_can(simulated, capsys):
    control(simulated, "lock", "--gpu", "1", "--max", "1200")
    control(simulated, "workload", "--gpu", "1")
    simulated.step(1.0)
    capsys.readouterr()
    assert control(simulated, "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    free, locked = shown["gpus"]
    assert shown["node"] == free["node"] == "node-a"
    assert (free["lock_mhz"], locked["lock_mhz"], locked["lock_min_mhz"]) == (None, 1200, 345)
    assert (locked["uuid"], locked["sm_mhz"], locked["product"]) == (simulated.uuids[1], 1200, "H200")
    assert (free["workload"], locked["workload"]["phase"]) == (None, "decode")


def test_a_foreign_lock_is_in_the_write_log(simulated):
    control(simulated, "lock", "--gpu", "1", "--min", "345", "--max", "1200")
    control(simulated, "unlock", "--gpu", "1")
    assert [(w["function"], w["comm"], w["args"]) for w in simulated.writes] == [
        ("nvmlDeviceSetGpuLockedClocks", "foreign-writer", [345, 1200]),
        ("nvmlDeviceResetGpuLockedClocks", "foreign-writer", []),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("lock", "--min", "1200", "--max", "345"),
        ("power-limit", "--watts", "900"),
        ("fault", "--function", "getPower", "--code", "4"),
        ("fault", "--function", "nvmlInit", "--code", "1000"),
        ("fault", "--function", "nvmlInit", "--code", "4", "--count", "0"),
        ("unlock", "--gpu", "9"),
    ],
)
def test_control_refuses_nonsense(simulated, capsys, arguments):
    assert control(simulated, *arguments) == 1
    assert capsys.readouterr().err.startswith("wattlock-simulator control: ")


def test_fault_slots_run_out_loudly(simulated, capsys):
    for _ in range(16):
        assert control(simulated, "fault", "--gpu", "0", "--function", "*", "--code", "15") == 0
    assert control(simulated, "fault", "--gpu", "0", "--function", "*", "--code", "15") == 1
    assert "fault slots are in use" in capsys.readouterr().err


def test_node_and_serving_processes_work_together_and_stop_on_sigterm(tmp_path):
    environment = {**os.environ, "NVIDIA_VISIBLE_DEVICES": state.gpu_uuid("n", 1)}
    command = [sys.executable, "-m", "wattlock_simulator"]
    directory = ["--directory", str(tmp_path)]
    node = subprocess.Popen(
        [*command, "node", *directory, "--gpus", "2", "--node-name", "n", "--no-device-plugin"], env=environment
    )
    wait_for(lambda: (tmp_path / state.STATE_NAME).exists() and (tmp_path / "libnvidia-ml.so.1").exists())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = None
    try:
        with StateFile.open(tmp_path) as file:
            wait_for(lambda: file.gpus[0].sensors.updated_ns)
            serve = subprocess.Popen([*command, "serve", *directory, "--port", str(port)], env=environment)

            def tokens():
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                        found = re.search(rb"vllm:generation_tokens_total{.*} (\S+)", page.read())
                except urllib.error.URLError:
                    return 0.0
                return float(found[1]) if found else 0.0

            assert wait_for(tokens) > 0
            assert file.gpus[1].sensors.sm_mhz == 1980
            serve.send_signal(signal.SIGTERM)
            assert serve.wait(timeout=10) == 0
            assert file.gpus[1].workload.architecture == 0
    finally:
        for process in filter(None, (node, serve)):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        assert node.wait(timeout=10) == 0
