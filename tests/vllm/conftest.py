"""Fixtures of the tier with a real vLLM."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from installed import install, no_crash_loop, simulator, wattlock, workload_namespace
from kubectl_tool import Kubectl
from vllm_pods import deployment
from workloads import Simulator, Workload, eventually

__all__ = ["install", "no_crash_loop", "simulator", "wattlock"]

ROOT = Path(__file__).parents[2]
START_SECONDS = 600


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode instance of a real vLLM, one pod each."""

    workload: Workload
    simulator: Simulator

    def pod(self, role: str) -> dict[str, Any]:
        """Return the pod of a role."""
        (pod,) = self.workload.pods(role)
        return pod

    def name(self, role: str) -> str:
        """Return the name of the pod of a role; it is the name of the instance too."""
        return str(self.pod(role)["metadata"]["name"])

    def address(self, role: str) -> str:
        """Return the address of the pod of a role."""
        return str(self.pod(role)["status"]["podIP"])

    def restarts(self, role: str) -> int:
        """Return how often the container of a role's pod was started again."""
        return int(self.pod(role)["status"]["containerStatuses"][0]["restartCount"])

    def wait_ready(self) -> None:
        """Wait until both answer."""
        for role in ("prefill", "decode"):
            self.workload.kubectl.run(
                *("rollout", "status", f"deployment/{role}", f"--timeout={START_SECONDS}s"),
                timeout_seconds=START_SECONDS + 10,
            )

    def kill(self, role: str) -> None:
        """Kill the container of a role's pod at once, as the kernel does when memory runs out."""
        pod = self.pod(role)
        container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        node = pod["spec"]["nodeName"]
        state = Path(os.environ["KUBECONFIG"]).parent
        command = [ROOT / "dev/cluster", "node-exec", "--name", os.environ["WATTLOCK_CLUSTER"], node, "--"]
        command += ["ctr", "--address", state / node / "containerd.sock", "--namespace", "k8s.io"]
        subprocess.run([*command, "tasks", "kill", "--signal", "SIGKILL", container], check=True, timeout=60)


@pytest.fixture(scope="module")
def pair(kubectl: Kubectl, simulator: Simulator) -> Iterator[Pair]:
    """Both instances, started once for all tests of a module."""
    with workload_namespace(kubectl, simulator) as workload:
        pair = Pair(workload, simulator)
        workload.kubectl.apply(deployment("prefill"), deployment("decode"))
        started = time.monotonic()
        pair.wait_ready()
        print(f"both instances are ready after {time.monotonic() - started:.0f} s")
        eventually("both have addresses", lambda: pair.address("prefill") and pair.address("decode"))
        yield pair
