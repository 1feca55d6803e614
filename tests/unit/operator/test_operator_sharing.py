"""Which placements are taken on, and which share a DaemonSet: one agent on a node, never without a right it needs."""

import copy
import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_worlds import DECODE, GPU_NODE, NOW, PREFILL, agent_pod, pod, policy, world
from wattlock_api.base import Toleration
from wattlock_api.constants import Reason
from wattlock_api.energypolicy import Placement
from wattlock_operator.decide import Decision, Memory, decide
from wattlock_operator.placement import plan_daemon_sets
from wattlock_operator.sharing import MAX_PLACEMENTS, is_within, placement_hash, refusals, share, tolerates_as_much
from wattlock_operator.world import PolicyView, World

#: With terms of its own, as the chart's has them: paused nodes are left.
PAUSE = "nvidia.com/gpu.deploy.client"
TEMPLATE: dict[str, Any] = {
    "kind": "DaemonSet",
    "spec": {
        "template": {
            "spec": {
                "containers": [{"name": "agent"}],
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {
                            "nodeSelectorTerms": [
                                {"matchExpressions": [{"key": PAUSE, "operator": "DoesNotExist"}]},
                                {"matchExpressions": [{"key": PAUSE, "operator": "In", "values": ["true"]}]},
                            ]
                        }
                    }
                },
            }
        }
    },
}
TAINTS = [("gpu", "", "NoSchedule"), ("team", "a", "NoSchedule"), ("team", "b", "NoExecute"), ("cp", "", "NoSchedule")]


def holds(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    if expression["operator"] == "In":
        return labels.get(expression["key"]) in expression["values"]
    assert expression["operator"] == "DoesNotExist"
    return expression["key"] not in labels


def tolerated(taint: tuple[str, str, str], tolerations: list[dict[str, Any]]) -> bool:
    key, value, effect = taint
    return any(
        entry.get("effect") in (None, effect)
        and (not entry.get("key") or entry["key"] == key)
        and (entry.get("operator") == "Exists" or entry.get("value", "") == value)
        for entry in tolerations
    )


def runs_on(made: dict[str, Any], labels: dict[str, str], taints: set[tuple[str, str, str]]) -> bool:
    """Whether Kubernetes would run a pod of the DaemonSet on a node."""
    spec = made["spec"]["template"]["spec"]
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return (
        spec["nodeSelector"].items() <= labels.items()
        and any(
            all(holds(entry, labels) for entry in term["matchExpressions"]) for term in required["nodeSelectorTerms"]
        )
        and all(tolerated(taint, spec["tolerations"]) for taint in taints)
    )


def may_write(made: dict[str, Any]) -> bool:
    (container,) = made["spec"]["template"]["spec"]["containers"]
    return "SYS_ADMIN" in container["securityContext"]["capabilities"].get("add", [])


def made_for(policies: list[PolicyView], allowed: tuple[Placement, ...] = ()) -> list[dict[str, Any]]:
    return list(plan_daemon_sets(world(policies, allowed_placements=allowed), TEMPLATE, ()).apply)


values = st.sampled_from(["", "1", "2"])
label_sets = st.dictionaries(st.sampled_from(["a", "b", "c"]), values, max_size=3)
tolerations = st.builds(
    lambda key, exists, value, effect: Toleration(
        key=key,
        operator="Exists" if exists or not key else None,
        value=None if exists or not key else value,
        effect=effect,
    ),
    st.sampled_from(["gpu", "team", None]),
    st.booleans(),
    st.sampled_from(["a", "b", None]),
    st.sampled_from([None, "NoSchedule", "NoExecute"]),
)
placements = st.one_of(
    st.just(Placement()),
    st.builds(
        lambda selector, tolerated, runtime: Placement(
            node_selector=selector, tolerations=tolerated, runtime_class_name=runtime
        ),
        label_sets,
        st.lists(tolerations, max_size=3),
        st.sampled_from([None, "nvidia", "kata"]),
    ),
)
policy_lists = st.lists(
    st.builds(
        lambda namespace, created, mode, placement, deleting: policy(
            namespace=namespace,
            created=f"2026-01-01T00:00:{created:02}Z",
            deleting=deleting,
            spec={"mode": mode, "placement": placement},
        ),
        st.sampled_from(["n1", "n2", "n3"]),
        st.integers(0, 59),
        st.sampled_from(["Observe", "Enforce"]),
        placements,
        st.sampled_from([False, False, False, True]),
    ),
    max_size=30,
).map(lambda found: [dataclasses.replace(entry, uid=f"uid-{i}", name=f"p{i}") for i, entry in enumerate(found)])
nodes = st.tuples(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), values).flatmap(
        lambda labels: st.sampled_from(
            [labels, labels | GPU_NODE, labels | {PAUSE: "true"}, labels | {PAUSE: "paused"}]
        )
    ),
    st.sets(st.sampled_from(TAINTS), max_size=2),
)


