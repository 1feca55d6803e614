"""What a tenant may write, and what it must not move: names that meet, floods, pods that pretend."""

import re
import time
from dataclasses import replace

import pytest
from operator_worlds import (
    DECODE,
    NOW,
    PREFILL,
    agent_pod,
    as_kept,
    gpu,
    instance,
    node_energy,
    pod,
    policy,
    two_pools,
    world,
)
from wattlock_api.base import timestamp
from wattlock_api.constants import AGENT_COMPONENT, COMPONENT_LABEL, PLACEMENT_LABEL
from wattlock_api.energypolicy import Placement
from wattlock_api.nodeenergy import AgentStatus, ArmTotals, ClockRange, Moments, PairStats, ProductClocks
from wattlock_api.policystatus import EnergyPolicyStatus
from wattlock_operator.apply import event_body
from wattlock_operator.decide import Memory, Written, decide
from wattlock_operator.events import Telling
from wattlock_operator.orders import give_orders
from wattlock_operator.parse import parse_pod
from wattlock_operator.placement import placement_hash
from wattlock_operator.reports import collect
from wattlock_operator.selection import instance_of
from wattlock_operator.settings import from_environment

SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
HOST = pod("d0", DECODE, host_network=True, ip="192.0.2.10")
REPORT = node_energy(gpus=[gpu()], instances=[instance()])


def pool_reasons(somewhere):
    status = decide(somewhere, None, Memory(), NOW).statuses["uid-qwen"]
    return {entry.reason: entry.message for entry in status.pools[0].reasons}


def test_a_pod_on_its_nodes_network_is_not_asked_for_metrics():
    somewhere = world([policy()], [HOST, pod("p0", PREFILL), agent_pod("n1")], [REPORT])
    (order,) = (order for order in give_orders(somewhere).by_node["n1"] if order.pod.name == "d0")
    assert order.metrics_url is None
    assert order.cap_mhz == 1590, "it is capped all the same: only the metrics are somebody else's"
    message = pool_reasons(somewhere)["HostNetworkMetrics"]
    assert "pod d0" in message
    assert "metrics.hostNetworkNamespaces name llm" in message


@pytest.mark.parametrize(("allowed", "asked"), [({"llm"}, True), ({"other"}, False), (set(), False)])
def test_an_administrator_may_allow_a_namespace(allowed, asked):
    somewhere = world([policy()], [HOST, agent_pod("n1")], [REPORT], host_network_namespaces=frozenset(allowed))
    (order,) = give_orders(somewhere).by_node["n1"]
    assert (order.metrics_url == "http://192.0.2.10:8200/metrics") is asked
    assert ("HostNetworkMetrics" in pool_reasons(somewhere)) is not asked


def test_a_speaker_of_an_instance_is_never_a_pod_on_its_nodes_network():
    group = {"leaderworkerset.sigs.k8s.io/name": "big", "leaderworkerset.sigs.k8s.io/group-index": "0"}
    pods = [pod("a", DECODE | group, host_network=True), pod("b", DECODE | group, ip="10.0.0.9")]
    orders = give_orders(world([policy()], pods)).by_node["n1"]
    assert {order.pod.name: order.metrics_url for order in orders} == {
        "a": None,
        "b": "http://10.0.0.9:8200/metrics",
    }


@pytest.mark.parametrize(
    ("spec", "status", "expected"),
    [
        ({"hostNetwork": True}, {}, True),
        ({"hostNetwork": False}, {"podIP": "10.0.0.7", "hostIP": "192.0.2.10"}, False),
        ({}, {"podIP": "192.0.2.10", "hostIP": "192.0.2.10"}, True),
        ({}, {"podIP": "fd00::1", "podIPs": [{"ip": "192.0.2.10"}], "hostIPs": [{"ip": "192.0.2.10"}]}, True),
        ({"hostNetwork": "true"}, {}, False),
        ({}, {}, False),
    ],
)
def test_which_pods_are_on_their_nodes_network(spec, status, expected):
    assert parse_pod({"spec": spec, "status": status}).host_network is expected


def test_the_allowed_namespaces_come_from_the_environment():
    environment = {"WATTLOCK_NAMESPACE": "w", "WATTLOCK_HOST_NETWORK_NAMESPACES": "llm, rdma ,"}
    assert from_environment(environment).host_network_namespaces == {"llm", "rdma"}
    assert from_environment({"WATTLOCK_NAMESPACE": "w"}).host_network_namespaces == frozenset()


