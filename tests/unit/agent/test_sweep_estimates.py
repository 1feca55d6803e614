"""From windows to findings: drift cancels, intervals hold the truth, and the classes and choices follow their rules."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.sweep.estimates import Window, change, summarise
from wattlock_agent.sweep.findings import (
    Behaviour,
    Crossing,
    Verdict,
    behaviour,
    choose,
    crossings,
    elasticity,
    front,
    request_joules,
    verdict,
)
from wattlock_agent.sweep.plan import STOCK, Lever, Setting, Shape, Workload, interleaved

DECODE = Workload(Shape.DECODE, 32, 4096, 256)
PREFILL = Workload(Shape.PREFILL, 32, 4096, 1)
CAP = Setting(Lever.CLOCK, 1590)


def window(setting, at, watts=500.0, rate=1000.0, workload=DECODE, mhz=None, cap_share=0.0):
    is_prefill = workload.shape is Shape.PREFILL
    return Window(
        workload=workload,
        setting=setting,
        at_seconds=at,
        seconds=10.0,
        watts=watts,
        generated_per_second=1.0 if is_prefill else rate,
        prompt_per_second=rate if is_prefill else 1.0,
        observed_mhz=mhz if mhz is not None else float(setting.value or 1980),
        cap_share=cap_share,
        celsius=50.0,
    )


def row_of(rows, setting, workload=DECODE):
    return next(row for row in rows if (row.setting, row.workload) == (setting, workload))


def test_a_drift_of_all_points_is_no_change():
    """Power rises by 20 % over the sweep; the cap saves 10 % at every moment."""
    windows = []
    for number, setting in enumerate(interleaved([CAP], 6, 1, "")):
        watts = 500 * (1 + 0.2 * number / 18) * (0.9 if setting == CAP else 1.0)
        windows.append(window(setting, 10.0 * number, watts))
    energy = row_of(summarise(windows), CAP).energy
    assert energy.percent == pytest.approx(-10, abs=0.02)
    assert energy.pairs == 6


def test_the_interval_holds_the_truth_as_often_as_it_says():
    source = random.Random(7)
    hits, sweeps = 0, 2000
    for _ in range(sweeps):
        windows = [
            window(setting, number, 500 * math.exp(source.gauss(0, 0.01)) * (0.86 if setting == CAP else 1.0))
            for number, setting in enumerate(interleaved([CAP], 5, 1, ""))
        ]
        energy = row_of(summarise(windows), CAP).energy
        hits += energy.low_percent <= -14 <= energy.high_percent
    assert 0.935 <= hits / sweeps <= 0.965


def test_one_repeat_has_no_interval_and_never_makes_a_choice():
    windows = [window(STOCK, 0), window(CAP, 1, watts=400), window(STOCK, 2)]
    rows = summarise(windows)
    assert row_of(rows, CAP).energy.high_percent == math.inf
    assert choose(rows, 1.0) is None


def test_windows_without_tokens_are_no_measurement():
    rows = summarise([window(STOCK, 0), window(CAP, 1, rate=0.0), window(CAP, 2), window(STOCK, 3)])
    assert row_of(rows, CAP).windows == 1


def test_a_point_without_stock_on_both_sides_has_no_change():
    assert row_of(summarise([window(STOCK, 0), window(CAP, 1)]), CAP).energy is None


@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=40))
def test_a_change_lies_in_its_interval(logarithms):
    found = change(logarithms)
    assert found.low_percent <= found.percent + 1e-9
    assert found.percent <= found.high_percent + 1e-9
    assert found.pairs == len(logarithms)


def test_prefill_counts_prompt_tokens_and_decode_generated_ones():
    rows = summarise([window(STOCK, 0, rate=50_000, workload=PREFILL), window(STOCK, 1, rate=4000)])
    assert row_of(rows, STOCK, PREFILL).joules_per_token == pytest.approx(0.01)
    assert row_of(rows, STOCK).joules_per_token == pytest.approx(0.125)


def test_a_power_limit_binds_by_the_limiters_counter_and_not_by_its_watts():
    rows = summarise([window(Setting(Lever.POWER, 600), 0, cap_share=0.0), window(STOCK, 1, cap_share=0.6)])
    assert verdict(rows[0]) is Verdict.INERT
    assert verdict(rows[1]) is Verdict.BINDING
    rows = summarise([window(STOCK, 1, cap_share=None)])
    assert verdict(rows[0]) is Verdict.UNKNOWN


def test_the_front_holds_what_nothing_beats_and_noise_puts_nothing_onto_it():
    windows = [
        window(STOCK, 0, watts=600, rate=1001),
        window(Setting(Lever.POWER, 650), 1, watts=601, rate=1002),
        window(Setting(Lever.CLOCK, 1590), 2, watts=500, rate=1000),
        window(Setting(Lever.CLOCK, 780), 3, watts=400, rate=950),
        window(Setting(Lever.POWER, 300), 4, watts=450, rate=940),
    ]
    assert [str(row.setting) for row in front(summarise(windows))] == ["clock 780 MHz", "clock 1590 MHz"]


@given(st.lists(st.tuples(st.floats(1, 2), st.floats(1, 2)), min_size=1, max_size=15))
def test_the_front_is_never_empty_and_each_point_beside_it_is_beaten(points):
    points_of = [Setting(Lever.CLOCK, 100 + number) for number in range(len(points))]
    rows = summarise(
        [
            window(setting, number, watts=100 * joules * rate, rate=100 * rate)
            for number, (setting, (joules, rate)) in enumerate(zip(points_of, points, strict=True))
        ]
    )
    best = front(rows)
    assert best
    fastest = max(rows, key=lambda row: row.tokens_per_second)
    assert any(row.tokens_per_second >= 0.994 * fastest.tokens_per_second for row in best)


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [(0.0, Behaviour.INSENSITIVE), (0.2, Behaviour.MILDLY_SENSITIVE), (1.0, Behaviour.SENSITIVE)],
)
def test_elasticity_is_the_exponent_of_throughput_over_the_clock(exponent, expected):
    windows = [
        window(Setting(Lever.CLOCK, mhz), number, rate=1000 * (mhz / 1980) ** exponent)
        for number, mhz in enumerate((1830, 1590, 1200, 990))
    ]
    found = elasticity(summarise(windows))
    assert found.slope == pytest.approx(exponent, abs=1e-9)
    assert found.behaviour is expected


def test_elasticity_goes_by_the_observed_clock_and_leaves_power_limits_out():
    """A clamp: locks at 1980 and 1830 MHz both run at 1830. A limit of 300 W is no clock point."""
    windows = [
        window(Setting(Lever.CLOCK, 1980), 0, rate=1000 * 1830 / 1980, mhz=1830.0),
        window(Setting(Lever.CLOCK, 1830), 1, rate=1000 * 1830 / 1980),
        window(Setting(Lever.CLOCK, 1200), 2, rate=1000 * 1200 / 1980),
        window(Setting(Lever.POWER, 300), 3, rate=10.0, mhz=1000.0),
    ]
    assert elasticity(summarise(windows)).slope == pytest.approx(1.0)


def test_elasticity_of_too_few_clocks_is_unknown():
    assert elasticity(summarise([window(STOCK, 0), window(CAP, 1)])) is None
    same = [window(Setting(Lever.CLOCK, mhz), mhz, mhz=1830.0) for mhz in (1980, 1900, 1830)]
    assert elasticity(summarise(same)) is None


def test_classes_have_the_documented_borders():
    assert [behaviour(slope) for slope in (-0.1, 0.049, 0.05, 0.499, 0.5)] == [
        Behaviour.INSENSITIVE,
        Behaviour.INSENSITIVE,
        Behaviour.MILDLY_SENSITIVE,
        Behaviour.MILDLY_SENSITIVE,
        Behaviour.SENSITIVE,
    ]


def sweep(effects, workload=DECODE, repeats=6, noise=0.002, seed=1):
    """Windows of clocks with their (energy, throughput) factors."""
    source = random.Random(seed)
    clocks = [Setting(Lever.CLOCK, clock) for clock in effects]
    windows = []
    for number, setting in enumerate(interleaved(clocks, repeats, 4, "")):
        energy, rate = effects.get(setting.value, (1.0, 1.0))
        noisy = math.exp(source.gauss(0, noise))
        windows.append(window(setting, number, 500 * energy * rate * noisy, 1000 * rate, workload))
    return windows


def test_the_clock_that_saves_most_within_the_bound_is_chosen():
    rows = summarise(sweep({1590: (0.86, 0.9995), 1200: (0.76, 0.997), 780: (0.72, 0.97)}))
    choice = choose(rows, 1.0)
    assert choice.cap_mhz == 1200
    assert choice.saving_percent == pytest.approx(24, abs=0.5)
    assert choice.pairs == 6
    assert choose(rows, 5.0).cap_mhz == 780
    assert choose(rows, 0.2).cap_mhz == 1590


def test_of_several_loads_the_worst_counts():
    long = Workload(Shape.DECODE, 32, 16384, 256)
    windows = sweep({1590: (0.86, 1.0), 780: (0.72, 1.0)}) + sweep({1590: (0.95, 1.0), 780: (0.9, 0.9)}, long)
    choice = choose(summarise(windows), 1.0)
    assert choice.cap_mhz == 1590
    assert choice.saving_percent == pytest.approx(5, abs=0.5)


def test_a_saving_that_may_be_none_is_not_chosen_and_prefill_never_counts():
    assert choose(summarise(sweep({1590: (0.999, 1.0)}, noise=0.02)), 1.0) is None
    assert choose(summarise(sweep({1590: (0.8, 1.0)}, PREFILL)), 1.0) is None


def test_the_energy_of_a_request_is_its_prompt_and_its_answer():
    windows = [window(STOCK, 0, 500, 50_000, PREFILL), window(STOCK, 1, 500, 4000)]
    assert request_joules(summarise(windows)) == {windows[1].workload: pytest.approx(4096 * 0.01 + 256 * 0.125)}
    assert request_joules(summarise(windows[1:])) == {}


def test_a_crossing_lies_between_the_lengths_at_which_the_order_changes():
    (found,) = crossings({"GQA": {1024: 1.0, 4096: 2.0, 16384: 8.0}, "MLA": {1024: 1.5, 4096: 2.5, 16384: 6.4}})
    assert (found.shorter, found.longer) == ("GQA", "MLA")
    assert 4096 < found.length_tokens < 16384
    assert crossings({"GQA": {1024: 1.0, 4096: 2.0}, "MLA": {1024: 1.5, 4096: 2.5}}) == ()


def test_a_crossing_is_where_two_power_laws_meet():
    lengths = (1000, 2000, 10_000)
    (found,) = crossings({"flat": dict.fromkeys(lengths, 4.0), "rising": {length: length / 1000 for length in lengths}})
    assert found == Crossing("rising", "flat", pytest.approx(4000))
