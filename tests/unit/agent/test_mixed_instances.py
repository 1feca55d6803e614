"""Mixed pools: capped while little of the work is prefill, released when it grows; in virtual time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wattlock_agent import prefill
from wattlock_agent.prefill import CLEAR_SECONDS, MAX_AGE_SECONDS, WINDOW_SECONDS, PrefillShare, objection
from wattlock_agent.serving.base import ServingCounters
from wattlock_api.schedule import Arm, arm_of, epoch_at

MIXED = {"role": "Mixed", "maxPrefillPercent": 20}
BOUND = 20.0


def page(at_seconds, computed, generated):
    return ServingCounters(at_seconds, generated, None, computed, None, None, 1.0, 0.0, None, None)


def shown(share, at_seconds, computed, generated):
    return prefill.add_page(share, page(at_seconds, computed, generated), BOUND)


# --- the share itself ----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1.0, 2.0, 5.0, 5.0, 40.0]),
            st.sampled_from(["page", "page", "page", "page", "failure", "restart", "dumb"]),
            st.integers(0, 400),
            st.integers(0, 2000),
        ),
        max_size=80,
    )
)
def test_nothing_is_capped_above_the_bound_or_with_an_unknown_share(steps):
    """The rule once more, from all that the pages said."""
    share, now, computed, generated, failures = PrefillShare(), 0.0, 0.0, 0.0, 0
    life: list[tuple[float, float, float]] = []
    clear_since: float | None = None
    for seconds, kind, more_computed, more_generated in steps:
        now += seconds
        if kind == "failure":
            share, failures = prefill.add_failure(share), failures + 1
            if failures >= 2:
                life, clear_since = [], None
        elif kind == "dumb":
            share = prefill.add_page(share, page(now, None, generated), BOUND)
            life, clear_since, failures = [], None, 0
        else:
            if kind == "restart":
                share, life, clear_since = prefill.forgotten(share), [], None
                computed = generated = 0.0
            computed, generated, failures = computed + more_computed, generated + more_generated, 0
            share = shown(share, now, computed, generated)
            life.append((now, computed, generated))
            first = next(each for each in life if now - each[0] <= WINDOW_SECONDS)
            prompts, total = computed - first[1], computed - first[1] + generated - first[2]
            if prompts > 0.2 * total:
                clear_since = None
            elif total > 0 and clear_since is None:
                clear_since = now
        for later in (0.0, 4.0, 16.0):
            if objection(share, now + later, BOUND) is None:
                assert clear_since is not None
                assert now + later - clear_since >= CLEAR_SECONDS
                assert now + later - life[-1][0] <= MAX_AGE_SECONDS
            elif kind != "failure" and life and clear_since is not None and later < 5:
                assert now + later - clear_since < CLEAR_SECONDS, "held although all is well"


def test_one_page_above_the_bound_releases_and_only_a_minute_without_one_caps_again():
    share, computed, generated = PrefillShare(), 0.0, 0.0
    verdicts = {}
    for now in range(0, 400, 5):
        generated += 1000
        computed += {150: 600, 250: 1200}.get(now, 100)
        share = shown(share, float(now), computed, generated)
        verdicts[now] = objection(share, float(now), BOUND)
    reasons = {now: "" if verdict is None else verdict.reason for now, verdict in verdicts.items()}
    assert {reasons[now] for now in range(0, 60, 5)} == {"PrefillUnknown"}
    # A burst within half a minute of work at 9 %: 1100 of 7100 tokens are below the bound, 1700 of 7700 above it.
    assert {reasons[now] for now in range(70, 250, 5)} == {""}
    over = [now for now in range(250, 400, 5) if reasons[now]]
    assert over[0] == 250
    assert 250 + CLEAR_SECONDS <= over[-1] + 5 <= 250 + CLEAR_SECONDS + WINDOW_SECONDS + 5
    assert {reasons[now] for now in over} == {"PrefillShare"}


def test_no_flapping_around_the_bound():
    share, computed, generated, changes, before = PrefillShare(), 0.0, 0.0, 0, None
    for now in range(0, 1200, 5):
        generated += 1000
        computed += 400 if now % 100 < 50 else 100  # 29 % and 9 % in turns: above the bound for some pages of each turn
        share = shown(share, float(now), computed, generated)
        held = objection(share, float(now), BOUND) is not None
        changes += before is not None and held != before
        before = held
    assert changes <= 1


def test_a_lull_is_neither_prefill_nor_a_sign_of_little_of_it():
    share = PrefillShare()
    for now in range(0, 300, 5):
        share = shown(share, float(now), 0.0, 0.0)
    assert objection(share, 295.0, BOUND).reason == "PrefillUnknown"
    for now in range(300, 400, 5):
        share = shown(share, float(now), 10.0, 100.0 * now)
    assert objection(share, 395.0, BOUND) is None
    for now in range(400, 600, 5):
        share = shown(share, float(now), 10.0, 100.0 * 395)
    assert objection(share, 595.0, BOUND) is None
    share = shown(share, 600.0, 500.0, 100.0 * 395)
    assert objection(share, 600.0, BOUND).reason == "PrefillShare"


# --- the agent -----------------------------------------------------------------------------------------------------


def test_a_mixed_instance_is_capped_after_a_minute_of_few_prompts(make_node, make_order):
    node = make_node(gpus=1, prompt_share=0.1)
    node.order(make_order(**MIXED))
    node.run(50)
    assert node.reasons()["GPU-0"] == "PrefillUnknown"
    assert not node.driver.log, "nothing is known yet, so nothing is written"
    node.run(30)
    assert node.locked() == {"GPU-0"}


def test_growing_prefill_releases_within_two_pages_and_falling_prefill_caps_again(make_node, make_order):
    node = make_node(gpus=1, prompt_share=0.1)
    node.order(make_order(**MIXED))
    node.run(80)
    assert node.locked() == {"GPU-0"}
    node.prompt_share = 3.0
    began = node.now_seconds
    while node.locked():
        node.run(1)
    assert node.now_seconds - began <= 10
    assert node.reasons()["GPU-0"] == "PrefillShare"
    node.prompt_share = 0.1
    began = node.now_seconds
    while not node.locked():
        node.run(1)
    assert CLEAR_SECONDS <= node.now_seconds - began <= CLEAR_SECONDS + WINDOW_SECONDS + 15


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"tells_prompts": False}, "PrefillNotTold"),
        ({"page_fails": "MetricsUnreachable"}, "MetricsUnreachable"),
        ({"page_fails": "MetricsInvalid"}, "MetricsInvalid"),
    ],
)
def test_what_is_not_known_is_not_capped(make_node, make_order, trouble, reason):
    node = make_node(gpus=1, prompt_share=0.1)
    node.order(make_order(**MIXED))
    node.run(80)
    assert node.locked() == {"GPU-0"}
    for name, value in trouble.items():
        setattr(node, name, value)
    node.run(12)
    assert not node.locked()
    assert node.reasons()["GPU-0"] == reason
    node.page_fails, node.tells_prompts = "", True
    node.run(50)
    assert not node.locked(), "a minute must be seen anew"
    node.run(30)
    assert node.locked() == {"GPU-0"}


def test_one_page_that_fails_changes_nothing(make_node, make_order):
    node = make_node(gpus=1, prompt_share=0.1)
    node.order(make_order(**MIXED))
    node.run(80)
    writes = len(node.driver.log)
    node.page_fails = "MetricsUnreachable"
    while node.scrapes[-1] < node.now_seconds:
        node.run(1)
    node.page_fails = ""
    node.run(30)
    assert len(node.driver.log) == writes


def test_without_a_page_address_nothing_is_capped(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(**MIXED, metricsURL=None))
    node.run(90)
    assert node.reasons()["GPU-0"] == "NoServingMetrics"
    assert not node.driver.log


def test_another_bound_begins_anew(make_node, make_order):
    node = make_node(gpus=1, prompt_share=0.1)
    node.order(make_order(**MIXED))
    node.run(80)
    node.order(make_order(role="Mixed", maxPrefillPercent=5), generation=2)
    node.run(2)
    assert not node.locked()
    node.run(80)
    assert node.reasons()["GPU-0"] == "PrefillShare"


@pytest.mark.parametrize("mode", ["Enforce", "Observe"])
def test_a_mixed_pool_without_a_bound_is_left_alone_and_one_that_observes_is_told(make_node, make_order, mode):
    node = make_node(gpus=1, prompt_share=2.0)
    node.order(make_order(role="Mixed", mode=mode))
    node.run(90)
    assert node.reasons()["GPU-0"] == {"Enforce": "MixedPool", "Observe": "ObserveMode"}[mode]
    node.order(make_order(**MIXED, mode="Observe", capMHz=None), generation=2)
    node.run(40)
    (instance,) = node.agent.instances.values()
    status = instance.status(node.now_seconds, None)
    assert status.reason == "PrefillShare"
    assert "would not be capped" in status.message
    assert status.computes_prompts
    assert not node.driver.log


def test_a_decode_pool_keeps_its_own_rule(make_node, make_order):
    node = make_node(gpus=1, prompt_share=0.105)  # 9.5 % of all tokens
    node.order(make_order())
    node.run(90)
    assert node.locked() == {"GPU-0"}
    node.prompt_share = 0.25
    node.run(90)
    assert node.reasons()["GPU-0"] == "ComputesPrompts"


def test_prefill_drops_epochs_of_both_arms_alike(make_node, make_order, switchback, schedule):
    """Held in the same passes, whatever the arm: the reason of the arm is never seen while prefill holds."""
    node = make_node(gpus=1, prompt_share=0.1)
    node.order(make_order(**MIXED, experiment=switchback))
    node.run(80)
    seen = set()
    node.prompt_share = 3.0
    node.run(10)
    for _ in range(200):
        node.run(1)
        seen.add((arm_of(schedule, "decode-0", epoch_at(schedule, node.clock.unix_seconds)), node.reasons()["GPU-0"]))
    assert seen == {(Arm.CAP, "PrefillShare"), (Arm.CONTROL, "PrefillShare")}
