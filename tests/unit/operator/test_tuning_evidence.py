"""The evidence that admits a cap, gives it up or shows what it saves, and how sums are taken over."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_api.constants import Reason
from wattlock_operator import sequential
from wattlock_operator.ledger import Tally
from wattlock_operator.pooling import Sample
from wattlock_operator.pooling import pool as pool_effect
from wattlock_operator.tuning.evidence import (
    LOG_ADMIT,
    MAX_TRIALS,
    breach,
    can_be_fast_enough,
    costs_energy,
    grown,
    is_admitted,
    mean_of,
    objective_of,
    pairs_to_admit,
)
from wattlock_operator.tuning.model import Goal, Objective
from wattlock_operator.verdict import Pooled, at_every_look, judge, pairs_to_go

BOUND = math.log(0.98)


def tally(pairs: int, energy: float, speed: float, noise: float = 0.01, latency: float | None = None) -> Tally:
    """Sums of pairs with these means and this spread."""

    def sums(mean: float) -> tuple[float, float]:
        return pairs * mean, pairs * (mean**2 + noise**2)

    return Tally(pairs, sums(energy), sums(speed), pairs, sums(-speed if latency is None else latency))


@pytest.mark.parametrize("effect", [0.0, -0.01, -0.05])
def test_a_claim_that_is_false_is_hardly_ever_believed_at_any_look(effect):
    """The effect is at most the level; the coin decides the sign of the rest, which has a memory and heavy tails."""
    chance, believed, games = random.Random(20261126), 0, 300
    for _ in range(games):
        total = squares = load = 0.0
        for pair in range(1, 201):
            load = 0.8 * load + chance.gauss(0, 0.03) * (5 if chance.random() < 0.05 else 1)
            value = BOUND + effect + chance.choice([-1, 1]) * load
            total, squares = total + value, squares + value**2
            if sequential.log_evidence_above(pair, total, squares, BOUND) >= math.log(20):
                believed += 1
                break
    assert believed <= 0.05 * games


def test_a_claim_that_is_true_is_believed_with_as_many_pairs_as_foretold():
    sums = tally(12, -0.2, -0.002, noise=0.02)
    wanted = sequential.pairs_needed_above(sums.pairs, *sums.throughput, BOUND, math.log(20))
    assert 12 < wanted < 60
    for pairs, believed in ((wanted - 1, False), (wanted, True)):
        more = tally(pairs, -0.2, -0.002, noise=0.02)
        assert (sequential.log_evidence_above(pairs, *more.throughput, BOUND) >= math.log(20)) is believed
    assert sequential.pairs_needed_above(12, *tally(12, -0.2, -0.03).throughput, BOUND, math.log(20)) is None


def test_the_bound_from_sums_is_never_more_than_the_game_itself():
    values = [0.03, -0.01, 0.05, 0.002, 0.04]
    game = sum(
        math.prod(math.exp(bet * value) / math.cosh(bet * value) for value in values) for bet in sequential.BETS
    ) / len(sequential.BETS)
    squares = math.fsum(value**2 for value in values)
    assert sequential.log_evidence_above(len(values), math.fsum(values), squares, 0.0) <= math.log(game)


@given(
    st.integers(-5, 10**6),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-1, 1),
)
def test_evidence_is_a_number_for_any_sums(pairs, total, squares, level):
    assert not math.isnan(sequential.log_evidence_above(pairs, total, squares, level))


def test_each_arm_has_its_share_of_the_five_percent():
    assert pytest.approx(math.log(20 * MAX_TRIALS)) == LOG_ADMIT
    goal = Goal()
    counts = [pairs for pairs in range(12, 400) if is_admitted(goal, tally(pairs, -0.2, -0.005, noise=0.04))]
    alone = next(
        pairs
        for pairs in range(12, 400)
        if sequential.log_evidence_above(pairs, *tally(pairs, 0, -0.005, 0.04).throughput, BOUND) >= math.log(20)
    )
    assert counts[0] > alone  # one arm alone would have been admitted earlier


def test_to_be_admitted_a_cap_must_keep_both_bounds_and_pay():
    goal = Goal(max_latency_increase_percent=1.0)
    assert is_admitted(goal, tally(200, -0.2, -0.002))
    assert not is_admitted(goal, tally(200, -0.2, -0.002, latency=0.02))
    assert not is_admitted(goal, tally(200, -0.2, -0.03, latency=0.0))
    assert not is_admitted(goal, tally(200, -0.005, 0.0))
    assert not is_admitted(goal, tally(200, 0.1, 0.0))
    assert not is_admitted(Goal(min_saving_percent=0), tally(200, -0.0005, 0.0))  # it may be none
    assert is_admitted(Goal(max_latency_increase_percent=None), tally(200, -0.2, -0.002, latency=0.5))
    assert not is_admitted(goal, Tally(200, tally(200, -0.2, 0).energy, tally(200, 0, 0).throughput))


def test_a_breach_names_what_is_worse():
    assert breach(Goal(), tally(100, -0.2, -0.01)) == ""
    assert breach(Goal(), tally(100, -0.2, -0.05)) == "throughput"
    assert breach(Goal(), tally(100, -0.2, 0.0, latency=0.06)) == "inter-token latency"


def test_costly_caps_are_told_apart():
    assert costs_energy(tally(60, 0.03, 0.0))
    assert not costs_energy(tally(60, -0.03, 0.0))


def test_forecasts_agree_with_what_comes():
    goal, noise = Goal(), 0.05
    wanted = pairs_to_admit(goal, tally(40, -0.2, -0.005, noise))
    assert not is_admitted(goal, tally(wanted - 1, -0.2, -0.005, noise))
    assert is_admitted(goal, tally(wanted, -0.2, -0.005, noise))
    assert can_be_fast_enough(goal, tally(40, -0.2, -0.005, noise), wanted + 5, optimism=0)
    assert not can_be_fast_enough(goal, tally(40, -0.2, -0.005, noise), wanted - 60, optimism=0)
    assert not can_be_fast_enough(goal, tally(40, -0.2, -0.05, noise), 10**6, optimism=1)
    assert pairs_to_admit(goal, tally(40, -0.2, -0.05)) is None


@given(st.integers(2, 500), st.floats(-1, 1), st.floats(0, 1))
def test_means_come_from_sums(pairs, value, noise):
    mean = mean_of(pairs, (pairs * value, pairs * (value**2 + noise**2)))
    assert mean.value == pytest.approx(value, abs=1e-9)
    assert mean.error == pytest.approx(noise / math.sqrt(pairs - 1), abs=1e-6)


def test_energy_times_delay_adds_both():
    goal = Goal(objective=Objective.ENERGY_DELAY_PRODUCT)
    assert objective_of(goal, tally(10, -0.2, -0.05, latency=0.07)).value == pytest.approx(-0.13)
    without = Tally(10, (-2.0, 0.4), (-0.5, 0.03))
    assert objective_of(goal, without).value == pytest.approx(-0.15)
    assert objective_of(Goal(), without).value == pytest.approx(-0.2)


def test_sums_only_grow():
    first, more = tally(10, -0.2, -0.01), tally(5, -0.1, 0.0)
    found = grown(first, first + more)
    assert (found.pairs, found.latency_pairs) == (5, 5)
    assert found.energy == pytest.approx(more.energy)
    assert found.latency == pytest.approx(more.latency)
    assert grown(first, more) == Tally()
    assert grown(first, first) == Tally()


def test_a_tuned_saving_needs_the_evidence_of_a_pick_of_twelve():
    values = [-0.05, -0.06, -0.04, -0.055, -0.045, -0.05, -0.06]
    total, squares = math.fsum(values), math.fsum(value**2 for value in values)
    alone = Pooled(pool_effect([Sample(len(values), total, squares)]), total, squares)
    picked = replace(alone, chances=12)
    assert judge(alone) is Reason.INTERVAL_EXCLUDES_ZERO
    assert judge(picked) is Reason.NEEDS_MORE_EVIDENCE
    assert picked.log_evidence == pytest.approx(alone.log_evidence - math.log(12))
    assert pairs_to_go(alone, Reason.NEEDS_MORE_EVIDENCE) < pairs_to_go(picked, Reason.NEEDS_MORE_EVIDENCE) < 20
    more = replace(
        picked, effect=pool_effect([Sample(70, 10 * total, 10 * squares)]), total=10 * total, squares=10 * squares
    )
    less = replace(more, chances=1)
    assert at_every_look(more).high > at_every_look(less).high