@settings(max_examples=200)
@given(policy_lists, st.lists(nodes, min_size=1, max_size=8))
def test_one_agent_on_a_node_and_every_right_that_its_policies_need(policies, some_nodes):
    made = made_for(policies)
    assert len(made) <= MAX_PLACEMENTS
    refused = refusals(policies, ())
    served = [entry for entry in policies if entry.uid not in refused and not entry.deleting]
    alone = [(entry, made_for([entry])[0]) for entry in served]
    for labels, taints in some_nodes:
        there = [one for one in made if runs_on(one, labels, taints)]
        assert len(there) <= 1, "which of two agents runs would be the scheduler's choice"
        for entry, own in alone:
            if runs_on(own, labels, taints):
                assert there, f"{entry.title} has no agent on a node that it selects"
                assert may_write(there[0]) or not may_write(own), "an observing policy kept another from capping"
    if all(entry.spec.mode == "Observe" for entry in served):
        assert not any(map(may_write, made))


@settings(max_examples=100)
@given(policy_lists, st.randoms(use_true_random=False))
def test_the_order_in_which_policies_are_listed_changes_nothing(policies, chance: random.Random):
    shuffled = policies[:]
    chance.shuffle(shuffled)
    assert made_for(shuffled) == made_for(policies)
    assert refusals(shuffled, ()) == refusals(policies, ())


@settings(max_examples=100)
@given(policy_lists, st.lists(placements, min_size=1, max_size=2))
def test_a_refused_policy_has_no_part_in_any_daemonset(policies, allowed):
    refused = refusals(policies, tuple(allowed))
    assert made_for(policies, tuple(allowed)) == made_for(
        [entry for entry in policies if entry.uid not in refused], tuple(allowed)
    )
    for entry in policies:
        assert entry.uid in refused or any(is_within(entry.spec.placement, limit) for limit in allowed)


def at(label: str, value: str = "1", **fields: Any) -> dict[str, Any]:
    return {"placement": {"nodeSelector": {label: value}, **fields}}


def test_placements_that_exclude_each_other_stay_apart():
    made = made_for([policy("a", spec=at("pool", "a")), policy("b", spec=at("pool", "b") | {"mode": "Observe"})])
    assert sorted(map(may_write, made)) == [False, True]


def test_a_placement_that_meets_two_others_joins_them():
    found = [policy("a", spec=at("pool", "a")), policy("b", spec=at("pool", "b")), policy("c", spec=at("zone"))]
    (made,) = made_for(found)
    spec = made["spec"]["template"]["spec"]
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) == 3 * 2
    assert spec["nodeSelector"] == {}


def test_a_selector_that_the_template_has_already_asks_for_no_more():
    template = copy.deepcopy(TEMPLATE)
    template["spec"]["template"]["spec"]["nodeSelector"] = {"os": "linux"}
    found = [policy("a", spec=at("os", "linux")), policy("b", spec=at("zone"))]
    (made,) = plan_daemon_sets(world(found), template, ()).apply
    assert runs_on(made, {"os": "linux"}, set())
    assert not runs_on(made, {"zone": "1"}, set())


def test_younger_policies_that_ask_for_less_restart_nobody():
    old = policy("old", created="2026-01-01T00:00:00Z")
    narrower = policy(
        "new",
        created="2026-01-02T00:00:00Z",
        spec={"mode": "Observe", "placement": {"nodeSelector": {**GPU_NODE, "zone": "1"}}},
    )
    assert made_for([old, narrower]) == made_for([old])
    elsewhere = policy("elsewhere", created="2026-01-01T00:00:00Z", spec=at("a"))
    assert made_for([old, elsewhere, narrower]) == made_for([old, elsewhere])


