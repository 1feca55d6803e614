"""Instances on several nodes: what their orders say, and the power that is handed from node to node."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_api.constants import Role
from wattlock_api.nodeenergy import EpochPower
from wattlock_api.peerpower import PeerPowers
from wattlock_operator.decide import PEER_POWER_SECONDS, Memory, decide
from wattlock_operator.orders import give_orders
from wattlock_operator.parse import parse_node_energy, parse_pod
from wattlock_operator.peerpower import peer_powers, sum_epochs
from wattlock_operator.reports import collect
from wattlock_operator.status import urgent_change
from wattlock_operator.tokenenergy import idle_message, joules_per_token

NODES = ("n1", "n2", "n3")


def member(index: int, node: str, size: int | None = 2, labels=DECODE, **changes):
    """A pod of group 3 of the LeaderWorkerSet "big"."""
    group = {
        "leaderworkerset.sigs.k8s.io/name": "big",
        "leaderworkerset.sigs.k8s.io/group-index": "3",
        "leaderworkerset.sigs.k8s.io/worker-index": str(index),
    }
    return pod(f"big-3-{index}", {**labels, **group}, node, group_size=size, **changes)


PREFILLER = pod("p0", PREFILL)


def orders_of(*pods):
    """Orders by pod name."""
    given_orders = give_orders(world([policy()], [*pods, PREFILLER], nodes=NODES))
    return {order.pod.name: order for orders in given_orders.by_node.values() for order in orders}


def span_of(order):
    return None if order.span is None else (order.span.nodes, order.span.missing_pods)


def test_an_instance_on_one_node_has_no_span():
    orders = orders_of(member(0, "n1"), member(1, "n1"), pod("single", DECODE))
    assert [span_of(order) for order in orders.values()] == [None] * 4


def test_an_instance_on_two_nodes_names_both_in_every_order_and_one_pod_speaks():
    orders = orders_of(member(0, "n2"), member(1, "n1"))
    assert span_of(orders["big-3-0"]) == span_of(orders["big-3-1"]) == (["n1", "n2"], 0)
    assert orders["big-3-0"].metrics_url is not None
    assert orders["big-3-1"].metrics_url is None


def test_of_several_pods_that_serve_metrics_one_speaks():
    # Workers without an index: either could be the leader. Tokens must not be counted twice.
    pods = [member(0, "n1"), member(1, "n2")]
    for each in pods:
        each.labels.pop("leaderworkerset.sigs.k8s.io/worker-index")
    orders = orders_of(*pods)
    assert [order.metrics_url is not None for order in orders.values() if order.instance == "big/3"] == [True, False]


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param([], id="none there"),
        pytest.param([member(1, "n2", labels={"app": "other"})], id="not selected"),
        pytest.param([member(1, "", ip="")], id="not scheduled"),
        pytest.param([member(1, "n2", phase="Failed")], id="finished"),
    ],
)
def test_a_pod_that_wattlock_does_not_see_is_missed_and_not_forgotten(workers):
    assert span_of(orders_of(member(0, "n1"), *workers)["big-3-0"]) == (["n1"], 1)


def test_the_size_of_a_group_is_read_from_the_pods_annotation():
    body = {"metadata": {"name": "a", "annotations": {"leaderworkerset.sigs.k8s.io/size": "4"}}}
    assert parse_pod(body).group_size == 4
    for odd in ("", "-1", "four", "4.0", "99999", None, 4):
        body["metadata"]["annotations"] = {"leaderworkerset.sigs.k8s.io/size": odd}
        assert parse_pod(body).group_size is None


@pytest.mark.parametrize("why", [{"guardrail_tripped": True, "guardrail_message": "slow"}, {"computes_prompts": True}])
def test_an_instance_that_one_agent_released_is_released_on_its_other_nodes(why):
    def caps(**tripped):
        reports = [
            node_energy("n1", instances=[instance("big/3", **tripped)]),
            node_energy("n2", instances=[instance("big/3"), instance("single")]),
        ]
        pods = [member(0, "n1"), member(1, "n2"), pod("single", DECODE, "n2"), PREFILLER]
        orders = give_orders(world([policy()], pods, reports, NODES)).by_node.values()
        return {order.pod.name: (order.cap_mhz, order.hold) for each in orders for order in each}

    assert {cap for name, (cap, _) in caps().items() if name != "p0"} == {1590}
    found = caps(**why)
    # The node that tripped releases by itself, and its order stays: its cool-down must not begin anew.
    assert found["big-3-0"] == found["single"] == (1590, None)
    cap, held = found["big-3-1"]
    assert cap is None
    assert "n1" in held.message


def told(node: str, *epochs: EpochPower, **changes):
    entry = instance("big/3", epochs=list(epochs), **changes)
    return node_energy(node, gpus=[gpu(0, instance="big/3")], instances=[entry])


def watts(epoch: int, value: str | None) -> EpochPower:
    return EpochPower(epoch=epoch, watts=value)


def handed(*reports, pods=None):
    pods = pods or [member(0, "n1", 3), member(1, "n2", 3), member(2, "n3", 3)]
    here = world([policy()], [*pods, PREFILLER], reports, NODES)
    found = peer_powers(here, give_orders(here).by_node)
    return {node: PeerPowers.model_validate_json(text) for node, text in found.items()}


def test_the_watts_of_all_other_nodes_are_summed_for_the_node_that_counts_tokens():
    found = handed(
        told("n1"), told("n2", watts(6, "100"), watts(7, "400.5")), told("n3", watts(7, "300.25"), watts(8, "1"))
    )
    (power,) = found["n1"].instances
    assert list(found) == ["n1"]
    assert (power.policy_uid, power.instance, power.nodes) == ("uid-qwen", "big/3", ["n2", "n3"])
    assert [(each.epoch, each.watts) for each in power.epochs] == [(7, "700.750")]


def test_while_a_node_has_not_told_nothing_is_handed_on():
    assert handed(told("n1"), told("n2", watts(7, "400"))) == {}
    assert handed(told("n1"), told("n2", watts(7, "400")), told("n3")) == {}


def test_an_epoch_that_one_node_cannot_use_is_said_to_be_of_no_use():
    found = handed(told("n1"), told("n2", watts(7, "400")), told("n3", watts(7, None)))
    assert found["n1"].instances[0].epochs == [EpochPower(epoch=7)]


REPORTS = st.lists(
    st.dictionaries(st.integers(0, 30), st.none() | st.floats(0, 1e6), max_size=8), min_size=1, max_size=5
)


@given(REPORTS)
def test_no_sum_is_of_fewer_nodes_than_there_are(reports):
    for each in sum_epochs(reports):
        parts = [report[each.epoch] for report in reports]  # a node that has not told would raise
        if each.watts is None:
            assert None in parts
        else:
            assert float(each.watts) == pytest.approx(sum(parts), abs=0.001)
    assert len(sum_epochs(reports)) <= 8


def decided(now_seconds, memory, epoch, written=""):
    """A decision on a world whose orders are written and whose peer has told of an epoch."""
    pods = [member(0, "n1"), member(1, "n2"), PREFILLER, agent_pod("n1"), agent_pod("n2")]
    by_node = give_orders(world([policy()], pods, nodes=NODES)).by_node
    entries = [
        node_energy("n1", by_node["n1"], instances=[instance("big/3")], peer_power=written),
        node_energy("n2", by_node["n2"], instances=[instance("big/3", epochs=[watts(epoch, "400")])]),
    ]
    return decide(world([policy()], pods, entries, NODES), None, memory, now_seconds)


def test_news_of_power_is_written_beside_the_same_orders_and_not_too_often():
    first = decided(NOW, Memory(), 7)
    assert list(first.write_orders) == list(first.peer_powers) == ["n1"]
    text = first.peer_powers["n1"]
    assert json.loads(text)["instances"][0]["epochs"] == [{"epoch": 7, "watts": "400.000"}]
    again = decided(NOW + 1, first.memory, 7, written=text)
    assert not again.write_orders
    soon = decided(NOW + 5, again.memory, 8, written=text)
    assert not soon.write_orders
    later = decided(NOW + PEER_POWER_SECONDS, soon.memory, 8, written=text)
    assert list(later.write_orders) == ["n1"]


def test_news_of_power_makes_no_node_lag():
    # The generation is what agents confirm; an annotation does not move it.
    first = decided(NOW, Memory(), 7)
    ready = {condition.type: condition for status in first.statuses.values() for condition in status.conditions}
    assert ready["Progressing"].reason != "WaitingForAgents"


def test_the_annotation_is_read_back():
    body = {"metadata": {"name": "n1", "annotations": {"wattlock.dev/peer-power": "{}"}}, "spec": {}}
    assert parse_node_energy(body).peer_power == "{}"
    assert parse_node_energy({"metadata": {"name": "n1"}}).peer_power == ""


def pool_energy(role, pods, reports):
    here = world([policy()], [*pods, PREFILLER], reports, NODES)
    report = collect(here, NOW)["uid-qwen", "decode"]
    members = [each for each in give_orders(here).selection.members["uid-qwen"] if each.pool.name == "decode"]
    return joules_per_token(role, members, report.gpus, report.instances)


def holding(node, pod_name, power, tokens=None, prompts=None, name="big/3"):
    entry = instance(name, tokens_per_second=tokens, prompt_tokens_per_second=prompts)
    held = gpu(0, pod_name, instance=name, power_watts=power)
    return node_energy(node, gpus=[held], instances=[entry])


PAIR = (member(0, "n1"), member(1, "n2"))


def test_an_instance_costs_the_watts_of_all_its_nodes():
    reports = [holding("n1", "big-3-0", 500, "1000"), holding("n2", "big-3-1", 300)]
    assert pool_energy(Role.DECODE, PAIR, reports) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "reports",
    [
        pytest.param([holding("n1", "big-3-0", 500, "1000")], id="the other node says nothing"),
        pytest.param(
            [holding("n1", "big-3-0", 500, "1000"), holding("n2", "big-3-1", None)], id="its power is not known"
        ),
    ],
)
def test_a_part_of_an_instance_never_looks_like_the_whole(reports):
    assert pool_energy(Role.DECODE, PAIR, reports) is None


def test_a_pod_that_is_missing_makes_energy_for_each_token_unknown():
    assert pool_energy(Role.DECODE, [member(0, "n1")], [holding("n1", "big-3-0", 500, "1000")]) is None


def test_each_role_is_judged_by_its_own_work():
    reports = [holding("n1", "d0", 600, tokens="3", prompts="2000", name="d0")]
    pods = [pod("d0", DECODE)]
    assert pool_energy(Role.PREFILL, pods, reports) == pytest.approx(0.3)
    assert pool_energy(Role.MIXED, pods, reports) == pytest.approx(200)


def test_without_tokens_there_is_no_energy_for_each_token_and_the_reason_is_said():
    reports = [holding("n1", "d0", 120, "0.0", name="d0")]
    assert pool_energy(Role.DECODE, [pod("d0", DECODE)], reports) is None
    items = collect(world([policy()], [], reports, NODES), NOW)["uid-qwen", "decode"].instances
    assert "all instances generated no tokens" in idle_message(Role.DECODE, items)


def test_instances_that_fall_idle_are_told_and_are_no_news():
    def status(tokens):
        reports = [holding("n1", "d0", 120, tokens, name="d0")]
        here = world([policy()], [pod("d0", DECODE), PREFILLER, agent_pod("n1")], reports, NODES)
        (found,) = decide(here, None, Memory(), NOW).statuses.values()
        return found

    busy, idle = status("1000"), status("0.0")
    assert "NoTokens" in {entry.reason for entry in idle.pools[0].reasons}
    assert idle.pools[0].power_watts == 120
    assert idle.pools[0].joules_per_generated_token is None
    assert "NoTokens" not in {entry.reason for entry in busy.pools[0].reasons}
    assert not urgent_change(busy, idle)


def test_an_idle_instance_costs_the_pool_its_watts():
    pods = [pod("d0", DECODE), pod("d1", DECODE, "n2")]
    reports = [holding("n1", "d0", 500, "1000", name="d0"), holding("n2", "d1", 100, "0.0", name="d1")]
    assert pool_energy(Role.DECODE, pods, reports) == pytest.approx(0.6)
    items = collect(world([policy()], [], reports, NODES), NOW)["uid-qwen", "decode"].instances
    assert "1 of 2 instances" in idle_message(Role.DECODE, items)
