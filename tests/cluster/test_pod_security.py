"""Pod Security admission of a real API server, asked about every pod that the chart and the operator make."""

import os
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from chart_rights import CHART
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Placement
from wattlock_operator.placement import daemon_set
from wattlock_operator.sharing import Shared

pytestmark = [pytest.mark.cluster]

LEVEL = "pod-security.kubernetes.io/enforce"
ACCOUNTS = ("wattlock-operator", "wattlock-release-all", "wattlock-agent")


@pytest.fixture
def secured(kubectl: Any, namespace: str) -> Any:
    """kubectl in a namespace with the accounts of the chart; a test says what level of Pod Security it has."""
    mine = kubectl.within(namespace)
    mine.apply(*({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}} for name in ACCOUNTS))
    return mine


def templates(*sets: str) -> dict[str, dict[str, Any]]:
    """Return the pod templates of the chart, by component; the agents' as the operator makes them, in both modes."""
    helm = os.environ.get("WATTLOCK_HELM") or shutil.which("helm")
    assert helm, "no helm: run through 'dev/cluster run -- ...', or set WATTLOCK_HELM"
    command = [helm, "template", "wattlock", str(CHART), *(word for pair in sets for word in ("--set", pair))]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout
    found: dict[str, dict[str, Any]] = {}
    for o in filter(None, yaml.safe_load_all(text)):
        component = o["metadata"].get("labels", {}).get("app.kubernetes.io/component", "")
        if o["kind"] in ("Deployment", "DaemonSet", "Job"):
            found[component] = o["spec"]["template"]
        elif o["kind"] == "Pod":
            found[component] = {"metadata": {"labels": o["metadata"]["labels"]}, "spec": o["spec"]}
        elif o["kind"] == "ConfigMap" and "agent-daemonset.yaml" in o["data"]:
            made = yaml.safe_load(o["data"]["agent-daemonset.yaml"])
            for mode in Mode:
                found[f"agent {mode}"] = daemon_set(made, Shared((Placement(),), mode), "x")["spec"]["template"]
    return found


def admitted(kubectl: Any, template: dict[str, Any]) -> str:
    """Ask the API server to admit a pod of the template; return its refusal, empty when there is none."""
    spec = template["spec"] | {"automountServiceAccountToken": False}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"] | {"name": "asked"}, "spec": spec}
    answer = kubectl.run("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod), check=False)
    return "" if answer.returncode == 0 else answer.stderr


def test_what_needs_nothing_of_its_node_runs_under_restricted(kubectl, secured):
    kubectl.run("label", "namespace", secured.namespace, f"{LEVEL}=restricted")
    found = {name: template for name, template in templates().items() if not name.startswith("agent")}
    assert {"operator", "release-hook", "check"} <= set(found)
    assert {name: answer for name, template in found.items() if (answer := admitted(secured, template))} == {}


@pytest.mark.parametrize("mode", ["Observe", "Enforce"])
@pytest.mark.parametrize("level", ["restricted", "baseline"])
def test_an_agent_is_refused_with_what_it_needs(kubectl, secured, mode, level):
    kubectl.run("label", "namespace", secured.namespace, f"{LEVEL}={level}")
    refusal = admitted(secured, templates()[f"agent {mode}"])
    assert f'violates PodSecurity "{level}:latest"' in refusal
    assert "hostPath" in refusal
    # besides its folders: an enforcing agent's one capability
    assert ('"SYS_ADMIN"' in refusal) is (mode == "Enforce")


@pytest.mark.parametrize("mode", ["Observe", "Enforce"])
def test_an_agent_runs_under_privileged(kubectl, secured, mode):
    kubectl.run("label", "namespace", secured.namespace, f"{LEVEL}=privileged")
    assert admitted(secured, templates()[f"agent {mode}"]) == ""


def test_with_a_namespace_for_the_agents_nothing_of_the_release_needs_its_node(kubectl, secured):
    helm = os.environ.get("WATTLOCK_HELM") or shutil.which("helm")
    command = [helm, "template", "wattlock", str(CHART), "--namespace", secured.namespace]
    command += ["--set", "agent.namespace=elsewhere", "--set", "simulator.enabled=true"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout
    kubectl.run("label", "namespace", secured.namespace, f"{LEVEL}=restricted")
    here = [
        o
        for o in filter(None, yaml.safe_load_all(text))
        if o["kind"] in ("Deployment", "DaemonSet", "Job") and o["metadata"]["namespace"] == secured.namespace
    ]
    assert {o["kind"] for o in here} == {"Deployment", "Job"}
    for o in here:
        assert admitted(secured, o["spec"]["template"]) == ""