@pytest.mark.parametrize(
    ("mine", "theirs", "used"),
    [
        # an enforcing policy goes before older ones and before the default
        ({"mode": "Observe"}, {"mode": "Enforce", **at("a", runtimeClassName="nvidia")}, "nvidia"),
        ({"mode": "Enforce"}, {"mode": "Observe", **at("a", runtimeClassName="kata")}, None),
        # then the default placement, then the older policy
        ({"mode": "Enforce", **at("a", runtimeClassName="kata")}, {"mode": "Enforce"}, None),
        (
            {"mode": "Observe", **at("a", runtimeClassName="nvidia")},
            {"mode": "Observe", **at("b", runtimeClassName="kata")},
            "nvidia",
        ),
    ],
)
def test_one_runtime_class_is_used_and_the_others_are_told(mine, theirs, used):
    old = policy("old", created="2026-01-01T00:00:00Z", spec=mine)
    new = policy("new", created="2026-01-02T00:00:00Z", namespace="other", spec=theirs)
    (shared,) = share([new, old])
    assert shared.runtime_class_name == used
    (loser,) = shared.overruled
    assert loser.spec.placement.runtime_class_name != used
    winner = {"old": new, "new": old}[loser.name]
    decision = decide(world([old, new]), TEMPLATE, Memory(), NOW)
    for entry, expected in ((loser, ("True", "PlacementOverlap")), (winner, ("False", "NoConflict"))):
        assert state(decision, entry.uid, "Conflict") == expected
    message = condition(decision, loser.uid, "Conflict").message
    assert winner.title in message
    assert "Write the same runtimeClassName" in message
    assert [telling.reason for telling in decision.tellings if telling.policy.uid == loser.uid and telling.warning]


def condition(decision: Decision, uid: str, kind: str) -> Any:
    (found,) = [entry for entry in decision.statuses[uid].conditions if entry.type == kind]
    return found


def state(decision: Decision, uid: str, kind: str) -> tuple[str, str]:
    found = condition(decision, uid, kind)
    return found.status, found.reason


PODS = (pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1"))


def refused_world(reason: Reason) -> World:
    """A world in which policy qwen, whose pods have an agent of others beside them, is refused."""
    if reason is Reason.PLACEMENT_NOT_ALLOWED:
        return world([policy()], PODS, allowed_placements=(Placement(runtime_class_name="nvidia"),))
    if reason is Reason.PLACEMENT_INVALID:
        return world([policy(spec=at("not a label"))], PODS)
    others = [
        policy(f"o{i}", namespace=f"o{i}", created="2025-01-01T00:00:00Z", spec=at("pool", str(i)))
        for i in range(MAX_PLACEMENTS)
    ]
    return world([*others, policy()], PODS)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (Reason.PLACEMENT_NOT_ALLOWED, '"runtimeClassName": "nvidia"'),
        (Reason.PLACEMENT_INVALID, "'not a label' in nodeSelector is no label key: write one as"),
        (Reason.TOO_MANY_PLACEMENTS, "write the same spec.placement as another policy"),
    ],
)
def test_nothing_is_done_for_a_refused_policy_and_it_is_told_why(reason, advice):
    somewhere = refused_world(reason)
    decision = decide(somewhere, TEMPLATE, Memory(), NOW)
    assert decision.write_orders.get("n1", ()) == (), "nothing of it is ordered, so nothing is locked"
    assert not {made["metadata"]["name"] for made in decision.daemon_sets.apply} & {
        f"wattlock-agent-{placement_hash(entry.spec.placement)}"
        for entry in somewhere.policies
        if entry.uid == "uid-qwen"
    }
    for kind in ("Ready", "Enforced"):
        assert state(decision, "uid-qwen", kind) == ("False", reason.value)
    assert advice in condition(decision, "uid-qwen", "Ready").message
    assert state(decision, "uid-qwen", "Progressing") == ("False", "UpToDate")
    decode, prefill = decision.statuses["uid-qwen"].pools
    assert [entry.reason for entry in (*decode.reasons, *prefill.reasons)] == [reason.value] * 2
    told = [telling for telling in decision.tellings if telling.policy.uid == "uid-qwen"]
    assert [(telling.reason, telling.warning) for telling in told] == [(reason.value, True)]
    # without the obstacle it would be capped
    assert decide(world([policy()], PODS), TEMPLATE, Memory(), NOW).write_orders["n1"]


def test_a_long_story_is_cut_and_no_crash():
    wide = Placement(node_selector={f"{'a' * 200}.example/{i}": "b" * 63 for i in range(16)})
    narrow = policy(spec={"placement": {"nodeSelector": {"x" * 5000: "y"}}})
    for entry in (narrow, policy()):
        status = decide(world([entry], PODS, allowed_placements=(wide,) * 3), TEMPLATE, Memory(), NOW).statuses[
            "uid-qwen"
        ]
        assert all(len(reason.message) <= 1024 for pool in status.pools for reason in pool.reasons)


