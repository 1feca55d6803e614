"""Fixtures of the tiers that talk to a real API server.

They run inside ``dev/cluster run -- ...``, which sets KUBECONFIG and puts kubectl and helm on the PATH.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]

#: Clusters that the tests may write to. They create and delete things at will, so anything else is refused.
TEST_SERVERS = ("https://10.250.0.1:6443", "https://127.0.0.1:")


@dataclass(frozen=True)
class Kubectl:
    """The kubectl program against one cluster."""

    kubeconfig: str
    namespace: str = ""

    def run(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl; with ``check`` a failure shows what it printed."""
        scope = ["--namespace", self.namespace] if self.namespace else []
        result = subprocess.run(
            ["kubectl", "--kubeconfig", self.kubeconfig, *scope, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}\n{result.stdout}{result.stderr}")
        return result

    def apply(self, *manifests: dict[str, Any], check: bool = True) -> subprocess.CompletedProcess[str]:
        """Apply manifests as a user would, from standard input."""
        return self.run("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests), check=check)

    def get(self, *what: str) -> dict[str, Any]:
        """Return an object or a list as parsed JSON."""
        parsed: dict[str, Any] = json.loads(self.run("get", *what, "-o", "json").stdout)
        return parsed

    def within(self, namespace: str) -> "Kubectl":
        """Return the same for another namespace."""
        return Kubectl(self.kubeconfig, namespace)


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """Path of the kubeconfig of a throw-away cluster."""
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        pytest.fail("no KUBECONFIG: run this tier through 'make test' or 'dev/cluster run -- pytest ...'")
    config = yaml.safe_load(Path(path).read_text())
    servers = [cluster["cluster"]["server"] for cluster in config["clusters"]]
    if not all(server.startswith(TEST_SERVERS) for server in servers):
        pytest.fail(f"refusing to test against {servers}: these tests delete things, use 'dev/cluster up'")
    return path


@pytest.fixture(scope="session")
def kubectl(kubeconfig: str) -> Kubectl:
    """kubectl as cluster administrator."""
    return Kubectl(kubeconfig)


@pytest.fixture(scope="session")
def crds(kubectl: Kubectl) -> None:
    """The CRDs of this checkout, served."""
    kubectl.run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kubectl.run("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))


@pytest.fixture
def namespace(kubectl: Kubectl, crds: None) -> Iterator[str]:
    """A fresh namespace, deleted afterwards without waiting."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    kubectl.run("create", "namespace", name)
    yield name
    kubectl.run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def good_policy() -> dict[str, Any]:
    """A policy that the API server accepts, in no particular namespace."""
    return {
        "apiVersion": "wattlock.dev/v1alpha1",
        "kind": "EnergyPolicy",
        "metadata": {"name": "qwen"},
        "spec": {
            "mode": "Enforce",
            "pools": [
                {
                    "name": "decode",
                    "role": "Decode",
                    "selector": {"matchLabels": {"llm-d.ai/role": "decode"}},
                    "clock": {"maxSMClockMHz": 1590},
                },
                {"name": "prefill", "role": "Prefill", "selector": {"matchLabels": {"llm-d.ai/role": "prefill"}}},
            ],
        },
    }
