"""The agents' DaemonSets."""

import dataclasses
from typing import Any

import pytest
from operator_worlds import GPU_NODE, agent_pod, gpu, node_energy, policy, world
from wattlock_api.constants import PLACEMENT_LABEL, GpuState, Mode
from wattlock_api.energypolicy import Placement, Toleration
from wattlock_operator.placement import TemplateError, daemon_set, plan_daemon_sets
from wattlock_operator.sharing import placement_hash, share
from wattlock_operator.world import DaemonSetView

TEMPLATE: dict[str, Any] = {
    "kind": "DaemonSet",
    "metadata": {"name": "x", "labels": {"helm.sh/chart": "wattlock-1"}},
    "spec": {
        "selector": {"matchLabels": {"helm.sh/chart": "wattlock-1"}},
        "template": {
            "metadata": {"labels": {"team": "infra"}},
            "spec": {
                "nodeSelector": {"kubernetes.io/os": "linux"},
                "tolerations": [{"key": "infra", "operator": "Exists"}],
                "containers": [
                    {"name": "agent", "env": [{"name": "WATTLOCK_MODE", "value": "x"}, {"name": "A", "value": "b"}]},
                    {"name": "sidecar"},
                ],
            },
        },
    },
}
HASH = placement_hash(Placement())


def existing(placed: str = HASH, fingerprint: str = "") -> DaemonSetView:
    return DaemonSetView(f"wattlock-agent-{placed}", placed, fingerprint)


def made_of(placement: Placement, mode: Mode = Mode.OBSERVE, template: Any = TEMPLATE) -> dict[str, Any]:
    (shared,) = share([policy(spec={"mode": mode, "placement": placement})])
    return daemon_set(template, shared, "wattlock")


def test_the_template_gets_name_place_mode_and_the_one_capability():
    placement = Placement(
        node_selector={"pool": "h200"}, tolerations=[Toleration(key="gpu")], runtime_class_name="nvidia"
    )
    made = made_of(placement, Mode.ENFORCE)
    placed = placement_hash(placement)
    assert made["metadata"]["name"] == f"wattlock-agent-{placed}"
    assert made["metadata"]["namespace"] == "wattlock"
    assert made["metadata"]["labels"]["helm.sh/chart"] == "wattlock-1"
    selector = made["spec"]["selector"]["matchLabels"]
    assert selector[PLACEMENT_LABEL] == placed
    assert "helm.sh/chart" not in selector, "a selector cannot be changed when the chart's version does"
    pod = made["spec"]["template"]
    assert selector.items() <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["labels"]["team"] == "infra"
    spec = pod["spec"]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "h200"}
    assert spec["tolerations"] == [{"key": "infra", "operator": "Exists"}, {"key": "gpu"}]
    assert spec["runtimeClassName"] == "nvidia"
    agent = spec["containers"][0]
    assert agent["env"] == [{"name": "A", "value": "b"}, {"name": "WATTLOCK_MODE", "value": "Enforce"}]
    assert agent["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    assert spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert "nodeAffinity" not in spec["affinity"]
    assert "affinity" not in TEMPLATE["spec"]["template"]["spec"], "the template itself must stay as it is"


def test_observing_agents_have_no_capability():
    agent = made_of(Placement())["spec"]["template"]["spec"]["containers"][0]
    assert agent["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    "template",
    [{}, {"kind": "Deployment"}, {"kind": "DaemonSet"}, {"kind": "DaemonSet", "spec": []}],
)
def test_a_template_that_is_none_is_refused_with_a_sentence(template):
    with pytest.raises(TemplateError, match="agent template"):
        made_of(Placement(), template=template)


def test_the_order_of_tolerations_does_not_make_a_placement():
    one, two = Toleration(key="a"), Toleration(key="b")
    assert placement_hash(Placement(tolerations=[one, two])) == placement_hash(Placement(tolerations=[two, one]))
    assert placement_hash(Placement(tolerations=[one])) != placement_hash(Placement(tolerations=[two]))


def modes(plan) -> list[str]:
    return [made["spec"]["template"]["spec"]["containers"][0]["env"][-1]["value"] for made in plan.apply]


def test_policies_of_one_placement_share_agents_and_one_that_enforces_is_enough():
    plan = plan_daemon_sets(world([policy("a", spec={"mode": "Observe"}), policy("b")]), TEMPLATE, ())
    assert modes(plan) == ["Enforce"]


def test_what_is_there_already_is_not_written_again():
    (made,) = plan_daemon_sets(world([policy()]), TEMPLATE, ()).apply
    present = existing(fingerprint=made["metadata"]["annotations"]["wattlock.dev/applied"])
    assert plan_daemon_sets(world([policy()], daemon_sets=(present,)), TEMPLATE, ()).apply == ()


LOCKED = {"node_energies": [node_energy(gpus=[gpu()])], "pods": [agent_pod("n1", HASH)], "daemon_sets": (existing(),)}


@pytest.mark.parametrize(
    ("policies", "options", "releasing", "deleted"),
    [
        ([], {"daemon_sets": (existing(),)}, [], True),
        ([policy()], {"daemon_sets": (existing(),)}, [], False),
        ([policy(deleting=True)], {"daemon_sets": (existing(),)}, ["uid-qwen"], False),
        ([policy(deleting=True)], {"daemon_sets": (existing(),)}, [], True),
        ([], LOCKED, [], False),
        ([], {**LOCKED, "nodes": ()}, [], True),
        # the policy moved to another placement: the old agents release as they stop
        ([policy(spec={"placement": {"nodeSelector": {"a": "b"}}})], LOCKED, [], True),
    ],
)
def test_agents_outlive_the_locks_of_policies_that_go(policies, options, releasing, deleted):
    plan = plan_daemon_sets(world(policies, **options), TEMPLATE, releasing)
    assert (plan.delete == (f"wattlock-agent-{HASH}",)) is deleted


def test_agents_outlive_a_lock_that_was_given_up_on_a_node_without_an_agent():
    """Its policy is gone by ``abandon-unreachable-nodes``: only an agent that starts there undoes it."""
    left = LOCKED | {"pods": []}
    assert plan_daemon_sets(world(**left), TEMPLATE, ()).delete == ()
    assert plan_daemon_sets(world(**left, nodes=()), TEMPLATE, ()).delete != (), "unless the node is gone, too"
    undone = left | {"node_energies": [node_energy(gpus=[gpu(state=GpuState.RELEASED, reason="NoOrder")])]}
    assert plan_daemon_sets(world(**undone), TEMPLATE, ()).delete != ()


def test_a_policy_that_is_not_understood_keeps_all_agents():
    unclear = dataclasses.replace(policy(), spec=None)
    assert plan_daemon_sets(world([unclear], daemon_sets=(existing("12345678"),)), TEMPLATE, ()).delete == ()


def test_agents_have_the_capability_until_their_gpus_are_released():
    # also those that find the lock of an agent that was killed: without it nobody could undo it
    observing = [policy(spec={"mode": "Observe"})]
    assert modes(plan_daemon_sets(world(observing, **LOCKED), TEMPLATE, ())) == ["Enforce"]
    assert modes(plan_daemon_sets(world(observing, daemon_sets=(existing(),)), TEMPLATE, ())) == ["Observe"]


def test_the_default_placement_is_the_label_of_gpu_feature_discovery():
    assert Placement().node_selector == GPU_NODE
