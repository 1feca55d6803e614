"""Where no agent can run any more: a Job of the chart undoes what the journal on the node says."""

import signal
import subprocess
from collections.abc import Iterator

import pytest
from chaos.engine import Engine
from chaos.faults_agent import end_agent
from chaos.nodes import ROOT
from chaos.site import GPUS_PER_NODE, Site, journal, until
from workloads import SYSTEM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture
def intact(engine: Engine, site: Site) -> Iterator[Site]:
    """The site as it should be, before and after."""
    engine.settle()
    yield site
    site.install()
    site.apply_policies()
    engine.settle(120)


def reset_job(node: str) -> str:
    command = [
        *("helm", "template", "wattlock", str(ROOT / "charts/wattlock"), "--namespace", SYSTEM),
        *("--values", str(ROOT / "dev/demo/values.yaml"), "--set", f"simulator.gpusPerNode={GPUS_PER_NODE}"),
        *("--set", f"reset.node={node}", "--show-only", "templates/reset-node.yaml"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_node_without_an_agent_is_reset_by_a_job(engine: Engine, intact: Site) -> None:
    site, recorder = intact, engine.recorder
    name = site.decode_pods("steady")[0]["spec"]["nodeName"]
    node = site.nodes[name]
    until("its decode GPUs are locked", lambda: recorder.locked_on(name))
    # Killed, and never to come back: their DaemonSet is gone, and so is the operator that would make it anew.
    site.kill_agents_for_good()
    locked = recorder.locked_on(name)
    assert locked
    assert {path.stem for path in journal(node).glob("*.json")} == locked

    subprocess.run(["kubectl", "apply", "-f", "-"], input=reset_job(name), text=True, timeout=60, check=True)
    jobs = f"/apis/batch/v1/namespaces/{SYSTEM}/jobs"
    (job,) = [each for each in site.kube.list_all(jobs) if each["metadata"]["name"].startswith("wattlock-reset")]

    def outcome() -> set[str]:
        status = (site.kube.get(f"{jobs}/{job['metadata']['name']}") or {}).get("status", {})
        kinds = {each["type"] for each in status.get("conditions", []) if each["status"] == "True"}
        return kinds & {"Complete", "Failed"}

    done = until("the Job has ended", outcome)
    log = subprocess.run(
        ["kubectl", "-n", SYSTEM, "logs", f"job/{job['metadata']['name']}"], capture_output=True, text=True, timeout=60
    ).stdout
    site.kube.delete(f"{jobs}/{job['metadata']['name']}")
    assert done == {"Complete"}, log
    assert recorder.locked_on(name) == set()
    assert not list(journal(node).glob("*.json"))
    for uuid in locked:
        assert f"{uuid}: released" in log


def test_a_policy_deleted_while_its_agent_is_dead(engine: Engine, intact: Site) -> None:
    """``kill -9``, and the policy goes while nobody is there to undo its locks."""
    site, recorder = intact, engine.recorder
    name = site.decode_pods("steady")[0]["spec"]["nodeName"]
    until("its decode GPUs are locked", lambda: recorder.locked_on(name))
    with site.nodes[name].kubelet_down():
        end_agent(site, name, signal.SIGKILL)
        held = recorder.locked_on(name)
        for policy in ("steady", "measured"):
            site.delete_policy(policy)
        assert recorder.locked_on(name) == held != set(), "a lock outlives the agent, as with a real driver"
    until("every GPU of the node is released", lambda: not recorder.locked_on(name), 60)
    until("the policies are gone", lambda: not site.policies(), 60)
    assert not list(journal(site.nodes[name]).glob("*.json"))
