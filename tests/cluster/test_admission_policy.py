"""Who may write a NodeEnergy, tried with real tokens against a real API server."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.cluster]

CHART = Path(__file__).parents[2] / "charts" / "wattlock"
APPLIED = (
    *("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"),
    *("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
)
ONLY_OPERATOR = "a NodeEnergy is written by Wattlock's operator alone"
ONLY_AGENT = "the status of a NodeEnergy is written by Wattlock's agent on that node alone"
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


def rendered(release: str, namespace: str) -> list[dict[str, Any]]:
    """Return the rights and policies that the chart installs."""
    helm = os.environ.get("WATTLOCK_HELM") or shutil.which("helm")
    assert helm, "no helm: run through 'dev/cluster run -- ...', or set WATTLOCK_HELM"
    command = [helm, "template", release, str(CHART), "--namespace", namespace, "--no-hooks"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout
    return [o for o in yaml.safe_load_all(text) if o and o["kind"] in APPLIED]


@dataclass(frozen=True)
class Site:
    """An installation of the chart's rights, and two nodes with a NodeEnergy each."""

    kubectl: Any
    release: str
    namespace: str
    folder: Path

    @property
    def node_a(self) -> str:
        return f"{self.release}-a"

    @property
    def node_b(self) -> str:
        return f"{self.release}-b"

    def with_token(self, account: str, *bound: str) -> Any:
        """Return kubectl with a token of a ServiceAccount; ``bound`` are flags of kubectl create token."""
        created = self.kubectl.run("--namespace", self.namespace, "create", "token", account, *bound)
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
            pod = self.kubectl.within(self.namespace).get("pod", f"agent-{node}")["metadata"]
            bound = ("Pod", pod["name"], pod["uid"])
        flags = ("--bound-object-kind", "--bound-object-name", "--bound-object-uid")
        return self.with_token(account, *(f"{flag}={value}" for flag, value in zip(flags, bound, strict=True)))


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


