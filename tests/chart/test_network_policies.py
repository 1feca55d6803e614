"""NetworkPolicies: off unless asked for; then they select our pods and let through what those pods need, no more."""

from typing import Any

import pytest
import yaml
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Placement
from wattlock_operator.placement import daemon_set
from wattlock_operator.sharing import Shared

pytestmark = [pytest.mark.chart]

ON = ("networkPolicy.enabled=true", "agent.namespace=gpu-agents")


def policies(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == "NetworkPolicy"}


def selects(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether the policy's podSelector takes a pod with these labels; only the forms that ours use."""
    selector = policy["spec"]["podSelector"]
    assert set(selector) == {"matchLabels", "matchExpressions"}
    assert {expression["operator"] for expression in selector["matchExpressions"]} == {"In"}
    return selector["matchLabels"].items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in selector["matchExpressions"]
    )


def our_pods(objects: list[dict[str, Any]]) -> dict[str, tuple[str, dict[str, str], dict[str, Any]]]:
    """Return namespace, labels and first container of each pod that talks to the API server, by component."""
    (template,) = [o for o in objects if o["metadata"]["name"] == "wattlock-agent-template"]
    agents = daemon_set(
        yaml.safe_load(template["data"]["agent-daemonset.yaml"]), Shared((Placement(),), Mode.ENFORCE), "gpu-agents"
    )
    found = {}
    for o in [*objects, agents]:
        pod = o if o["kind"] == "Pod" else o["spec"]["template"] if o["kind"] in ("Deployment", "Job") else None
        pod = agents["spec"]["template"] if o is agents else pod
        if pod is not None:
            labels = pod["metadata"]["labels"]
            component = labels["app.kubernetes.io/component"]
            found[component] = (o["metadata"]["namespace"], labels, pod["spec"]["containers"][0])
    assert set(found) == {"operator", "release-hook", "check", "agent"}
    return found


def test_none_unless_asked_for(helm):
    assert policies(helm.render()) == {}


def test_each_of_our_pods_is_selected_by_one_policy_in_its_namespace(helm):
    objects = helm.render(*ON)
    for component, (namespace, labels, _) in our_pods(objects).items():
        ours = [
            name
            for name, policy in policies(objects).items()
            if policy["metadata"]["namespace"] == namespace and selects(policy, labels)
        ]
        assert ours == ["wattlock-agent" if component == "agent" else "wattlock-operator"], component


def test_pods_of_others_are_left_alone(helm):
    # a release of another name in the same namespace, and a serving pod
    mine = {"app.kubernetes.io/name": "wattlock", "app.kubernetes.io/component": "agent"}
    for policy in policies(helm.render(*ON)).values():
        assert not selects(policy, {**mine, "app.kubernetes.io/instance": "other"})
        assert not selects(policy, {"app.kubernetes.io/component": "agent"})


def test_only_the_port_of_metrics_and_probes_is_open(helm):
    objects = helm.render(*ON)
    for component in ("operator", "agent"):
        spec = policies(objects)[f"wattlock-{component}"]["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        (rule,) = spec["ingress"]
        assert set(rule) == {"ports"}
        _, _, container = our_pods(objects)[component]
        assert rule["ports"] == [{"protocol": "TCP", "port": port["name"]} for port in container["ports"]]
        assert {probe["httpGet"]["port"] for probe in (container["livenessProbe"], container["readinessProbe"])} == {
            rule["ports"][0]["port"]
        }


def test_the_operator_reaches_the_api_server_and_names_only(helm):
    api, names = policies(helm.render(*ON))["wattlock-operator"]["spec"]["egress"]
    assert api == {"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}
    assert names == {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}


def test_the_agent_also_reaches_pods_and_what_is_named(helm):
    operator, agent = (
        policies(helm.render(*ON, "networkPolicy.servingCIDRs={10.1.0.0/16}"))[f"wattlock-{component}"]["spec"]
        for component in ("operator", "agent")
    )
    assert agent["egress"][:2] == operator["egress"]
    assert agent["egress"][2:] == [{"to": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.1.0.0/16"}}]}]


def test_addresses_and_scrapers_can_be_narrowed(helm):
    objects = helm.render(
        *ON,
        "networkPolicy.apiServer.ports={8443}",
        "networkPolicy.apiServer.cidrs={10.0.0.10/32,fd00::10/128}",
        "networkPolicy.metricsFrom[0].podSelector.matchLabels.app=prometheus",
    )
    for policy in policies(objects).values():
        assert policy["spec"]["egress"][0] == {
            "ports": [{"protocol": "TCP", "port": 8443}],
            "to": [{"ipBlock": {"cidr": "10.0.0.10/32"}}, {"ipBlock": {"cidr": "fd00::10/128"}}],
        }
        assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]
