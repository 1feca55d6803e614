"""The whole command against a simulated node: real processes, the driver's own log, kill -9 in the middle."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wattlock_agent.gpu.capability import has_sys_admin
from wattlock_agent.journal_file import POWER_LIMITS_NAME
from wattlock_agent.sweep.record import read_run
from wattlock_simulator import physics
from wattlock_simulator.physics import Architecture, Phase, Product, Workload
from wattlock_simulator.state import StateError, StateFile

pytestmark = pytest.mark.timeout(300)  # real seconds on machines that may be busy
SIMULATOR = [sys.executable, "-m", "wattlock_simulator", "--log-level", "WARNING"]
AGENT = [sys.executable, "-m", "wattlock_agent"]
LIMIT_MW = 650_000  # not the driver's default: a reset to the default would be noticed


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


class Site:
    """A simulated GPU, the endpoint on it, and a journal."""

    def __init__(self, directory: Path, journal: Path) -> None:
        self.directory, self.journal = directory, journal
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start("node", "--no-device-plugin", "--gpus", "2")
            until(self._moves)
            where = ("--address", "127.0.0.1", "--port", str(self.port))
            self._start("serve", "--gpus", "0", "--requests", "--batch", "64", *where)
            until(self._answers)
        except BaseException:
            self.stop()
            raise

    def _start(self, part: str, *arguments: str) -> None:
        self._processes.append(subprocess.Popen([*SIMULATOR, part, "--directory", str(self.directory), *arguments]))

    def _moves(self) -> bool:
        try:
            return bool((self.directory / "libnvidia-ml.so.1").exists() and self.gpu().sensors.updated_ns > 0)
        except StateError:  # not there, or being made
            return False

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def gpu(self, index: int = 0) -> Any:
        with StateFile.open(self.directory) as file:
            return type(file.gpus[index]).from_buffer_copy(file.gpus[index])

    @property
    def uuid(self) -> str:
        return str(self.gpu().identity.uuid.decode())

    def writes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "writes.log").read_text().splitlines()]

    def command(self, *arguments: str) -> list[str]:
        there = ["--state-dir", str(self.journal)]
        return [*prefix(), *AGENT, *arguments, *there]

    def sweep(self, out: Path, *more: str) -> list[str]:
        return self.command(
            *("sweep", "--i-may-change-clocks", "--url", f"http://127.0.0.1:{self.port}", "--gpus", self.uuid),
            *("--out", str(out), "--client", "own", "--concurrency", "8", "--lengths", "1024", *more),
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "LD_LIBRARY_PATH": str(self.directory)}

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)

    def is_untouched(self) -> bool:
        gpu = self.gpu()
        left = list(self.journal.iterdir()) if self.journal.exists() else []
        return (gpu.request.lock_range_mhz, gpu.request.power_limit_mw, left) == (0, LIMIT_MW, [])

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(timeout=20)


def prefix() -> list[str]:
    """What gives a process CAP_SYS_ADMIN where this one has not got it."""
    mine = has_sys_admin(Path("/proc/self/status").read_text())
    return [] if mine else ["unshare", "--user", "--map-root-user"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    site = Site(directory / "driver", directory / "journal")
    with StateFile.open(site.directory) as file:
        file.gpus[0].request.power_limit_mw = LIMIT_MW
    yield site
    site.stop()


def test_a_sweep_finds_the_simulators_truth_and_leaves_no_trace(site, tmp_path):
    out = tmp_path / "out"
    points = ("--clocks", "1590,780", "--power-limits", "600,350")
    done = site.run(
        site.sweep(
            *(out, *points, "--repeats", "1", "--window-seconds", "2", "--settle-seconds", "0.5"),
            *("--shapes", "decode", "--architecture", "GQA"),
        )
    )
    assert done.returncode == 0, done.stderr
    assert site.is_untouched()
    assert "[6/6]" in done.stdout
    assert {write["uuid"] for write in site.writes()} == {site.uuid}
    run, windows = read_run(out)
    assert run.planned_windows == len(windows) == 6
    load = Workload(Architecture.GQA, Phase.DECODE, 8, 1024 + 128)
    for window in windows:
        cap = window.setting.value if window.setting.lever == "clock" else None
        limit = window.setting.value if window.setting.lever == "power" else 700.0
        truth = physics.operating_point(Product.H200, load, cap, limit)
        assert window.joules_per_token == pytest.approx(truth.joules_per_token, rel=0.12), str(window.setting)
        assert window.observed_mhz == pytest.approx(truth.clock_mhz, abs=60)
        assert (window.cap_share > 0.5) == truth.power_limited
    report = (out / "report.md").read_text()
    assert "| 8 x 1024 | limit 600 W | 1980 | 0 % Inert |" in report
    assert "insensitive" in report
    assert not (out / "profile.yaml").exists()  # one repeat proves nothing
    assert (out / "pareto.png").stat().st_size > 10_000


def test_while_a_sweep_runs_others_are_kept_out_and_a_signal_restores_everything(site, tmp_path):
    process = begin(site, tmp_path / "out")
    until(lambda: (site.journal / POWER_LIMITS_NAME).exists())
    for command in (site.sweep(tmp_path / "other"), site.command("reset")):
        refused = site.run(command)
        assert refused.returncode != 0
        assert "holds the journal" in refused.stderr
    until(lambda: site.gpu().request.power_limit_mw == 300_000)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped by SIGTERM; everything is as it was before" in errors
    assert site.is_untouched()


@pytest.mark.parametrize("seed", range(2))
def test_killed_in_the_middle_reset_restores_everything(site, tmp_path, seed):
    process = begin(site, tmp_path / "out")
    before = len(site.writes())
    wanted = before + 1 + random.Random(seed).randint(1, 12)  # the first one undoes locks of others
    until(lambda: len(site.writes()) >= wanted)
    process.kill()
    process.communicate(timeout=30)
    assert not site.is_untouched()
    short = ("--clocks", "1590", "--power-limits", "none", "--shapes", "decode", "--repeats", "1")
    refused = site.run(site.sweep(tmp_path / "again", *short, "--window-seconds", "0.3"))
    assert (refused.returncode, "wattlock-agent reset" in refused.stderr) == (2, True)
    done = site.run(site.command("reset"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert site.is_untouched()


def begin(site: Site, out: Path) -> subprocess.Popen[str]:
    """A sweep that changes the GPU every half a second and would take minutes."""
    points = ("--clocks", "1590,990", "--power-limits", "500,300", "--repeats", "50", "--stock-every", "2")
    times = ("--window-seconds", "0.3", "--settle-seconds", "0.1", "--shapes", "decode")
    command = site.sweep(out, *points, *times)
    return subprocess.Popen(command, env=site.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_nothing_is_changed_without_permission_and_a_dry_run_needs_none(site, tmp_path):
    before = len(site.writes())
    command = [each for each in site.sweep(tmp_path / "out") if each != "--i-may-change-clocks"]
    refused = site.run(command)
    assert refused.returncode == 2
    assert "--i-may-change-clocks" in refused.stderr
    dry = site.run([*command, "--dry-run"])
    assert dry.returncode == 0
    assert "measurements of 20 s take" in dry.stdout
    assert len(site.writes()) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpus", "GPU-nowhere"), "no GPU GPU-nowhere here"),
        (("--url", "http://127.0.0.1:9"), "check that the engine runs"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_changed(site, tmp_path, arguments, sentence):
    before = len(site.writes())
    done = site.run([*site.sweep(tmp_path / "out"), *arguments])
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert len(site.writes()) == before


def test_gpus_that_the_endpoint_does_not_run_on_are_noticed(site, tmp_path):
    other = site.gpu(1).identity.uuid.decode()
    times = ("--window-seconds", "0.5", "--settle-seconds", "0.1", "--clocks", "1590", "--power-limits", "none")
    done = site.run([*site.sweep(tmp_path / "out", *times), "--gpus", other])
    assert done.returncode == 1
    assert "must name the GPUs that it runs on" in done.stderr
    assert site.gpu(1).request.lock_range_mhz == 0


def test_the_agent_itself_never_loads_the_sweep():
    code = (
        "import sys, wattlock_agent.__main__, wattlock_agent.loop\n"
        "assert not [name for name in sys.modules if name in ('wattlock_agent.sweep.command', 'matplotlib')]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
