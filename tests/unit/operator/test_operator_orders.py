"""Which pods get which orders."""

import dataclasses

import pytest
from operator_worlds import DECODE, PREFILL, agent_pod, gpu, node_energy, pod, policy, world
from wattlock_api.base import LabelSelector, LabelSelectorRequirement
from wattlock_api.clockprofile import PUBLISHED, ClockProfileSpec, Evidence, ProfileRow
from wattlock_api.constants import Architecture, Mode
from wattlock_api.nodeenergy import Order
from wattlock_operator.orders import MAX_ORDERS_PER_NODE, give_orders
from wattlock_operator.selection import matches, selector_text
from wattlock_operator.world import MetricsHint


def orders_of(*arguments, **options) -> dict[str, Order]:
    """Orders by pod name."""
    given = give_orders(world(*arguments, **options))
    return {order.pod.name: order for orders in given.by_node.values() for order in orders}


def held(order: Order) -> str | None:
    return order.hold.reason if order.hold else None


PAIR = (pod("d0", DECODE), pod("p0", PREFILL))


@pytest.mark.parametrize(
    ("expression", "labels", "expected"),
    [
        ({"key": "a", "operator": "In", "values": ["x", "y"]}, {"a": "y"}, True),
        ({"key": "a", "operator": "In", "values": ["x"]}, {}, False),
        ({"key": "a", "operator": "NotIn", "values": ["x"]}, {"a": "x"}, False),
        ({"key": "a", "operator": "NotIn", "values": ["x"]}, {}, True),
        ({"key": "a", "operator": "Exists"}, {"a": ""}, True),
        ({"key": "a", "operator": "Exists"}, {}, False),
        ({"key": "a", "operator": "DoesNotExist"}, {}, True),
        ({"key": "a", "operator": "DoesNotExist"}, {"a": "x"}, False),
    ],
)
def test_label_expressions_mean_what_they_mean_in_kubernetes(expression, labels, expected):
    assert matches(LabelSelector.model_validate({"matchExpressions": [expression]}), labels) is expected


def test_an_empty_selector_selects_nothing():
    assert not matches(LabelSelector(), {"a": "b"})


def test_decode_is_capped_and_prefill_is_left_alone():
    orders = orders_of([policy()], PAIR)
    assert (orders["d0"].cap_mhz, held(orders["d0"])) == (1590, None)
    assert orders["d0"].experiment is not None
    assert orders["d0"].experiment.seed == "uid-qwen"
    assert (orders["p0"].cap_mhz, orders["p0"].experiment, orders["p0"].guardrail) == (None, None, None)


def test_without_verification_there_is_no_experiment():
    assert orders_of([policy(spec={"verification": {"method": "None"}})], PAIR)["d0"].experiment is None


def test_in_observe_mode_no_order_carries_a_cap():
    order = orders_of([policy(spec={"mode": "Observe"})], PAIR)["d0"]
    assert (order.mode, order.cap_mhz, order.hold, order.experiment) == (Mode.OBSERVE, None, None, None)


@pytest.mark.parametrize(
    ("pods", "group_by", "expected"),
    [
        ([pod("d0", DECODE)], [], "NoPrefillPeer"),
        ([pod("d0", DECODE), pod("p0", PREFILL, ready=False)], [], "NoPrefillPeer"),
        ([pod("d0", DECODE), pod("p0", PREFILL, terminating=True)], [], "NoPrefillPeer"),
        ([pod("d0", DECODE), pod("p0", PREFILL, phase="Failed")], [], "NoPrefillPeer"),
        ([pod("d0", DECODE), pod("p0", PREFILL, node="")], [], "NoPrefillPeer"),
        ([pod("d0", DECODE), pod("p0", PREFILL, namespace="other")], [], "NoPrefillPeer"),
        ([pod("d0", DECODE | {"m": "a"}), pod("p0", PREFILL | {"m": "a"}, namespace="other")], ["m"], "NoPrefillPeer"),
        ([pod("d0", DECODE | {"m": "a"}), pod("p0", PREFILL | {"m": "b"})], ["m"], "NoPrefillPeer"),
        ([pod("d0", DECODE), pod("p0", PREFILL)], ["m"], "NoPrefillPeer"),
        ([pod("d0", DECODE | {"m": "a"}), pod("p0", PREFILL | {"m": "a"})], ["m"], None),
        ([pod("d0", DECODE), pod("p0", PREFILL, wants_gpu=False)], [], "NoPrefillPeer"),
        ([pod("d0", DECODE, terminating=True), pod("p0", PREFILL)], [], None),
    ],
)
def test_decode_needs_a_ready_prefill_pod_of_its_group(pods, group_by, expected):
    order = orders_of([policy(spec={"groupBy": group_by})], pods)["d0"]
    assert held(order) == expected
    assert (order.cap_mhz is None) is (expected is not None)


