"""Instances on several nodes: whole energy or none, by itself and with the operator's own functions in between."""

import math
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import DECODE, PREFILL, agent_pod, node_energy, pod, policy, world
from wattlock_agent.clock import Clock
from wattlock_agent.epochs import Sample
from wattlock_agent.experiment import Switchback
from wattlock_agent.holders.base import PodName
from wattlock_agent.kube import PeersSeen
from wattlock_agent.orders import parse_peers
from wattlock_agent.report import build_status
from wattlock_agent.span import KEPT_EPOCHS, PEER_WAIT_SECONDS, Peers, Span, Unknown
from wattlock_api.base import parse_timestamp
from wattlock_api.constants import PEER_POWER_ANNOTATION
from wattlock_api.nodeenergy import EpochPower, NodeEnergyStatus
from wattlock_api.peerpower import MAX_PEER_POWER_BYTES, PeerPower, PeerPowers
from wattlock_api.schedule import Experiment, epoch_at
from wattlock_operator.decide import Memory, decide

EXPERIMENT = Experiment("seed", 20, 0.5)
START = 1_800_000_000.0
SPAN = Span(frozenset({"n1", "n2", "n3"}), 0, serves=True)


def power(nodes=("n2", "n3"), **epochs: float | None) -> PeerPower:
    """News of epochs given as e1=500.0."""
    told = [
        EpochPower(epoch=int(name[1:]), watts=None if watts is None else f"{watts:.3f}")
        for name, watts in epochs.items()
    ]
    return PeerPower(policy_uid="p", instance="i", nodes=list(nodes), epochs=told)


def test_the_power_of_an_epoch_is_waited_for_and_then_given_up():
    peers = Peers(SPAN)
    assert peers.watts(7, 4.0) is None
    assert peers.watts(7, PEER_WAIT_SECONDS) is Unknown.UNKNOWN
    peers.take(power(e7=500.0, e8=None))
    assert peers.watts(7, 4.0) == 500
    assert peers.watts(8, 4.0) is Unknown.UNKNOWN


@pytest.mark.parametrize("nodes", [("n2",), ("n3",), (), ("n2", "n3", "n4"), ("n2", "n4"), ("n1", "n2", "n3")])
def test_news_of_other_nodes_than_all_the_others_is_no_news(nodes):
    peers = Peers(SPAN)
    peers.take(power(nodes, e7=500.0))
    assert peers.watts(7, 4.0) is None


def test_with_a_pod_missing_no_energy_is_ever_whole():
    peers = Peers(Span(frozenset({"n1"}), 1, serves=True))
    assert peers.watts(7, 0.0) is Unknown.UNKNOWN


@given(st.lists(st.tuples(st.integers(0, 200), st.none() | st.floats(0, 1e5)), max_size=60))
def test_only_what_was_told_last_is_ever_believed_and_memory_is_bounded(news):
    peers = Peers(SPAN)
    last = {}
    for epoch, watts in news:
        peers.take(power(**{f"e{epoch}": watts}))
        last[epoch] = watts
    known = [epoch for epoch in last if peers.watts(epoch, 0.0) is not None]
    assert len(known) <= 2 * KEPT_EPOCHS
    for epoch in known:
        found = peers.watts(epoch, 0.0)
        assert (None if found is Unknown.UNKNOWN else found) == pytest.approx(last[epoch], abs=0.001)


@pytest.mark.parametrize("text", [None, 7, "", "{", "[]", '{"instances": 3}', "x" * (MAX_PEER_POWER_BYTES + 1)])
def test_an_annotation_that_cannot_be_read_is_no_news(text):
    assert parse_peers({PEER_POWER_ANNOTATION: text}) == PeerPowers()
    assert parse_peers(None) == PeerPowers()


def run(switchback, epochs, news=lambda epoch, switchback: None, span=SPAN, watts=500.0):
    """Feed whole epochs of 1000 tokens/s; after each, ``news`` may tell of it. Returns first epoch and ratios."""
    first = epoch_at(EXPERIMENT, START)
    switchback.configure(EXPERIMENT, "i", 1590, span)
    ratios = []
    for epoch in range(first, first + epochs):
        for offset in (0.5, 3.0, 8.0, 13.0, 18.0, 19.7):
            unix = epoch * 20.0 + offset
            at = unix - START
            ratios += switchback.note(Clock(at, unix), True)
            switchback.add(Sample(unix, 1000 * at, 10 * at, 1000 * at, watts * at, (0,)))
        news(epoch, switchback)
    end = (first + epochs) * 20.0
    switchback.note(Clock(end + 5 - START, end + 5), True)
    return first, ratios


