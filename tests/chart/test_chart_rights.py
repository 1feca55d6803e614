"""What the chart's roles let its parts do, and whom they are bound to."""

import pytest
from rendered import named

pytestmark = [pytest.mark.chart]


def test_every_binding_names_a_role_and_an_account_that_exist(helm):
    objects = helm.render("agent.namespace=gpu-agents")
    roles = {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects}
    for binding in [o for o in objects if o["kind"] in ("RoleBinding", "ClusterRoleBinding")]:
        role = binding["roleRef"]
        assert (role["kind"], binding["metadata"].get("namespace"), role["name"]) in roles
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["namespace"], subject["name"]) in roles


def test_the_agent_may_do_little(helm):
    objects = helm.render("agent.namespace=gpu-agents")
    assert named(objects, "ClusterRole", "wattlock-agent")["rules"] == [
        {"apiGroups": ["wattlock.dev"], "resources": ["nodeenergies"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["wattlock.dev"], "resources": ["nodeenergies/status"], "verbs": ["patch"]},
    ]
    lease = named(objects, "Role", "wattlock-agent-lease")
    assert lease["metadata"]["namespace"] == "wattlock-system"
    assert lease["rules"] == [
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": ["wattlock-operator"],
            "verbs": ["get"],
        }
    ]
    bound = [
        o["roleRef"]["name"]
        for o in objects
        if o["kind"] in ("RoleBinding", "ClusterRoleBinding")
        and any(subject["name"] == "wattlock-agent" for subject in o["subjects"])
    ]
    assert sorted(bound) == ["wattlock-agent", "wattlock-agent-lease"]


def rights_of(objects, account: str) -> dict[tuple[str, str, str], set[str]]:
    """Verbs by namespace (empty: everywhere), group and resource (with its name, where only one may be touched)."""
    rights: dict[tuple[str, str, str], set[str]] = {}
    for binding in [o for o in objects if o["kind"] in ("RoleBinding", "ClusterRoleBinding")]:
        if [subject["name"] for subject in binding["subjects"]] != [account]:
            continue
        where = binding["metadata"].get("namespace", "")
        for rule in named(objects, binding["roleRef"]["kind"], binding["roleRef"]["name"])["rules"]:
            for resource in rule["resources"]:
                place = f"{resource} {''.join(rule.get('resourceNames', []))}".strip()
                for group in rule["apiGroups"]:
                    rights.setdefault((where, group, place), set()).update(rule["verbs"])
    return rights


def test_the_release_hook_may_do_what_it_does_and_no_more(helm):
    """It stops the operator by its scale: who may change the Deployment may run anything with the operator's rights."""
    assert rights_of(helm.render("agent.namespace=gpu-agents"), "wattlock-release-all") == {
        ("", "wattlock.dev", "nodeenergies"): {"list"},
        ("", "wattlock.dev", "energypolicies"): {"list", "patch"},
        ("wattlock-system", "apps", "deployments wattlock-operator"): {"get"},
        ("wattlock-system", "apps", "deployments/scale wattlock-operator"): {"patch"},
        ("wattlock-system", "", "pods"): {"list"},
        ("gpu-agents", "apps", "daemonsets"): {"list", "delete"},
        ("gpu-agents", "", "pods"): {"list"},
    }


def test_the_operator_may_do_what_it_does_and_no_more(helm):
    """Every verb here is one that the operator's code, or Kopf for it, sends; PUT is for the lease alone."""
    read = {"get", "list", "watch"}
    assert rights_of(helm.render("agent.namespace=gpu-agents"), "wattlock-operator") == {
        ("", "wattlock.dev", "energypolicies"): read | {"patch"},
        ("", "wattlock.dev", "energypolicies/status"): {"patch"},
        ("", "wattlock.dev", "nodeenergies"): read | {"create", "patch", "delete"},
        ("", "wattlock.dev", "clockprofiles"): read | {"create"},
        ("", "", "pods"): read,
        ("", "", "nodes"): read,
        ("", "", "namespaces"): read,
        ("", "apiextensions.k8s.io", "customresourcedefinitions"): read,
        ("", "", "events"): {"create"},
        ("gpu-agents", "apps", "daemonsets"): read | {"create", "patch", "delete"},
        ("wattlock-system", "coordination.k8s.io", "leases wattlock-operator"): {"get", "update"},
        ("wattlock-system", "coordination.k8s.io", "leases"): {"create"},
    }


def test_nobody_gets_a_right_to_edit_a_nodeenergy_by_aggregation(helm):
    for name in ("wattlock-viewer", "wattlock-editor"):
        for rule in named(helm.render(), "ClusterRole", name)["rules"]:
            if "nodeenergies" in rule["resources"]:
                assert set(rule["verbs"]) == {"get", "list", "watch"}
