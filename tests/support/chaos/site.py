"""The cluster under test: Wattlock installed by its chart, and serving pods of every kind on simulated GPUs."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from chaos.nodes import DRIVER, JOURNAL, ROOT, Node, pids_of_container, signal_all
from chaos.truth import parse_pod
from wattlock_api.constants import LEASE_NAME
from wattlock_operator.kube import (
    NODES,
    POLICIES,
    Kube,
    KubeError,
    connect,
    daemon_sets_path,
    lease_path,
    node_energy_path,
    policy_path,
)
from wattlock_simulator import control
from wattlock_simulator.state import LOG_NAME
from workloads import AGENT_LABEL, OPERATOR_LABEL, SERVING_PORT, SYSTEM, serving

NAMESPACE = "chaos"
GPUS_PER_NODE = 4
#: The shortest that the agents take: what happens when the control plane is gone takes as long.
STALE_SECONDS = 60
CAPS_MHZ = (1590, 1575)
_SYSTEM_PODS = f"/api/v1/namespaces/{SYSTEM}/pods"
JOURNAL_BYTES = 64 * 1024

T = TypeVar("T")
Json = dict[str, Any]


class TooLongError(Exception):
    """What should have come about did not."""


def until(what: str, probe: Callable[[], T], timeout_seconds: float = 60, every_seconds: float = 0.3) -> T:
    """Return the first true value of ``probe``. Without an answer of the API server it is asked again."""
    deadline = time.monotonic() + timeout_seconds
    last: object = None
    while True:
        try:
            value = probe()
            if value:
                return value
            last = value
        except KubeError as error:
            last = error
        if time.monotonic() > deadline:
            raise TooLongError(f"waited {timeout_seconds:.0f} s in vain until {what}; last: {last}")
        time.sleep(every_seconds)


def _workload(name: str, kind: str, role: str, replicas: int, labels: dict[str, str]) -> Json:
    body = serving(role, replicas)
    body["kind"] = kind
    body["metadata"] = {"name": name, "namespace": NAMESPACE}
    body["spec"]["selector"]["matchLabels"] = labels
    body["spec"]["template"]["metadata"]["labels"] = labels
    if kind == "StatefulSet":
        body["spec"] |= {"serviceName": name, "podManagementPolicy": "Parallel"}
    body["spec"]["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] = labels
    return body


def labels(set_name: str, role: str) -> dict[str, str]:
    """Return the labels of the pods of a policy with that role."""
    return {"llm-d.ai/role": role, "llm-d.ai/model": set_name}


#: "steady" is capped in every epoch; "measured" takes part in an experiment, so that it saves energy that is counted.
WORKLOADS = (
    _workload("steady-decode", "StatefulSet", "decode", 2, labels("steady", "decode")),
    _workload("steady-prefill", "Deployment", "prefill", 1, labels("steady", "prefill")),
    _workload("measured-decode", "Deployment", "decode", 2, labels("measured", "decode")),
    _workload("measured-prefill", "Deployment", "prefill", 1, labels("measured", "prefill")),
    _workload("bystander", "Deployment", "decode", 1, {"app": "bystander"}),
)


def policy(name: str, cap_mhz: int = CAPS_MHZ[0]) -> Json:
    """Return the policy of the pods of that name, as it is when nothing is done to it."""
    verification: Json = {"method": "None"}
    if name == "measured":
        verification = {"method": "Switchback", "epochSeconds": 20, "controlShare": 0.5}
    decode, prefill = ({"matchLabels": labels(name, role)} for role in ("decode", "prefill"))
    return {
        "apiVersion": "wattlock.dev/v1alpha1",
        "kind": "EnergyPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "mode": "Enforce",
            "verification": verification,
            "pools": [
                {"name": "decode", "role": "Decode", "selector": decode, "clock": {"maxSMClockMHz": cap_mhz}},
                {"name": "prefill", "role": "Prefill", "selector": prefill},
            ],
        },
    }


POLICIES_NAMES = ("steady", "measured")


class Site:
    """All that faults are done to."""

    def __init__(self) -> None:
        self.kube: Kube = connect()
        names = sorted(body["metadata"]["name"] for body in self.kube.list_all(NODES))
        self.nodes = {name: Node(name, f"node{index}") for index, name in enumerate(names)}
        self.restarts: dict[str, int] = {}
        """Restarts that faults have caused, by pod UID."""
        self.ended: set[str] = set()
        """Containers that faults have ended."""
        self.foreign: set[str] = set()
        """GPUs that a fault has locked as somebody else would."""

    write_log = DRIVER / LOG_NAME

    # --- setting up --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Give each node a small disk for the journal, install Wattlock, start the workload."""
        for node in self.nodes.values():
            mounted = node.run("sh", "-c", f"mkdir -p {JOURNAL}; grep -c ' {JOURNAL} tmpfs' /proc/mounts || true")
            if mounted.strip() == "0":
                node.run("mount", "-t", "tmpfs", "-o", f"size={JOURNAL_BYTES}", "tmpfs", str(JOURNAL))
        self.install()
        self.deploy()
        self.apply_policies()
        for body in self.pods(SYSTEM):
            self.restarts[body["metadata"]["uid"]] = self.restart_count(body)

    def take_down(self) -> None:
        """Remove the workload and its policies; Wattlock stays."""
        for name in POLICIES_NAMES:
            self.delete_policy(name)
        until("the policies are gone", lambda: not self.policies(), 90)
        self.kube.delete(f"/api/v1/namespaces/{NAMESPACE}")
        until("the workload is gone", lambda: self.kube.get(f"/api/v1/namespaces/{NAMESPACE}") is None, 120)

    def kill_agents_for_good(self) -> None:
        """Kill the agents while their kubelets cannot start them anew, and delete their DaemonSet and the operator."""
        with ExitStack() as kubelets:
            for node in self.nodes.values():
                kubelets.enter_context(node.kubelet_down())
            for body in self.agents() + self.operators():
                for container_id in self.container_ids(body):
                    signal_all(pids_of_container(container_id), signal.SIGKILL)
                self.delete_pod(body, 0)
            self.kube.delete(workload_path("Deployment", "wattlock-operator", SYSTEM))
            # Or the next operator would wait for a minute.
            self.kube.delete(lease_path(SYSTEM, LEASE_NAME))
            for body in self.kube.list_all(daemon_sets_path(SYSTEM), AGENT_LABEL):
                self.kube.delete(daemon_sets_path(SYSTEM, body["metadata"]["name"]))
            # A controller may have made new pods meanwhile; without a kubelet they cannot start.
            for label in (AGENT_LABEL, OPERATOR_LABEL):
                until("none is left", partial(self._none_is_left, label))

    def _none_is_left(self, label: str) -> bool:
        left = list(self.kube.list_all(_SYSTEM_PODS, label))
        for body in left:
            self.delete_pod(body, 0)
        return not left

    def install(self, *more: str) -> None:
        """Install the chart with simulated GPUs, or bring it back to what it was."""
        self.helm(
            *("upgrade", "--install", "wattlock", str(ROOT / "charts/wattlock"), "--create-namespace"),
            *("--values", str(ROOT / "dev/demo/values.yaml"), "--wait", "--timeout", "3m"),
            *("--set", f"simulator.gpusPerNode={GPUS_PER_NODE}", "--set", f"agent.staleOrdersSeconds={STALE_SECONDS}"),
            *more,
        )
        until("both nodes offer GPUs", self._gpus_are_offered)

    def _gpus_are_offered(self) -> bool:
        offered = [body["status"].get("allocatable", {}) for body in self.kube.list_all(NODES)]
        return all(int(each.get("nvidia.com/gpu", 0)) >= GPUS_PER_NODE for each in offered)

    def deploy(self) -> None:
        """Start the workload, or bring it back to what it was; does not wait for it (``incomplete`` tells)."""
        self.put("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for body in WORKLOADS:
            self.put(workload_path(body["kind"]), body)

    def incomplete(self) -> dict[str, str]:
        """Return which workloads do not have all their pods ready, and no other, a sentence by name."""
        pods = [parse_pod(body) for body in self.kube.list_all(f"/api/v1/namespaces/{NAMESPACE}/pods")]
        found = {}
        for body in WORKLOADS:
            selector = body["spec"]["selector"]["matchLabels"]
            mine = [pod for pod in pods if selector.items() <= pod.labels.items() and (pod.running or pod.begins)]
            ready = [pod for pod in mine if pod.ready and not pod.going]
            if len(ready) != body["spec"]["replicas"] or len(mine) != len(ready):
                found[body["metadata"]["name"]] = f"has {len(ready)} ready pods of {len(mine)}"
        return found

    @staticmethod
    def template(name: str) -> Json:
        """Return the pod template of a workload."""
        template: Json = next(body for body in WORKLOADS if body["metadata"]["name"] == name)["spec"]["template"]
        return template

    def put(self, collection: str, body: Json) -> None:
        """Create an object, or apply it over the one of its name."""
        path = f"{collection}/{quote(body['metadata']['name'])}"
        query = {"fieldManager": "chaos", "force": "true"}
        self.kube.request("PATCH", path, query, body, "application/apply-patch+yaml")

    def helm(self, *arguments: str) -> str:
        """Run helm in Wattlock's namespace."""
        command = ["helm", *arguments, "--namespace", SYSTEM]
        result = subprocess.run(command, capture_output=True, text=True, timeout=250)
        if result.returncode != 0:
            raise TooLongError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout

    def repair(self) -> None:
        """Bring everything back after a failed step, so that the next one can be judged."""
        for node in self.nodes.values():
            with node.driver() as file:
                for gpu in file.gpus:
                    control.clear_faults(gpu.faults)
        for body in self.pods():
            if "ownerReferences" not in body["metadata"]:
                self.delete_pod(body, 0)
        self.install()
        self.deploy()
        self.apply_policies()

    # --- policies ----------------------------------------------------------------------------------------------------

    def apply_policies(self, cap_mhz: int = CAPS_MHZ[0]) -> None:
        """Create both policies, or bring them back to what they were."""
        for name in POLICIES_NAMES:
            self.apply_policy(name, cap_mhz)

    def apply_policy(self, name: str, cap_mhz: int = CAPS_MHZ[0]) -> None:
        """Create a policy, or bring it back. One that is being deleted is waited for first."""

        def free() -> bool:
            found = self.kube.get(policy_path(NAMESPACE, name))
            return found is None or "deletionTimestamp" not in found["metadata"]

        until(f"the old policy {name} is gone", free)
        collection = policy_path(NAMESPACE, name).rpartition("/")[0]

        def apply() -> bool:
            self.put(collection, policy(name, cap_mhz))
            return True

        until(f"the API server takes policy {name}", apply, 30)

    def patch_policy(self, name: str, spec: Json) -> None:
        """Change a policy's spec by a merge patch."""
        self.kube.merge(policy_path(NAMESPACE, name), {"spec": spec})

    def delete_policy(self, name: str) -> None:
        """Delete a policy; does not wait for it."""
        self.kube.delete(policy_path(NAMESPACE, name))

    def policies(self) -> list[Json]:
        """Return all policies."""
        return list(self.kube.list_all(POLICIES))

    def touch_policies(self) -> None:
        """Do what a person does about a refusal or a conflict: change the order, so that it is worth another try."""
        found = self.kube.get(policy_path(NAMESPACE, POLICIES_NAMES[0])) or policy(POLICIES_NAMES[0])
        cap_mhz = found["spec"]["pools"][0].get("clock", {}).get("maxSMClockMHz")
        self.apply_policies(CAPS_MHZ[0] if cap_mhz == CAPS_MHZ[1] else CAPS_MHZ[1])

    # --- pods --------------------------------------------------------------------------------------------------------

    def pods(self, namespace: str = NAMESPACE, selector: str = "") -> list[Json]:
        """Return pods that are not going, and have not ended: a kubelet that restarts refuses some, and they stay."""
        items = self.kube.list_all(f"/api/v1/namespaces/{namespace}/pods", selector)
        ended = ("Failed", "Succeeded")
        return [b for b in items if "deletionTimestamp" not in b["metadata"] and b["status"].get("phase") not in ended]

    def decode_pods(self, name: str = "") -> list[Json]:
        """Return the running decode pods of a policy, or of all."""
        return [
            body
            for body in self.pods(selector="llm-d.ai/role=decode" + (f",llm-d.ai/model={name}" if name else ""))
            if body["status"].get("phase") == "Running"
        ]

    def agents(self, node: str = "") -> list[Json]:
        """Return the running agents, of one node or of all."""
        return [
            body
            for body in self.pods(SYSTEM, AGENT_LABEL)
            if body["status"].get("phase") == "Running" and node in ("", body["spec"].get("nodeName"))
        ]

    def operators(self) -> list[Json]:
        """Return the operator's running pod."""
        return [body for body in self.pods(SYSTEM, OPERATOR_LABEL) if body["status"].get("phase") == "Running"]

    def delete_pod(self, body: Json, grace_seconds: int | None = None) -> None:
        """Delete a pod; one that is gone is fine."""
        metadata = body["metadata"]
        options: Json = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
            self.kube.request("DELETE", path, body=options)
        except KubeError as error:
            if error.status != 404:
                raise

    def evict(self, body: Json) -> None:
        """Evict a pod, as a drain does."""
        metadata = {key: body["metadata"][key] for key in ("name", "namespace")}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
        try:
            self.kube.request("POST", path, body=eviction)
        except KubeError as error:
            if error.status != 404:
                raise

    def simulate(self, body: Json, change: Json) -> None:
        """Change what a serving pod does."""
        name = body["metadata"]["name"]
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}:{SERVING_PORT}/proxy/simulate"
        try:
            self.kube.request("POST", path, body=change)
        except KubeError as error:
            if "not JSON" not in str(error) or error.status is None or error.status >= 300:
                raise

    def scale(self, kind: str, name: str, replicas: int, namespace: str = NAMESPACE) -> None:
        """Scale a workload."""
        path = workload_path(kind, name, namespace)
        self.kube.merge(path, {"spec": {"replicas": replicas}})

    @contextmanager
    def operator_down(self) -> Iterator[None]:
        """Scale the operator to zero, and back afterwards."""
        self.scale("Deployment", "wattlock-operator", 0, SYSTEM)
        until(
            "the operator is gone",
            lambda: not list(self.kube.list_all(f"/api/v1/namespaces/{SYSTEM}/pods", OPERATOR_LABEL)),
        )
        try:
            yield
        finally:
            self.start_operator()

    def start_operator(self) -> None:
        """Scale the operator to one; does not wait for it."""
        self.scale("Deployment", "wattlock-operator", 1, SYSTEM)

    def operator_is_ready(self) -> bool:
        """Return whether the operator's Deployment is ready."""
        found = self.kube.get(workload_path("Deployment", "wattlock-operator", SYSTEM))
        return bool((found or {}).get("status", {}).get("readyReplicas"))

    def container_ids(self, body: Json) -> list[str]:
        """Return the ids of a pod's running containers."""
        found = [each.get("containerID", "") for each in body["status"].get("containerStatuses", [])]
        return [each.rpartition("/")[2] for each in found if each]

    def will_restart(self, body: Json) -> None:
        """Note that a fault ends the containers of a pod."""
        uid = body["metadata"]["uid"]
        self.restarts[uid] = self.restarts.get(uid, 0) + 1
        self.ended |= set(self.container_ids(body))

    def unwell(self) -> dict[str, str]:
        """Return what of Wattlock does not work as it should, a sentence by name; empty when all does."""
        found = {}
        for body in self.pods(SYSTEM) + self.pods():
            if body["status"].get("phase") == "Running" and self.ended & set(self.container_ids(body)):
                found[body["metadata"]["name"]] = "has not been started anew"
        if not self.operator_is_ready():
            found["operator"] = "is not ready"
        found |= self._unsettled()
        for name, node in self.nodes.items():
            agents = [body for body in self.agents(name) if parse_pod(body).ready]
            if len(agents) != 1:
                found[f"agent of {name}"] = f"{len(agents)} are ready"
            locked = {gpu.uuid for gpu in node.gpus() if gpu.lock_mhz} - self.foreign
            recorded = {path.stem for path in journal(node).glob("*.json")}
            if locked != recorded:
                found[f"journal of {name}"] = f"records {sorted(recorded)}, locked are {sorted(locked)}"
        return found

    def allow_restart(self, body: Json) -> None:
        """Note that a pod may start its containers anew once more; it need not."""
        uid = body["metadata"]["uid"]
        self.restarts[uid] = self.restarts.get(uid, 0) + 1

    def _unsettled(self) -> dict[str, str]:
        """Return where operator or agents have not caught up."""
        found = {}
        daemon_sets = list(self.kube.list_all(daemon_sets_path(SYSTEM), AGENT_LABEL))
        for body in daemon_sets:
            status = body["status"]
            seen = status.get("observedGeneration") == body["metadata"]["generation"]
            if not seen or status.get("updatedNumberScheduled") != len(self.nodes):
                found[body["metadata"]["name"]] = "is being rolled out"
        if len(daemon_sets) != 1:
            found["DaemonSets of agents"] = f"there are {len(daemon_sets)}"
        for name in self.nodes:
            orders = self.kube.get(node_energy_path(name))
            if orders is None or orders.get("status", {}).get("observedGeneration") != orders["metadata"]["generation"]:
                found[f"orders of {name}"] = "are not confirmed by its agent"
        return found

    @staticmethod
    def restart_count(body: Json) -> int:
        """Return how often the containers of a pod were started anew."""
        return sum(int(each["restartCount"]) for each in body["status"].get("containerStatuses", []))

    def unexpected_restarts(self) -> list[str]:
        """Return which pods of Wattlock restarted more often than they were made to, a sentence each."""
        found = []
        for body in self.kube.list_all(f"/api/v1/namespaces/{SYSTEM}/pods"):
            count = self.restart_count(body)
            allowed = self.restarts.get(body["metadata"]["uid"], 0)
            if count > allowed:
                found.append(f"{body['metadata']['name']} restarted {count} times, {allowed} of them on purpose")
        return found


def workload_path(kind: str, name: str = "", namespace: str = NAMESPACE) -> str:
    """Return the path of a Deployment, StatefulSet or DaemonSet, or of all."""
    return f"/apis/apps/v1/namespaces/{namespace}/{kind.lower()}s" + (f"/{quote(name)}" if name else "")


def journal(node: Node) -> Path:
    """Return the folder of the node's journal."""
    return node.path(JOURNAL)
