"""A tenant with Kubernetes' own role "edit" in one namespace, against an operator at work."""

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_rights import CHART, ORDER, Caller
from operator_site import DECODE, NODE_LABEL, PREFILL, Site, placed
from operator_site import eventually as patiently
from wattlock_api.constants import FORCE_RELEASE_ANNOTATION

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

API = "/apis/wattlock.dev/v1alpha1"
#: A thousand are in the unit tier, where they take seconds (test_operator_hostile.py).
POLICIES, PODS = 100, 150
#: A busy machine takes its time.
PATIENCE_SECONDS = 60
#: What the operator itself looks for in labels, and long ones.
NASTY = {
    "wattlock.dev/placement": "0000000000000000",
    "app.kubernetes.io/component": "agent",
    "leaderworkerset.sigs.k8s.io/name": "n" * 63,
    "leaderworkerset.sigs.k8s.io/group-index": "999999999999999999999999",
    "leaderworkerset.sigs.k8s.io/worker-index": "0",
    "policy": "x" * 63,
}


def eventually(what: Callable[[], Any], timeout_seconds: float = PATIENCE_SECONDS) -> Any:
    return patiently(what, timeout_seconds)


@dataclass(frozen=True)
class Tenant:
    """Somebody with the role "edit" in a namespace of his own, and in no other."""

    namespace: str
    caller: Caller
    kubectl: Any


@pytest.fixture
def tenant(kubectl: Any, namespace: str, site: Site, tmp_path: Any) -> Iterator[Tenant]:
    mine = f"{namespace}-tenant"
    command = ["helm", "template", namespace, str(CHART), "--namespace", namespace, "-s", "templates/user-roles.yaml"]
    roles = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    kubectl.run("apply", "-f", "-", stdin=roles)
    kubectl.run("create", "namespace", mine)
    try:
        his = kubectl.within(mine)
        his.run("create", "serviceaccount", "tenant")
        his.run("create", "rolebinding", "tenant", "--clusterrole=edit", f"--serviceaccount={mine}:tenant")
        token = his.run("create", "token", "tenant").stdout.strip()
        config = yaml.safe_load(Path(kubectl.kubeconfig).read_text())
        for user in config["users"]:
            user["user"] = {"token": token}
        (tmp_path / "tenant").write_text(yaml.safe_dump(config))
        his_own = type(kubectl)(str(tmp_path / "tenant"), mine)
        found = Tenant(mine, Caller.of(his_own), his_own)
        policies = f"{API}/namespaces/{mine}/energypolicies"
        # the controller that adds our rules to the role takes a moment
        eventually(lambda: found.caller.ask("POST", policies, {"metadata": {"name": "x"}})[0] not in (401, 403))
        yield found
    finally:
        # while the operator of the site still runs: it has to let the policies go
        kubectl.within(mine).run("delete", "energypolicies", "--all", "--timeout=240s", timeout_seconds=250)
        kubectl.run("delete", "-f", "-", "--ignore-not-found", "--wait=false", stdin=roles, check=False)
        kubectl.run("delete", "namespace", mine, "--wait=false", check=False)


def named(policy: dict[str, Any], name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    return {**policy, "metadata": {"name": name, "namespace": namespace}, "spec": {**policy["spec"], **spec}}


def serving_pod(name: str, node: str, labels: dict[str, str], **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "i", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"nodeName": node, "automountServiceAccountToken": False, "containers": [container], **spec},
    }


def test_his_rights_end_at_his_namespace(tenant, site, good_policy):
    node = site.node()
    victim, mine = site.namespace, tenant.namespace
    site.kubectl.apply(placed(good_policy, site))
    site.agent(node)
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    eventually(lambda: [order["capMHz"] for order in site.orders(node) if "capMHz" in order] == [1590])
    lease = f"/apis/coordination.k8s.io/v1/namespaces/{victim}/leases/wattlock-operator"
    eventually(lambda: site.kube.get(lease))
    abandon = {"metadata": {"annotations": {FORCE_RELEASE_ANNOTATION: "true"}}}
    profile = {"metadata": {"name": "p"}, "spec": {"rows": []}}
    attempts = [
        ("POST", f"{API}/namespaces/{victim}/energypolicies", named(good_policy, "his", victim)),
        ("PATCH", f"{API}/namespaces/{victim}/energypolicies/qwen", {"spec": {"mode": "Observe"}}),
        ("PATCH", f"{API}/namespaces/{victim}/energypolicies/qwen", abandon),
        ("DELETE", f"{API}/namespaces/{victim}/energypolicies/qwen", None),
        ("PATCH", f"{API}/namespaces/{mine}/energypolicies/x/status", {"status": {"measuredAt": "now"}}),
        ("POST", f"{API}/clockprofiles", profile),
        ("PATCH", f"{API}/clockprofiles/published", {"spec": {"rows": []}}),
        ("POST", f"{API}/nodeenergies", {"metadata": {"name": "n"}, "spec": {"orders": [ORDER]}}),
        ("PATCH", f"{API}/nodeenergies/{node}", {"spec": {"orders": [ORDER]}}),
        ("PATCH", f"{API}/nodeenergies/{node}/status", {"status": {"locked": 9}}),
        ("DELETE", f"{API}/nodeenergies/{node}", None),
        ("PATCH", lease, {"spec": {"renewTime": "2099-01-01T00:00:00.000000Z"}}),
        ("POST", f"/api/v1/namespaces/{victim}/pods", serving_pod("agent", node, {})),
        ("PATCH", f"/api/v1/namespaces/{victim}/pods/decode-0", {"metadata": {"labels": {"llm-d.ai/role": "x"}}}),
        ("PATCH", f"/api/v1/namespaces/{victim}/pods/decode-0/status", {"status": {"podIP": "192.0.2.1"}}),
        ("POST", "/api/v1/nodes", {"metadata": {"name": "n"}}),
        ("PATCH", f"/api/v1/nodes/{node}", {"metadata": {"labels": {"a": "b"}}}),
    ]
    answers = {(method, path): tenant.caller.ask(method, path, body) for method, path, body in attempts}
    assert {asked: answer for asked, answer in answers.items() if answer[0] != 403} == {}


