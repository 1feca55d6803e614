"""Rollouts as the whole operator decides them: from orders, reports and kept status to the next orders."""

import dataclasses

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, as_kept, instance, node_energy, pod, policy, world
from wattlock_api.base import parse_timestamp, timestamp
from wattlock_api.constants import RolloutPhase
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_operator.decide import Memory, decide
from wattlock_operator.parse import parse_policy


def cluster(spec, gpus=(), instances=(), orders=(), status=None):
    pods = [pod(f"d{number}", DECODE) for number in range(4)] + [pod("p0", PREFILL), agent_pod("n1")]
    node = node_energy("n1", orders, gpus=gpus, instances=instances)
    return world([policy(spec=spec, status=status)], pods, [node])


SPEC = {"rollout": {"steps": [1, "100%"], "holdSeconds": 20}}


def settle(spec, memory, now, status=None, instances=(), orders=()):
    """Decide, write the orders, and decide once more when the agents have acted on them."""
    first = decide(cluster(spec, orders=orders, status=status, instances=instances), None, memory, now)
    orders = first.write_orders.get("n1", orders)
    last = decide(cluster(spec, orders=orders, status=status, instances=instances), None, first.memory, now + 2)
    both = (*first.tellings, *last.tellings)
    return dataclasses.replace(last, tellings=both), last.write_orders.get("n1", orders)


def test_the_whole_decision_rolls_out_and_says_so():
    decision, orders = settle(SPEC, Memory(), NOW)
    capped = [order for order in orders if order.cap_mhz is not None]
    assert len(capped) == 1
    waiting = {order.hold.reason for order in orders if order.hold is not None}
    assert waiting == {"RolloutPending"}
    status = decision.statuses["uid-qwen"]
    assert status.summary.clock == "1590MHz(1/4)"
    conditions = {each.type: each for each in status.conditions}
    assert (conditions["Progressing"].status, conditions["Progressing"].reason) == ("True", "RollingOut")
    assert "step 1 of 2" in conditions["Progressing"].message
    # A restarted operator has the status alone.
    later, orders = settle(SPEC, Memory(), NOW + 23, status, orders=orders)
    assert len([order for order in orders if order.cap_mhz is not None]) == 4
    tripped = instance(capped[0].instance, guardrail_tripped=True, guardrail_message="slow")
    back, orders = settle(SPEC, Memory(), NOW + 30, later.statuses["uid-qwen"], [tripped], orders)
    conditions = {each.type: each for each in back.statuses["uid-qwen"].conditions}
    assert (conditions["Ready"].status, conditions["Ready"].reason) == ("False", "RolledBack")
    assert "slow" in conditions["Ready"].message
    assert [telling.reason for telling in back.tellings if telling.warning] == ["RolledBack", "Breached"]
    assert all(order.cap_mhz is None for order in orders)


def test_a_cool_down_of_before_takes_no_rollout_back():
    """Enforce, a trip, Observe and Enforce again: the agent goes on with the cool-down of the first time."""
    decision, orders = settle(SPEC, Memory(), NOW)
    (first,) = [order.instance for order in orders if order.cap_mhz is not None]
    cooling = instance(first, guardrail_tripped=True, guardrail_message="slow", guardrail_withdrawn=True)
    later, orders = settle(SPEC, decision.memory, NOW + 30, instances=[cooling], orders=orders)
    rollout = later.statuses["uid-qwen"].pools[0].rollout
    assert (rollout.phase, rollout.step) == (RolloutPhase.PROGRESSING, 1)
    assert "cool-down" in rollout.message
    assert [order.instance for order in orders if order.cap_mhz is not None] == [first]
    breached = cooling.model_copy(update={"guardrail_withdrawn": False})
    back, orders = settle(SPEC, later.memory, NOW + 60, instances=[breached], orders=orders)
    assert back.statuses["uid-qwen"].pools[0].rollout.phase is RolloutPhase.ROLLED_BACK


@pytest.mark.parametrize("since", ["0000-01-01T00:00:00Z", "0001-01-01T00:00:00+01:00"])
def test_a_time_that_nobody_can_read_counts_as_none(since):
    _, orders = settle(SPEC, Memory(), NOW)
    rollout = {"phase": "Progressing", "target": [{"product": "", "capMHz": 1590}], "step": 1, "since": since}
    status = kept_rollout(rollout)
    decision, orders = settle(SPEC, Memory(), NOW, status, orders=orders)
    assert len([order for order in orders if order.cap_mhz is not None]) == 1
    told = decision.statuses["uid-qwen"].pools[0].rollout
    assert parse_timestamp(told.since) >= NOW, "it holds from now on"
    _, orders = settle(SPEC, decision.memory, NOW + 30, status, orders=orders)
    assert len([order for order in orders if order.cap_mhz is not None]) == 4


