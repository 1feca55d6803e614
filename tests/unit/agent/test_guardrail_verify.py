"""Guardrail, lock watch, prompt evidence and staleness: small state machines, each by its transitions."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.evidence import PromptEvidence, Work, add_work, computes_prompts, restarted
from wattlock_agent.experiment import PairRatios
from wattlock_agent.guardrail import GuardrailState, Window, breach, is_tripped, judge_pair, judge_window
from wattlock_agent.staleness import Freshness, api_answered, lease_read, why_stale
from wattlock_agent.verify import Finding, LockReading, LockWatch, backoff_seconds, check_lock
from wattlock_api.constants import STALE_ORDERS_SECONDS
from wattlock_api.energypolicy import Guardrail

BOUNDS = Guardrail(max_throughput_loss_percent=2, max_inter_token_latency_ms=50, cooldown_seconds=100)


def latencies(*milliseconds, bounds=BOUNDS):
    state = GuardrailState()
    for number, value in enumerate(milliseconds):
        seen = Window(2.0, None if value is None else value / 1000)
        state = judge_window(state, bounds, float(number), seen)
    return state


@pytest.mark.parametrize(
    ("windows", "trips"),
    [
        ((60, 60), 1),
        ((60, 40, 60), 0),
        ((60, None, 60), 0),
        ((50, 50, 50), 0),
        ((60, 60, 60, 60), 1),
        ((40, 60, 60.1), 1),
    ],
)
def test_two_windows_in_a_row_trip(windows, trips):
    assert latencies(*windows).trips == trips


def test_no_bound_no_trip():
    assert latencies(900, 900, bounds=Guardrail()).trips == 0


def test_a_trip_holds_for_the_cool_down_and_tells_the_numbers():
    state = latencies(60, 61)
    assert is_tripped(state, 100.9)
    assert not is_tripped(state, 101.0)
    assert "61.0 ms" in state.message
    assert "50 ms" in state.message


def pairs(*ratios):
    state = GuardrailState()
    for number, ratio in enumerate(ratios):
        state = judge_pair(state, BOUNDS, float(number), PairRatios(ratio, None))
    return state


def pairs_until_a_trip(loss, scatter, chance, most=100):
    """Return after how many pairs an instance trips that loses so much; ``most`` if it does not."""
    state = GuardrailState()
    for number in range(most):
        ratio = math.log(1 - loss) + chance.gauss(0, scatter)
        state = judge_pair(state, BOUNDS, float(number), PairRatios(ratio, None))
        if state.trips:
            return number + 1
    return most


def test_scatter_alone_seldom_trips_and_a_real_loss_soon_does():
    """A trip takes a rollout back, and every pair of every instance is a chance to trip for nothing."""
    chance = random.Random(1)
    seen = [pairs_until_a_trip(0.01, 0.03, chance) for _ in range(300)]
    assert sum(pairs < 100 for pairs in seen) / sum(seen) < 1 / 1000
    assert max(pairs_until_a_trip(0.05, 0.01, chance) for _ in range(100)) <= 8


def test_a_clear_loss_trips_with_the_fourth_pair():
    loss = math.log(0.95)
    assert pairs(loss, loss - 0.001, loss).trips == 0
    state = pairs(loss, loss - 0.001, loss, loss + 0.001)
    assert state.trips == 1
    assert "5.0 %" in state.message
    assert state.throughput_ratios == ()


def test_a_loss_within_the_bound_or_hidden_by_noise_does_not_trip():
    assert pairs(*[math.log(0.99)] * 30).trips == 0
    assert pairs(-0.2, 0.15, -0.18, 0.12, -0.2, 0.1).trips == 0


def test_only_the_last_ten_pairs_count():
    state = pairs(*[0.0, 0.001] * 50)
    assert len(state.throughput_ratios) == 10


def histogram(**tokens_by_ms):
    """Cumulative buckets of vLLM from tokens by upper bound in milliseconds; ``over``: above them all."""
    seen, buckets = 0, []
    for bound_ms in (10, 25, 50, 75, 100):
        seen += tokens_by_ms.get(f"ms{bound_ms}", 0)
        buckets.append((bound_ms / 1000, float(seen)))
    return (*buckets, (math.inf, float(seen + tokens_by_ms.get("over", 0))))


P99 = Guardrail(max_inter_token_latency_p99_ms=60)


@pytest.mark.parametrize(
    ("tokens", "late"),
    [
        ({"ms25": 990, "over": 10}, False),  # 1.0 %: the 99th percentile is not above
        ({"ms25": 989, "over": 11}, True),
        ({"ms25": 900, "ms75": 100}, False),  # 50 to 75 ms: perhaps below 60, so nothing is said
        ({"ms25": 900, "ms100": 100}, True),
        ({"ms25": 49, "over": 50}, False),  # too few tokens
        ({}, False),
    ],
)
def test_the_percentile_is_judged_without_interpolation(tokens, late):
    text = breach(Window(2.0, latency_buckets=histogram(**tokens)), P99)
    assert bool(text) is late
    if late:
        assert "75 ms" in text
        assert "60 ms" in text


def test_a_bound_above_every_bucket_and_an_unknown_histogram_say_nothing():
    late = histogram(over=1000)
    assert breach(Window(2.0, latency_buckets=late), Guardrail(max_inter_token_latency_p99_ms=101)) == ""
    assert breach(Window(2.0, latency_buckets=late[:-1]), P99) == ""
    assert breach(Window(2.0), P99) == ""


@pytest.mark.parametrize(
    ("bounds", "seen", "text"),
    [
        ({"max_waiting_requests": 5}, {"waiting_requests": 6.0}, "6 requests waited"),
        ({"max_waiting_requests": 5}, {"waiting_requests": 5.0}, ""),
        ({"max_waiting_requests": 0}, {"waiting_requests": None}, ""),
        ({"max_preemptions_per_minute": 60}, {"preemptions": 3.0}, "90 preemptions a minute"),
        ({"max_preemptions_per_minute": 60}, {"preemptions": 2.0}, ""),
        ({"max_preemptions_per_minute": 0}, {"preemptions": None}, ""),
        ({}, {"preemptions": 1e6, "waiting_requests": 1e6, "mean_latency_seconds": 9.0}, ""),
    ],
)
def test_queue_and_preemptions_have_bounds_of_their_own(bounds, seen, text):
    found = breach(Window(2.0, **seen), Guardrail(**bounds))
    assert found.startswith(text)
    assert bool(found) is bool(text)


def test_two_different_breaches_in_a_row_trip_as_well():
    bounds = Guardrail(max_waiting_requests=5, max_inter_token_latency_ms=50)
    state = judge_window(GuardrailState(), bounds, 0.0, Window(3.0, mean_latency_seconds=0.06))
    state = judge_window(state, bounds, 2.0, Window(2.0, waiting_requests=9.0))
    assert state.trips == 1


def test_latency_far_above_control_trips_and_a_little_does_not():
    bounds = Guardrail(max_inter_token_latency_increase_percent=10)
    for percent, trips in ((15, 1), (8, 0)):
        state = GuardrailState()
        for number in range(4):
            pair = PairRatios(0.0, math.log(1 + percent / 100) + 0.001 * (number % 2))
            state = judge_pair(state, bounds, float(number), pair)
        assert state.trips == trips
        assert ("more inter-token latency" in state.message) is bool(trips)


def test_a_relapse_doubles_the_cool_down_and_a_long_quiet_time_does_not():
    late = Window(2.0, mean_latency_seconds=0.06)

    def again(state, at):
        return judge_window(judge_window(state, BOUNDS, at, late), BOUNDS, at, late)

    first = again(GuardrailState(), 0.0)
    assert first.tripped_until_seconds == 100
    relapse = again(first, 150.0)
    assert relapse.tripped_until_seconds == 150 + 200
    assert "200 s" in relapse.message
    assert "again" in relapse.message
    third = again(relapse, 500.0)
    assert third.tripped_until_seconds == 500 + 400
    calm = again(third, 900.0 + 401.0)
    assert calm.tripped_until_seconds == 1301 + 100


def test_no_cool_down_is_longer_than_a_day():
    state, at = GuardrailState(), 0.0
    late = Window(2.0, mean_latency_seconds=0.06)
    for _ in range(20):
        state = judge_window(judge_window(state, BOUNDS, at, late), BOUNDS, at, late)
        assert state.tripped_until_seconds - at <= 86_400
        at = state.tripped_until_seconds
    assert state.trips == 20


@given(st.lists(st.floats(-0.019, 0.5), min_size=1, max_size=40))
def test_no_pair_beyond_the_bound_never_trips(ratios):
    assert pairs(*ratios).trips == 0


def test_false_alarms_are_rare():
    """No effect at all, 2 % noise, bound 2 %: a trip needs a mean far below it."""
    import random

    draw = random.Random(4)
    trips = sum(pairs(*[draw.gauss(0, 0.02) for _ in range(30)]).trips > 0 for _ in range(300))
    assert trips <= 6


def lock_reading(at, sm, busy=True, age=100.0):
    return LockReading(float(at), sm, busy, 1590, 15, age)


def check(watch, *readings):
    findings = []
    for each in readings:
        watch, finding = check_lock(watch, each)
        findings.append(finding)
    return watch, findings


def test_three_seconds_above_the_cap_under_load_is_a_lost_lock():
    _, findings = check(LockWatch(), *[lock_reading(t, 1980) for t in range(4)])
    assert findings == [Finding.FINE] * 3 + [Finding.LOST]


@pytest.mark.parametrize(
    "readings",
    [
        [lock_reading(t, 1605) for t in range(20)],
        [lock_reading(t, 1980, busy=False) for t in range(20)],
        [lock_reading(t, 1980, age=1.0) for t in range(20)],
        [lock_reading(t, None) for t in range(20)],
        [lock_reading(t, 1980 if t % 3 else 1590) for t in range(20)],
        [lock_reading(10 * t, 1980) for t in range(20)],
    ],
    ids=["one-step", "idle", "just-locked", "no-clock", "flicker", "gaps"],
)
def test_no_false_alarm(readings):
    _, findings = check(LockWatch(), *readings)
    assert set(findings) == {Finding.FINE}


def test_the_third_loss_within_ten_minutes_is_a_conflict_and_back_off_doubles():
    watch = LockWatch()
    backoffs, ends = [], []
    for start in (0, 100, 200):
        watch, findings = check(watch, *[lock_reading(start + t, 1980) for t in range(4)])
        ends.append(findings[-1])
        backoffs.append(backoff_seconds(watch))
        watch = replace(watch, above_since_seconds=None)
    assert ends == [Finding.LOST, Finding.LOST, Finding.CONFLICT]
    assert backoffs[:2] == [5.0, 10.0]


def test_losses_of_long_ago_are_forgiven():
    watch = LockWatch()
    for start in (0, 700, 1400, 2100):
        watch, findings = check(watch, *[lock_reading(start + t, 1980) for t in range(4)])
        assert findings[-1] is Finding.LOST


def work(evidence, seconds, share, start=0):
    for at in range(start, start + seconds + 1, 5):
        evidence = add_work(evidence, Work(float(at), 1000.0 * share * at, 1000.0 * (1 - share) * at))
    return evidence


def test_computed_prompts_are_noticed_after_a_minute_and_forgiven_after_five():
    evidence = work(PromptEvidence(), 50, 0.3)
    assert not computes_prompts(evidence, 50)
    evidence = work(PromptEvidence(), 60, 0.3)
    assert "more than 10 %" in computes_prompts(evidence, 60)
    assert computes_prompts(restarted(evidence), 359)
    assert not computes_prompts(evidence, 360)


def test_a_true_decode_instance_is_left_in_peace():
    assert not computes_prompts(work(PromptEvidence(), 600, 0.05), 600)
    assert not computes_prompts(work(PromptEvidence(), 600, 0.0), 600)


def test_evidence_is_bounded():
    assert len(work(PromptEvidence(), 10_000, 0.2).recent) <= 64


def test_silence_of_either_makes_orders_stale():
    fresh = lease_read(Freshness(0.0), 0.0, "a", 1.0)
    assert why_stale(fresh, 10.0) == ""
    assert "API server" in why_stale(fresh, STALE_ORDERS_SECONDS + 1.0)
    answered = api_answered(fresh, STALE_ORDERS_SECONDS)
    assert "lease" in why_stale(answered, STALE_ORDERS_SECONDS + 1.0)
    renewed = lease_read(answered, float(STALE_ORDERS_SECONDS), "b", None)
    assert why_stale(renewed, STALE_ORDERS_SECONDS + 1.0) == ""


def test_how_long_silence_is_borne_can_be_told():
    fresh = lease_read(Freshness(0.0, stale_seconds=60), 0.0, "a", 1.0)
    assert why_stale(fresh, 60.0) == ""
    assert "API server has not answered for more than 60 s" in why_stale(fresh, 61.0)
    assert "lease wattlock-operator for more than 60 s" in why_stale(api_answered(fresh, 61.0), 61.0)


def test_an_old_lease_is_trusted_only_after_it_changed():
    old = lease_read(Freshness(0.0), 0.0, "a", 5000.0)
    assert why_stale(old, 1.0)
    assert why_stale(lease_read(old, 5.0, "a", 5005.0), 5.0)
    assert why_stale(lease_read(old, 5.0, None, None), 5.0)
    assert why_stale(lease_read(old, 5.0, "b", 5000.0), 5.0) == "", "clocks of machines need not agree"
