"""After the choice: when the tuner leaves the chosen cap alone, gives it up, or searches anew."""

from dataclasses import replace

import pytest
from tuning_world import PoolUnderTest, memory_bound
from wattlock_api.energypolicy import Tune
from wattlock_operator.tuning.model import MOVED_SECONDS, REST_SECONDS, Outcome, Patience, Phase, Regime, Tuning
from wattlock_operator.tuning.pools import patience_of
from wattlock_operator.tuning.progress import describe, duration_text, progress
from wattlock_operator.tuning.regime import BATCH_FACTOR, moved
from wattlock_operator.tuning.step import NOTE_POWER_SECONDS, START_SECONDS

HOUR = 3600.0


@pytest.fixture
def settled():
    pool = PoolUnderTest(seed=5, instances=32)
    pool.search()
    assert pool.state.phase is Phase.SETTLED
    return pool


def rest(pool: PoolUnderTest) -> None:
    """Let the time pass in which load alone reopens nothing."""
    for _ in range(3):
        pool.look(max(REST_SECONDS, 4 * pool.state.took_seconds))


def test_a_settled_pool_stays_settled(settled):
    chosen = settled.state.current_mhz
    for _ in range(200):
        settled.look()
    assert (settled.state.phase, settled.state.current_mhz) == (Phase.SETTLED, chosen)
    assert settled.state.held.pairs == 200 * 32


def test_another_batch_reopens_when_it_lasts(settled):
    chosen = settled.state.current_mhz
    rest(settled)
    settled.regime = Regime(32 * BATCH_FACTOR * 1.1, 0.0095, "a")
    settled.look()
    for _ in range(int(MOVED_SECONDS // 120)):
        assert settled.state.phase is Phase.SETTLED
        settled.look()
    assert settled.state.phase is Phase.STARTING
    assert settled.state.cap_mhz is None  # looks at the released pool first
    assert "sequences at once" in settled.state.note
    while settled.state.phase is Phase.STARTING:
        settled.look()
    assert settled.state.searches == 2
    assert settled.state.trials[0].cap_mhz == pytest.approx(chosen / 0.8, abs=15)  # not from the top again
    settled.search()
    assert settled.state.regime.batch > 50


def test_a_burst_reopens_nothing(settled):
    rest(settled)
    for _ in range(20):
        settled.regime = Regime(200, 0.03, "a")
        settled.look(MOVED_SECONDS / 2)
        settled.regime = Regime(32, 0.008, "a")
        settled.look(MOVED_SECONDS / 2)
        assert settled.state.phase is Phase.SETTLED


def test_load_that_comes_and_goes_searches_a_fifth_of_the_time_at_most(settled):
    settled.state = replace(settled.state, took_seconds=2 * HOUR)
    settled.regime = Regime(200, 0.03, "a")
    chosen_at = settled.state.since_seconds
    while settled.state.phase is Phase.SETTLED:
        settled.look()
    assert settled.now_seconds - chosen_at == pytest.approx(8 * HOUR, abs=120)


def test_the_policy_says_how_long_it_waits(settled):
    settled.patience = patience_of(Tune(reopen_after_seconds=60, rest_seconds=300))
    settled.state = replace(settled.state, took_seconds=2 * HOUR)
    settled.regime = Regime(200, 0.03, "a")
    for _ in range(4):
        assert settled.look(60).phase is Phase.SETTLED
    assert settled.look(60).phase is Phase.STARTING
    assert patience_of(Tune()) == Patience()


def test_other_pods_reopen_without_a_rest(settled):
    settled.regime = Regime(32, 0.008, "b")
    settled.look()
    settled.look(MOVED_SECONDS)
    assert settled.state.phase is Phase.STARTING
    assert "other pods, GPUs or drivers" in settled.state.note


def test_a_pool_that_was_left_alone_is_looked_at_again_when_its_work_changes():
    pool = PoolUnderTest(effects=lambda cap: (0.0, 0.0), instances=32)
    assert pool.search().phase is Phase.RELEASED
    pool.effects = memory_bound
    pool.regime = Regime(4, 0.005, "a")
    rest(pool)
    pool.look(MOVED_SECONDS)
    assert pool.search().phase is Phase.SETTLED


def test_a_change_during_the_search_begins_it_anew():
    pool = PoolUnderTest()
    for _ in range(12):
        pool.look()
    assert pool.state.phase is Phase.SEARCHING
    pool.regime = Regime(200, 0.03, "a")
    pool.look()
    pool.look(MOVED_SECONDS)
    assert pool.state.phase is Phase.STARTING
    assert pool.state.trials == ()
    assert pool.search().phase is Phase.SETTLED


def test_slow_drift_during_a_search_is_followed():
    pool = PoolUnderTest(noise=0.04, instances=4)
    batch = 32.0
    while pool.state.phase is not Phase.SETTLED:
        batch *= 1.004
        pool.regime = Regime(batch, 0.008, "a")
        pool.look()
        assert pool.state.searches <= 1
    assert pool.state.regime.batch > 0.8 * batch


def test_a_power_limit_that_begins_to_act_is_another_regime(settled):
    settled.regime = Regime(32, 0.008, "a", power_limited=False)
    settled.look(NOTE_POWER_SECONDS)
    assert settled.state.regime.power_limited is False
    rest(settled)
    settled.regime = replace(settled.regime, power_limited=True)
    settled.look()
    settled.look(MOVED_SECONDS)
    assert settled.state.phase is Phase.STARTING
    assert "power limit" in settled.state.note


def test_a_choice_that_turns_out_too_slow_is_given_up_and_the_search_goes_on_above(settled):
    chosen = settled.state.current_mhz
    settled.effects = lambda cap: (0.2, 0.05 if cap <= chosen else 0.001)
    settled.look()
    settled.look()
    assert settled.state.trial(chosen).outcome is Outcome.BREACH
    assert settled.state.cap_mhz is None or settled.state.cap_mhz > chosen
    assert settled.search().current_mhz > chosen
    for _ in range(3):
        assert settled.look().phase is Phase.SETTLED
    assert settled.state.searches == 2
    # The new choice is judged by pairs of its own.
    assert settled.state.held.pairs == 32 * (settled.now_seconds - settled.state.since_seconds) / 120


def test_the_guardrail_ends_a_choice_at_once(settled):
    chosen = settled.state.current_mhz
    settled.tripped = 32
    assert settled.look().cap_mhz is None
    settled.tripped = 0
    settled.look()
    assert settled.search().current_mhz > chosen


def test_a_choice_that_costs_energy_now_is_given_up(settled):
    settled.effects = lambda cap: (-0.05, 0.0)
    settled.look()
    assert (settled.state.phase, settled.state.cap_mhz) == (Phase.STARTING, None)
    assert "costs energy" in settled.state.note


def test_nothing_is_locked_before_the_work_is_known():
    pool = PoolUnderTest(regime=None)
    for _ in range(50):
        assert pool.look().cap_mhz is None
    assert "waiting for tokens" in pool.state.note
    pool.regime = Regime(32, 0.008, "a")
    assert pool.look(START_SECONDS / 2).cap_mhz is None
    assert pool.look(START_SECONDS).cap_mhz == 1575


def test_without_the_released_clock_it_begins_at_the_top_after_a_while():
    pool = PoolUnderTest(released_mhz=None)
    assert pool.look(100).cap_mhz is None
    assert pool.look(60).cap_mhz is None
    assert pool.look(200).cap_mhz == 1575


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (Regime(32, 0.008, "a"), ""),
        (Regime(32 * 1.5, 0.008 * 1.3, "a"), ""),
        (Regime(20.1, 0.008, "a"), ""),
        (Regime(19.0, 0.008, "a"), "decodes 19 sequences at once instead of 32"),
        (Regime(32, 0.011, "a"), "11.0 ms instead of 8.0 ms"),
        (Regime(32, 0.008, "b"), "other pods"),
        (Regime(32, 0.008, "a", True), ""),
        (Regime(0.0, float("nan"), "a"), ""),
        (None, ""),
    ],
)
def test_what_counts_as_other_work(now, text):
    found = moved(Regime(32, 0.008, "a"), now)
    assert text in found
    assert bool(found) is bool(text)


