"""What the tokens of agent and operator can do, by real requests to a real API server, with the chart's own rights."""

from collections.abc import Iterator
from typing import Any

import pytest
from chart_rights import ORDER, Caller, Site, eventually, order, pod_on, report, rights_of_the_chart

pytestmark = [pytest.mark.cluster]

API = "/apis/wattlock.dev/v1alpha1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
#: In paths: RELEASE and AGENTS are namespaces, MINE and OTHER nodes, NAME the prefix of the chart's names.
NOBODYS = {"metadata": {"name": "x"}}
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "x"},
    "spec": {"containers": [{"name": "c", "image": "i"}]},
}
TOKEN = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "x"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
}
MADE = {"apiVersion": "wattlock.dev/v1alpha1", "kind": "NodeEnergy", "metadata": {"name": "NAME-made"}, "spec": {}}
STATUS = {"status": {"locked": 1}}
ORDERS = {"spec": {"orders": [ORDER]}}

AGENT_MAY = [
    ("GET", f"{API}/nodeenergies", None),
    ("GET", f"{API}/nodeenergies/MINE", None),
    ("PATCH", f"{API}/nodeenergies/MINE/status", STATUS),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases/wattlock-operator", None),
]
NEITHER_MAY = [
    ("GET", "/api/v1/secrets", None),
    ("GET", "/api/v1/namespaces/RELEASE/secrets", None),
    ("GET", "/api/v1/namespaces/AGENTS/secrets/x", None),
    ("GET", "/api/v1/namespaces/kube-system/secrets", None),
    ("GET", "/api/v1/configmaps", None),
    ("GET", "/api/v1/namespaces/RELEASE/configmaps/NAME-agent-template", None),
    ("POST", "/api/v1/namespaces/AGENTS/pods", POD),
    ("POST", "/api/v1/namespaces/RELEASE/pods", POD),
    ("POST", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/exec?command=sh", None),
    ("GET", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/exec?command=sh", None),
    ("GET", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/log", None),
    ("GET", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/portforward?ports=1", None),
    ("GET", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/proxy/", None),
    ("PATCH", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/ephemeralcontainers", {"spec": {}}),
    ("PATCH", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/status", {"status": {"podIP": "192.0.2.1"}}),
    ("PATCH", "/api/v1/namespaces/AGENTS/pods/agent-OTHER", {"metadata": {"labels": {"a": "b"}}}),
    ("DELETE", "/api/v1/namespaces/AGENTS/pods/agent-OTHER", None),
    ("POST", "/api/v1/namespaces/AGENTS/pods/agent-OTHER/eviction", NOBODYS),
    ("PATCH", "/api/v1/nodes/MINE", {"metadata": {"labels": {"a": "b"}}}),
    ("PATCH", "/api/v1/nodes/MINE/status", {"status": {}}),
    ("GET", "/api/v1/nodes/MINE/proxy/pods", None),
    ("DELETE", "/api/v1/nodes/MINE", None),
    ("GET", "/api/v1/namespaces/AGENTS/serviceaccounts/NAME-agent", None),
    ("PATCH", "/api/v1/namespaces/AGENTS/serviceaccounts/NAME-agent", {"metadata": {"labels": {"a": "b"}}}),
    ("POST", "/api/v1/namespaces/AGENTS/serviceaccounts/NAME-agent/token", TOKEN),
    ("POST", "/api/v1/namespaces/RELEASE/serviceaccounts/NAME-operator/token", TOKEN),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases", None),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases/other", None),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/MINE", None),
    ("DELETE", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases/wattlock-operator", None),
    ("POST", f"{API}/namespaces/RELEASE/energypolicies", NOBODYS),
    ("DELETE", f"{API}/namespaces/RELEASE/energypolicies/x", None),
    ("PATCH", f"{API}/clockprofiles/published", {"spec": {}}),
    ("DELETE", f"{API}/clockprofiles/published", None),
    ("PATCH", f"{API}/nodeenergies/OTHER/status", STATUS),
    ("PUT", f"{API}/nodeenergies/MINE/status", NOBODYS),
    ("POST", f"{RBAC}/clusterrolebindings", BINDING),
    ("PATCH", f"{RBAC}/clusterroles/NAME-agent", {"rules": []}),
    ("DELETE", f"{ADMISSION}/validatingadmissionpolicies/NAME-nodeenergy-status", None),
    ("PATCH", f"{ADMISSION}/validatingadmissionpolicybindings/NAME-nodeenergy-spec", {"spec": {}}),
    ("PATCH", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/nodeenergies.wattlock.dev", {"spec": {}}),
    ("GET", "/apis/certificates.k8s.io/v1/certificatesigningrequests", None),
    ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", NOBODYS),
    ("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", NOBODYS),
    ("GET", "/apis/apps/v1/namespaces/RELEASE/deployments", None),
    ("PATCH", "/apis/apps/v1/namespaces/RELEASE/deployments/NAME-operator", {"spec": {}}),
    ("GET", "/apis/apps/v1/namespaces/kube-system/daemonsets", None),
    ("POST", "/apis/apps/v1/namespaces/kube-system/daemonsets", NOBODYS),
    ("GET", "/apis/resource.k8s.io/v1/resourceclaims", None),
    ("GET", "/logs/", None),
]
AGENT_MAY_NOT = [
    *NEITHER_MAY,
    ("PATCH", f"{API}/nodeenergies/MINE", ORDERS),
    ("POST", f"{API}/nodeenergies", MADE),
    ("DELETE", f"{API}/nodeenergies/MINE", None),
    ("GET", f"{API}/energypolicies", None),
    ("PATCH", f"{API}/namespaces/RELEASE/energypolicies/x/status", STATUS),
    ("GET", f"{API}/clockprofiles", None),
    ("GET", "/api/v1/pods", None),
    ("GET", "/api/v1/pods?fieldSelector=spec.nodeName%3DMINE", None),
    ("GET", "/api/v1/namespaces/AGENTS/pods/agent-MINE", None),
    ("GET", "/api/v1/nodes", None),
    ("GET", "/api/v1/nodes/MINE", None),
    ("GET", "/api/v1/namespaces", None),
    ("POST", "/api/v1/namespaces/AGENTS/events", NOBODYS),
    ("GET", "/apis/apps/v1/namespaces/AGENTS/daemonsets", None),
    ("DELETE", "/apis/apps/v1/namespaces/AGENTS/daemonsets/x", None),
    ("PUT", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases/wattlock-operator", NOBODYS),
    ("PATCH", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases/wattlock-operator", {"spec": {}}),
    ("POST", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases", NOBODYS),
]
OPERATOR_MAY = [
    ("GET", "/api/v1/pods", None),
    ("GET", "/api/v1/nodes", None),
    ("GET", "/api/v1/namespaces", None),
    ("GET", f"{API}/energypolicies", None),
    ("POST", f"{API}/nodeenergies", MADE),
    ("PATCH", f"{API}/nodeenergies/NAME-made", ORDERS),
    ("DELETE", f"{API}/nodeenergies/NAME-made", None),
    ("GET", "/apis/apps/v1/namespaces/AGENTS/daemonsets", None),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/RELEASE/leases/wattlock-operator", None),
]
OPERATOR_MAY_NOT = [
    *NEITHER_MAY,
    ("PATCH", f"{API}/nodeenergies/MINE/status", STATUS),
    ("GET", "/apis/apps/v1/daemonsets", None),
    ("GET", "/apis/apps/v1/namespaces/RELEASE/daemonsets", None),
]


@pytest.fixture(scope="module")
def site(kubectl, crds, tmp_path_factory) -> Iterator[Site]:
    with rights_of_the_chart(kubectl, tmp_path_factory.mktemp("tokens"), agents_apart=True, careless=False) as site:
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "wattlock-operator"}}
        kubectl.within(site.namespace).apply(lease)
        yield site


def filled(value: Any, site: Site) -> Any:
    """Return a path or body with the names of this installation."""
    if isinstance(value, dict):
        filled_in = {key: filled(inner, site) for key, inner in value.items()}
        if filled_in.get("kind") == "NodeEnergy":
            filled_in["metadata"]["labels"] = {"admission-test": site.release}
        return filled_in
    if not isinstance(value, str):
        return value
    names = {
        "RELEASE": site.namespace,
        "AGENTS": site.agents,
        "MINE": site.node_a,
        "OTHER": site.node_b,
        "NAME": f"{site.release}-wattlock",
    }
    for word, name in names.items():
        value = value.replace(word, name)
    return value


def callers(site: Site) -> dict[str, Any]:
    return {
        "agent": site.agent(site.node_a, "pod"),
        "operator": site.with_token(f"{site.release}-wattlock-operator"),
    }


@pytest.mark.parametrize(("who", "table"), [("agent", AGENT_MAY), ("operator", OPERATOR_MAY)])
def test_what_it_does_is_allowed(site, who, table):
    caller = Caller.of(callers(site)[who])
    for method, path, body in table:
        code, said = caller.ask(method, filled(path, site), filled(body, site))
        assert code == 200, said


@pytest.mark.parametrize(("who", "table"), [("agent", AGENT_MAY_NOT), ("operator", OPERATOR_MAY_NOT)])
def test_everything_else_is_forbidden(site, who, table):
    caller = Caller.of(callers(site)[who])
    answers = {
        (method, path): caller.ask(method, filled(path, site), filled(body, site)) for method, path, body in table
    }
    assert {asked: answer for asked, answer in answers.items() if answer[0] != 403} == {}


@pytest.mark.parametrize("who", ["agent", "operator"])
@pytest.mark.parametrize("mask", ["admin", "system:serviceaccount:kube-system:namespace-controller", "other"])
def test_nobody_can_be_impersonated(site, who, mask):
    mask = f"system:serviceaccount:{site.namespace}:{site.release}-wattlock-operator" if mask == "other" else mask
    masked = Caller.of(callers(site)[who], {"Impersonate-User": mask})
    code, said = masked.ask("GET", f"{API}/nodeenergies")
    assert (code, "cannot impersonate" in said) == (403, True), said


def rules(kubectl: Any, namespace: str) -> set[tuple[str, ...]]:
    """Return all that somebody may do with resources in a namespace, one right a line, as the authorizer tells it."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    answer = Caller.of(kubectl).kube.request(
        "POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", body=review
    )
    assert not answer["status"].get("incomplete")
    return {
        (verb, f"{resource}.{group}".rstrip("."), name)
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames") or [""]
    }


def rights(what: str, *verbs: str, name: str = "") -> set[tuple[str, ...]]:
    return {(verb, what, name) for verb in verbs}


LOOK = ("get", "list", "watch")
AGENT_RIGHTS = rights("nodeenergies.wattlock.dev", *LOOK) | rights("nodeenergies/status.wattlock.dev", "patch")
AGENT_IN_RELEASE = rights("leases.coordination.k8s.io", "get", name="wattlock-operator")
OPERATOR_RIGHTS = (
    rights("energypolicies.wattlock.dev", *LOOK, "patch")
    | rights("energypolicies/status.wattlock.dev", "patch")
    | rights("nodeenergies.wattlock.dev", *LOOK, "create", "patch", "delete")
    | rights("clockprofiles.wattlock.dev", *LOOK, "create")
    | rights("pods", *LOOK)
    | rights("nodes", *LOOK)
    | rights("namespaces", *LOOK)
    | rights("customresourcedefinitions.apiextensions.k8s.io", *LOOK)
    | rights("events", "create")
)
OPERATOR_IN_RELEASE = rights("leases.coordination.k8s.io", "get", "update", name="wattlock-operator") | rights(
    "leases.coordination.k8s.io", "create"
)
OPERATOR_IN_AGENTS = rights("daemonsets.apps", *LOOK, "create", "patch", "delete")


def test_the_authorizer_knows_of_no_other_right(site, kubectl):
    kubectl.within(site.agents).apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody"}})
    nobody = site.with_token("nobody")
    expected = {
        ("agent", "elsewhere"): AGENT_RIGHTS,
        ("agent", "agents"): AGENT_RIGHTS,
        ("agent", "release"): AGENT_RIGHTS | AGENT_IN_RELEASE,
        ("operator", "elsewhere"): OPERATOR_RIGHTS,
        ("operator", "agents"): OPERATOR_RIGHTS | OPERATOR_IN_AGENTS,
        ("operator", "release"): OPERATOR_RIGHTS | OPERATOR_IN_RELEASE,
    }
    places = {"elsewhere": "default", "agents": site.agents, "release": site.namespace}
    found = {
        (who, place): rules(caller, namespace) - rules(nobody, namespace)
        for who, caller in callers(site).items()
        for place, namespace in places.items()
    }
    assert found == expected


def test_a_report_changes_no_label_annotation_or_owner(site):
    before = site.kubectl.get("nodeenergy", site.node_a)["metadata"]
    forged = {
        "annotations": {"wattlock.dev/peer-power": "{}"},
        "labels": {"a": "b"},
        "finalizers": ["example.com/stay"],
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": site.node_b, "uid": "1"}],
    }
    body = {"metadata": forged, "status": {"locked": 2}}
    code, said = Caller.of(site.agent(site.node_a, "pod")).ask(
        "PATCH", f"{API}/nodeenergies/{site.node_a}/status", body
    )
    assert code == 200, said
    after = site.kubectl.get("nodeenergy", site.node_a)["metadata"]
    for field in forged:
        assert after.get(field) == before.get(field), field


def test_a_token_dies_with_its_agents_pod(site, kubectl):
    pod = pod_on(site.node_a, f"{site.release}-wattlock-agent")
    pod["metadata"]["name"] = "agent-short"
    agents = kubectl.within(site.agents)
    agents.apply(pod)
    uid = agents.get("pod", "agent-short")["metadata"]["uid"]
    bound = {"kind": "Pod", "apiVersion": "v1", "name": "agent-short", "uid": uid}
    thief = site.with_token(
        f"{site.release}-wattlock-agent", *(f"--bound-object-{key}={bound[key]}" for key in ("kind", "name", "uid"))
    )
    thief, mine = Caller.of(thief), f"{API}/nodeenergies/{site.node_a}/status"
    assert thief.ask("PATCH", mine, STATUS) == (200, "")
    agents.run("delete", "pod", "agent-short", "--grace-period=0", "--force")
    eventually("the token is refused", lambda: thief.ask("PATCH", mine, STATUS)[0] == 401)


def test_without_the_admission_policies_the_same_attacks_succeed(kubectl, crds, tmp_path):
    # So it is these policies that stop them above and in test_admission_policy.py, and nothing else.
    with rights_of_the_chart(kubectl, tmp_path, "admission.enabled=false") as bare:
        agent, somebody = bare.agent(bare.node_a, "pod"), bare.with_token("intruder")
        for answer in (report(agent, bare.node_b), order(agent, bare.node_b), order(somebody, bare.node_a)):
            assert answer.returncode == 0, answer.stderr
        assert bare.kubectl.get("nodeenergy", bare.node_a)["spec"]["orders"][0]["capMHz"] == 1590