def test_the_prefill_rule_can_be_turned_off():
    assert orders_of([policy(spec={"requirePrefillPeer": False})], PAIR[:1])["d0"].cap_mhz == 1590


@pytest.mark.parametrize("change", [{"phase": "Succeeded"}, {"phase": "Failed"}, {"node": ""}, {"wants_gpu": False}])
def test_pods_that_cannot_hold_a_gpu_get_no_order(change):
    assert "d0" not in orders_of([policy()], [dataclasses.replace(PAIR[0], **change), PAIR[1]])


def test_no_cap_before_the_finalizer_is_there():
    order = orders_of([policy(finalizer=False)], PAIR)["d0"]
    assert (order.cap_mhz, held(order)) == (None, "WaitingToWrite")


def test_a_deleted_policy_orders_nothing():
    assert orders_of([policy(deleting=True)], PAIR) == {}


def test_a_pod_of_two_policies_belongs_to_the_older_and_is_held():
    older, younger = policy("zeta", created="2026-01-01T00:00:00Z"), policy("alpha", created="2026-01-02T00:00:00Z")
    given = give_orders(world([younger, older], PAIR))
    orders = {order.pod.name: order for order in given.by_node["n1"]}
    assert {order.policy.name for order in orders.values()} == {"zeta"}
    assert {held(order) for order in orders.values()} == {"PolicyConflict"}
    assert orders["d0"].cap_mhz is None
    message = orders["d0"].hold.message if orders["d0"].hold else ""
    assert "llm/alpha" in message
    assert "llm/zeta" in message
    assert set(given.selection.disputes) == {"uid-alpha", "uid-zeta"}


def test_a_pod_of_two_pools_of_one_policy_is_held():
    pools = [
        {"name": "one", "role": "Decode", "selector": {"matchLabels": DECODE}, "clock": {"maxSMClockMHz": 1590}},
        {"name": "two", "role": "Mixed", "selector": {"matchLabels": DECODE}},
    ]
    order = orders_of([policy(spec={"pools": pools, "requirePrefillPeer": False})], PAIR[:1])["d0"]
    assert held(order) == "PolicyConflict"


def lws(name: str, index: int, **changes):
    labels = {
        "leaderworkerset.sigs.k8s.io/name": "big",
        "leaderworkerset.sigs.k8s.io/group-index": "3",
        "leaderworkerset.sigs.k8s.io/worker-index": str(index),
    }
    return pod(name, DECODE | labels, **changes)


def test_the_pods_of_a_leader_worker_set_group_are_one_instance_and_only_the_leader_serves_metrics():
    orders = orders_of([policy()], [lws("big-3", 0), lws("big-3-1", 1, node="n2"), PAIR[1]])
    assert {orders["big-3"].instance, orders["big-3-1"].instance} == {"big/3"}
    assert orders["big-3"].metrics_url is not None
    assert orders["big-3-1"].metrics_url is None


def test_a_hold_on_one_pod_holds_its_whole_instance():
    spec = {"groupBy": ["m"]}
    pods = [lws("big-3", 0), lws("big-3-1", 1), pod("p0", PREFILL | {"m": "a"})]
    pods[0] = dataclasses.replace(pods[0], labels={**pods[0].labels, "m": "a"})
    orders = orders_of([policy(spec=spec)], pods)
    assert [held(orders[name]) for name in ("big-3", "big-3-1")] == ["NoPrefillPeer", "NoPrefillPeer"]


@pytest.mark.parametrize(
    ("endpoint", "hint", "ip", "expected"),
    [
        ({}, MetricsHint(), "10.0.0.7", "http://10.0.0.7:8000/metrics"),
        ({}, MetricsHint(gpu_container_port=8200), "10.0.0.7", "http://10.0.0.7:8200/metrics"),
        ({}, MetricsHint(named_port=9090, gpu_container_port=8200), "10.0.0.7", "http://10.0.0.7:9090/metrics"),
        ({}, MetricsHint(annotated_port=7, annotated_path="/m", named_port=9), "10.0.0.7", "http://10.0.0.7:7/m"),
        (
            {"port": 1, "path": "/x"},
            MetricsHint(annotated_port=7, annotated_path="/m"),
            "10.0.0.7",
            "http://10.0.0.7:1/x",
        ),
        ({}, MetricsHint(), "fd00::7", "http://[fd00::7]:8000/metrics"),
        ({}, MetricsHint(), "", None),
        ({}, MetricsHint(), "metadata.internal", None),
        ({}, MetricsHint(), "127.0.0.1", None),
        ({}, MetricsHint(), "169.254.169.254", None),
        ({}, MetricsHint(), "0.0.0.0", None),
        ({}, MetricsHint(), "::1", None),
        ({}, MetricsHint(), "224.0.0.1", None),
    ],
)
def test_the_metrics_address_is_the_pods_own(endpoint, hint, ip, expected):
    pools = [{"name": "mixed", "role": "Mixed", "selector": {"matchLabels": DECODE}, "metrics": endpoint}]
    order = orders_of([policy(spec={"pools": pools})], [pod("d0", DECODE, hint=hint, ip=ip)])["d0"]
    assert order.metrics_url == expected


