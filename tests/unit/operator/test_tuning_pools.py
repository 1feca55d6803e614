"""A tuner in the operator's decisions: orders by arm, what status and Events tell, restarts, and searches anew."""

import json
from dataclasses import replace

import pytest
from operator_worlds import instance
from tuning_site import PODS, Site
from tuning_world import memory_bound, nothing_saved
from wattlock_api.constants import ConditionType
from wattlock_api.energypolicy import Guardrail, Tune
from wattlock_api.nodeenergy import ClockRange, PairStats, ProductClocks
from wattlock_api.tuningstatus import TuningStatus
from wattlock_operator.ledger import Ledger, Tally, advance
from wattlock_operator.reports import NodeInstance, PoolReport, collect
from wattlock_operator.tunedrow import tuned_row
from wattlock_operator.tuning.model import Goal, Observation, Outcome, Phase, Trial, Tuning
from wattlock_operator.tuning.pools import goal_of, pair_sums, supported_mhz
from wattlock_operator.tuning.record import from_status, goal_word, to_status
from wattlock_operator.tuning.step import step


def test_the_whole_search_by_orders_and_reports():
    site = Site()
    found = site.search()
    assert found.phase == "Settled"
    assert memory_bound(found.cap_mhz)[0] > 0.97 * max(
        memory_bound(mhz)[0] for mhz in range(345, 1980, 15) if memory_bound(mhz)[1] <= 0.02
    )
    assert set(site.asked.values()) == {found.cap_mhz}
    # One cap at a time for the whole pool, and one after the other: the first step is a fifth.
    assert next(cap for cap in site.caps if cap is not None) == 1575
    assert site.shares == {0.5, 0.1}  # half of the epochs released in the search, the policy's share after it
    site.look()
    assert {order.experiment.control_share for order in site.orders() if order.experiment} == {0.1}


def test_kubectl_shows_where_it_is():
    site = Site()
    clocks, messages = [], []
    for _ in range(60):
        site.look()
        clocks.append(site.status.summary.clock)
        messages.append(site.tuning.message)
    assert clocks[0] is None  # nothing is locked before the released pool was seen
    assert "1260MHz(2/" in " ".join(map(str, clocks))
    assert any(text.startswith("arm 2 of at most") and "1260 MHz" in text for text in messages)
    assert clocks[-1] == f"{site.tuning.cap_mhz}MHz"
    best = next(arm for arm in site.tuning.tried if arm.cap_mhz == site.tuning.cap_mhz)
    low, high = map(float, best.ci95)
    assert low < 100 * memory_bound(best.cap_mhz)[0] < high
    assert best.outcome == "Admitted"


def test_an_operator_that_restarts_all_the_time_finds_the_same():
    steady, restless = Site(), Site()
    first, second = steady.search(), restless.search(restart_every=1)
    assert (second.phase, second.cap_mhz) == (first.phase, first.cap_mhz)
    assert [arm.cap_mhz for arm in second.tried] == [arm.cap_mhz for arm in first.tried]
    assert [arm.sums.pairs for arm in second.tried] == [arm.sums.pairs for arm in first.tried]


def test_events_tell_of_each_arm_and_the_choice_and_are_bounded():
    site = Site()
    found = site.search()
    site.look()
    told = [reason for reason, _ in site.events]
    assert told.count("TuningArm") >= 4
    assert told.count("Tuned") == 1
    assert any(f"chose {found.cap_mhz} MHz" in text for reason, text in site.events if reason == "Tuned")
    before = len(site.events)
    for _ in range(20):
        site.look()
    assert "TuningArm" not in [reason for reason, _ in site.events[before:]]
    quick = Site()
    for _ in range(200):
        quick.look(1.0)
    assert len(quick.events) <= 13


def test_a_pool_in_which_nothing_pays_is_left_alone():
    site = Site(effects=nothing_saved)
    assert site.search().phase == "Released"
    site.look()
    assert set(site.asked.values()) == {None}
    reasons = {entry.reason for entry in site.status.pools[0].reasons}
    assert "NoClockPays" in reasons
    assert "NoClockPays" in [reason for reason, _ in site.events]
    enforced = next(each for each in site.status.conditions if each.type == ConditionType.ENFORCED)
    assert (enforced.status, enforced.reason) == ("False", "NoClockPays")


