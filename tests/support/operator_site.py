"""The real operator as a process beside a real API server; only the agents are played by the test."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from wattlock_api.base import timestamp
from wattlock_api.constants import LEASE_NAME
from wattlock_operator.kube import Kube, KubeError, lease_path, node_energy_path, policy_path

KWH = 3.6e6
NODE_LABEL = {"nvidia.com/gpu.present": "true"}

TEMPLATE = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "template", "labels": {"app.kubernetes.io/name": "wattlock"}},
    "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "agent", "image": "wattlock:test", "env": []}]},
        },
    },
}


def measured(capped_kwh: float) -> dict[str, Any]:
    """What an agent tells of an instance that needs 0.8 of the energy under the cap: a quarter of it is saved."""
    mean, pairs = math.log(0.8), 60
    energy = {"total": f"{pairs * mean:.9f}", "squares": f"{pairs * (mean**2 + 1e-6):.9f}"}
    return {
        "energyJoules": f"{capped_kwh * KWH:.1f}",
        "arms": [{"capMHz": 1590, "joules": f"{capped_kwh * KWH:.1f}"}],
        "pairStats": [{"capMHz": 1590, "pairs": pairs, "energy": energy}],
        "tokensPerSecond": "1000",
    }


def eventually(what: Callable[[], Any], timeout_seconds: float = 20, message: str = "") -> Any:
    """Return the first true answer; the last failed assertion or answer is shown when the time is over."""
    deadline, last = time.monotonic() + timeout_seconds, None
    while True:
        try:
            last = what()
            if last:
                return last
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{message or 'not so in time'}: {last}")
        threading.Event().wait(0.1)


class Proxy:
    """A way to the API server that can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target, self._open, self._pairs = (host, port), True, set[socket.socket]()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                client.close()
                continue
            server = socket.create_connection(self._target, timeout=5)
            server.settimeout(None)
            with self._lock:
                self._pairs |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            with self._lock:
                self._pairs.discard(end)

    def cut(self) -> None:
        """Break all connections and refuse new ones."""
        self._open = False
        with self._lock:
            ends = list(self._pairs)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._open = True

    def close(self) -> None:
        """End for good."""
        self._listener.close()
        self.cut()


def _ask(log_path: Path, path: str) -> str:
    """Return a page of the operator that writes this log."""
    found = [line for line in log_path.read_text().splitlines() if "probes on port" in line]
    assert found, "the operator does not serve yet"
    port = int(found[-1].rsplit(" ", 1)[1])
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as refusal:
        return str(refusal.read().decode())


@dataclass
class Replica:
    """One operator of several."""

    identity: str
    log_path: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def http(self, path: str) -> str:
        return _ask(self.log_path, path)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@dataclass
class Site:
    """A namespace with pods, a node of our own, an operator, and an agent that does what it is told."""

    kubectl: Any
    namespace: str
    tmp_path: Path
    kube: Kube
    operator: subprocess.Popen[bytes] | None = None
    nodes: list[str] = field(default_factory=list)
    agents: list["FakeAgent"] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "wattlock_operator")
    """What Python is to run as the operator."""

    @property
    def log(self) -> Path:
        return self.tmp_path / "operator.log"

    def start(self) -> None:
        self.operator = self._spawn(f"operator-{uuid.uuid4().hex[:5]}", self.log)

    def _spawn(self, identity: str, log_path: Path) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "KUBECONFIG": self.kubectl.kubeconfig,
            "WATTLOCK_NAMESPACE": self.namespace,
            "WATTLOCK_AGENT_TEMPLATE": str(self.tmp_path / "template.yaml"),
            "WATTLOCK_HTTP_PORT": "0",
            "POD_NAME": identity,
            **self.settings,
        }
        with log_path.open("ab") as log:
            return subprocess.Popen([sys.executable, *self.program], env=environment, stdout=log, stderr=log)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the operator's program, as people do by kubectl exec."""
        environment = {**os.environ, "KUBECONFIG": self.kubectl.kubeconfig, **self.settings}
        command = [sys.executable, "-m", "wattlock_operator", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def replica(self, identity: str) -> "Replica":
        """Start one more operator, with the settings as they are now."""
        log_path = self.tmp_path / f"{identity}.log"
        replica = Replica(identity, log_path, self._spawn(identity, log_path))
        self.replicas.append(replica)
        return replica

    def leader(self) -> str:
        """Who holds the lease; empty: nobody."""
        lease = self.kube.get(lease_path(self.namespace, LEASE_NAME)) or {"spec": {}}
        return str(lease["spec"].get("holderIdentity") or "")

    def stop(self, how: int = signal.SIGTERM) -> int | None:
        if self.operator is None:
            return None
        self.operator.send_signal(how)
        code = self.operator.wait(timeout=25)
        self.operator = None
        return code

    def http(self, path: str) -> str:
        return _ask(self.log, path)

    def node(self, ready: bool = True) -> str:
        name = f"node-{uuid.uuid4().hex[:8]}"
        self.kubectl.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": NODE_LABEL}})
        status = {"conditions": [{"type": "Ready", "status": str(ready), "reason": "Test", "message": "test"}]}
        self.patch_status("node", name, status)
        self.nodes.append(name)
        return name

    def patch_status(self, kind: str, name: str, status: dict[str, Any], namespace: str = "") -> None:
        self.kubectl.within(namespace).run(
            "patch", kind, name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status})
        )

    def pod(self, name: str, node: str, labels: dict[str, str], ready: bool = True, namespace: str = "") -> str:
        namespace = namespace or self.namespace
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": node,
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 0,
                "containers": [
                    {
                        "name": "vllm",
                        "image": "vllm",
                        "ports": [{"containerPort": 8200}],
                        "resources": {"limits": {"nvidia.com/gpu": "1"}},
                    }
                ],
            },
        }
        kubectl = self.kubectl.within(namespace)
        kubectl.run("create", "-f", "-", stdin=yaml.safe_dump(manifest))
        condition = {"type": "Ready", "status": str(ready)}
        status = {"phase": "Running", "podIP": "10.1.2.3", "podIPs": [{"ip": "10.1.2.3"}], "conditions": [condition]}
        self.patch_status("pod", name, status, namespace)
        return str(kubectl.get("pod", name)["metadata"]["uid"])

    def agent(self, node: str) -> "FakeAgent":
        agent = FakeAgent(self, node)
        self.agents.append(agent)
        return agent

    def orders(self, node: str) -> list[dict[str, Any]]:
        found = self.kube.get(node_energy_path(node)) or {"spec": {}}
        return list(found["spec"].get("orders", []))

    def node_energy(self, node: str) -> dict[str, Any]:
        found = self.kube.get(node_energy_path(node))
        assert found is not None, f"there is no NodeEnergy {node}"
        return found

    def has_service_account(self, namespace: str) -> bool:
        return self.kube.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default") is not None

    def policy(self, name: str = "qwen", namespace: str = "") -> dict[str, Any]:
        found = self.kube.get(policy_path(namespace or self.namespace, name))
        assert found is not None, f"policy {name} is gone"
        return found

    def condition(self, kind: str, name: str = "qwen", namespace: str = "") -> tuple[str, str, str]:
        status = self.policy(name, namespace).get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == kind:
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""


