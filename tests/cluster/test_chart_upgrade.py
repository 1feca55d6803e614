"""What the chart refuses when it is upgraded: it asks the API server what runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

CHART = Path(__file__).parents[2] / "charts" / "wattlock"


@pytest.fixture
def upgrade(kubeconfig, namespace):
    """A function that renders an upgrade of a release in ``namespace`` with one ``--set``; the server is asked."""
    helm = os.environ.get("WATTLOCK_HELM") or shutil.which("helm")
    assert helm, "no helm: run through 'dev/cluster run -- ...', or set WATTLOCK_HELM"

    def render(value):
        command = [helm, "template", "w", str(CHART), "--kubeconfig", kubeconfig, "--namespace", namespace]
        command += ["--dry-run=server", "--is-upgrade", "-s", "templates/agent-template.yaml", "--set", value]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return render


def test_agents_that_run_cannot_be_moved_to_another_namespace(kubectl, namespace, upgrade):
    there = kubectl.within(namespace)
    first = upgrade("agent.namespace=")
    assert first.returncode == 0, first.stderr
    there.run("apply", "-f", "-", stdin=first.stdout)
    assert upgrade("agent.namespace=elsewhere").returncode == 0, "nothing runs yet"

    daemon_set = yaml.safe_load(yaml.safe_load(first.stdout)["data"]["agent-daemonset.yaml"])
    daemon_set["metadata"]["name"] = "wattlock-agent-1234"
    there.apply(daemon_set)
    refused = upgrade("agent.namespace=elsewhere")
    assert refused.returncode != 0
    assert f'agent.namespace cannot change from "{namespace}" to "elsewhere" while agents run' in refused.stderr
    assert f"kubectl get daemonset -n {namespace}" in refused.stderr
    assert upgrade(f"agent.namespace={namespace}").returncode == 0, "the same one, written out"

    there.run("delete", "daemonset", "wattlock-agent-1234")
    assert upgrade("agent.namespace=elsewhere").returncode == 0