def give_up(switchback, epochs):
    """Let the time pass after which nothing more is waited for."""
    unix = START + 20.0 * epochs + PEER_WAIT_SECONDS + 1
    switchback.note(Clock(unix - START, unix), True)


def tell(epoch, switchback):
    switchback.take_peers(power(**{f"e{epoch}": 250.0}))


def test_the_energy_of_an_epoch_is_that_of_all_nodes():
    switchback = Switchback()
    run(switchback, 8, tell)
    for arm in switchback.arms():
        assert float(arm.joules) / float(arm.seconds) == pytest.approx(750)
    assert switchback.dropped().peers == 0
    assert switchback.pair_stats()[0].pairs >= 3


def test_epochs_whose_power_elsewhere_never_comes_are_dropped_and_counted_so():
    switchback = Switchback()
    first, _ = run(switchback, 8, lambda epoch, given: tell(epoch, given) if epoch % 2 else None)
    give_up(switchback, 8)
    assert switchback.dropped().peers == sum(1 for epoch in range(first, first + 8) if epoch % 2 == 0)
    assert switchback.pair_stats() == []


def test_power_that_comes_late_still_counts_in_the_order_of_epochs():
    switchback = Switchback()
    told = []

    def late(epoch, given):
        told.append(epoch)
        if len(told) % 4 == 0:
            for each in told[-4:]:
                tell(each, given)

    run(switchback, 8, late)
    in_time = Switchback()
    run(in_time, 8, tell)
    assert switchback.dropped().peers == 0
    assert switchback.pair_stats() == in_time.pair_stats()


def test_the_guardrail_hears_of_throughput_without_waiting_for_energy():
    _, ratios = run(Switchback(), 8)
    assert len(ratios) >= 3


def test_where_tokens_are_counted_elsewhere_power_is_told_and_nothing_is_paired():
    switchback = Switchback()
    span = Span(frozenset({"n1", "n2"}), 0, serves=False)
    first, _ = run(switchback, 12, span=span, watts=300.0)
    epochs = switchback.epochs()
    assert [each.epoch for each in epochs] == list(range(first + 12 - KEPT_EPOCHS, first + 12))
    assert {float(each.watts) for each in epochs} == {300.0}
    assert switchback.pair_stats() == []
    assert switchback.arms() == []


def test_a_change_of_nodes_begins_anew():
    switchback = Switchback()
    run(switchback, 3, span=Span(frozenset({"n1", "n2"}), 0, serves=False))
    assert switchback.epochs()
    switchback.configure(EXPERIMENT, "i", 1590, SPAN)
    assert switchback.epochs() == []


# --- two agents and the operator ---


class Cluster:
    """Two nodes with a GPU each that serve together, and the operator's decisions in between."""

    #: Watts by node: released, capped.
    WATTS: ClassVar = {"n1": (500.0, 450.0), "n2": (300.0, 180.0)}

    def __init__(self, make_node):
        self.policy = policy(spec={"verification": {"controlShare": 0.5, "epochSeconds": 20}})
        self.pods = [
            pod(f"big-0-{index}", DECODE | self._labels(index), node, group_size=2)
            for index, node in enumerate(self.WATTS)
        ]
        self.nodes = {}
        for index, name in enumerate(self.WATTS):
            node = make_node(gpus=1)
            node.pods = {"GPU-0": (PodName("llm", f"big-0-{index}"),)}
            self.nodes[name] = node
        self.memory = Memory()
        self.powers = {}
        self.writes = 0
        self.deaf = set()
        """Nodes whose reports do not arrive any more."""
        self.reports = {}

    @staticmethod
    def _labels(index):
        prefix = "leaderworkerset.sigs.k8s.io"
        return {f"{prefix}/name": "big", f"{prefix}/group-index": "0", f"{prefix}/worker-index": str(index)}

    def status(self, name) -> NodeEnergyStatus:
        agent = self.nodes[name].agent
        return build_status(agent.outlook, agent.tracks, agent.instances, "1", "agent", False, agent.parted)

    def operate(self):
        """One pass of the operator over what the agents reported."""
        entries = []
        for name, node in self.nodes.items():
            if node.agent.outlook is not None and name not in self.deaf:
                self.reports[name] = self.status(name)
            orders = node.orders.orders if node.orders else ()
            entries.append(
                node_energy(name, orders, status=self.reports.get(name), peer_power=self.powers.get(name, ""))
            )
        pods = [*self.pods, pod("p0", PREFILL), *map(agent_pod, self.nodes)]
        decision = decide(world([self.policy], pods, entries, self.nodes), None, self.memory, self.now())
        self.memory = decision.memory
        for name, orders in decision.write_orders.items():
            if name in self.nodes:
                self.writes += 1
                node = self.nodes[name]
                changed = node.orders is None or node.orders.orders != orders
                if changed:
                    node.order(*orders, generation=1 + (node.orders.generation if node.orders else 0))
                self.powers[name] = decision.peer_powers.get(name, "")
                peers = parse_peers({PEER_POWER_ANNOTATION: self.powers[name]})
                node.agent.handle(PeersSeen(peers), node.clock)
        return decision

    def now(self):
        return next(iter(self.nodes.values())).clock.unix_seconds

    def run(self, seconds):
        for second in range(int(seconds)):
            for name, node in self.nodes.items():
                released, capped = self.WATTS[name]
                node.driver.watts = capped if node.driver.locks else released
                node.run(1)
            if second % 20 == 5 or self.nodes["n1"].orders is None:
                self.operate()
        return self

    @property
    def serving(self):
        return self.status("n1").instances[0]


