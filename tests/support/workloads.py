"""Workloads on simulated GPUs, and the simulated driver asked directly."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from kubectl_tool import Kubectl

SYSTEM = "wattlock-system"
SIMULATOR_LABEL = "app.kubernetes.io/component=simulator"
AGENT_LABEL = "app.kubernetes.io/component=agent"
OPERATOR_LABEL = "app.kubernetes.io/component=operator"
SERVING_PORT = 8200

T = TypeVar("T")


def eventually(what: str, probe: Callable[[], T], timeout_seconds: float = 30, every_seconds: float = 0.5) -> T:
    """Return the first true value of ``probe``; fail with its last value after the time-out."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := probe()):
        assert time.monotonic() < deadline, f"waited {timeout_seconds:.0f} s in vain until {what}; last: {value!r}"
        time.sleep(every_seconds)
    return value


@contextmanager
def api_server_paused() -> Iterator[None]:
    """Stop the API server's process (of this test's cluster only) and let it go on afterwards."""
    cluster = os.environ["WATTLOCK_CLUSTER"]
    in_kind = os.environ.get("WATTLOCK_KIND_MODE") == "yes"
    inside = ["docker", "exec", f"wattlock-{cluster}-control-plane"] if in_kind else []
    pattern = "^kube-apiserver" if in_kind else f"kube-apiserver.*/{cluster}/"

    def signal_all(name: str) -> None:
        subprocess.run([*inside, "pkill", f"-{name}", "-f", pattern], check=True, timeout=10)

    signal_all("STOP")
    try:
        yield
    finally:
        signal_all("CONT")


@dataclass(frozen=True)
class Write:
    """A clock write that the simulated driver logged: what was really asked of it, by whom."""

    at_seconds: float
    function: str
    uuid: str
    arguments: tuple[int, ...]
    result: int

    @property
    def locks(self) -> bool:
        return self.function == "nvmlDeviceSetGpuLockedClocks" and self.result == 0

    @property
    def resets(self) -> bool:
        return self.function == "nvmlDeviceResetGpuLockedClocks" and self.result == 0


class Simulator:
    """The simulated driver of all nodes, asked directly and not through Wattlock."""

    def __init__(self, kubectl: Kubectl, namespace: str = SYSTEM) -> None:
        self._kubectl = kubectl.within(namespace)

    def _pods(self) -> list[str]:
        items = self._kubectl.get("pods", "-l", SIMULATOR_LABEL)["items"]
        return [pod["metadata"]["name"] for pod in items]

    def gpus(self) -> dict[str, dict[str, Any]]:
        """Return the state of every GPU by UUID."""
        gpus: dict[str, dict[str, Any]] = {}
        for pod in self._pods():
            shown = self._kubectl.run("exec", pod, "--", "wattlock-simulator", "control", "show", "--json").stdout
            gpus |= {gpu["uuid"]: gpu for gpu in json.loads(shown)["gpus"]}
        return gpus

    def locked(self) -> set[str]:
        """Return the UUIDs of locked GPUs."""
        return {uuid for uuid, gpu in self.gpus().items() if gpu["lock_mhz"]}

    def writes(self) -> list[Write]:
        """Return every clock write since the simulator was installed, oldest first."""
        writes = []
        for pod in self._pods():
            log = self._kubectl.run("exec", pod, "--", "sh", "-c", "cat /var/lib/wattlock-simulator/writes.log || true")
            for line in log.stdout.splitlines():
                entry = json.loads(line)
                writes.append(
                    Write(
                        entry["timeNs"] / 1e9,
                        entry["function"],
                        entry["uuid"],
                        tuple(entry["args"]),
                        entry["result"],
                    )
                )
        return sorted(writes, key=lambda write: write.at_seconds)

    def control(self, node: str, *arguments: str) -> str:
        """Run ``wattlock-simulator control`` on a node: faults, driver reload, a foreign lock."""
        pods = self._kubectl.get("pods", "-l", SIMULATOR_LABEL)["items"]
        pod = next(pod["metadata"]["name"] for pod in pods if pod["spec"]["nodeName"] == node)
        output: str = self._kubectl.run("exec", pod, "--", "wattlock-simulator", "control", *arguments).stdout
        return output

    @staticmethod
    def truth(cap_mhz: int, batch: int = 32, context: int = 4096) -> dict[str, Any]:
        """Return what a cap really does to the simulated GQA decode."""
        command = [sys.executable, "-m", "wattlock_simulator", "truth", "--product", "H200", "--architecture", "GQA"]
        command += ["--batch", str(batch), "--context", str(context), "--cap", str(cap_mhz), "--json"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found: dict[str, Any] = json.loads(result.stdout)
        return found


def serving(role: str, replicas: int, batch: int = 32, context: int = 4096, gpus: int = 1) -> dict[str, Any]:
    """Return a Deployment of simulated serving pods, labelled as llm-d labels them."""
    labels = {"llm-d.ai/role": role, "llm-d.ai/model": "qwen"}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": "localhost/wattlock-simulator:dev",
        "imagePullPolicy": "IfNotPresent",
        "args": [
            *("serve", "--role", role, "--architecture", "GQA", "--batch", str(batch), "--context", str(context)),
            *("--port", str(SERVING_PORT)),
        ],
        "ports": [{"name": "metrics", "containerPort": SERVING_PORT}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": "metrics"}, "periodSeconds": 1},
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
    }
    if not gpus:
        # The simulated engine needs a GPU; any server will do to be a pod without one.
        container |= {"command": ["python", "-m", "http.server", str(SERVING_PORT)], "args": [], "resources": {}}
        container["readinessProbe"] = {"tcpSocket": {"port": "metrics"}, "periodSeconds": 1}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": role},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "topologySpreadConstraints": [
                        {
                            "maxSkew": 1,
                            "topologyKey": "kubernetes.io/hostname",
                            "whenUnsatisfiable": "ScheduleAnyway",
                            "labelSelector": {"matchLabels": labels},
                        }
                    ],
                    "containers": [container],
                },
            },
        },
    }