def test_progress_in_words_and_time():
    pool = PoolUnderTest(seed=2, noise=0.03)
    assert describe(Tuning(), pool.goal, pool.observation()) == "looking at the released pool before the first cap"
    seen = []
    for state in pool.looks():
        seen.append(describe(state, pool.goal, pool.observation()))
        found = progress(state, pool.goal, pool.observation())
        if state.phase is Phase.SEARCHING:
            assert 1 <= found.arm <= found.arms <= 12
            assert found.seconds_left > 0
        else:
            assert found is None
    assert any(text.startswith("arm 2 of at most") and "1260 MHz, saving 1" in text for text in seen)
    assert any("until it is shown to keep the bounds, about" in text for text in seen)
    assert f"chose {pool.state.current_mhz} MHz after {len(pool.state.trials)} arm(s), saving 2" in seen[-1]
    assert duration_text(61) == "2 min"
    assert duration_text(7201) == "3 h"


def test_the_time_left_is_of_the_right_size():
    """Half of the way through, the forecast is right within a factor of three."""
    pool = PoolUnderTest(seed=4, noise=0.03)
    forecasts = []
    for state in pool.looks():
        found = progress(state, pool.goal, pool.observation())
        forecasts.append((pool.now_seconds, None if found is None else found.seconds_left))
    at, left = forecasts[len(forecasts) // 2]
    truth = pool.now_seconds - at
    assert truth / 3 <= left <= 3 * truth