@pytest.fixture
def cluster(make_node):
    return Cluster(make_node)


def test_two_agents_and_the_operator_find_the_saving_of_the_whole_instance(cluster):
    cluster.run(420)
    (stats,) = cluster.serving.pair_stats
    assert stats.pairs >= 6
    truth = math.log((450 + 180) / (500 + 300))  # the serving node alone would say log(0.9)
    assert float(stats.energy.total) / stats.pairs == pytest.approx(truth, abs=0.003)
    assert cluster.serving.dropped.peers == 0
    watts = {arm.cap_mhz: float(arm.joules) / float(arm.seconds) for arm in cluster.serving.arms}
    assert watts == {0: pytest.approx(800, rel=0.005), 1590: pytest.approx(630, rel=0.005)}
    assert cluster.writes <= 2 + 420 / 20
    worker = cluster.status("n2").instances[0]
    assert (worker.pair_stats, worker.reason, len(worker.epochs)) == ([], "", KEPT_EPOCHS)


def test_one_node_of_an_instance_never_shows_its_energy_as_that_of_all(cluster):
    cluster.run(60)
    assert cluster.serving.joules_per_generated_token is None
    assert cluster.serving.token_energy_reason == "SpansNodes"
    decision = cluster.operate()
    (status,) = decision.statuses.values()
    watts = status.pools[0].power_watts
    assert float(status.pools[0].joules_per_generated_token) == pytest.approx(watts / 1000, rel=0.001)
    assert watts > 500


def test_when_the_other_agent_falls_silent_epochs_are_dropped_and_none_is_too_cheap(cluster):
    cluster.run(200)
    before = cluster.serving.pair_stats[0]
    cluster.deaf.add("n2")
    cluster.run(PEER_WAIT_SECONDS + 120)
    after = cluster.serving.pair_stats[0]
    assert cluster.serving.dropped.peers >= 4
    assert after.pairs <= before.pairs + 1  # the one that was on its way
    for arm in cluster.serving.arms:
        assert float(arm.joules) / float(arm.seconds) > 600


def test_a_replaced_pod_on_the_other_node_costs_its_epoch_and_no_more(cluster):
    cluster.run(120)
    cluster.pods[1] = pod("big-0-1b", DECODE | cluster._labels(1), "n2", group_size=2)
    cluster.nodes["n2"].pods = {"GPU-0": (PodName("llm", "big-0-1b"),)}
    cluster.run(300)
    (stats,) = cluster.serving.pair_stats
    assert 1 <= cluster.serving.dropped.peers <= 3
    assert float(stats.energy.total) / stats.pairs == pytest.approx(math.log(630 / 800), abs=0.003)


def test_a_slow_instance_is_released_on_all_its_nodes_and_capped_again_after_the_cool_down(cluster):
    cluster.policy = policy(
        spec={"verification": {"method": "None"}, "guardrail": {"maxInterTokenLatencyMs": 50, "cooldownSeconds": 60}}
    )
    cluster.run(40)
    assert all(node.locked() for node in cluster.nodes.values())
    cluster.nodes["n1"].latency_seconds = 0.2
    cluster.run(40)
    assert not any(node.locked() for node in cluster.nodes.values())
    cluster.nodes["n1"].latency_seconds = 0.01
    cluster.run(100)
    assert all(node.locked() for node in cluster.nodes.values())
    assert cluster.serving.guardrail_trips == 1


def test_the_times_of_the_virtual_nodes_are_those_of_the_schedule():
    assert parse_timestamp("2027-01-15T08:00:00Z") == START
