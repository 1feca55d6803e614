from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wattlock_simulator import driver
from wattlock_simulator.node import Node
from wattlock_simulator.physics import Product
from wattlock_simulator.state import StateFile

CAP_SYS_ADMIN = 1 << 21


def effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)


class SimulatedNode:
    """A node under a virtual clock: nothing moves unless the test steps it."""

    def __init__(self, directory: Path, library: Path, gpus: int = 2, product: Product = Product.H200) -> None:
        self.directory = directory
        self.now_ns = 1_000_000_000
        shutil.copy(library, directory / driver.LIBRARY_NAME)
        self.file = StateFile.create(directory, "node-a", product, gpus)
        self.start_process()

    def start_process(self) -> None:
        self.node = Node(self.file, seed=1, monotonic_ns=lambda: self.now_ns)
        self.step(0.1)

    def step(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            self.now_ns += 100_000_000
            self.node.step(0.1)

    @property
    def uuids(self) -> list[str]:
        return [g.identity.uuid.decode() for g in self.file.gpus]

    @property
    def writes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "writes.log").read_text().splitlines()]


class NvmlClient:
    """The unchanged pynvml in its own process; ``call`` returns the value or raises NvmlCodeError."""

    def __init__(self, directory: Path, *prefix: str, visible: str = "all") -> None:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(directory), "NVIDIA_VISIBLE_DEVICES": visible}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).with_name("sim_nvml_client.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid

    def call(self, function: str, *arguments: Any, gpu: str | None = None) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"call": function, "uuid": gpu, "args": arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise NvmlCodeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


class NvmlCodeError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver.build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def simulated(tmp_path: Path, library: Path) -> Iterator[SimulatedNode]:
    node = SimulatedNode(tmp_path, library)
    yield node
    node.file.close()


@pytest.fixture
def start_client(simulated: SimulatedNode) -> Iterator[Callable[..., NvmlClient]]:
    """Starts clients that may write; ``privileged=False`` takes CAP_SYS_ADMIN away."""
    clients: list[NvmlClient] = []
    has_it = bool(effective_capabilities() & CAP_SYS_ADMIN)

    def start(*, privileged: bool = True, init: bool = True, visible: str = "all") -> NvmlClient:
        prefix: tuple[str, ...] = ()
        if privileged and not has_it:
            prefix = ("unshare", "--user", "--map-root-user")
        elif not privileged and has_it:
            prefix = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
        client = NvmlClient(simulated.directory, *prefix, visible=visible)
        clients.append(client)
        if init:
            client.call("nvmlInit")
        return client

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(start_client: Callable[..., NvmlClient]) -> NvmlClient:
    return start_client()


@pytest.fixture
def nvml_code() -> type[NvmlCodeError]:
    return NvmlCodeError