def test_a_pod_that_is_labelled_as_an_agent_elsewhere_is_none():
    labels = {COMPONENT_LABEL: AGENT_COMPONENT, PLACEMENT_LABEL: placement_hash(Placement())}
    liar = pod("agent", labels, "n1", namespace="llm", wants_gpu=False)
    somewhere = world([policy()], [liar, pod("d0", DECODE), pod("p0", PREFILL)])
    assert somewhere.agent_pods() == ()
    assert "NoAgent" in pool_reasons(somewhere)


def test_instances_of_two_policies_never_meet_whatever_they_are_called():
    group = {"leaderworkerset.sigs.k8s.io/name": "a", "leaderworkerset.sigs.k8s.io/group-index": "0"}
    assert instance_of(pod("a", group)) == "a/0", "no pod's name has a slash"
    mine, theirs = policy("a-b", namespace="a"), policy("c", namespace="a-b")
    pods = [pod("d0", DECODE, namespace="a"), pod("d0", DECODE, namespace="a-b", uid="other")]
    found = collect(
        world(
            [mine, theirs],
            pods,
            [
                node_energy(
                    gpus=[
                        gpu(0, policy_uid=mine.uid),
                        gpu(1, policy_uid=theirs.uid),
                    ]
                )
            ],
        ),
        NOW,
    )
    assert {key: [entry.gpu.uuid for entry in report.gpus] for key, report in found.items()} == {
        (mine.uid, "decode"): ["GPU-0"],
        (theirs.uid, "decode"): ["GPU-1"],
    }


def test_a_placement_cannot_be_made_to_meet_another():
    # 64 bits: nobody searches for a second placement with a given hash
    assert re.fullmatch(r"[0-9a-f]{16}", placement_hash(Placement()))


@pytest.mark.parametrize("name", ["q" * 253, "q" * 199 + "-" + "q" * 20, "a.b." + "c" * 240, "q"])
def test_events_have_names_of_their_own(name):
    policies = [policy(name, uid="1"), policy(name[:-1] + "z", uid="2")]
    reasons = ("InForce", "Capped", "IntervalExcludesZero")
    tellings = [Telling(each, False, reason, "m") for each in policies for reason in reasons]
    names = [event_body(telling, "me", NOW)["metadata"]["name"] for telling in tellings]
    assert len(set(names)) == len(names)
    assert all(SUBDOMAIN.fullmatch(name) and len(name) <= 253 for name in names)


def test_a_thousand_policies_about_the_same_pods_are_told_and_cost_little():
    policies = [policy(f"p{number:04}" + "x" * 200, uid=f"uid-{number}") for number in range(1000)]
    pods = [pod(f"d{number}" + "y" * 200, DECODE, f"n{number // 10}", uid=f"{number}") for number in range(250)]
    nodes = [f"n{number}" for number in range(25)]
    somewhere = world(policies, pods, [node_energy(name) for name in nodes], nodes)
    began = time.process_time()
    decision = decide(somewhere, None, Memory(), NOW)
    assert time.process_time() - began < 20
    # a quarter of a million claims: what is kept of them is a sentence for each pod
    (kept, *_) = give_orders(somewhere).selection.disputes.values()
    assert max(sum(map(len, member.rivals)) for member in kept) < 3000
    assert sum(map(len, decision.write_orders.values())) == 250
    order = decision.write_orders["n0"][0]
    assert (order.cap_mhz, order.hold and order.hold.reason) == (None, "PolicyConflict")
    for status in decision.statuses.values():
        conflict = next(entry for entry in status.conditions if entry.type == "Conflict")
        assert conflict.status == "True"
        assert len(conflict.message) <= 1024


def test_a_thousand_statuses_are_written_in_turns_and_none_is_forgotten():
    policies = [policy(f"p{number:04}", uid=f"uid-{number}") for number in range(1000)]
    memory, seen, passes = Memory(), [], 0
    while passes < 5:
        decision = decide(world(policies), None, memory, NOW + passes)
        memory, passes = decision.memory, passes + 1
        assert len(decision.write_statuses) == 200
        assert len(decision.tellings) <= 10 * 200
        assert decision.again_soon is (passes < 5)
        seen += [view.uid for view, _ in decision.write_statuses]
    assert sorted(seen) == sorted(view.uid for view in policies)
    assert decide(world(policies), None, memory, NOW + passes).write_statuses == ()


