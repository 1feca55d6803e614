"""The real operator against a real API server: orders, status, deletion, conflicts, restarts."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_site import DECODE, PREFILL, Proxy, Site, eventually, placed
from wattlock_api.constants import FINALIZER, FORCE_RELEASE_ANNOTATION

pytestmark = pytest.mark.cluster


def test_a_policy_becomes_orders_and_their_reports_become_its_status(site, good_policy):
    node = site.node()
    decode = site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    site.pod("other", node, {"app": "other"})
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))

    orders = {order["pod"]["name"]: order for order in eventually(lambda: site.orders(node))}
    assert set(orders) == {"decode-0", "prefill-0"}
    eventually(lambda: [o.get("capMHz") for o in site.orders(node) if o["podUid"] == decode] == [1590])
    order = next(o for o in site.orders(node) if o["podUid"] == decode)
    assert order["metricsURL"] == "http://10.1.2.3:8200/metrics"
    assert order["experiment"]["seed"] == site.policy()["metadata"]["uid"]
    assert "capMHz" not in next(o for o in site.orders(node) if o["pod"]["name"] == "prefill-0")

    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)
    eventually(lambda: site.condition("Ready")[0] == "True", message=site.condition("Ready"))
    assert site.condition("Enforced")[0] == "True"
    summary = site.policy()["status"]["summary"]
    assert (summary["gpus"], summary["clock"], summary["power"]) == (2, "1590MHz", "600W")
    assert FINALIZER in site.policy()["metadata"]["finalizers"]
    assert site.kubectl.get("clockprofile", "published")["spec"]["rows"][0]["maxSMClockMHz"] == 1590
    lease = site.kubectl.within(site.namespace).get("lease", "wattlock-operator")
    assert lease["spec"]["holderIdentity"].startswith("operator-")


def test_a_deleted_policy_stays_until_its_gpus_are_released(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    agent = site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)

    agent.obeys = False
    site.kubectl.within(site.namespace).run("delete", "energypolicy", "qwen", "--wait=false")
    eventually(lambda: site.condition("Ready")[1] == "Releasing")
    assert site.orders(node) == []
    assert node in site.condition("Ready")[2]
    threading.Event().wait(2.5)  # long enough for a finalizer that does not wait to be gone
    daemon_sets = site.kubectl.within(site.namespace).get("daemonsets")["items"]
    assert site.policy()["metadata"]["deletionTimestamp"]
    assert len(daemon_sets) == 1, "the agents must outlive the release"

    agent.obeys = True
    gone = lambda: site.kubectl.within(site.namespace).get("energypolicies")["items"] == []  # noqa: E731
    eventually(gone)
    eventually(lambda: site.kubectl.within(site.namespace).get("daemonsets")["items"] == [])


def test_without_a_ready_prefill_pod_decode_is_held(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL, ready=False)
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.condition("Ready")[1] == "NoPrefillPeer")
    assert [order.get("capMHz") for order in site.orders(node)] == [None, None]

    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    site.patch_status("pod", "prefill-0", ready, site.namespace)
    eventually(lambda: 1590 in [order.get("capMHz") for order in site.orders(node)])
    eventually(lambda: site.condition("Ready")[0] == "True")


def test_a_pod_that_two_policies_claim_is_capped_by_neither(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)
    second = placed(good_policy, site)
    second["metadata"] = {"name": "second", "namespace": site.namespace}
    site.kubectl.apply(second)

    for name in ("qwen", "second"):
        eventually(lambda name=name: site.condition("Conflict", name)[0] == "True")
        message = site.condition("Conflict", name)[2]
        assert f"{site.namespace}/qwen" in message
        assert f"{site.namespace}/second" in message
        assert "selectors" in message
    eventually(lambda: all("capMHz" not in order for order in site.orders(node)))
    assert {order["hold"]["reason"] for order in site.orders(node)} == {"PolicyConflict"}
    assert {order["policy"]["name"] for order in site.orders(node)} == {"qwen"}
    posted = site.kubectl.within(site.namespace).get("events", "--field-selector", "reason=PolicyConflict")["items"]
    assert {event["involvedObject"]["name"] for event in posted} == {"qwen", "second"}

    site.kubectl.within(site.namespace).run("delete", "energypolicy", "second", "--timeout=20s")
    eventually(lambda: 1590 in [order.get("capMHz") for order in site.orders(node)])
    eventually(lambda: site.condition("Conflict")[0] == "False")


def test_policies_reach_the_pods_of_their_own_namespace_only(site, good_policy, kubectl):
    other = f"{site.namespace}-b"
    kubectl.run("create", "namespace", other)
    try:
        node = site.node()
        for namespace in (site.namespace, other):
            eventually(lambda namespace=namespace: site.has_service_account(namespace))
            site.pod("decode-0", node, DECODE, namespace=namespace)
            site.pod("prefill-0", node, PREFILL, namespace=namespace)
        site.agent(node)
        site.kubectl.apply(placed(good_policy, site))
        eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)
        assert {order["pod"]["namespace"] for order in site.orders(node)} == {site.namespace}
    finally:
        kubectl.run("delete", "namespace", other, "--wait=false")


def test_a_restarted_operator_goes_on_where_the_last_one_was(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    agent = site.agent(node)
    agent.extra = {"energyJoules": "7200000"}
    site.kubectl.apply(placed(good_policy, site))

    def energy() -> list[str | None]:
        return [pool.get("energyKWh") for pool in site.policy().get("status", {}).get("pools", [])]

    eventually(lambda: energy() == ["2.000000", "2.000000"], 25)
    eventually(lambda: site.condition("Ready")[0] == "True")
    before = site.policy()
    generation = site.node_energy(node)["metadata"]["generation"]
    assert site.stop(signal.SIGTERM) == 0
    agent.extra = {"energyJoules": "10800000"}  # it goes on while no operator watches
    eventually(lambda: "10800000" in json.dumps(site.node_energy(node)["status"]))
    site.start()
    eventually(lambda: energy() == ["3.000000", "3.000000"])
    after = site.policy()
    assert site.node_energy(node)["metadata"]["generation"] == generation, "a restart must not change an order"
    times = [
        {entry["type"]: entry["lastTransitionTime"] for entry in policy["status"]["conditions"]}
        for policy in (before, after)
    ]
    assert times[0]["Ready"] == times[1]["Ready"]


def test_the_operator_outlives_an_outage_of_the_api_server(site, good_policy):
    """It sees what changed meanwhile, also what was deleted, and does so without a restart."""
    config = yaml.safe_load(Path(site.kubectl.kubeconfig).read_text())
    server = urllib.parse.urlsplit(config["clusters"][0]["cluster"]["server"])
    proxy = Proxy(str(server.hostname), int(server.port or 443))
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{proxy.port}"
    through = site.tmp_path / "kubeconfig"
    through.write_text(yaml.safe_dump(config))
    site.stop()
    site.settings = {"KUBECONFIG": str(through)}
    site.start()
    node = site.node()
    for name, labels in (("decode-0", DECODE), ("decode-1", DECODE), ("prefill-0", PREFILL)):
        site.pod(name, node, labels)
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 2)
    process = site.operator
    proxy.cut()
    site.kubectl.within(site.namespace).run("delete", "pod", "decode-1", "--force", "--grace-period=0")
    eventually(lambda: "no answer from the API server" in site.log.read_text())
    proxy.mend()
    eventually(lambda: {order["pod"]["name"] for order in site.orders(node)} == {"decode-0", "prefill-0"}, 45)
    assert process is not None
    assert process.poll() is None
    proxy.close()


def test_metrics_and_probes(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    labels = f'{{namespace="{site.namespace}",policy="qwen",pool="decode",role="Decode"}}'
    eventually(lambda: f"wattlock_pool_locked_gpus{labels} 1.0" in site.http("/metrics"))
    text = site.http("/metrics")
    assert f'wattlock_policy_info{{mode="Enforce",namespace="{site.namespace}",policy="qwen"}} 1.0' in text
    assert "wattlock_operator_leading 1.0" in text
    assert "wattlock_operator_errors_total{" not in text
    assert (site.http("/healthz"), site.http("/readyz")) == ("ok\n", "ok\n")


def test_a_policy_of_a_dead_node_waits_until_it_is_told_not_to(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    agent = site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)
    agent.obeys = False
    dead = {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "Test", "message": "test"}]}
    site.patch_status("node", node, dead)
    kubectl = site.kubectl.within(site.namespace)
    kubectl.run("delete", "energypolicy", "qwen", "--wait=false")
    eventually(lambda: FORCE_RELEASE_ANNOTATION in site.condition("Ready")[2])
    kubectl.run("annotate", "energypolicy", "qwen", f"{FORCE_RELEASE_ANNOTATION}=true")
    eventually(lambda: kubectl.get("energypolicies")["items"] == [])


def test_a_daemon_set_deleted_by_hand_comes_back(site, good_policy):
    kubectl = site.kubectl.within(site.namespace)
    site.kubectl.apply(placed(good_policy, site))
    found = eventually(lambda: kubectl.get("daemonsets")["items"])
    container = found[0]["spec"]["template"]["spec"]["containers"][0]
    assert container["securityContext"]["capabilities"] == {"add": ["SYS_ADMIN"], "drop": ["ALL"]}
    kubectl.run("delete", "daemonset", found[0]["metadata"]["name"])
    again = eventually(lambda: kubectl.get("daemonsets")["items"])
    assert again[0]["metadata"]["uid"] != found[0]["metadata"]["uid"]

    kubectl.run("patch", "energypolicy", "qwen", "--type=merge", "-p", '{"spec": {"mode": "Observe"}}')

    def capabilities() -> dict[str, Any]:
        spec = kubectl.get("daemonsets")["items"][0]["spec"]["template"]["spec"]
        return dict(spec["containers"][0]["securityContext"]["capabilities"])

    eventually(lambda: capabilities() == {"drop": ["ALL"]})


def command(site: Site, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run one of the operator's other commands."""
    environment = {**os.environ, "KUBECONFIG": site.kubectl.kubeconfig, "WATTLOCK_NAMESPACE": site.namespace}
    return subprocess.run(
        [sys.executable, "-m", "wattlock_operator", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_check_tells_what_works_and_what_does_not(site, good_policy):
    eventually(lambda: "leading as" in site.log.read_text())
    well = command(site, "check", "--timeout-seconds", "5")
    assert well.returncode == 0, well.stdout
    assert "ok    EnergyPolicy is served" in well.stdout
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.kubectl.within(site.namespace).get("daemonsets")["items"])
    ill = command(site, "check", "--timeout-seconds", "1")
    assert ill.returncode == 1, ill.stdout
    assert "FAIL  0 of " in ill.stdout


@pytest.mark.parametrize("by_hand", [False, True], ids=["the agent answers", "reset by hand"])
def test_release_all_leaves_nothing_locked_and_lets_policies_go(site, good_policy, by_hand):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    agent = site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)
    site.stop()  # there is no Deployment to scale here
    agent.obeys = False
    kept = command(site, "release-all", "--timeout-seconds", "3")
    assert kept.returncode == 1
    assert f"a lock may remain on: {node}" in kept.stdout
    assert FINALIZER in site.policy()["metadata"]["finalizers"]
    if by_hand:  # as the sentence says: the node does not come back, and its GPUs are reset on it
        assert "kubectl delete nodeenergy NODE" in kept.stdout
        site.kubectl.run("delete", "nodeenergy", node)
    else:
        agent.stops()
    done = command(site, "release-all", "--timeout-seconds", "20")
    assert done.returncode == 0, done.stdout
    assert "every GPU is released" in done.stdout
    site.kubectl.within(site.namespace).run("delete", "energypolicy", "qwen", "--timeout=10s")