def test_one_namespace_cannot_push_out_the_first_placement_of_another():
    greedy = [
        policy(f"g{i}", namespace="greedy", created="2025-01-01T00:00:00Z", spec=at("g", str(i)))
        for i in range(2 * MAX_PLACEMENTS)
    ]
    late = [
        policy(f"l{i}", namespace=f"late{i}", created="2026-01-01T00:00:00Z", spec=at("l", str(i)))
        for i in range(MAX_PLACEMENTS - 1)
    ]
    refused = refusals([*greedy, *late], ())
    assert not {entry.uid for entry in late} & set(refused)
    assert len(greedy) - len(set(refused)) == 1
    # who shares a placement that is taken on is no placement more
    same = policy("same", namespace="last", created="2027-01-01T00:00:00Z", spec=at("l", "0"))
    assert same.uid not in refusals([*greedy, *late, same], ())


@pytest.mark.parametrize(
    ("spec", "within"),
    [
        ({}, True),
        ({"nodeSelector": {**GPU_NODE, "zone": "1"}}, True),
        ({"tolerations": []}, True),
        ({"tolerations": [{"key": "nvidia.com/gpu", "value": "x", "effect": "NoSchedule"}]}, True),
        ({"nodeSelector": {}}, False),
        ({"nodeSelector": {"nvidia.com/gpu.present": "false"}}, False),
        ({"nodeSelector": {"kubernetes.io/os": "linux"}}, False),
        ({"tolerations": [{"operator": "Exists"}]}, False),
        ({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}, False),
        ({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}]}, False),
        ({"tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]}, False),
        ({"runtimeClassName": "kata"}, False),
    ],
)
def test_the_administrators_limit_holds_in_every_direction(spec, within):
    assert is_within(Placement.model_validate(spec), Placement()) is within


@pytest.mark.parametrize(
    ("wide", "narrow", "as_much"),
    [
        ({"operator": "Exists"}, {"key": "a", "value": "x"}, True),
        ({"operator": "Exists", "effect": "NoSchedule"}, {"key": "a", "value": "x", "effect": "NoSchedule"}, True),
        ({"operator": "Exists", "effect": "NoSchedule"}, {"key": "a", "value": "x"}, False),
        ({"key": "a", "operator": "Exists"}, {"key": "a", "value": "x", "effect": "NoExecute"}, True),
        ({"key": "a", "operator": "Exists"}, {"key": "b", "value": "x"}, False),
        ({"key": "a", "operator": "Exists"}, {"operator": "Exists"}, False),
        ({"key": "a", "value": "x"}, {"key": "a", "operator": "Equal", "value": "x", "effect": "NoExecute"}, True),
        ({"key": "a", "value": "x"}, {"key": "a", "value": "y"}, False),
        ({"key": "a", "value": "x"}, {"key": "a", "operator": "Exists"}, False),
        ({"key": "a"}, {"key": "a", "value": ""}, True),
        ({"key": "a"}, {"key": "a", "operator": "Exists"}, False),
    ],
)
def test_which_toleration_goes_further(wide, narrow, as_much):
    assert tolerates_as_much(Toleration.model_validate(wide), Toleration.model_validate(narrow)) is as_much


def test_of_tolerations_that_say_the_same_one_is_kept():
    same = [{"key": "gpu"}, {"key": "gpu", "operator": "Equal"}, {"key": "gpu", "value": ""}]
    found = [policy(f"p{i}", spec=at("a", tolerations=[entry])) for i, entry in enumerate(same)]
    (made,) = made_for(found)
    assert len(made["spec"]["template"]["spec"]["tolerations"]) == 1
    assert runs_on(made, {"a": "1"}, {("gpu", "", "NoSchedule")})


@pytest.mark.parametrize(
    "placement",
    [
        {"nodeSelector": {"": "a"}},
        {"nodeSelector": {"-a": "b"}},
        {"nodeSelector": {"a/b/c": "d"}},
        {"nodeSelector": {"UPPER.example/a": "b"}},
        {"nodeSelector": {"a" * 64: "b"}},
        {"nodeSelector": {"a" * 254 + "/a": "b"}},
        {"nodeSelector": {"a": "b c"}},
        {"nodeSelector": {"a": "b\n"}},
        {"tolerations": [{}]},
        {"tolerations": [{"operator": "Equal", "value": "x"}]},
        {"tolerations": [{"key": "a b", "operator": "Exists"}]},
        {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        {"tolerations": [{"key": "a", "value": "b c"}]},
        {"runtimeClassName": ""},
        {"runtimeClassName": "NVIDIA"},
        {"runtimeClassName": "a..b"},
    ],
)
def test_what_the_api_server_would_refuse_spoils_no_daemonset(placement):
    bad = policy("bad", spec={"placement": placement})
    assert refusals([bad], ())[bad.uid].reason is Reason.PLACEMENT_INVALID
    assert made_for([bad, policy("good")]) == made_for([policy("good")])
