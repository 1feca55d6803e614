"""Rollouts: one step after the other, held, halted and taken back; the state alone says where it stands."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, as_kept, instance, node_energy, pod, policy, world
from wattlock_api.base import parse_timestamp, timestamp
from wattlock_api.constants import RolloutPhase
from wattlock_api.energypolicy import Rollout
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_api.policystatus import RolloutStatus
from wattlock_operator.decide import Memory, decide
from wattlock_operator.parse import parse_policy
from wattlock_operator.rollout import Breach, Candidate, in_turn, instances_of_step, plan_rollout

RULES = Rollout(steps=[1, "50%", "100%"], hold_seconds=100)


class Pool:
    """Instances whose agents act at once on what the plan orders, in virtual time."""

    def __init__(self, size=4, rules=RULES, mhz=1590):
        self.rules, self.mhz, self.now, self.generation = rules, mhz, NOW, 1
        self.ordered: dict[str, int | None] = {f"d{number}": None for number in range(size)}
        self.breach: dict[str, str] = {}
        self.cooling: set[str] = set()
        self.not_ready: set[str] = set()
        self.deaf: set[str] = set()
        self.state: RolloutStatus | None = None

    def told(self, name):
        told = self.breach.get(name)
        return () if told is None else (Breach(told, self.ordered[name], name not in self.deaf),)

    def look(self, seconds=0.0):
        self.now += seconds
        candidates = [
            Candidate(
                name=name,
                product="",
                cap_mhz=self.mhz,
                ready=name not in self.not_ready,
                ordered_mhz=mhz,
                acted=name not in self.deaf,
                breaches=self.told(name),
                cools_down=name in self.cooling,
            )
            for name, mhz in self.ordered.items()
        ]
        plan = plan_rollout(self.rules, self.state, candidates, "seed", self.generation, self.now)
        # What is kept goes through the API server, which knows JSON only.
        self.state = RolloutStatus.model_validate(plan.status.to_api())
        self.ordered = {each.name: plan.cap_mhz(each) for each in candidates}
        return self

    def run(self, seconds, every=10):
        for _ in range(int(seconds / every)):
            self.look(every)
        return self

    @property
    def capped(self):
        return sorted(name for name, mhz in self.ordered.items() if mhz == self.mhz)

    @property
    def turns(self):
        return [each.name for each in in_turn("seed", [Candidate(name, "", 1, True) for name in self.ordered])]


def test_each_step_holds_before_the_next_begins():
    pool = Pool().look()
    assert pool.capped == [pool.turns[0]]
    assert pool.run(100).capped == [pool.turns[0]], "the hold time begins once the agent has acted"
    assert len(pool.run(20).capped) == 2
    assert len(pool.run(90).capped) == 2
    assert len(pool.run(20).capped) == 4
    assert pool.state.phase is RolloutPhase.PROGRESSING, "the last step holds, too"
    assert pool.run(120).state.phase is RolloutPhase.COMPLETE


def test_a_breach_under_the_new_clock_takes_everything_back_to_the_clock_of_before():
    pool = Pool().run(400)
    assert pool.state.phase is RolloutPhase.COMPLETE
    pool.mhz = 1400
    pool.look().look()
    assert sorted(pool.ordered.values()) == [1400, 1590, 1590, 1590]
    pool.breach = {pool.turns[0]: "52.0 ms, the bound is 50 ms"}
    pool.look(5)
    assert set(pool.ordered.values()) == {1590}
    assert pool.state.phase is RolloutPhase.ROLLED_BACK
    assert pool.turns[0] in pool.state.message
    assert "52.0 ms" in pool.state.message
    pool.breach = {}
    assert set(pool.run(5000).ordered.values()) == {1590}, "it is not tried again by itself"
    pool.generation += 1
    pool.look()
    assert sorted(pool.ordered.values()) == [1400, 1590, 1590, 1590]


def test_the_first_rollout_goes_back_to_released():
    pool = Pool().look().look()
    pool.breach = {pool.turns[0]: "slow"}
    assert set(pool.look().ordered.values()) == {None}


@pytest.mark.parametrize("whose", ["another instance's", "of before the order"])
def test_a_breach_that_the_new_clock_did_not_make_does_not_count(whose):
    pool = Pool().run(400)
    pool.mhz = 1400
    first = pool.turns[0]
    if whose == "of before the order":
        pool.breach, pool.deaf = {first: "told under the old clock"}, {first}
    else:
        pool.breach = {pool.turns[-1]: "slow under the old clock"}
    pool.run(50)
    assert pool.state.phase is RolloutPhase.PROGRESSING
    assert pool.ordered[first] == 1400


@pytest.mark.parametrize(
    ("breach", "counts"),
    [
        (Breach("slow", 1400, acted=True), True),
        (Breach("told under the old clock", 1400, acted=False), False),
        (Breach("told under the old clock", 1590, acted=True), False),
        (Breach("cools down from an earlier cap", None, acted=True), False),
    ],
)
def test_a_breach_is_judged_by_the_node_that_tells_it_alone(breach, counts):
    """The other node's agent lags, or has the instance's release in its order already."""
    pool = Pool().run(400)
    pool.mhz = 1400
    first = pool.look().turns[0]
    for other in (Breach("", None, acted=False), Breach("", 1590, acted=True)):
        spread = [
            Candidate(name, "", 1400, True, None, False, (other, breach) if name == first else ())
            for name in pool.ordered
        ]
        plan = plan_rollout(RULES, pool.state, spread, "seed", 1, pool.now)
        assert (plan.status.phase is RolloutPhase.ROLLED_BACK) == counts
        assert ("slow" in plan.status.message) == counts


def test_the_hold_time_does_not_run_while_agents_have_not_acted_or_pods_are_not_ready():
    pool = Pool().look()
    pool.deaf = {pool.turns[0]}
    assert len(pool.run(1000).capped) == 1
    assert pool.turns[0] in pool.state.message
    pool.deaf = set()
    pool.run(90)
    pool.not_ready = {"d3"}
    assert len(pool.run(1000).capped) == 1
    assert "d3" in pool.state.message
    pool.not_ready = set()
    assert len(pool.run(90).capped) == 1, "it begins anew"
    assert len(pool.run(30).capped) == 2


def test_the_hold_time_does_not_run_through_a_cool_down_of_before():
    pool = Pool()
    pool.cooling = {pool.turns[0]}
    assert len(pool.run(1000).capped) == 1
    assert "cool-down of 1 instance(s)" in pool.state.message
    pool.cooling = {pool.turns[-1]}
    assert len(pool.run(110).capped) == 2


def test_as_many_may_be_not_ready_as_is_allowed():
    pool = Pool(rules=RULES.model_copy(update={"max_unavailable": 1})).look()
    pool.not_ready = {"d3"}
    assert len(pool.run(130).capped) == 2


def test_other_orders_on_the_node_do_not_stop_a_hold_that_runs():
    pool = Pool().look().look()
    pool.deaf = {pool.turns[0]}
    pool.look(50)
    pool.deaf = set()
    assert len(pool.run(60).capped) == 2


def test_paused_keeps_what_is_and_goes_on_with_a_full_hold():
    pool = Pool().run(120)
    pool.rules = RULES.model_copy(update={"paused": True})
    assert len(pool.look(1000).capped) == 2, "not even when the hold time was over as it was paused"
    assert len(pool.run(1000).capped) == 2
    assert pool.state.phase is RolloutPhase.PAUSED
    pool.rules = RULES
    assert len(pool.run(90).capped) == 2
    assert len(pool.run(30).capped) == 4


def test_a_breach_while_paused_still_takes_everything_back():
    pool = Pool(rules=RULES.model_copy(update={"paused": True})).look().look()
    pool.breach = {pool.turns[0]: "slow"}
    assert pool.look().state.phase is RolloutPhase.ROLLED_BACK


def test_without_rules_every_change_is_at_once_and_rules_that_come_later_release_nobody():
    pool = Pool(rules=None).look()
    assert len(pool.capped) == 4
    pool.rules = RULES
    assert len(pool.look().capped) == 4
    pool.mhz = 1400
    assert sorted(pool.look().ordered.values()) == [1400, 1590, 1590, 1590]


def test_a_change_taken_back_in_the_middle_is_done_at_once():
    pool = Pool().run(400)
    pool.mhz = 1400
    pool.run(130)
    pool.mhz = 1590
    assert set(pool.look().ordered.values()) == {1590}
    assert pool.state.phase is RolloutPhase.COMPLETE


def test_a_third_clock_in_the_middle_begins_from_the_clock_of_before():
    pool = Pool().run(400)
    pool.mhz = 1400
    pool.run(130)
    pool.mhz = 1305
    assert sorted(pool.look().ordered.values()) == [1305, 1590, 1590, 1590]


def test_instances_that_come_while_it_is_complete_are_capped_at_once():
    pool = Pool().run(400)
    pool.ordered["d9"] = None
    assert "d9" in pool.look().capped
    assert pool.state.phase is RolloutPhase.COMPLETE


def test_the_state_stays_while_there_is_nothing_to_cap():
    pool = Pool().run(130)
    state = pool.state
    assert plan_rollout(RULES, state, [], "seed", 1, pool.now).status == state
    assert plan_rollout(RULES, None, [], "seed", 1, pool.now) is None


def test_gpu_products_have_clocks_of_their_own():
    pool = [Candidate("a", "H100", 1200, True), Candidate("b", "H200", 1590, True)]
    plan = plan_rollout(None, None, pool, "seed", 1, NOW)
    changed = [dataclasses.replace(pool[0], cap_mhz=1100), pool[1]]
    for number in range(60):
        changed = [dataclasses.replace(each, ordered_mhz=plan.cap_mhz(each), acted=True) for each in changed]
        plan = plan_rollout(RULES, plan.status, changed, "seed", 1, NOW + 10 * number)
        assert plan.cap_mhz(changed[1]) == 1590, "a product whose row did not change keeps its clock"
    assert plan.cap_mhz(changed[0]) == 1100


H100, H200 = "NVIDIA H100", "NVIDIA H200"
BY_PROFILE = {"a": (H100, 1200), "b": (H200, 1590), "c": (H100, 1200), "d": (H200, 1590)}


def settled(caps, by_product=True):
    """The state of a pool whose instances have had these clocks for long."""
    pool = [Candidate(name, product, mhz, True, by_product=by_product) for name, (product, mhz) in caps.items()]
    return plan_rollout(None, None, pool, "seed", 1, NOW).status


def asks(mhz, by_product=False):
    """The same pool, asking for another clock: one number, or one by product."""
    numbers = mhz if isinstance(mhz, dict) else dict.fromkeys((H100, H200), mhz)
    return [
        Candidate(name, product, numbers[product], True, by_product=by_product)
        for name, (product, _) in BY_PROFILE.items()
    ]


def caps_of(plan, pool):
    return {each.name: plan.cap_mhz(each) for each in pool}


def test_from_a_profile_to_one_number_everybody_keeps_his_clock_until_his_turn_comes_and_after_a_trip():
    before = settled(BY_PROFILE)
    pool = asks(1400)
    plan = plan_rollout(RULES, before, pool, "seed", 2, NOW)
    (first,) = plan.on_target
    clocks_of_before = {name: mhz for name, (_, mhz) in BY_PROFILE.items()}
    assert caps_of(plan, pool) == clocks_of_before | {first: 1400}
    tripped = [
        dataclasses.replace(each, breaches=(Breach("slow", 1400, acted=True),)) if each.name == first else each
        for each in pool
    ]
    back = plan_rollout(RULES, plan.status, tripped, "seed", 2, NOW + 5)
    assert back.status.phase is RolloutPhase.ROLLED_BACK
    assert caps_of(back, pool) == clocks_of_before
    # And the profile again: that is the clock of before, so it needs no steps.
    profile = asks({H100: 1200, H200: 1590}, by_product=True)
    again = plan_rollout(RULES, back.status, profile, "seed", 3, NOW + 10)
    assert again.status.phase is RolloutPhase.COMPLETE
    assert caps_of(again, profile) == clocks_of_before


def test_from_a_profile_to_the_same_number_nothing_changes_for_anybody():
    before = settled({"a": (H200, 1590), "b": (H200, 1590)})
    pool = [Candidate(name, H200, 1590, True, by_product=False) for name in "ab"]
    new = Candidate("c", "", 1590, True, by_product=False)  # its node's agent has told nothing yet
    plan = plan_rollout(RULES, before, [*pool, new], "seed", 2, NOW)
    assert plan.status.phase is RolloutPhase.COMPLETE
    assert caps_of(plan, [*pool, new]) == dict.fromkeys("abc", 1590)
    # From now on it is one number, also for products that no profile knew.
    other = Candidate("d", H100, 1590, True, by_product=False)
    later = plan_rollout(RULES, plan.status, [*pool, other], "seed", 2, NOW + 5)
    assert later.status.phase is RolloutPhase.COMPLETE


def test_from_one_number_to_a_profile_only_the_products_that_get_another_clock_change_in_turn():
    before = settled(dict.fromkeys(BY_PROFILE, (H200, 1590)), by_product=False)
    pool = asks({H100: 1200, H200: 1590}, by_product=True)
    plan = plan_rollout(RULES, before, pool, "seed", 2, NOW)
    assert [each.cap_mhz for each in plan.status.previous] == [1590]
    others = {each.name for each in pool} - plan.on_target
    assert {caps_of(plan, pool)[name] for name in others} == {1590}
    for number in range(60):
        pool = [dataclasses.replace(each, ordered_mhz=caps_of(plan, pool)[each.name], acted=True) for each in pool]
        plan = plan_rollout(RULES, plan.status, pool, "seed", 2, NOW + 10 * number)
        assert all(plan.cap_mhz(each) == 1590 for each in pool if each.product == H200)
    assert plan.status.phase is RolloutPhase.COMPLETE
    # On the way back, too: each keeps its own until its turn comes.
    fixed = asks(1590)
    back = plan_rollout(RULES, plan.status, fixed, "seed", 3, NOW + 700)
    assert back.status.phase is RolloutPhase.PROGRESSING
    for each in fixed:
        assert back.cap_mhz(each) in ({1590} if each.product == H200 or each.name in back.on_target else {1200})


def test_an_instance_of_an_unknown_product_has_no_clock_of_before_where_products_differed():
    pool = [*asks(1400), Candidate("new", "", 1400, True, by_product=False)]
    plan = plan_rollout(RULES, settled(BY_PROFILE), pool, "seed", 2, NOW)
    assert caps_of(plan, pool)["new"] in ({1400} if "new" in plan.on_target else {None})


@pytest.mark.parametrize(
    ("step", "total", "count"),
    [(1, 4, 1), (9, 4, 4), ("25%", 4, 1), ("25%", 5, 2), ("100%", 3, 3), ("1%", 1000, 10), ("1%", 3, 1)],
)
def test_shares_are_rounded_up(step, total, count):
    assert instances_of_step(step, total) == count


@settings(max_examples=150)
@given(st.data())
def test_whatever_happens_no_instance_is_at_a_clock_that_nobody_chose_and_a_breach_is_never_ignored(data):
    """Any instance is at the target, at the clock of before, or released; restarts lose nothing, since only the status
    is kept; and with a breach under the target the next look has nobody there."""
    pool = Pool(size=data.draw(st.integers(1, 6)))
    asked = [pool.mhz]
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["wait", "clock", "breach", "calm", "deaf", "ready", "come", "go", "edit"])):
            case "clock":
                pool.mhz = data.draw(st.sampled_from([1200, 1400, 1590]))
                asked.append(pool.mhz)
            case "breach":
                pool.breach = dict.fromkeys(data.draw(st.sets(st.sampled_from(sorted(pool.ordered)))), "slow")
            case "calm":
                pool.breach = {}
            case "deaf":
                pool.deaf = data.draw(st.sets(st.sampled_from(sorted(pool.ordered))))
            case "ready":
                pool.not_ready = data.draw(st.sets(st.sampled_from(sorted(pool.ordered))))
            case "come":
                pool.ordered[f"d{len(pool.ordered) + 10}"] = None
            case "go" if len(pool.ordered) > 1:
                del pool.ordered[sorted(pool.ordered)[0]]
            case "edit":
                pool.generation += 1
        before = pool.state
        told = {
            name
            for name in pool.breach
            if name in pool.ordered and name not in pool.deaf and pool.ordered[name] == pool.mhz
        }
        same = before is not None and {each.cap_mhz for each in before.target} == {pool.mhz}
        rolling = same and before.phase is RolloutPhase.PROGRESSING
        first = (
            set(pool.turns[: instances_of_step(RULES.steps[before.step - 1], len(pool.ordered))]) if rolling else set()
        )
        pool.look(data.draw(st.sampled_from([0.0, 15.0, 120.0])))
        assert {mhz for mhz in pool.ordered.values() if mhz is not None} <= set(asked)
        if told & first:
            assert pool.state.phase is RolloutPhase.ROLLED_BACK
            assert not pool.capped or pool.mhz in {each.cap_mhz for each in pool.state.previous}


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