@pytest.mark.parametrize("mhz", [0, 50, 5001])
@pytest.mark.parametrize("where", ["target", "previous"])
def test_a_clock_that_no_order_may_have_counts_as_none(where, mhz):
    rollout = {"phase": "Progressing", "target": [{"product": "", "capMHz": 1590}], "step": 1, "steps": 2}
    rollout[where] = [{"product": "", "capMHz": mhz}]
    status = kept_rollout(rollout)
    assert status.pools[0].energy_kwh == "12", "the rest of the status is read all the same"
    decision, orders = settle(SPEC, Memory(), NOW, status)
    assert {order.cap_mhz for order in orders} <= {1590, None}
    assert as_kept(decision.statuses["uid-qwen"]).pools[0].rollout.step == 1


def kept_rollout(rollout):
    """A status as somebody left it."""
    pools = [{"name": "decode", "role": "Decode", "energyKWh": "12", "rollout": rollout}]
    return parse_policy({"status": {"pools": pools}}).status


def group(number, index, node):
    """A pod of an instance on two nodes; the first one serves its metrics."""
    labels = {"name": "big", "group-index": str(number), "worker-index": str(index)}
    labels = {f"leaderworkerset.sigs.k8s.io/{name}": value for name, value in labels.items()}
    return pod(f"big-{number}-{index}", DECODE | labels, node, group_size=2)


class Spread:
    """Two instances on two nodes each, whose agents act on their orders at once unless they lag."""

    NODES = ("n1", "n2", "n3", "n4")
    PODS = (group(0, 0, "n1"), group(0, 1, "n2"), group(1, 0, "n3"), group(1, 1, "n4"), pod("p0", PREFILL, "n1"))

    def __init__(self):
        self.now, self.memory = NOW, Memory()
        self.orders, self.generations = dict.fromkeys(self.NODES, ()), dict.fromkeys(self.NODES, 1)
        self.tripped: dict[str, list] = {}
        self.lagging: set[str] = set()

    def look(self, seconds=5.0):
        self.now += seconds
        entries = [
            node_energy(
                name,
                self.orders[name],
                generation=self.generations[name],
                status=NodeEnergyStatus(
                    observed_generation=self.generations[name] - (name in self.lagging),
                    reported_at=timestamp(self.now),
                    instances=self.tripped.get(name, []),
                ),
            )
            for name in self.NODES
        ]
        pods = [*self.PODS, *map(agent_pod, self.NODES)]
        decision = decide(world([policy(spec=SPEC)], pods, entries, self.NODES), None, self.memory, self.now)
        self.memory = decision.memory
        for name, written in decision.write_orders.items():
            self.orders[name] = written
            self.generations[name] += 1
        return decision.statuses["uid-qwen"].pools[0].rollout

    @property
    def capped(self):
        return {order.instance for orders in self.orders.values() for order in orders if order.cap_mhz is not None}

    def trip(self, node, name):
        self.tripped[node] = [instance(name, guardrail_tripped=True, guardrail_message="slow")]


@pytest.mark.parametrize("lags", [True, False])
def test_a_trip_on_one_of_an_instances_nodes_takes_everything_back_also_while_another_lags(lags):
    pool = Spread()
    pool.look()
    pool.look()
    (name,) = pool.capped
    leader, worker = ("n1", "n2") if name == "big/0" else ("n3", "n4")
    pool.trip(leader, name)
    pool.lagging = {worker} if lags else set()
    state = pool.look()
    assert (state.phase, "slow" in state.message) == (RolloutPhase.ROLLED_BACK, True)
    assert pool.capped == set()


def test_a_trip_that_is_told_before_the_agent_has_acted_counts_once_it_has_though_the_others_are_held_by_then():
    pool = Spread()
    pool.look()
    pool.look()
    (name,) = pool.capped
    leader = "n1" if name == "big/0" else "n3"
    pool.trip(leader, name)
    pool.lagging = {leader}
    for _ in range(3):
        assert pool.look().phase is RolloutPhase.PROGRESSING
    pool.lagging = set()
    assert pool.look().phase is RolloutPhase.ROLLED_BACK


def test_observe_has_no_rollout_and_enforce_begins_one():
    decision, orders = settle(SPEC | {"mode": "Observe"}, Memory(), NOW)
    assert decision.statuses["uid-qwen"].pools[0].rollout is None
    assert all(order.cap_mhz is None for order in orders)
    _, orders = settle(SPEC, decision.memory, NOW + 1, decision.statuses["uid-qwen"])
    assert len([order for order in orders if order.cap_mhz is not None]) == 1
