"""helm uninstall leaves no lock, even with policies still there."""

import subprocess
import time

import pytest
from workloads import AGENT_LABEL, SYSTEM, eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_helm_uninstall_leaves_no_lock(kubectl, workload, simulator, install, good_policy):
    workload.deploy(serving("decode", 2), serving("prefill", 1))
    policy = good_policy | {"spec": good_policy["spec"] | {"verification": {"method": "None"}}}
    workload.kubectl.apply(policy)
    eventually("decode is locked", workload.locked, 30)
    gpus = workload.gpus("decode")
    try:
        result = subprocess.run(
            ["helm", "uninstall", "wattlock", "--namespace", SYSTEM, "--wait", "--timeout", "3m"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        uninstalled_at = time.time()
        assert result.returncode == 0, result.stdout + result.stderr
        assert kubectl.within(SYSTEM).get("pods", "-l", AGENT_LABEL)["items"] == []
        # With the operator gone nothing may hold the policy back.
        assert workload.policy()["spec"]["mode"] == "Enforce"
        workload.kubectl.run("delete", "epol", "qwen", "--timeout=20s")
    finally:
        install()
    # The simulated driver came and went with the chart; its state on the node did not.
    last = {write.uuid: write for write in simulator.writes() if write.uuid in gpus}
    assert set(last) == gpus
    for write in last.values():
        assert write.resets
        assert write.at_seconds < uninstalled_at
    assert simulator.locked() == set()