def test_he_cannot_tell_the_agent_where_to_read(tenant, site, good_policy):
    node = site.node()
    forged = {
        "podIP": "169.254.169.254",
        "podIPs": [{"ip": "169.254.169.254"}],
        "hostIP": "10.0.0.1",
        "phase": "Running",
    }
    pod = serving_pod("decode-0", node, DECODE) | {"status": forged}
    code, said = tenant.caller.ask("POST", f"/api/v1/namespaces/{tenant.namespace}/pods", pod)
    assert code == 200, said
    path = f"/api/v1/namespaces/{tenant.namespace}/pods/decode-0"
    code, said = tenant.caller.ask("PATCH", f"{path}/status", {"status": forged})
    assert code == 403, said
    tenant.caller.ask("PATCH", path, {"status": forged})
    there = site.kube.get(path)
    assert there is not None
    assert there["status"].get("podIP") is None
    assert there["status"]["phase"] == "Pending"
    tenant.kubectl.apply(named(good_policy, "his", tenant.namespace, requirePrefillPeer=False))
    (order,) = eventually(lambda: site.orders(node))
    assert "metricsURL" not in order


def test_a_pod_on_its_nodes_network_is_measured_without_metrics(tenant, site, good_policy):
    node = site.node()
    site.agent(node)
    pod = serving_pod("decode-0", node, DECODE, hostNetwork=True)
    assert tenant.caller.ask("POST", f"/api/v1/namespaces/{tenant.namespace}/pods", pod) == (200, "")
    status = {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "hostIP": "10.0.0.1"}
    site.patch_status("pod", "decode-0", status, tenant.namespace)
    pools = [{**good_policy["spec"]["pools"][0], "metrics": {"port": 10250, "path": "/pods"}}]
    tenant.kubectl.apply(named(good_policy, "his", tenant.namespace, requirePrefillPeer=False, pools=pools))
    eventually(lambda: [order.get("capMHz") for order in site.orders(node)] == [1590])
    assert [order.get("metricsURL") for order in site.orders(node)] == [None]

    def told() -> str:
        pools = site.policy("his", tenant.namespace).get("status", {}).get("pools", [])
        reasons = {entry["reason"]: entry["message"] for pool in pools for entry in pool["reasons"]}
        return str(reasons.get("HostNetworkMetrics", ""))

    assert f"metrics.hostNetworkNamespaces name {tenant.namespace}" in eventually(told)


def test_his_policy_moves_no_order_of_another_namespace(tenant, site, good_policy):
    node = site.node()
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    group = {"llm-d.ai/model": "qwen"}
    site.pod("decode-0", node, DECODE | group)
    site.pod("prefill-0", node, PREFILL | group)
    eventually(lambda: sorted(order.get("capMHz", 0) for order in site.orders(node)) == [0, 1590])
    before = site.orders(node)
    tenant.kubectl.apply(named(good_policy, "qwen", tenant.namespace, mode="Observe"))
    tenant.kubectl.apply(named(good_policy, "other", tenant.namespace))
    eventually(lambda: site.condition("Ready", "other", tenant.namespace)[1] == "NoMatchingPods")
    assert site.orders(node) == before
    assert site.condition("Conflict")[0] == "False"


