"""Tenants whose placements select the same nodes: who only observes keeps nobody from capping."""

import copy

import pytest
from workloads import SYSTEM, eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: Every node, whatever its taints: the widest placement that a tenant can write.
EVERYWHERE = {"nodeSelector": {"kubernetes.io/os": "linux"}, "tolerations": [{"operator": "Exists"}]}


def test_an_observing_tenant_with_an_overlapping_placement_does_not_keep_another_from_capping(
    kubectl, workload, serving_pods, simulator, good_policy
):
    workload.deploy(serving("decode", 1))
    observing = copy.deepcopy(good_policy)
    observing["metadata"]["name"] = "watcher"
    observing["spec"] |= {"mode": "Observe", "placement": EVERYWHERE, "requirePrefillPeer": False}
    observing["spec"]["pools"].pop()
    workload.kubectl.apply(observing)
    nodes = {node["metadata"]["name"] for node in kubectl.get("nodes")["items"]}

    def agents() -> dict[str, str]:
        """Where agents run that are ready, with the DaemonSet's placement."""
        return {
            pod["spec"]["nodeName"]: pod["metadata"]["labels"]["wattlock.dev/placement"]
            for pod in serving_pods.agents()
            if pod["status"].get("containerStatuses", [{}])[0].get("ready")
        }

    eventually("the observer has an agent on every node", lambda: set(agents()) == nodes, 60)
    before = len(simulator.writes())
    serving_pods.kubectl.apply(good_policy | {"spec": good_policy["spec"] | {"verification": {"method": "None"}}})
    eventually("the other tenant's decode GPUs are locked", serving_pods.locked, 90)
    eventually("one agent runs on each node", lambda: len(serving_pods.agents()) == len(nodes), 30)
    assert len(kubectl.within(SYSTEM).get("daemonsets", "-l", "app.kubernetes.io/component=agent")["items"]) == 1
    eventually("it is ready", lambda: serving_pods.condition("Enforced").get("status") == "True", 60)
    # An agent is not ready for a moment whenever its orders change.
    (placement,) = eventually(
        "one placement has all agents", lambda: len(found := set(agents().values())) == 1 and found, 30
    )
    watched = workload.gpus("decode")
    assert not watched & {write.uuid for write in simulator.writes()[before:] if write.locks}, "mode Observe was capped"
    eventually("and the observer still measures", lambda: workload.pool("decode", "watcher").get("powerWatts"), 60)

    # When it goes, agents are only where the other tenant wants them, and cap again.
    workload.kubectl.run("delete", "epol", "watcher", "--timeout=60s", timeout_seconds=70)
    eventually("their agents are new ones", lambda: agents() and placement not in agents().values(), 60)
    eventually("the GPUs are locked again", serving_pods.locked, 60)
