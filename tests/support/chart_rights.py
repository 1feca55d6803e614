"""The chart's rights and admission policies on a real API server, and whoever acts under them."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes
import yaml
from wattlock_operator.kube import Kube, KubeError

CHART = Path(__file__).parents[2] / "charts" / "wattlock"
APPLIED = (
    *("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"),
    *("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
)
STATUS = '{"status":{"observedGeneration":1,"locked":3}}'
ORDER = {
    "policy": {"namespace": "llm", "name": "p", "uid": "1"},
    "pool": "decode",
    "role": "Decode",
    "pod": {"namespace": "llm", "name": "d", "uid": "2"},
    "podUid": "2",
    "instance": "d",
    "mode": "Enforce",
    "capMHz": 1590,
}


def rendered(release: str, namespace: str, *sets: str) -> list[dict[str, Any]]:
    """Return the rights and policies that the chart installs; each of ``sets`` is a KEY=VALUE."""
    helm = os.environ.get("WATTLOCK_HELM") or shutil.which("helm")
    assert helm, "no helm: run through 'dev/cluster run -- ...', or set WATTLOCK_HELM"
    command = [helm, "template", release, str(CHART), "--namespace", namespace, "--no-hooks"]
    command += [word for pair in sets for word in ("--set", pair)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout
    return [o for o in yaml.safe_load_all(text) if o and o["kind"] in APPLIED]


@dataclass(frozen=True)
class Site:
    """An installation of the chart's rights, and two nodes with a NodeEnergy each."""

    kubectl: Any
    release: str
    namespace: str
    agents: str
    """Namespace of the agents."""
    folder: Path

    @property
    def node_a(self) -> str:
        return f"{self.release}-a"

    @property
    def node_b(self) -> str:
        return f"{self.release}-b"

    def with_token(self, account: str, *bound: str) -> Any:
        """Return kubectl with a token of a ServiceAccount; ``bound`` are flags of kubectl create token."""
        home = self.namespace if account.endswith("-operator") else self.agents
        created = self.kubectl.run("--namespace", home, "create", "token", account, *bound)
        config = yaml.safe_load(Path(self.kubectl.kubeconfig).read_text())
        for user in config["users"]:
            user["user"] = {"token": created.stdout.strip()}
        path = self.folder / f"{account}-{abs(hash(bound))}"
        path.write_text(yaml.safe_dump(config))
        return type(self.kubectl)(str(path))

    def agent(self, node: str, binding: str) -> Any:
        """Return kubectl as the agent of a node, its token bound to its pod (as the kubelet does) or to the node."""
        account = f"{self.release}-wattlock-agent"
        if binding == "node":
            uid = self.kubectl.get("node", node)["metadata"]["uid"]
            bound = ("Node", node, uid)
        else:
            pod = self.kubectl.within(self.agents).get("pod", f"agent-{node}")["metadata"]
            bound = ("Pod", pod["name"], pod["uid"])
        flags = ("--bound-object-kind", "--bound-object-name", "--bound-object-uid")
        return self.with_token(account, *(f"{flag}={value}" for flag, value in zip(flags, bound, strict=True)))


@dataclass(frozen=True)
class Caller:
    """Somebody with a kubeconfig, who sends plain requests."""

    kube: Kube

    @classmethod
    def of(cls, kubectl: Any, headers: dict[str, str] | None = None) -> "Caller":
        """Return the caller that kubectl would be."""
        loader: Any = kubernetes.config
        client = loader.new_client_from_config(config_file=kubectl.kubeconfig)
        for name, value in (headers or {}).items():
            client.set_default_header(name, value)
        return cls(Kube(client))

    def ask(self, method: str, path: str, body: Any = None, kind: str = "") -> tuple[int, str]:
        """Send a request; return the HTTP status and what the server said when it refused."""
        kind = kind or ("application/merge-patch+json" if method == "PATCH" else "application/json")
        try:
            self.kube.request(method, path, body=body, content_type=kind)
        except KubeError as error:
            if error.status is None:
                raise
            return error.status, str(error)
        return 200, ""


def pod_on(node: str, account: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"agent-{node}"},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "automountServiceAccountToken": False,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "agent", "image": "localhost/none"}],
        },
    }