@pytest.mark.parametrize("liar", ["no GPU", "zero GPUs", "not ready", "in another namespace"])
def test_a_pod_that_only_says_prefill_is_no_peer(tenant, site, good_policy, liar):
    node = site.node()
    site.agent(node)
    group = {"llm-d.ai/model": "qwen"}
    site.kubectl.apply(placed(good_policy, site, groupBy=["llm-d.ai/model"]))
    site.pod("decode-0", node, DECODE | group)
    home = tenant.namespace if liar == "in another namespace" else site.namespace
    pod = serving_pod("prefill-0", node, PREFILL | group)
    if liar == "no GPU":
        pod["spec"]["containers"][0].pop("resources")
    if liar == "zero GPUs":
        pod["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "0"}}
    site.kubectl.within(home).apply(pod)
    ready = {"type": "Ready", "status": str(liar != "not ready")}
    site.patch_status("pod", "prefill-0", {"phase": "Running", "podIP": "10.1.2.4", "conditions": [ready]}, home)
    eventually(lambda: "prefill pod with a GPU" in json.dumps(site.policy().get("status", {})))
    assert [order["hold"]["reason"] for order in site.orders(node) if order["pod"]["name"] == "decode-0"] == [
        "NoPrefillPeer"
    ]
    # the same with a real one: so it was the lie that was not believed
    site.pod("prefill-1", node, PREFILL | group)
    eventually(lambda: [o.get("capMHz") for o in site.orders(node) if o["pod"]["name"] == "decode-0"] == [1590])


def test_a_pod_that_only_says_agent_is_none(tenant, site, good_policy):
    node = site.node()
    labels = {"app.kubernetes.io/component": "agent", "wattlock.dev/placement": "0000000000000000"}
    tenant.kubectl.apply(serving_pod("agent", node, labels))
    tenant.kubectl.apply(named(good_policy, "his", tenant.namespace))
    eventually(lambda: site.condition("Ready", "his", tenant.namespace)[1] == "NoMatchingPods")
    assert site.kube.get(f"{API}/nodeenergies/{node}") is None


def test_names_that_look_alike_do_not_meet(site, good_policy):
    base = site.namespace
    dotted, dashed = f"{base}.b", f"{base}-b"
    for name in (dotted, dashed):
        site.kubectl.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": NODE_LABEL}})
        site.patch_status("node", name, {"conditions": [{"type": "Ready", "status": "True"}]})
        site.nodes.append(name)
    long = [f"{'q' * 199}-{'q' * 40}{end}" for end in "ab"]
    for name in long:
        site.kubectl.apply(named(good_policy, name, base, pools=[good_policy["spec"]["pools"][1]]))
    site.kubectl.apply(
        named(good_policy, "decode", base, pools=good_policy["spec"]["pools"][:1], requirePrefillPeer=False)
    )
    site.pod("d", dotted, DECODE)
    site.pod("e", dashed, DECODE)
    eventually(lambda: [order["pod"]["name"] for order in site.orders(dotted)] == ["d"])
    eventually(lambda: [order["pod"]["name"] for order in site.orders(dashed)] == ["e"])
    kubectl = site.kubectl.within(base)

    def told() -> set[str]:
        events = kubectl.get("events", "--field-selector", "involvedObject.kind=EnergyPolicy")["items"]
        return {event["involvedObject"]["name"] for event in events}

    eventually(lambda: set(long) <= told())
    assert "could not create Event" not in site.log.read_text()


def test_a_flood_of_policies_and_pods_delays_nobody_for_long(tenant, site, good_policy):
    node, his_node = site.node(), site.node()
    site.agent(node)
    policies, pods = (
        f"{API}/namespaces/{tenant.namespace}/energypolicies",
        f"/api/v1/namespaces/{tenant.namespace}/pods",
    )

    def post(number: int) -> None:
        if number < POLICIES:
            policy = named(good_policy, f"flood-{number:04}", tenant.namespace)
            policy["spec"]["placement"] = {"nodeSelector": {"nowhere": "true"}}
            assert tenant.caller.ask("POST", policies, policy) == (200, "")
        else:
            assert tenant.caller.ask("POST", pods, serving_pod(f"pod-{number}", his_node, NASTY | DECODE)) == (200, "")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(post, range(POLICIES + PODS)))
    # In the middle of it somebody else wants his GPU capped.
    site.kubectl.apply(placed(good_policy, site))
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    eventually(lambda: [o["capMHz"] for o in site.orders(node) if "capMHz" in o] == [1590])
    eventually(
        lambda: site.condition("Conflict", f"flood-{POLICIES - 1:04}", tenant.namespace)[0] == "True",
        2 * PATIENCE_SECONDS,
    )
    assert len(site.orders(his_node)) <= 256
    assert not [order for order in site.orders(his_node) if "capMHz" in order]
    page = site.http("/metrics")
    assert len(page) < 8 * 2**20
    assert "nnnnnnnn" not in page, "no label of a pod becomes a label of a metric"
    events = site.kubectl.within(tenant.namespace).get("events", "--chunk-size=500")["items"]
    told = [event for event in events if event["involvedObject"]["kind"] == "EnergyPolicy"]
    assert len(told) <= 10 * POLICIES
    assert "Traceback" not in site.log.read_text()