class FakeAgent:
    """Does on a node's NodeEnergy what an agent does, as far as the operator can see it."""

    def __init__(self, site: Site, node: str) -> None:
        self.site, self.node = site, node
        self.obeys = True
        self.extra: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        """What it tells of itself."""
        self.measures: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]] = lambda order: ({}, {})
        """From an order to what is reported beside the rest of its GPU and of its instance."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beats_at = 0.0
        while not self._stop.wait(0.15):
            if time.monotonic() >= beats_at:
                self._beat()
                beats_at = time.monotonic() + 10
            if self.obeys:
                self.report()

    def _beat(self) -> None:
        """Renew the node's lease as its kubelet would: without it Kubernetes takes node and pods for dead in 50 s."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self.node}"
        now = timestamp(time.time()).replace("Z", ".000000Z")
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self.node}}
        with contextlib.suppress(KubeError):
            self.site.kube.apply(path, lease | {"spec": {"holderIdentity": self.node, "renewTime": now}})

    def report(self) -> None:
        path = node_energy_path(self.node)
        body = self.site.kube.get(path)
        if body is None:
            return
        gpus, instances = [], []
        for index, order in enumerate(body["spec"].get("orders", [])):
            locked = "capMHz" in order
            gpu = {
                "uuid": f"GPU-{index}",
                "index": index,
                "product": "NVIDIA H200",
                "state": "Locked" if locked else "Observing",
                "reason": "Locked" if locked else (order.get("hold") or {"reason": "PrefillPool"})["reason"],
                "holder": order["pod"],
                "policyUid": order["policy"]["uid"],
                "pool": order["pool"],
                "instance": order["instance"],
                "powerWatts": 300,
            }
            of_gpu, of_instance = self.measures(order)
            gpus.append(gpu | ({"requestedMHz": order["capMHz"]} if locked else {}) | of_gpu)
            key = f"{order['policy']['uid']}/{order['instance']}"
            base = {"key": key, "policyUid": order["policy"]["uid"], "pool": order["pool"]}
            instances.append(base | {"instance": order["instance"]} | self.extra | of_instance)
        self._write(body, gpus, instances, "Running")

    def stops(self) -> None:
        """Report as a stopping agent does: all released."""
        body = self.site.node_energy(self.node)
        gpus = [gpu | {"state": "Released", "reason": "AgentStopping"} for gpu in body["status"]["gpus"]]
        self._write(body, gpus, body["status"].get("instances", []), "Stopping")

    def _write(self, body: dict[str, Any], gpus: list[Any], instances: list[Any], phase: str) -> None:
        path = node_energy_path(self.node)
        status = {
            "observedGeneration": body["metadata"]["generation"],
            "reportedAt": timestamp(time.time()),
            "phase": phase,
            "agent": self.about,
            "gpus": gpus,
            "instances": instances,
            "locked": sum(gpu["state"] == "Locked" for gpu in gpus),
        }
        before = body.get("status", {})
        same = all(before.get(key) == value for key, value in status.items() if key != "reportedAt")
        if not same:
            with contextlib.suppress(KubeError):  # deleted meanwhile
                self.site.kube.merge(path + "/status", {"status": status})

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)


#: What a tuner that has found its clock writes into status.
SETTLED = {
    "phase": "Settled",
    "capMHz": 705,
    "since": "2026-11-24T10:00:00Z",
    "tried": [
        {
            "capMHz": 705,
            "outcome": "Admitted",
            "energyPercent": "26.31",
            "throughputChangePercent": "-1.21",
            "sums": {"capMHz": 705, "pairs": 212},
            "seen": {"capMHz": 705, "pairs": 212},
        }
    ],
    "regime": {
        "batch": "28.00",
        "interTokenLatencyMs": "8.000",
        "products": ["NVIDIA H200"],
        "driverVersions": ["580.159.04"],
    },
}


DECODE, PREFILL = {"llm-d.ai/role": "decode"}, {"llm-d.ai/role": "prefill"}


def placed(policy: dict[str, Any], site: Site, **spec: Any) -> dict[str, Any]:
    """Return the policy in the site's namespace, with changes to its spec."""
    metadata = {**policy["metadata"], "namespace": site.namespace}
    return {**policy, "metadata": metadata, "spec": {**policy["spec"], **spec}}
