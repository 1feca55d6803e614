"""``release-all``: releases every GPU before the chart goes (its pre-delete hook runs it).

The operator is scaled to zero first, so that nobody makes the agents' DaemonSets anew. Then they are deleted: a
stopping agent resets what it locked. Last the policies lose our finalizer, so that they can be deleted later.
"""

import time
from collections.abc import Callable
from typing import TextIO
from urllib.parse import quote

from wattlock_api.constants import AGENT_COMPONENT, COMPONENT_LABEL, FINALIZER, PLACEMENT_LABEL

from wattlock_operator import kube as api
from wattlock_operator.kube import Kube, KubeError
from wattlock_operator.parse import parse_node_energy, parse_pod
from wattlock_operator.placement import MANAGED_BY_LABEL, MANAGER
from wattlock_operator.release import locked_uuids
from wattlock_operator.settings import Settings

POLL_SECONDS = 1.0


class _Hook:
    def __init__(self, settings: Settings, kube: Kube, deadline: float, out: TextIO) -> None:
        self._settings, self._kube, self._deadline, self._out = settings, kube, deadline, out

    def say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()

    def wait(self, what: str, remaining: Callable[[], list[str]]) -> list[str]:
        """Wait until nothing remains or the time is over; return what remains."""
        said: list[str] | None = None
        while True:
            try:
                left = remaining()
            except KubeError as error:
                left = [str(error)]
            if not left:
                return []
            if left != said:
                self.say(f"waiting for {what}: {', '.join(left[:8])}{' and more' if len(left) > 8 else ''}")
                said = left
            if time.monotonic() >= self._deadline:
                return left
            time.sleep(POLL_SECONDS)

    def stop_operator(self) -> list[str]:
        namespace, name = self._settings.namespace, self._settings.deployment
        path = f"/apis/apps/v1/namespaces/{quote(namespace)}/deployments/{quote(name)}"
        deployment = self._kube.get(path)
        if deployment is None:
            self.say(f"there is no Deployment {namespace}/{name}: the operator is gone already")
            return []
        self._kube.merge(path + "/scale", {"spec": {"replicas": 0}})
        self.say(f"scaled the operator {namespace}/{name} to zero")

        # Its pods, and not its status: a Deployment does not count those that are still stopping. Of several operators
        # the one that stops last may have taken the lead for a moment, and made the DaemonSets anew.
        labels = deployment["spec"]["selector"]["matchLabels"]
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))

        def running() -> list[str]:
            pods = map(parse_pod, self._kube.list_all(f"/api/v1/namespaces/{quote(namespace)}/pods", selector))
            return [pod.name for pod in pods if not pod.finished]

        return self.wait("the operator to stop", running)

    def _agent_pods(self) -> list[str]:
        path = f"/api/v1/namespaces/{quote(self._settings.agent_namespace)}/pods"
        pods = map(parse_pod, self._kube.list_all(path, f"{COMPONENT_LABEL}={AGENT_COMPONENT},{PLACEMENT_LABEL}"))
        return [f"{pod.name} on {pod.node}" for pod in pods if pod.node and not pod.finished]

    def stop_agents(self) -> list[str]:
        namespace = self._settings.agent_namespace
        selector = f"{MANAGED_BY_LABEL}={MANAGER},{COMPONENT_LABEL}={AGENT_COMPONENT}"
        names = [body["metadata"]["name"] for body in self._kube.list_all(api.daemon_sets_path(namespace), selector)]
        for name in names:
            self._kube.delete(api.daemon_sets_path(namespace, name))
            self.say(f"deleted DaemonSet {namespace}/{name}: its agents release their GPUs as they stop")
        return self.wait("agents to stop", self._agent_pods)

    def _locked_nodes(self) -> list[str]:
        found = []
        for body in self._kube.list_all(api.NODE_ENERGIES):
            view = parse_node_energy(body)
            locked = locked_uuids(view.status)
            if locked:
                found.append(f"{view.name} ({len(locked)} GPU(s) locked)")
        return found

    def wait_for_gpus(self) -> list[str]:
        return self.wait("GPUs to be released", self._locked_nodes)

    def strip_finalizers(self) -> None:
        for body in self._kube.list_all(api.POLICIES):
            metadata = body["metadata"]
            finalizers = metadata.get("finalizers") or []
            if FINALIZER not in finalizers:
                continue
            patch = {
                "metadata": {
                    "resourceVersion": metadata["resourceVersion"],
                    "finalizers": [name for name in finalizers if name != FINALIZER],
                }
            }
            path = api.policy_path(metadata["namespace"], metadata["name"])
            try:
                self._kube.merge(path, patch)
            except KubeError as error:
                if error.status == 404:
                    continue
                if error.status != 409:
                    raise
                patch["metadata"]["resourceVersion"] = None  # changed meanwhile; the operator is gone, so it is ours
                self._kube.merge(path, {"metadata": {"finalizers": patch["metadata"]["finalizers"]}})
            self.say(f"policy {metadata['namespace']}/{metadata['name']} can now be deleted")


def run(settings: Settings, kube: Kube, timeout_seconds: float, out: TextIO) -> int:
    """Release every GPU. Returns 0 when all are released, else 1 with a sentence that names the nodes."""
    hook = _Hook(settings, kube, time.monotonic() + timeout_seconds, out)
    try:
        operator_left = hook.stop_operator()
        if operator_left:
            hook.say(
                f"the operator {settings.namespace}/{settings.deployment} does not stop; it would start the agents "
                "anew. Delete its Deployment and run this again"
            )
            return 1
        agents_left = hook.stop_agents()
        locked = hook.wait_for_gpus()
        if not locked:
            hook.strip_finalizers()
    except KubeError as error:
        hook.say(f"the API server refused: {error}. GPUs may still be locked; run this again")
        return 1
    if locked or agents_left:
        nodes = ", ".join(locked or agents_left)
        hook.say(
            f"a lock may remain on: {nodes}. Where a node can come back: bring it back, start the operator (kubectl -n "
            f"{settings.namespace} scale deployment {settings.deployment} --replicas=1), wait until kubectl get "
            "nodeenergy shows no lock there, and run this again. Where it cannot: reset its GPUs by hand (nvidia-smi "
            "--reset-gpu-clocks, or a reboot), say so with kubectl delete nodeenergy NODE, and run this again"
        )
        return 1
    hook.say("every GPU is released")
    return 0
