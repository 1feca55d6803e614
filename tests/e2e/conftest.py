"""Fixtures of the end-to-end tier."""

from collections.abc import Iterator

import pytest
from installed import install, serving_pods, shared_workload, simulator, wattlock, workload
from kubectl_tool import Kubectl
from workloads import SYSTEM

__all__ = ["install", "serving_pods", "shared_workload", "simulator", "wattlock", "workload"]


@pytest.fixture(autouse=True)
def no_crash_loop(kubectl: Kubectl, wattlock: None) -> Iterator[None]:
    """No container of Wattlock may have restarted in any test."""
    yield
    for pod in kubectl.within(SYSTEM).get("pods")["items"]:
        for container in pod["status"].get("containerStatuses", []):
            if container["restartCount"]:
                log = kubectl.within(SYSTEM).run("logs", pod["metadata"]["name"], "--previous", check=False)
                pytest.fail(f"{pod['metadata']['name']} restarted {container['restartCount']} times:\n{log.stdout}")
