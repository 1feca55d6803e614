"""Fixtures: Wattlock installed by its chart on the local cluster, and a namespace for a workload."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kubectl_tool import Kubectl
from workloads import SYSTEM, Simulator, Workload, eventually, serving

ROOT = Path(__file__).parents[2]
GPUS_PER_NODE = int(os.environ.get("WATTLOCK_SIMULATED_GPUS", "4"))


@pytest.fixture(scope="session")
def install(kubectl: Kubectl) -> Callable[..., None]:
    """Return a function that installs the chart with simulated GPUs, or brings it back; it takes words for helm."""

    def helm_install(*more: str) -> None:
        command = [
            *("helm", "upgrade", "--install", "wattlock", str(ROOT / "charts/wattlock"), "--namespace", SYSTEM),
            *("--create-namespace", "--values", str(ROOT / "dev/demo/values.yaml"), "--wait", "--timeout", "3m"),
            *("--set", f"simulator.gpusPerNode={GPUS_PER_NODE}", *more),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stdout + result.stderr
        eventually(
            "both nodes offer GPUs",
            lambda: all(
                int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) >= GPUS_PER_NODE
                for node in kubectl.get("nodes")["items"]
            ),
            60,
        )

    return helm_install


@pytest.fixture(scope="session")
def wattlock(install: Callable[..., None]) -> None:
    """Wattlock, installed by its chart."""
    install()


@pytest.fixture(autouse=True)
def no_crash_loop(kubectl: Kubectl, wattlock: None) -> Iterator[None]:
    """No container of Wattlock may have restarted in any test."""
    yield
    for pod in kubectl.within(SYSTEM).get("pods")["items"]:
        for container in pod["status"].get("containerStatuses", []):
            if container["restartCount"]:
                log = kubectl.within(SYSTEM).run("logs", pod["metadata"]["name"], "--previous", check=False)
                pytest.fail(f"{pod['metadata']['name']} restarted {container['restartCount']} times:\n{log.stdout}")


@pytest.fixture(scope="session")
def simulator(kubectl: Kubectl, wattlock: None) -> Simulator:
    """The simulated driver of all nodes."""
    return Simulator(kubectl)


@contextmanager
def workload_namespace(kubectl: Kubectl, simulator: Simulator) -> Iterator[Workload]:
    """An empty namespace for a workload; afterwards its policies and pods are gone and no GPU is locked."""
    name = f"llm-{int(time.time() * 1000) % 10**9}"
    kubectl.run("create", "namespace", name)
    workload = Workload(kubectl, name, simulator)
    yield workload
    workload.delete_policies()
    kubectl.run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def workload(kubectl: Kubectl, simulator: Simulator) -> Iterator[Workload]:
    """An empty namespace for a workload; afterwards its policies and pods are gone and no GPU is locked."""
    with workload_namespace(kubectl, simulator) as workload:
        yield workload


@pytest.fixture(scope="module")
def shared_workload(kubectl: Kubectl, simulator: Simulator) -> Iterator[Workload]:
    """Two decode pods and a prefill pod, one GPU each, for all tests of a module."""
    with workload_namespace(kubectl, simulator) as workload:
        workload.deploy(serving("decode", 2), serving("prefill", 1))
        yield workload


@pytest.fixture
def serving_pods(shared_workload: Workload) -> Iterator[Workload]:
    """The shared pods as they were deployed, without a policy before and after."""
    shared_workload.deploy(serving("decode", 2), serving("prefill", 1))
    yield shared_workload
    shared_workload.delete_policies()
    for pod in shared_workload.pods("decode"):
        shared_workload.simulate(pod, metricsFault="none", extraLatencyMs=0, computesPrompts=False)