def test_in_mode_observe_nothing_is_tried_and_nothing_is_forgotten():
    site = Site(mode="Observe")
    for _ in range(10):
        site.look()
    assert set(site.asked.values()) == {None}
    assert site.tuning is None
    site.mode = "Enforce"
    found = site.search()
    site.mode = "Observe"
    for _ in range(3):
        site.look()
    assert set(site.asked.values()) == {None}
    assert site.tuning.cap_mhz == found.cap_mhz
    site.mode = "Enforce"
    site.look()
    assert set(site.asked.values()) == {found.cap_mhz}


def test_all_instances_have_the_arm_at_once_also_where_changes_are_rolled_out():
    site = Site(rollout={"steps": [1, "100%"], "holdSeconds": 600})
    while site.caps[-1:] != [1575]:
        site.look()
    assert set(site.asked.values()) == {1575}
    assert site.search().phase == "Settled"


def test_another_goal_begins_anew():
    site = Site()
    site.search()
    site.tune = {"minMHz": 1000}
    site.look()
    assert (site.tuning.phase, set(site.asked.values())) == ("Starting", {None})
    assert site.search().cap_mhz >= 1000


def test_a_new_template_or_driver_reopens():
    for change in ({"template": "v2"}, {"driver": "590.1"}):
        site = Site()
        site.search()
        for name, value in change.items():
            setattr(site, name, value)
        for _ in range(4):
            site.look()
        assert site.tuning.searches == 1
        assert site.tuning.phase == "Starting"
        assert "TuningAnew" in [reason for reason, _ in site.events]
        found = site.search(restart_every=1)
        assert found.searches == 2
        # Caps of the first search have pairs of then, which the second one does not count, whoever restarts.
        assert any(0 < arm.sums.pairs < arm.seen.pairs for arm in found.tried)


def test_the_guardrail_ends_an_arm_for_the_whole_pool():
    site = Site()
    while site.caps[-1:] != [1260]:
        site.look()
    site.tripped = PODS[:2]
    site.look()
    assert set(site.asked.values()) == {None}
    assert next(arm for arm in site.tuning.tried if arm.cap_mhz == 1260).outcome == "Breach"
    assert "guardrail" in site.tuning.message
    site.tripped = ()
    site.look()
    assert min(set(site.asked.values())) > 1260


def test_the_pool_stays_released_while_the_agents_tell_of_cool_downs():
    site = Site()
    site.trip_at(1260)
    site.unread = PODS  # the agents were restarted, or the engines' pages cannot be read
    site.look()
    assert set(site.asked.values()) == {None}
    assert "cool-down" in site.tuning.message
    site.tripped, site.unread = (), ()
    site.look()
    assert min(set(site.asked.values())) > 1260


def test_a_tuner_waits_for_what_it_needs_to_know():
    site = Site()
    site.batch = 0.0  # no tokens
    for _ in range(10):
        site.look()
    assert set(site.asked.values()) == {None}
    assert "waiting for tokens" in site.tuning.message
    assert any(entry.reason == "Tuning" for entry in site.status.pools[0].reasons)


def test_the_bounds_are_those_of_the_guardrail():
    guardrail = Guardrail(max_throughput_loss_percent=4, max_inter_token_latency_increase_percent=7)
    goal = goal_of(Tune(objective="EnergyDelayProduct", min_saving_percent=2, min_mhz=600), guardrail)
    assert (goal.max_throughput_loss_percent, goal.max_latency_increase_percent) == (4, 7)
    assert (goal.objective, goal.min_saving_percent, goal.min_mhz, goal.max_mhz) == ("EnergyDelayProduct", 2, 600, None)
    assert goal_of(Tune(), Guardrail()) == Goal()


def test_only_clocks_that_all_gpus_support_are_tried():
    site = Site()
    here = site._world()
    report = collect(here, site.now)["uid-qwen", "decode"]
    assert supported_mhz(here, report)[:2] == (1980, 1965)
    told = here.node_energies["n1"].status
    other = told.agent.products[0].model_copy(update={"product": "NVIDIA H100"})
    agent = told.agent.model_copy(update={"products": [other]})
    without = replace(
        here,
        node_energies={"n1": replace(here.node_energies["n1"], status=told.model_copy(update={"agent": agent}))},
    )
    assert supported_mhz(without, report) == ()

    first, *others = report.gpus
    mixed = replace(first, gpu=first.gpu.model_copy(update={"product": "NVIDIA H100"}))
    slower = ProductClocks(product="NVIDIA H100", ranges=[ClockRange(min_mhz=210, max_mhz=1755, step_mhz=30)])
    agent = told.agent.model_copy(update={"products": [*told.agent.products, slower]})
    both = {"n1": replace(here.node_energies["n1"], status=told.model_copy(update={"agent": agent}))}
    found = supported_mhz(replace(here, node_energies=both), replace(report, gpus=(mixed, *others)))
    assert (found[0], found[-1]) == (1755, 345)
    assert all((1755 - mhz) % 30 == 0 for mhz in found)


