"""The metrics pages of the running operator and agents: what promtool says, and what they tell of live pods."""

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from promtool import check_metrics
from wattlock_agent import metric_specs as agent_specs
from wattlock_operator import metric_specs as operator_specs
from workloads import AGENT_LABEL, SYSTEM, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OPERATOR_LABEL = "app.kubernetes.io/component=operator"
ALWAYS = {"verification": {"method": "None"}}


def page(kubectl, pod) -> str:
    """A pod's page, asked for inside the pod: no way from here into the cluster's network is needed."""
    (port,) = [
        port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
        if port["name"] in ("http", "metrics")
    ]
    code = f"import urllib.request as u;print(u.urlopen('http://127.0.0.1:{port}/metrics',timeout=5).read().decode())"
    text = kubectl.within(SYSTEM).run("exec", pod["metadata"]["name"], "--", "python", "-c", code).stdout
    return str(text).rstrip("\n") + "\n"


def pods(kubectl, label):
    return kubectl.within(SYSTEM).get("pods", "-l", label, "--field-selector", "status.phase=Running")["items"]


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_live_pages_are_without_fault_and_tell_what_status_tells(serving_pods, simulator, good_policy, kubectl):
    workload = serving_pods
    spec = good_policy["spec"] | ALWAYS
    workload.kubectl.apply(good_policy | {"spec": spec})
    eventually("decode is locked", workload.locked, 30)
    eventually("decode is measured", lambda: workload.pool("decode").get("joulesPerGeneratedToken"), 60)

    (operator,) = pods(kubectl, OPERATOR_LABEL)
    text = page(kubectl, operator)
    assert check_metrics(text) == ""
    found = families(text)
    assert set(found) == {spec.family for spec in operator_specs.SPECS}
    mine = {"namespace": workload.kubectl.namespace, "policy": "qwen", "pool": "decode", "role": "Decode"}
    capped = [sample.value for sample in found["wattlock_pool_capped_gpus"].samples if sample.labels == mine]
    assert capped == [2]

    held = workload.gpus("decode")
    locked = {}
    for agent in pods(kubectl, AGENT_LABEL):
        text = page(kubectl, agent)
        assert check_metrics(text) == ""
        found = families(text)
        assert set(found) == {spec.family for spec in agent_specs.SPECS}
        locked |= {
            sample.labels["gpu"]: sample.labels["pod"]
            for sample in found["wattlock_gpu_state"].samples
            if sample.labels["state"] == "Locked" and sample.value == 1
        }
    assert set(locked) == held
    assert set(locked.values()) == {pod["metadata"]["name"] for pod in workload.pods("decode")}

    workload.delete_policies()
    gone = lambda: 'policy="qwen"' not in page(kubectl, pods(kubectl, OPERATOR_LABEL)[0])  # noqa: E731
    eventually("the policy's series are gone", gone, 30)
