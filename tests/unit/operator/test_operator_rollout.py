"""Rollouts: one step after the other, held, halted and taken back; the state alone says where it stands."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_worlds import NOW
from wattlock_api.constants import RolloutPhase
from wattlock_api.energypolicy import Rollout
from wattlock_api.policystatus import RolloutStatus
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
