"""Who may write a NodeEnergy, tried with real tokens against a real API server."""

import json
from collections.abc import Iterator

import pytest
import yaml
from chart_rights import CHART, ORDER, Site, eventually, label, node_energy, order, report, rights_of_the_chart

pytestmark = [pytest.mark.cluster]

ONLY_OPERATOR = "a NodeEnergy is written by Wattlock's operator alone"
ONLY_AGENT = "the status of a NodeEnergy is written by Wattlock's agent on that node alone"


@pytest.fixture(scope="module")
def site(kubectl, crds, tmp_path_factory) -> Iterator[Site]:
    with rights_of_the_chart(kubectl, tmp_path_factory.mktemp("tokens")) as site:
        yield site


bindings = pytest.mark.parametrize("binding", ["pod", "node"])


@bindings
def test_an_agent_reports_about_its_own_node(site, binding):
    answer = report(site.agent(site.node_a, binding), site.node_a)
    assert answer.returncode == 0, answer.stderr
    assert site.kubectl.get("nodeenergy", site.node_a)["status"]["locked"] == 3


def test_an_agent_reports_by_server_side_apply(site):
    me = site.agent(site.node_a, "pod")
    mine = {**node_energy(site.node_a, site.release), "status": {"observedGeneration": 2}}
    del mine["spec"], mine["metadata"]["labels"]
    words = ("apply", "--server-side", "--subresource=status", "--field-manager=wattlock-agent", "-f", "-")
    answer = me.run(*words, "--force-conflicts", stdin=yaml.safe_dump(mine), check=False)
    assert answer.returncode == 0, answer.stderr
    assert site.kubectl.get("nodeenergy", site.node_a)["status"]["observedGeneration"] == 2


@bindings
def test_an_agent_cannot_report_about_another_node(site, binding):
    before = site.kubectl.get("nodeenergy", site.node_b)
    answer = report(site.agent(site.node_a, binding), site.node_b)
    assert answer.returncode != 0
    assert (
        f"the agent of node {site.node_a} may report only about its own node, not about {site.node_b}" in answer.stderr
    )
    assert site.kubectl.get("nodeenergy", site.node_b) == before


def test_a_token_that_names_no_node_cannot_report(site):
    answer = report(site.with_token(f"{site.release}-wattlock-agent"), site.node_a)
    assert answer.returncode != 0
    assert "this agent token names no node: use the token that the kubelet mounts" in answer.stderr


@bindings
def test_an_agent_cannot_give_orders_even_where_rbac_would_let_it(site, binding):
    me = site.agent(site.node_a, binding)
    assert me.run("auth", "can-i", "patch", "nodeenergies").stdout.strip() == "yes"
    answer = order(me, site.node_a)
    assert answer.returncode != 0
    assert ONLY_OPERATOR in answer.stderr
    assert site.kubectl.get("nodeenergy", site.node_a)["spec"] == {"orders": []}


def test_a_report_cannot_carry_orders(site):
    patch = json.dumps({"spec": {"orders": [ORDER]}, "status": {"locked": 5}})
    assert report(site.agent(site.node_a, "pod"), site.node_a, patch).returncode == 0
    after = site.kubectl.get("nodeenergy", site.node_a)
    assert (after["spec"], after["status"]["locked"]) == ({"orders": []}, 5)


def test_the_operator_gives_orders_and_makes_and_deletes_the_objects(site):
    operator = site.with_token(f"{site.release}-wattlock-operator")
    name = f"{site.release}-c"
    manifest = yaml.safe_dump(node_energy(name, site.release))
    words = ("apply", "--server-side", "--field-manager=wattlock-operator", "-f", "-")
    made = operator.run(*words, stdin=manifest, check=False)
    assert made.returncode == 0, made.stderr
    answer = order(operator, name)
    assert answer.returncode == 0, answer.stderr
    assert site.kubectl.get("nodeenergy", name)["spec"]["orders"][0]["capMHz"] == 1590
    answer = operator.run("delete", "nodeenergy", name, "--wait=false", check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_operator_cannot_report(site):
    answer = report(site.with_token(f"{site.release}-wattlock-operator"), site.node_a)
    assert answer.returncode != 0
    assert "forbidden" in answer.stderr


def test_somebody_with_a_careless_role_can_change_nothing(site):
    somebody = site.with_token("intruder")
    answers = {
        "order": order(somebody, site.node_a),
        "label": label(somebody, site.node_a),
        "create": somebody.run(
            "create", "-f", "-", stdin=yaml.safe_dump(node_energy(f"{site.release}-d", site.release)), check=False
        ),
        "delete": somebody.run("delete", "nodeenergy", site.node_a, "--wait=false", check=False),
    }
    for what, answer in answers.items():
        assert answer.returncode != 0, what
        assert ONLY_OPERATOR in answer.stderr, (what, answer.stderr)
        assert "edit the EnergyPolicy that selects their pods" in answer.stderr
    answer = report(somebody, site.node_a)
    assert answer.returncode != 0
    assert ONLY_AGENT in answer.stderr


def test_an_administrator_may_override(site):
    assert label(site.kubectl, site.node_b).returncode == 0
    answer = report(site.kubectl, site.node_b, '{"status":{"locked":0}}')
    assert answer.returncode == 0, answer.stderr


def test_kubernetes_itself_may_collect_the_objects_but_give_no_orders(site):
    name = f"{site.release}-e"
    site.kubectl.apply(node_energy(name, site.release))
    # the garbage collector: RBAC lets it delete anything
    as_collector = (
        "--as=system:serviceaccount:kube-system:generic-garbage-collector",
        "--as-group=system:serviceaccounts:kube-system",
        "--as-group=system:serviceaccounts",
        "--as-group=system:authenticated",
    )
    patch = json.dumps({"spec": {"orders": [ORDER]}})
    ordered = site.kubectl.run(*as_collector, "patch", "nodeenergy", name, "--type=merge", "-p", patch, check=False)
    assert ordered.returncode != 0
    assert ONLY_OPERATOR in ordered.stderr
    patched = site.kubectl.run(
        *as_collector, "patch", "nodeenergy", name, "--type=merge", "-p", '{"metadata":{"finalizers":[]}}', check=False
    )
    assert patched.returncode == 0, patched.stderr
    deleted = site.kubectl.run(*as_collector, "delete", "nodeenergy", name, "--wait=false", check=False)
    assert deleted.returncode == 0, deleted.stderr


def test_the_expressions_pass_the_servers_type_check(site):
    for name in ("spec", "status"):
        where = ("validatingadmissionpolicy", f"{site.release}-wattlock-nodeenergy-{name}")
        # the controller manager checks, and says so by observedGeneration
        eventually(
            "the types are checked", lambda where=where: "observedGeneration" in site.kubectl.get(*where)["status"]
        )
        assert site.kubectl.get(*where)["status"]["typeChecking"].get("expressionWarnings", []) == []


@pytest.mark.parametrize("path", sorted((CHART / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_api_server_accepts_the_examples(kubectl, namespace, path):
    answer = kubectl.within(namespace).run("apply", "--dry-run=server", "-f", str(path), check=False)
    assert answer.returncode == 0, answer.stderr
