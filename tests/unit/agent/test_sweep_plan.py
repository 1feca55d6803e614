"""The plan of a sweep: points that the GPU takes, in an order in which nothing but the point differs."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wattlock_agent.sweep.plan import (
    STOCK,
    Lever,
    Plan,
    PlanError,
    Setting,
    Shape,
    clock_points,
    interleaved,
    power_points,
    workloads,
)

CLOCKS = tuple(range(345, 1981, 15))
POINTS = [Setting(Lever.CLOCK, 1590), Setting(Lever.CLOCK, 990), Setting(Lever.POWER, 500), Setting(Lever.POWER, 300)]


def test_the_clocks_of_an_h200_unless_told_otherwise():
    assert clock_points(CLOCKS, None) == (1830, 1710, 1590, 1395, 1200, 990, 780)


@given(st.lists(st.integers(345, 3000), max_size=20))
def test_every_clock_is_one_that_the_gpu_supports_and_none_is_above_what_was_asked_for(wanted):
    points = clock_points(CLOCKS, wanted)
    assert set(points) <= set(CLOCKS)
    assert all(any(point <= each for each in wanted) for point in points)
    assert list(points) == sorted(set(points), reverse=True)


def test_what_the_gpu_cannot_do_is_refused_with_what_to_write():
    with pytest.raises(PlanError, match="345 MHz or more"):
        clock_points(CLOCKS, [1590, 300])
    with pytest.raises(PlanError, match="no clocks"):
        clock_points((), None)
    with pytest.raises(PlanError, match="takes 200 W or more"):
        power_points(200, 700, [150])
    with pytest.raises(PlanError, match="stands at 700 W"):
        power_points(200, 700, [750])


def test_power_limits_are_below_the_one_that_was_found_which_is_stock():
    assert power_points(200, 700, None) == (617, 534, 450, 367, 284, 200)
    assert power_points(200, 700, [700, 500]) == (500,)
    assert power_points(200, 700, []) == ()


@given(st.integers(50_000, 400_000), st.integers(0, 600_000))
@example(52_500, 22_500)
@example(299_600, 0)
def test_power_limits_of_any_board_are_in_its_range(low_mw, span_mw):
    low_watts, high_watts = low_mw / 1000, (low_mw + span_mw) / 1000
    points = power_points(low_watts, high_watts, None)
    assert all(low_watts <= point < high_watts for point in points)
    assert len(points) == 6 or span_mw < 12_000


@given(st.lists(st.sampled_from(POINTS), unique=True), st.integers(1, 6), st.integers(1, 5), st.text(max_size=5))
def test_every_point_comes_as_often_as_asked_with_stock_before_and_after(points, repeats, stock_every, seed):
    order = interleaved(points, repeats, stock_every, seed)
    assert order[0] == order[-1] == STOCK
    counts = Counter(order)
    assert all(counts[point] == repeats for point in points)
    longest = run = 0
    for setting in order:
        run = 0 if setting == STOCK else run + 1
        longest = max(longest, run)
    assert longest <= stock_every
    if points:  # each repeat has stock points of its own at both ends
        assert list(pairwise(order)).count((STOCK, STOCK)) == repeats - 1


def test_repeats_have_different_orders_and_the_seed_decides():
    order = [setting for setting in interleaved(POINTS, 4, 99, "a") if setting != STOCK]
    blocks = {tuple(order[start : start + 4]) for start in range(0, 16, 4)}
    assert len(blocks) > 1
    assert interleaved(POINTS, 4, 99, "a") == interleaved(POINTS, 4, 99, "a")
    assert interleaved(POINTS, 4, 99, "a") != interleaved(POINTS, 4, 99, "b")


def test_prefill_requests_generate_one_token():
    every = workloads([Shape.DECODE, Shape.PREFILL], [32, 8], [4096, 1024], 256)
    assert len(every) == 8
    assert {work.output_tokens for work in every if work.shape is Shape.PREFILL} == {1}
    assert {work.output_tokens for work in every if work.shape is Shape.DECODE} == {256}


def test_the_time_that_is_left():
    plan = Plan(workloads([Shape.DECODE], [8], [1024, 4096], 256), interleaved(POINTS, 1, 4, ""), 5.0, 20.0)
    assert plan.windows == 12  # 2 loads of stock, four points, stock
    assert plan.remaining_seconds(2) == 250.0