def profile_policy(name: str = "published", architecture: str | None = None):
    pool = {"name": "decode", "role": "Decode", "selector": {"matchLabels": DECODE}, "clock": {"profile": name}}
    if architecture:
        pool["architecture"] = architecture
    return policy(spec={"pools": [pool], "requirePrefillPeer": False})


def row(product: str, mhz: int, architecture: Architecture | None = None) -> ProfileRow:
    evidence = Evidence(kind="Published", source="test")
    return ProfileRow(
        product=product, phase="Decode", architecture=architecture, max_sm_clock_mhz=mhz, evidence=evidence
    )


@pytest.mark.parametrize(
    ("policy_", "gpus", "expected"),
    [
        (profile_policy(), [gpu()], 1590),
        (profile_policy("mine", "MLA"), [gpu()], 1200),
        (profile_policy("mine", "GQA"), [gpu()], 1400),
        (profile_policy("mine"), [gpu()], 1400),
        (profile_policy(), [gpu(product="NVIDIA H100")], "NoProfileRow"),
        (profile_policy(), [], "ProductUnknown"),
        (profile_policy(), [gpu(), gpu(1, product="NVIDIA H100")], "ProductUnknown"),
        (profile_policy("none"), [gpu()], "ProfileNotFound"),
        # another pod's GPUs tell the product only when the node has no other
        (profile_policy(), [gpu(0, "x"), gpu(1, "y")], 1590),
        (profile_policy(), [gpu(0, "d0"), gpu(1, "y", product="NVIDIA H100")], 1590),
        (profile_policy(), [gpu(0, "x"), gpu(1, "y", product="NVIDIA H100")], "ProductUnknown"),
    ],
)
def test_the_cap_comes_from_the_row_of_the_product(policy_, gpus, expected):
    profiles = {
        "published": PUBLISHED,
        "mine": ClockProfileSpec(
            rows=[row("NVIDIA H200", 1400), row("NVIDIA H200", 1200, Architecture.MLA), row("NVIDIA H100", 1000)]
        ),
    }
    order = orders_of([policy_], PAIR[:1], [node_energy(gpus=gpus)], profiles=profiles)["d0"]
    assert (order.cap_mhz or held(order)) == expected
    if order.hold is not None:
        assert "maxSMClockMHz" in order.hold.message or "ClockProfile" in order.hold.message


def test_an_instance_on_different_products_has_no_cap():
    profiles = {"mine": ClockProfileSpec(rows=[row("A", 1400), row("B", 1200)])}
    reports = [node_energy("n1", gpus=[gpu(0, "x", product="A")]), node_energy("n2", gpus=[gpu(0, "y", product="B")])]
    pods = [lws("big-3", 0), lws("big-3-1", 1, node="n2")]
    orders = orders_of([profile_policy("mine")], pods, reports, ("n1", "n2"), profiles=profiles)
    assert {held(order) for order in orders.values()} == {"ProductUnknown"}


def test_a_node_never_gets_more_orders_than_the_schema_allows():
    pods = [pod(f"d{index}", DECODE) for index in range(MAX_ORDERS_PER_NODE + 3)]
    given = give_orders(world([policy()], [*pods, agent_pod("n1")]))
    assert len(given.by_node["n1"]) == MAX_ORDERS_PER_NODE
    assert len(given.surplus["uid-qwen"]) == 3


def test_a_selector_reads_as_kubectl_writes_it():
    expressions = [
        LabelSelectorRequirement(key="tier", operator="In", values=["gpu", "big"]),
        LabelSelectorRequirement(key="zone", operator="NotIn", values=["a"]),
        LabelSelectorRequirement(key="app", operator="Exists"),
        LabelSelectorRequirement(key="old", operator="DoesNotExist"),
    ]
    selector = LabelSelector(match_labels={"llm-d.ai/role": "decode"}, match_expressions=expressions)
    assert selector_text(selector) == "llm-d.ai/role=decode,tier in (gpu, big),zone notin (a),app,!old"