def intruder(release: str, namespace: str) -> list[dict[str, Any]]:
    """Return an account that RBAC lets do anything with NodeEnergies, as a careless role would."""
    labels = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    name = f"{release}-intruder"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "intruder", "namespace": namespace}},
        {
            **labels,
            "kind": "ClusterRole",
            "metadata": {"name": name},
            "rules": [
                {
                    "apiGroups": ["wattlock.dev"],
                    "resources": ["nodeenergies", "nodeenergies/status"],
                    "verbs": ["get", "list", "create", "update", "patch", "delete"],
                }
            ],
        },
        {
            **labels,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [
                {"kind": "ServiceAccount", "name": name, "namespace": namespace}
                for name in ("intruder", f"{release}-wattlock-agent")
            ],
        },
    ]


def node_energy(name: str, release: str) -> dict[str, Any]:
    return {
        "apiVersion": "wattlock.dev/v1alpha1",
        "kind": "NodeEnergy",
        "metadata": {"name": name, "labels": {"admission-test": release}},
        "spec": {"orders": []},
    }


def eventually(what: str, probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not probe():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.2)


@contextmanager
def rights_of_the_chart(
    kubectl: Any, folder: Path, *sets: str, agents_apart: bool = False, careless: bool = True
) -> Iterator[Site]:
    """Apply what the chart gives to operator and agents, and two nodes with an agent's pod and a NodeEnergy each.

    ``careless`` adds a role that lets the agents and an account "intruder" do anything with NodeEnergies, so that
    admission alone is in their way.

    WATTLOCK_TEST_CHART_SET adds a value of the chart, to see which tests need a part of it:
    ``WATTLOCK_TEST_CHART_SET=admission.enabled=false dev/cluster run -- pytest tests/cluster``.
    """
    release = f"adm-{os.urandom(4).hex()}"
    agents = f"{release}-agents" if agents_apart else release
    site = Site(kubectl, release, release, agents, folder)
    more = [each for each in (os.environ.get("WATTLOCK_TEST_CHART_SET", ""),) if each]
    objects = rendered(release, release, f"agent.namespace={agents if agents_apart else ''}", *sets, *more)
    for o in objects:
        if o["kind"] == "ValidatingAdmissionPolicyBinding":
            # this test's policies shall not judge what other tests do in the same cluster
            o["spec"]["matchResources"] = {"objectSelector": {"matchLabels": {"admission-test": release}}}
    nodes = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": n}} for n in (site.node_a, site.node_b)]
    energies = [node_energy(n, release) for n in (site.node_a, site.node_b)]
    extra = intruder(release, agents)
    if not careless:
        extra[-1]["subjects"] = extra[-1]["subjects"][:1]
    cluster_wide = [o for o in objects if "namespace" not in o["metadata"]]
    namespaces = sorted({release, agents})
    try:
        for name in namespaces:
            kubectl.run("create", "namespace", name)
        kubectl.apply(*objects, *extra, *nodes, *energies)
        pods = [pod_on(n, f"{release}-wattlock-agent") for n in (site.node_a, site.node_b)]
        kubectl.within(agents).apply(*pods)
        if any(o["kind"] == "ValidatingAdmissionPolicy" for o in objects):
            probe = site.with_token("intruder")
            eventually("the policies are in force", lambda: label(probe, site.node_a).returncode != 0)
            eventually("the policies are in force", lambda: report(probe, site.node_a).returncode != 0)
        yield site
    finally:
        doomed = [*cluster_wide, *extra[1:], *energies, *nodes]
        kubectl.run("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=yaml.safe_dump_all(doomed))
        for name in namespaces:
            # no kubelet of these nodes will ever confirm that the pods are gone
            kubectl.within(name).run("delete", "pods", "--all", "--grace-period=0", "--force", "--wait=false")
            kubectl.run("delete", "namespace", name, "--ignore-not-found", "--wait=false")


def report(kubectl: Any, node: str, patch: str = STATUS) -> subprocess.CompletedProcess[str]:
    return kubectl.run("patch", "nodeenergy", node, "--subresource=status", "--type=merge", "-p", patch, check=False)


def order(kubectl: Any, node: str) -> subprocess.CompletedProcess[str]:
    patch = json.dumps({"spec": {"orders": [ORDER]}})
    return kubectl.run("patch", "nodeenergy", node, "--type=merge", "-p", patch, check=False)


def label(kubectl: Any, node: str) -> subprocess.CompletedProcess[str]:
    return kubectl.run("label", "nodeenergy", node, f"t={time.monotonic_ns()}", "--overwrite", check=False)