def test_who_waited_longest_is_written_first():
    policies = [policy(f"p{number:04}", uid=f"uid-{number}") for number in range(300)]
    ages_seconds = {view.uid: 60 if number >= 200 else 30 for number, view in enumerate(policies)}
    written = {uid: Written(EnergyPolicyStatus(), NOW - age) for uid, age in ages_seconds.items()}
    decision = decide(world(policies), None, Memory(written=written), NOW)
    assert {view.uid for view in policies[200:]} <= {view.uid for view, _ in decision.write_statuses}


#: The most that a decimal string of a report may say.
MOST = "9" * 15
PAIR = {"cap_mhz": 1590, "pairs": 10}


@pytest.mark.parametrize(
    "told",
    [
        {"energy_joules": MOST},
        {"tokens_per_second": MOST},
        {"prompt_tokens_per_second": MOST},
        {"arms": [ArmTotals(cap_mhz=60, joules="5")]},
        {"arms": [ArmTotals(cap_mhz=1590, joules=MOST)]},
        {"inter_token_latency_ms": MOST, "tokens_per_second": "1"},
        {"pair_stats": [PairStats(**PAIR, energy=Moments(total=f"-{MOST}", squares=MOST))]},
        {"pair_stats": [PairStats(**PAIR, latency_pairs=10, latency=Moments(total="400", squares="16000"))]},
        {"pair_stats": [PairStats(cap_mhz=1590, pairs=-10)]},
        {"message": "x" * 1024, "reason": "MetricsInvalid"},
    ],
    ids=lambda told: "-".join(told),
)
@pytest.mark.parametrize("clock", [{"maxSMClockMHz": 1590}, {"tune": {}}], ids=["fixed", "tuned"])
def test_reports_that_the_schema_accepts_have_a_status_that_it_accepts(told, clock):
    """Also of pods that left, whose sums the operator keeps."""
    spec = {"pools": two_pools(clock), "cost": {"pricePerKWh": MOST}}
    gpus = [gpu(0, "d0"), gpu(1, "d1")]
    both = node_energy(gpus=gpus, instances=[instance(name, **told) for name in ("d0", "d1")])
    pods = [pod("d0", DECODE), pod("d1", DECODE), pod("p0", PREFILL)]
    first = decide(world([policy(spec=spec)], pods, [both]), None, Memory(), NOW)
    last = decide(world([policy(spec=spec)], pods[1:], [node_energy(gpus=gpus[:1])]), None, first.memory, NOW + 30)
    for decision in (first, last):
        assert decision.failures == ()
        as_kept(decision.statuses["uid-qwen"])


@pytest.mark.parametrize("mhz", [0, 60, 5001])
def test_a_released_clock_that_nobody_may_ask_for_begins_no_search(mhz):
    told = instance(tokens_per_second="1000", inter_token_latency_ms="8")
    report = node_energy(gpus=[gpu(requested_mhz=None, state="Released", observed_mhz=mhz)], instances=[told])
    ranges = [ClockRange(min_mhz=345, max_mhz=1980, step_mhz=15)]
    agent = AgentStatus(products=[ProductClocks(product="NVIDIA H200", ranges=ranges)])
    report = replace(report, status=report.status.model_copy(update={"agent": agent}))
    somewhere = world([policy(spec={"pools": two_pools({"tune": {}})})], [pod("d0", DECODE), pod("p0", PREFILL)])
    memory = Memory()
    for seconds in range(0, 200, 10):
        fresh = report.status.model_copy(update={"reported_at": timestamp(NOW + seconds)})
        looked = replace(somewhere, node_energies={"n1": replace(report, status=fresh)})
        decision = decide(looked, None, memory, NOW + seconds)
        memory = decision.memory
        assert decision.failures == ()
    tuning = as_kept(decision.statuses["uid-qwen"]).pools[0].tuning
    assert (tuning.phase, tuning.released_mhz) == ("Searching", 1980)


@pytest.mark.parametrize("mode", ["Observe", "Enforce"])
def test_the_serving_pods_of_one_tenant_stop_no_pass(mode):
    """Each of two pages tells as many tokens as a report may, and their sum has a digit more."""
    told = [instance(name, tokens_per_second="600000000000000.0") for name in ("d0", "d1")]
    pods = [pod("d0", DECODE), pod("d1", DECODE), pod("p0", PREFILL)]
    policies = [policy(spec={"mode": mode}), policy("other", namespace="other", deleting=True)]
    decision = decide(world(policies, pods, [node_energy(instances=told)]), None, Memory(), NOW)
    assert decision.failures == ()
    assert decision.released == {"uid-other"}
    assert decision.statuses["uid-qwen"].pools[0].tokens_per_second == f"{MOST}.0"