def test_the_memory_survives_a_status_and_odd_ones_are_none():
    site = Site()
    for _ in range(25):
        site.look()
    tuner = site.memory.tuners["uid-qwen", "decode"]
    status = TuningStatus.model_validate(json.loads(json.dumps(tuner.status.to_api())))
    again = from_status(status, tuner.goal)
    assert to_status(again, tuner.goal, tuner.seen) == status
    for name in ("phase", "current_mhz", "confirming", "top_mhz", "searches", "note"):
        assert getattr(again, name) == getattr(tuner.state, name)
    assert [trial.outcome for trial in again.trials] == [trial.outcome for trial in tuner.state.trials]
    assert from_status(status, Goal(min_mhz=500)) == Tuning()
    assert from_status(status.model_copy(update={"since": "yesterday"}), tuner.goal) == Tuning()
    assert from_status(None, tuner.goal) == Tuning()
    assert len(json.dumps(status.to_api())) < 12_000
    assert len(goal_word(Goal())) <= 128


def test_a_status_never_has_a_cap_twice():
    """Server-side apply refuses a whole status in which one key of a list is there twice."""
    arms = [(1575, "Open"), (1260, "Breach"), (1575, "NotShown")]
    state = Tuning(trials=tuple(Trial(cap_mhz, outcome=Outcome(outcome)) for cap_mhz, outcome in arms))
    told = to_status(state, Goal(), Observation(0.0, 4))
    assert [(arm.cap_mhz, arm.outcome) for arm in told.tried] == arms[:2]


def measured(**pairs: int) -> PoolReport:
    reports = {name: instance(name, pair_stats=[PairStats(cap_mhz=1590, pairs=count)]) for name, count in pairs.items()}
    return PoolReport(instances=tuple(NodeInstance("n1", each, silent=False) for each in reports.values()))


def test_the_pairs_of_an_arm_count_once_whatever_the_pool_measured_before():
    """Status has room for the sums of 15 caps; an arm of which fewer pods went than of those is not among them."""
    ledger = Ledger(settled={cap_mhz: Tally(20) for cap_mhz in range(700, 925, 15)})
    state = Tuning(phase=Phase.SETTLED, since_seconds=0.0, trials=(Trial(1590),), current_mhz=1590)
    total = 0
    for look in range(1, 8):
        pods = {"d0": look} | ({} if look % 2 else {f"d{look}": 10})  # a second pod comes and goes
        total += 1 + sum(pods.values()) - look
        ledger = advance(ledger, measured(**pods))
        state = step(state, Goal(), Observation(float(look), 1, pair_sums(ledger)))
        assert (state.trials[0].sums.pairs, state.held.pairs) == (total, total)


def test_what_was_found_can_be_written_down_as_a_row():
    site = Site()
    found = site.search(restart_every=3)
    row = tuned_row(site._world().policies[0])
    assert (row.product, row.max_sm_clock_mhz) == ("NVIDIA H200", found.cap_mhz)
    assert row.evidence.driver_version == "580.159"
    assert row.regime.min_batch == pytest.approx(32 / 1.6, rel=0.01)


def test_searches_are_counted_by_cause_and_arms_by_the_guardrail_through_restarts():
    site = Site()
    site.trip_at(1260)
    site.tripped = ()
    found = site.search(restart_every=1)
    assert ([(each.cause, each.searches) for each in found.begun], found.guardrail_arms) == ([("First", 1)], 1)
    site.driver = "590.1"
    for _ in range(4):
        site.look()
    found = site.search(restart_every=2)
    assert [(each.cause, each.searches) for each in found.begun] == [("First", 1), ("WorkChanged", 1)]
    site.tripped = PODS
    site.look()
    assert site.tuning.guardrail_arms == 2
    assert {each.cause: each.searches for each in site.tuning.begun} == {"First": 1, "WorkChanged": 1, "BrokeBound": 1}
    assert site.tuning.searches == 3
