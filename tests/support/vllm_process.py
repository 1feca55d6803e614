"""A real vLLM as a process of this machine, a simulated GPU that works while it does, and sweeps of both."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from vllm_pods import ROOT, VllmPage, installed, read_page
from vllm_watch import recorded
from wattlock_agent.gpu.capability import has_sys_admin
from wattlock_agent.sweep.estimates import Window
from wattlock_simulator.state import StateError, StateFile

ADDRESS = "127.0.0.1"
#: Not the driver's default: a reset to the default would be noticed.
LIMIT_MW = 650_000
_SIMULATOR = [sys.executable, "-m", "wattlock_simulator", "--log-level", "WARNING"]
_START_SECONDS = 400.0
_PAGE_SECONDS = 0.2
_SLOWEST_SECONDS = 0.1


def until(what: str, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return found


@dataclass
class Swept:
    """What a sweep printed and how it ended."""

    status: int
    errors: str
    lines: list[tuple[float, str]] = field(default_factory=list)
    """With the time at which each came, in seconds since 1970."""

    def ends(self, windows: Sequence[Window]) -> list[tuple[float, float]]:
        """Return between which two moments each window ended, in seconds since 1970.

        A window's own time is since the begin of the sweep, and of when it was asked for: it begins a little later,
        with a refresh of the sensors and a quick page. The line about it comes after it.
        """
        told = [at for at, line in self.lines if line.startswith("[")]
        since = [window.at_seconds + window.seconds / 2 for window in windows]
        began = min(at - end for at, end in zip(told, since, strict=True))
        return [(began + end, at) for end, at in zip(since, told, strict=True)]


class VllmSite:
    """All of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.driver, self.journal = directory / "driver", directory / "journal"
        self._processes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind((ADDRESS, 0))
            self.port = free.getsockname()[1]
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        folder = Path(installed())
        self._write_program(folder)
        serve = ("serve", str(folder / "model"), "--served-model-name", "tiny", "--host", ADDRESS)
        size = ("--max-model-len", "1024", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager")
        self._spawn(str(self.program), *serve, "--port", str(self.port), *size, "--disable-uvicorn-access-log")
        self._spawn(*_SIMULATOR, "node", "--directory", str(self.driver), "--no-device-plugin", "--gpus", "1")
        until("the simulated driver is there", self._moves)
        with StateFile.open(self.driver) as file:
            file.gpus[0].request.power_limit_mw = LIMIT_MW
        began = time.monotonic()
        until(f"vLLM answers; its log is {self.directory}/vllm.log", self._answers, _START_SECONDS)
        print(f"vLLM is ready after {time.monotonic() - began:.0f} s")
        self._spawn(
            *(*_SIMULATOR, "follow", "--directory", str(self.driver), "--gpus", "0"),
            *("--url", f"http://{ADDRESS}:{self.port}/metrics", "--batch", "32", "--context", "1024"),
        )

    def _write_program(self, folder: Path) -> None:
        """Write "vllm" as users have it on their PATH; it needs variables of its own, as in the pod."""
        pod = yaml.safe_load((ROOT / "dev/vllm/deployment.yaml").read_text())["spec"]["template"]["spec"]
        values = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        lines = ["#!/bin/sh"]
        for name, value in values.items():
            if name not in ("PORT", "KV_ROLE"):
                lines.append(f"export {name}={shlex.quote(value.replace('/opt/vllm', str(folder)))}")
        self.program = self.directory / "bin" / "vllm"
        self.program.parent.mkdir()
        self.program.write_text("\n".join([*lines, f'exec {folder}/env/bin/vllm "$@"\n']))
        self.program.chmod(0o755)

    def _spawn(self, *command: str) -> None:
        with (self.directory / "vllm.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def _moves(self) -> bool:
        try:
            return bool((self.driver / "libnvidia-ml.so.1").exists() and self.gpu().sensors.updated_ns > 0)
        except StateError:  # not there, or being made
            return False

    def _answers(self) -> bool:
        assert self._processes[0].poll() is None, (self.directory / "vllm.log").read_text()[-2000:]
        with suppress(OSError, AssertionError):
            return self.page().generated_tokens == 0
        return False

    def gpu(self) -> Any:
        """Return a copy of the GPU's state."""
        with StateFile.open(self.driver) as file:
            return type(file.gpus[0]).from_buffer_copy(file.gpus[0])

    def page(self) -> VllmPage:
        """Return vLLM's own counters."""
        return read_page(ADDRESS, self.port)

    def recorded(self) -> AbstractContextManager[list[VllmPage]]:
        """Record vLLM's own counters often and sharply."""
        return recorded(ADDRESS, self.port, _PAGE_SECONDS, _SLOWEST_SECONDS)

    def writes(self) -> list[tuple[str, list[int]]]:
        """Return what was written to the driver so far."""
        path = self.driver / "writes.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(each["function"], each["args"]) for each in map(json.loads, lines)]

    def is_untouched(self) -> bool:
        """Return whether the GPU is as it was before any sweep, with no record of one."""
        request = self.gpu().request
        left = list(self.journal.iterdir()) if self.journal.exists() else []
        return (request.lock_range_mhz, request.power_limit_mw, left) == (0, LIMIT_MW, [])

    def bench_processes(self) -> list[str]:
        """Return the processes of vLLM's client on this vLLM."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "bench serve" in words and f":{self.port}" in words:
                    found.append(words)
        return found

    def sweep(self, out: Path, client: str, *more: str) -> "subprocess.Popen[str]":
        """Begin a sweep."""
        mine = has_sys_admin(Path("/proc/self/status").read_text())
        command = [
            *([] if mine else ["unshare", "--user", "--map-root-user"]),
            *(sys.executable, "-m", "wattlock_agent", "sweep", "--i-may-change-clocks", "--gpus", "all"),
            *("--url", f"http://{ADDRESS}:{self.port}", "--state-dir", str(self.journal), "--out", str(out)),
            *("--client", client, "--settle-seconds", "1", "--repeats", "1", *more),
        ]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.driver),
            "PATH": f"{self.program.parent}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )

    def stop(self) -> None:
        """End all processes."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30)


def watch(process: "subprocess.Popen[str]") -> Swept:
    """Read all that a sweep prints until it ends."""
    assert process.stdout is not None
    assert process.stderr is not None
    swept = Swept(-1, "")
    with process:
        for line in process.stdout:
            swept.lines.append((time.time(), line.rstrip("\n")))
        swept.errors = process.stderr.read()
        swept.status = process.wait(timeout=60)
    return swept


def grown(pages: list[VllmPage], name: str, begin_seconds: float, end_seconds: float) -> float:
    """Return how much a counter grew between two moments, on a line between the pages around each."""

    def at(moment: float) -> float:
        for first, last in pairwise(pages):
            if first.unix_seconds <= moment <= last.unix_seconds:
                share = (moment - first.unix_seconds) / (last.unix_seconds - first.unix_seconds)
                low, high = getattr(first, name), getattr(last, name)
                return float(low + share * (high - low))
        raise AssertionError("no pages around that moment")

    return at(end_seconds) - at(begin_seconds)


def rates(pages: list[VllmPage], name: str, ends: tuple[float, float], seconds: float) -> tuple[float, float]:
    """Return the lowest and the highest rate of a counter over windows of that length that end between two moments."""
    first, last = ends
    steps = max(1, round((last - first) / _PAGE_SECONDS))
    moments = [first + (last - first) * step / steps for step in range(steps + 1)]
    found = [grown(pages, name, moment - seconds, moment) / seconds for moment in moments]
    return min(found), max(found)
