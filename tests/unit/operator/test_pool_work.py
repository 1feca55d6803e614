"""Which work chooses a pool's row: not each whiff of traffic, and through restarts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import NOW, instance
from wattlock_api.policystatus import PoolWork, ProfileStatus
from wattlock_operator.reports import NodeInstance, PoolReport
from wattlock_operator.tuning.model import Regime
from wattlock_operator.work import (
    FIRST_SECONDS,
    MARGIN,
    MOVED_SECONDS,
    Watch,
    measured_work,
    read_watch,
    told_watch,
    watch,
)

PERIOD_SECONDS = 15.0


def report(*served: tuple[str | None, str | None], silent: bool = False) -> PoolReport:
    return PoolReport(
        instances=tuple(
            NodeInstance("n1", instance(f"d{at}", tokens_per_second=rate, inter_token_latency_ms=latency), silent)
            for at, (rate, latency) in enumerate(served)
        )
    )


def test_work_is_the_mean_over_instances_that_generate_tokens():
    work = measured_work(report(("4000", "8"), ("2000", "8"), ("0", "8"), (None, "8"), ("100", None)))
    assert work == Regime(pytest.approx(24), pytest.approx(0.008))
    assert measured_work(report(("0", "8"))) is None
    assert measured_work(report(("4000", "8"), silent=True)) is None


def test_absurd_reports_fit_into_status():
    most = "999999999999999"
    state = watch(Watch(), measured_work(report((most, most))), NOW)
    assert told_watch("p", state).work is not None


def after(state: Watch, work: Regime | None, seconds: float, now: float) -> tuple[Watch, float]:
    end = now + seconds
    while now < end:
        now += PERIOD_SECONDS
        state = watch(state, work, now)
    return state, now


def settled(batch: float, latency: float = 0.008) -> tuple[Watch, float]:
    state, now = after(Watch(), Regime(batch, latency), FIRST_SECONDS + PERIOD_SECONDS, NOW)
    assert state.regime == Regime(pytest.approx(batch), pytest.approx(latency))
    return state, now


def test_the_first_regime_takes_a_minute():
    state, _ = after(Watch(), Regime(32, 0.008), FIRST_SECONDS - PERIOD_SECONDS, NOW)
    assert state.regime is None
    assert settled(32)[0].since_seconds is not None


def test_other_work_must_last():
    state, now = settled(32)
    state, now = after(state, Regime(64, 0.008), MOVED_SECONDS - 60, now)
    assert state.regime.batch == pytest.approx(32)
    state, now = after(state, Regime(64, 0.008), 120, now)
    assert state.regime.batch == pytest.approx(64, rel=0.01)
    assert state.since_seconds == pytest.approx(now, abs=120)


@pytest.mark.parametrize("other", [Regime(32 * 1.24, 0.008), Regime(32 / 1.24, 0.008 * 1.24), Regime(32, 0.008 / 1.24)])
def test_up_to_a_quarter_is_the_same_work_for_ever(other):
    state, now = settled(32)
    regime = state.regime
    state, now = after(state, other, 86400, now)
    assert (state.regime, state.moved_since_seconds) == (regime, None)
    beyond = Regime(32 * 1.26, 0.008)
    assert after(state, beyond, 2 * MOVED_SECONDS, now)[0].regime.batch == pytest.approx(32 * 1.26, rel=0.01)


def test_a_lull_or_a_look_back_begins_anew():
    for between in (None, Regime(32, 0.008)):
        state, now = settled(32)
        state, now = after(state, Regime(64, 0.008), MOVED_SECONDS - 60, now)
        state, now = after(state, between, 300, now)
        state, now = after(state, Regime(64, 0.008), MOVED_SECONDS - 60, now)
        assert state.regime.batch == pytest.approx(32)


def test_a_pool_without_traffic_keeps_its_regime():
    state, now = settled(32)
    state, _ = after(state, None, 86400, now)
    assert (state.regime.batch, state.work) == (pytest.approx(32), None)


def test_what_moves_alone_takes_nothing_with_it():
    state, now = settled(32)
    state, _ = after(state, Regime(34, 0.016), MOVED_SECONDS + 120, now)
    assert state.regime == Regime(pytest.approx(32), pytest.approx(0.016, rel=0.01))


def test_a_restarted_operator_goes_on():
    state, now = settled(32)
    state, now = after(state, Regime(64, 0.008), MOVED_SECONDS - 60, now)
    told = ProfileStatus.model_validate(told_watch("mine", state).to_api())
    again = read_watch(told)
    assert again.regime == Regime(pytest.approx(32, rel=0.01), pytest.approx(0.008, rel=0.01))
    again, _ = after(again, Regime(64, 0.008), 120, now)
    assert again.regime.batch == pytest.approx(64, rel=0.01)


def test_a_status_that_says_nothing_is_no_memory():
    assert read_watch(None) == Watch()
    assert read_watch(ProfileStatus(name="mine", since="soon")) == Watch()
    zero = ProfileStatus(name="mine", regime=PoolWork(batch="0", inter_token_latency_ms="8"))
    assert read_watch(zero).regime is None


batches = st.floats(0.01, 1e6)


@given(batches, st.lists(st.floats(-1, 1), min_size=1, max_size=200))
def test_within_the_margin_nothing_moves_ever(batch, swings):
    first, now = settled(batch)
    state = first
    for swing in swings:
        now += PERIOD_SECONDS
        state = watch(state, Regime(batch * math.exp(swing * 0.999 * math.log(MARGIN)), 0.008), now)
        assert state.regime == first.regime


@given(st.lists(st.tuples(batches, st.floats(1e-6, 1e3), st.floats(0, 300)), min_size=1, max_size=200))
def test_regimes_change_no_more_often_than_the_dwell(looks):
    state, now, changed = Watch(), NOW, None
    for batch, latency, seconds in looks:
        now += seconds
        before, state = state.regime, watch(state, Regime(batch, latency), now)
        if before is not None and state.regime != before:
            assert changed is None or now - changed >= MOVED_SECONDS
        if state.regime != before:
            changed = now
