"""The operator on a real API server, for tests that start one."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from faulty_proxy import FaultyProxy
from operator_site import TEMPLATE, Site
from wattlock_operator.kube import connect


@pytest.fixture
def site(kubectl: Any, namespace: str, tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(TEMPLATE))
    found = Site(kubectl, namespace, tmp_path, connect())
    found.start()
    yield found
    found.kubectl.within(namespace).run("delete", "energypolicy", "--all", "--wait=false", check=False)
    for agent in found.agents:
        agent.stop()
    found.stop(signal.SIGKILL)
    for replica in found.replicas:
        replica.end(signal.SIGKILL)
    for policy in kubectl.within(namespace).get("energypolicies")["items"]:
        patch = json.dumps({"metadata": {"finalizers": None}})
        kubectl.within(namespace).run(
            "patch", "energypolicy", policy["metadata"]["name"], "--type=merge", "-p", patch, check=False
        )
    for node in found.nodes:
        kubectl.run("delete", "node,nodeenergy", node, "--ignore-not-found", "--wait=false", check=False)
    if os.environ.get("SHOW_OPERATOR_LOG"):
        for log in (found.log, *(replica.log_path for replica in found.replicas)):
            print(log.name, log.read_text(), sep="\n")


@pytest.fixture
def proxy(kubectl: Any, crds: None) -> Iterator[FaultyProxy]:
    """A way to the API server that can be faulty."""
    found = FaultyProxy(connect())
    yield found
    found.close()
