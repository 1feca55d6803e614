"""An instance with a GPU on each of two nodes: both switch together, and its energy is that of both."""

import math

import pytest
from workloads import eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PREFIX = "leaderworkerset.sigs.k8s.io"


def member(index, node):
    """A pod of a group of two, labelled as the LeaderWorkerSet controller does it; only the leader's tokens count."""
    deployment = serving("decode", 1)
    deployment["metadata"]["name"] = f"big-{index}"
    labels = {f"{PREFIX}/name": "big", f"{PREFIX}/group-index": "0", f"{PREFIX}/worker-index": str(index)}
    template = deployment["spec"]["template"]
    template["metadata"]["labels"] = template["metadata"]["labels"] | labels
    template["metadata"]["annotations"] = {f"{PREFIX}/size": "2"}
    template["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
    deployment["spec"]["selector"]["matchLabels"] = template["metadata"]["labels"]
    return deployment


def test_an_instance_on_two_nodes_is_compared_by_the_energy_of_both(kubectl, workload, simulator, good_policy):
    nodes = sorted(node["metadata"]["name"] for node in kubectl.get("nodes")["items"])[:2]
    workload.deploy(member(0, nodes[0]), member(1, nodes[1]), serving("prefill", 1))
    good_policy["spec"]["verification"] = {"controlShare": 0.5, "epochSeconds": 20}
    workload.kubectl.apply(good_policy)

    def on(node):
        reports = {entry["metadata"]["name"]: entry.get("status", {}) for entry in kubectl.get("nodeenergies")["items"]}
        found = reports.get(node, {}).get("instances", [])
        return next((each for each in found if each["instance"] == "big/0"), {})

    def pairs():
        stats = on(nodes[0]).get("pairStats", [])
        return stats[0] if stats and stats[0]["pairs"] >= 3 else None

    stats = eventually("three pairs are measured", pairs, 480, every_seconds=2)
    leader, worker = on(nodes[0]), on(nodes[1])
    assert worker.get("pairStats", []) == []
    assert worker["epochs"], "the other node tells the power of its epochs"
    assert "joulesPerGeneratedToken" not in leader, "one node's energy is not that of all"
    # Both GPUs do the same work, so the saving of the two together is that of one.
    truth = math.log(1 - simulator.truth(1590)["energy_percent"] / 100)
    assert float(stats["energy"]["total"]) / stats["pairs"] == pytest.approx(truth, abs=0.01)
    watts = {arm["capMHz"]: float(arm["joules"]) / float(arm["seconds"]) for arm in leader["arms"]}
    assert watts[0] > 900, f"{watts}: less than two busy GPUs draw"
    pool = workload.pool("decode")
    assert (pool["instances"], pool["gpus"]) == (1, 2)
    per_token = float(pool["joulesPerGeneratedToken"])
    assert per_token == pytest.approx(pool["powerWatts"] / float(pool["tokensPerSecond"]), rel=0.05)