class Workload:
    """Decode and prefill pods in a namespace of their own, and the policies about them."""

    def __init__(self, kubectl: Kubectl, namespace: str, simulator: Simulator) -> None:
        self.kubectl = kubectl.within(namespace)
        self.namespace = namespace
        self.simulator = simulator

    def deploy(self, *deployments: dict[str, Any]) -> None:
        """Apply Deployments and wait until all of their pods are ready."""
        self.kubectl.apply(*deployments)
        for deployment in deployments:
            name = deployment["metadata"]["name"]
            self.kubectl.run("rollout", "status", f"deployment/{name}", "--timeout=90s", timeout_seconds=100)

    def pods(self, role: str) -> list[dict[str, Any]]:
        """Return the running pods of a role that are not being deleted."""
        items = self.kubectl.get("pods", "-l", f"llm-d.ai/role={role}")["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def gpus_of(self, pod: dict[str, Any]) -> set[str]:
        """Return the UUIDs that the device plugin gave to a pod, as the container sees them."""
        name = pod["metadata"]["name"]
        shown = self.kubectl.run("exec", name, "--", "printenv", "NVIDIA_VISIBLE_DEVICES").stdout
        return set(shown.strip().split(","))

    def gpus(self, role: str) -> set[str]:
        """Return the UUIDs that the pods of a role hold."""
        return set().union(*(self.gpus_of(pod) for pod in self.pods(role)))

    def simulate(self, pod: dict[str, Any], **change: Any) -> None:
        """Change what a serving pod does, through its own control endpoint."""
        code = (
            "import sys,urllib.request as u;"
            f"u.urlopen(u.Request('http://127.0.0.1:{SERVING_PORT}/simulate',sys.argv[1].encode()),timeout=5).read()"
        )
        self.kubectl.run("exec", pod["metadata"]["name"], "--", "python", "-c", code, json.dumps(change))

    def delete_policies(self) -> None:
        """Delete all policies of the namespace; no GPU may be locked then."""
        self.kubectl.run("delete", "epol", "--all", "--timeout=90s", timeout_seconds=100)
        locked = self.simulator.locked()
        assert not locked, f"{locked} are locked although there is no policy"

    def agents(self) -> list[dict[str, Any]]:
        """Return the pods of the agents, on all nodes."""
        found: list[dict[str, Any]] = self.kubectl.within(SYSTEM).get("pods", "-l", AGENT_LABEL)["items"]
        return found

    def policy(self, name: str = "qwen") -> dict[str, Any]:
        """Return a policy as the API server has it."""
        found: dict[str, Any] = self.kubectl.get("epol", name)
        return found

    def status(self, name: str = "qwen") -> dict[str, Any]:
        """Return the status of a policy."""
        found: dict[str, Any] = self.policy(name).get("status", {})
        return found

    def pool(self, pool: str, name: str = "qwen") -> dict[str, Any]:
        """Return the status of a pool, empty while there is none."""
        return next((entry for entry in self.status(name).get("pools", []) if entry["name"] == pool), {})

    def reasons(self, pool: str, name: str = "qwen") -> dict[str, str]:
        """Return the reasons of a pool with their sentences."""
        return {entry["reason"]: entry["message"] for entry in self.pool(pool, name).get("reasons", [])}

    def condition(self, kind: str, name: str = "qwen") -> dict[str, Any]:
        """Return a condition of a policy, empty while there is none."""
        return next((entry for entry in self.status(name).get("conditions", []) if entry["type"] == kind), {})

    def locked(self, role: str = "decode") -> bool:
        """Return whether the driver has a lock on every GPU of a role (and there is one)."""
        gpus = self.gpus(role)
        return bool(gpus) and gpus <= self.simulator.locked()
