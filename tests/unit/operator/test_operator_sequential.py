"""Evidence that holds at every look."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_api.constants import Reason
from wattlock_api.energypolicy import Verification
from wattlock_operator.pooling import Sample, pool
from wattlock_operator.sequential import (
    BETS,
    LOG_ENOUGH,
    interval_at_every_look,
    is_enough,
    log_evidence,
    pairs_needed,
)
from wattlock_operator.verdict import Pooled, forecast, judge, pairs_to_go

SIZES = st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=10)


def sums(values: list[float]) -> tuple[int, float, float]:
    return len(values), math.fsum(values), math.fsum(value * value for value in values)


@given(SIZES)
def test_by_fair_coins_the_evidence_is_one_on_average_at_most(sizes):
    """The property behind Ville's inequality, over every outcome of the coins."""
    outcomes = [
        sums([size if coins >> bit & 1 else -size for bit, size in enumerate(sizes)])
        for coins in range(2 ** len(sizes))
    ]
    assert math.fsum(math.exp(log_evidence(*outcome)) for outcome in outcomes) / len(outcomes) <= 1 + 1e-9


@given(SIZES)
def test_it_is_a_lower_bound_of_a_fair_game_for_each_bet(sizes):
    """log cosh(b sqrt(u)) is concave in u, so equal sizes are the worst case for the product of the cosh."""
    count, _, squares = sums(sizes)
    for bet in BETS:
        assert count * math.log(math.cosh(bet * math.sqrt(squares / count))) >= (
            math.fsum(math.log(math.cosh(bet * size)) for size in sizes) - 1e-9
        )


def test_pairs_that_all_agree_double_the_stake():
    """Money on a fair coin at most doubles with each pair; half of it is on the other side."""
    assert log_evidence(6, 6 * 0.15, 6 * 0.15**2) == pytest.approx(5 * math.log(2), abs=0.6)
    assert is_enough(log_evidence(7, 7 * 0.15, 7 * 0.15**2))
    assert not is_enough(log_evidence(5, 5 * 0.15, 5 * 0.15**2))


@pytest.mark.parametrize("nothing", [(0, 0.0, 0.0), (5, 0.0, 0.0), (3, math.nan, 1.0), (3, math.inf, 1.0)])
def test_no_data_is_no_evidence(nothing):
    assert log_evidence(*nothing) == 0


@given(st.integers(0, 10_000), st.floats(-1e6, 1e6), st.floats(0, 1e9))
def test_evidence_is_a_number_whatever_is_reported(pairs, total, squares):
    assert math.isfinite(log_evidence(pairs, total, squares))


@given(st.integers(1, 500), st.floats(-0.3, 0.3), st.floats(0, 0.2))
def test_the_sign_of_the_effect_does_not_matter(pairs, mean, deviation):
    squares = pairs * (mean**2 + deviation**2)
    assert log_evidence(pairs, pairs * mean, squares) == pytest.approx(log_evidence(pairs, -pairs * mean, squares))


def test_someone_who_looks_after_every_pair_is_fooled_in_at_most_one_of_twenty():
    chance, one_look, every_look, pools = random.Random(20261123), 0, 0, 400
    for _ in range(pools):
        count, total, squares, seen, verified = 0, 0.0, 0.0, False, False
        for _ in range(150):
            d = chance.gauss(0, 0.03 * (1 + 4 * (chance.random() < 0.1)))
            count, total, squares = count + 1, total + d, squares + d * d
            effect = pool([Sample(count, total, squares)])
            reason = judge(Pooled(effect, total, squares))
            seen |= reason in (Reason.NEEDS_MORE_EVIDENCE, Reason.INTERVAL_EXCLUDES_ZERO, Reason.CAP_COSTS_ENERGY)
            verified |= reason in (Reason.INTERVAL_EXCLUDES_ZERO, Reason.CAP_COSTS_ENERGY)
        one_look, every_look = one_look + seen, every_look + verified
    assert every_look <= 0.05 * pools
    assert one_look > 0.15 * pools, "without the correction the watcher is fooled: else this test shows nothing"


def test_the_interval_at_every_look_is_what_the_evidence_leaves():
    pairs, total, squares = sums([-0.2, -0.22, -0.18, -0.24, -0.21, -0.19, -0.2, -0.23])
    low, high = interval_at_every_look(pairs, total, squares)
    assert low < total / pairs < high < 0
    for end, outwards in ((low, -1), (high, 1)):
        for step, ruled_out in ((1e-4 * outwards, True), (-1e-4 * outwards, False)):
            effect = end + step
            left = squares - 2 * effect * total + pairs * effect**2
            assert is_enough(log_evidence(pairs, total - pairs * effect, left)) is ruled_out
    effect = pool([Sample(pairs, total, squares)])
    assert low < effect.low < effect.high < high


def test_the_interval_at_every_look_has_no_ends_with_little_data():
    assert interval_at_every_look(0, 0.0, 0.0) == (-math.inf, math.inf)
    assert interval_at_every_look(*sums([0.1, 0.2, 0.3])) == (-math.inf, math.inf)


def test_the_forecast_of_pairs_is_what_they_need():
    one = sums([0.05, -0.03, 0.04, 0.0])
    wanted = pairs_needed(*one)
    assert wanted is not None
    assert log_evidence(wanted, one[1] * wanted / 4, one[2] * wanted / 4) >= LOG_ENOUGH
    assert log_evidence(wanted - 1, one[1] * (wanted - 1) / 4, one[2] * (wanted - 1) / 4) < LOG_ENOUGH
    assert pairs_needed(*sums([0.1, -0.1])) is None
    assert pairs_needed(0, 0.0, 0.0) is None


def test_the_forecast_is_told_in_pairs_and_time():
    total, squares = 40 * 0.02, 40 * (0.02**2 + 0.05**2)
    pooled = Pooled(pool([Sample(20, total / 2, squares / 2)] * 2), total, squares)
    assert judge(pooled) is Reason.NEEDS_MORE_EVIDENCE
    text = forecast(pooled, Reason.NEEDS_MORE_EVIDENCE, Verification(epoch_seconds=20, control_share=0.5))
    # 77 pairs in all: 37 to go, so 19 for each of two instances, of 40 s each
    assert text == "about 40 more pair(s) if they are like those so far, some 20 min with 2 instance(s)"
    assert forecast(pooled, Reason.INTERVAL_INCLUDES_ZERO, Verification()) == ""


def test_an_interval_that_is_too_wide_needs_pairs_by_the_square():
    values = [-0.2 + 0.12 * (-1) ** number for number in range(8)]
    pooled = Pooled(pool([Sample(*sums(values))]), *sums(values)[1:])
    assert judge(pooled) is Reason.INTERVAL_TOO_WIDE
    # a half-width of 8.8 points: 8 * (8.8 / 3)^2 = 69 pairs in all
    assert pairs_to_go(pooled, Reason.INTERVAL_TOO_WIDE) == pytest.approx(61, abs=2)
    assert forecast(pooled, Reason.INTERVAL_TOO_WIDE, Verification()).startswith("about 70 more pair(s)")
