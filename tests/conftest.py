"""Fixtures of the tiers that talk to a real API server.

They run inside ``dev/cluster run -- ...``, which sets KUBECONFIG and puts kubectl and helm on the PATH.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from kubectl_tool import Kubectl

ROOT = Path(__file__).parents[1]

# The same examples every time, so that what fails was changed; "make fuzz" looks for others. No example is judged by
# how long it takes: a busy machine must not make a property fail.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")

#: Clusters that the tests may write to. They create and delete things at will, so anything else is refused.
TEST_SERVERS = ("https://10.250.0.1:6443", "https://127.0.0.1:")


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