@pytest.fixture(scope="module")
def site(kubectl, crds, tmp_path_factory) -> Iterator[Site]:
    release = f"adm-{os.urandom(4).hex()}"
    namespace = release
    site = Site(kubectl, release, namespace, tmp_path_factory.mktemp("tokens"))
    objects = rendered(release, namespace)
    for o in objects:
        if o["kind"] == "ValidatingAdmissionPolicyBinding":
            # this test's policies shall not judge what other tests do in the same cluster
            o["spec"]["matchResources"] = {"objectSelector": {"matchLabels": {"admission-test": release}}}
    nodes = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": n}} for n in (site.node_a, site.node_b)]
    energies = [node_energy(n, release) for n in (site.node_a, site.node_b)]
    cluster_wide = [o for o in objects if "namespace" not in o["metadata"]]
    try:
        kubectl.run("create", "namespace", namespace)
        kubectl.apply(*objects, *intruder(release, namespace), *nodes, *energies)
        pods = [pod_on(n, f"{release}-wattlock-agent") for n in (site.node_a, site.node_b)]
        kubectl.within(namespace).apply(*pods)
        probe = site.with_token("intruder")
        eventually("the policies are in force", lambda: label(probe, site.node_a).returncode != 0)
        eventually(
            "the policies are in force",
            lambda: report(probe, site.node_a).returncode != 0,
        )
        yield site
    finally:
        doomed = [*cluster_wide, *intruder(release, namespace)[1:], *energies, *nodes]
        kubectl.run("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=yaml.safe_dump_all(doomed))
        # no kubelet of these nodes will ever confirm that the pods are gone
        kubectl.within(namespace).run("delete", "pods", "--all", "--grace-period=0", "--force", "--wait=false")
        kubectl.run("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")


def report(kubectl: Any, node: str, patch: str = STATUS) -> subprocess.CompletedProcess[str]:
    return kubectl.run("patch", "nodeenergy", node, "--subresource=status", "--type=merge", "-p", patch, check=False)


def order(kubectl: Any, node: str) -> subprocess.CompletedProcess[str]:
    patch = json.dumps({"spec": {"orders": [ORDER]}})
    return kubectl.run("patch", "nodeenergy", node, "--type=merge", "-p", patch, check=False)


def label(kubectl: Any, node: str) -> subprocess.CompletedProcess[str]:
    return kubectl.run("label", "nodeenergy", node, f"t={time.monotonic_ns()}", "--overwrite", check=False)


bindings = pytest.mark.parametrize("binding", ["pod", "node"])


@bindings
def test_an_agent_reports_about_its_own_node(site, binding):
    answer = report(site.agent(site.node_a, binding), site.node_a)
    assert answer.returncode == 0, answer.stderr
    assert site.kubectl.get("nodeenergy", site.node_a)["status"]["locked"] == 3


def test_an_agent_reports_by_server_side_apply(site):
    me = site.agent(site.node_a, "pod")
    mine = {**node_energy(site.node_a, site.release), "status": {"observedGeneration": 2}}
    del mine["spec"], mine["metadata"]["labels"]
    words = ("apply", "--server-side", "--subresource=status", "--field-manager=wattlock-agent", "-f", "-")
    answer = me.run(*words, "--force-conflicts", stdin=yaml.safe_dump(mine), check=False)
    assert answer.returncode == 0, answer.stderr
    assert site.kubectl.get("nodeenergy", site.node_a)["status"]["observedGeneration"] == 2


@bindings
def test_an_agent_cannot_report_about_another_node(site, binding):
    before = site.kubectl.get("nodeenergy", site.node_b)
    answer = report(site.agent(site.node_a, binding), site.node_b)
    assert answer.returncode != 0
    assert (
        f"the agent of node {site.node_a} may report only about its own node, not about {site.node_b}" in answer.stderr
    )
    assert site.kubectl.get("nodeenergy", site.node_b) == before


def test_a_token_that_names_no_node_cannot_report(site):
    answer = report(site.with_token(f"{site.release}-wattlock-agent"), site.node_a)
    assert answer.returncode != 0
    assert "this agent token names no node: use the token that the kubelet mounts" in answer.stderr


@bindings
def test_an_agent_cannot_give_orders_even_where_rbac_would_let_it(site, binding):
    me = site.agent(site.node_a, binding)
    assert me.run("auth", "can-i", "patch", "nodeenergies").stdout.strip() == "yes"
    answer = order(me, site.node_a)
    assert answer.returncode != 0
    assert ONLY_OPERATOR in answer.stderr
    assert site.kubectl.get("nodeenergy", site.node_a)["spec"] == {"orders": []}


def test_a_report_cannot_carry_orders(site):
    patch = json.dumps({"spec": {"orders": [ORDER]}, "status": {"locked": 5}})
    assert report(site.agent(site.node_a, "pod"), site.node_a, patch).returncode == 0
    after = site.kubectl.get("nodeenergy", site.node_a)
    assert (after["spec"], after["status"]["locked"]) == ({"orders": []}, 5)


def test_the_operator_gives_orders_and_makes_and_deletes_the_objects(site):
    operator = site.with_token(f"{site.release}-wattlock-operator")
    name = f"{site.release}-c"
    manifest = yaml.safe_dump(node_energy(name, site.release))
    words = ("apply", "--server-side", "--field-manager=wattlock-operator", "-f", "-")
    made = operator.run(*words, stdin=manifest, check=False)
    assert made.returncode == 0, made.stderr
    answer = order(operator, name)
    assert answer.returncode == 0, answer.stderr
    assert site.kubectl.get("nodeenergy", name)["spec"]["orders"][0]["capMHz"] == 1590
    answer = operator.run("delete", "nodeenergy", name, "--wait=false", check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_operator_cannot_report(site):
    answer = report(site.with_token(f"{site.release}-wattlock-operator"), site.node_a)
    assert answer.returncode != 0
    assert "forbidden" in answer.stderr


def test_somebody_with_a_careless_role_can_change_nothing(site):
    somebody = site.with_token("intruder")
    answers = {
        "order": order(somebody, site.node_a),
        "label": label(somebody, site.node_a),
        "create": somebody.run(
            "create", "-f", "-", stdin=yaml.safe_dump(node_energy(f"{site.release}-d", site.release)), check=False
        ),
        "delete": somebody.run("delete", "nodeenergy", site.node_a, "--wait=false", check=False),
    }
    for what, answer in answers.items():
        assert answer.returncode != 0, what
        assert ONLY_OPERATOR in answer.stderr, (what, answer.stderr)
        assert "edit the EnergyPolicy that selects their pods" in answer.stderr
    answer = report(somebody, site.node_a)
    assert answer.returncode != 0
    assert ONLY_AGENT in answer.stderr


def test_an_administrator_may_override(site):
    assert label(site.kubectl, site.node_b).returncode == 0
    answer = report(site.kubectl, site.node_b, '{"status":{"locked":0}}')
    assert answer.returncode == 0, answer.stderr


def test_kubernetes_itself_may_collect_the_objects_but_give_no_orders(site):
    name = f"{site.release}-e"
    site.kubectl.apply(node_energy(name, site.release))
    # the garbage collector: RBAC lets it delete anything
    as_collector = (
        "--as=system:serviceaccount:kube-system:generic-garbage-collector",
        "--as-group=system:serviceaccounts:kube-system",
        "--as-group=system:serviceaccounts",
        "--as-group=system:authenticated",
    )
    patch = json.dumps({"spec": {"orders": [ORDER]}})
    ordered = site.kubectl.run(*as_collector, "patch", "nodeenergy", name, "--type=merge", "-p", patch, check=False)
    assert ordered.returncode != 0
    assert ONLY_OPERATOR in ordered.stderr
    patched = site.kubectl.run(
        *as_collector, "patch", "nodeenergy", name, "--type=merge", "-p", '{"metadata":{"finalizers":[]}}', check=False
    )
    assert patched.returncode == 0, patched.stderr
    deleted = site.kubectl.run(*as_collector, "delete", "nodeenergy", name, "--wait=false", check=False)
    assert deleted.returncode == 0, deleted.stderr


def test_the_expressions_pass_the_servers_type_check(site):
    for name in ("spec", "status"):
        where = ("validatingadmissionpolicy", f"{site.release}-wattlock-nodeenergy-{name}")
        # the controller manager checks, and says so by observedGeneration
        eventually(
            "the types are checked", lambda where=where: "observedGeneration" in site.kubectl.get(*where)["status"]
        )
        assert site.kubectl.get(*where)["status"]["typeChecking"].get("expressionWarnings", []) == []


@pytest.mark.parametrize("path", sorted((CHART / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_api_server_accepts_the_examples(kubectl, namespace, path):
    answer = kubectl.within(namespace).run("apply", "--dry-run=server", "-f", str(path), check=False)
    assert answer.returncode == 0, answer.stderr
