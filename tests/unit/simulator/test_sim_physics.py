"""The physics: how far the fit is from the readings, what was published about clocks, and what must always hold."""

from pathlib import Path
from statistics import mean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wattlock_simulator import fit, fitted, physics
from wattlock_simulator.physics import Architecture, Phase, Product, Workload

DATA = Path(__file__).parents[2] / "data"
ROWS = fit.load_rows(DATA)

fewer_examples = settings(max_examples=50)

products = st.sampled_from(Product)
architectures = st.sampled_from(Architecture)
clocks = st.sampled_from(physics.supported_clocks_mhz(Product.H200))
decodes = st.builds(Workload, architectures, st.just(Phase.DECODE), st.floats(0.5, 512), st.floats(128, 131072))
workloads = st.builds(Workload, architectures, st.sampled_from(Phase), st.floats(0.5, 512), st.floats(128, 131072))


def errors(phase):
    rows = [r for r in ROWS if r.workload.phase is phase]
    points = [(r, physics.operating_point(r.product, r.workload)) for r in rows]
    watts = [abs(p.watts / r.watts - 1) for r, p in points]
    seconds = [abs(p.step_seconds / r.step_seconds - 1) for r, p in points]
    clock = [abs(p.clock_mhz - r.clock_mhz) for r, p in points]
    return watts, seconds, clock


def test_the_fit_holds_all_recorded_decode_rows():
    watts, seconds, clock = errors(Phase.DECODE)
    assert len(watts) == 38
    assert median(watts) < 0.01
    assert max(watts) < 0.03
    assert median(seconds) < 0.015
    assert max(seconds) < 0.035
    assert max(clock) < 50  # mean SM clock, power-limited rows included


def test_the_fit_holds_all_recorded_prefill_rows():
    watts, seconds, clock = errors(Phase.PREFILL)
    assert len(watts) == 16
    assert max(watts) < 0.025
    assert median(seconds) < 0.025
    assert max(seconds) < 0.06
    assert mean(clock) < 50


def test_the_committed_constants_are_the_fit():
    assert fit.render(fit.fit(ROWS)) == Path(fitted.__file__).read_text()


@pytest.mark.parametrize(("batch", "percent"), [(1, 30.0), (32, 32.0)])
def test_published_saving_of_gated_deltanet_at_780(batch, percent):
    workload = Workload(Architecture.GATED_DELTA_NET, Phase.DECODE, batch, 4096)
    saving = physics.true_saving(Product.H200, workload, 780)
    assert saving.energy_percent == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_published_clock_effects(architecture, batch):
    workload = Workload(architecture, Phase.DECODE, batch, 1024)
    at_780 = physics.true_saving(Product.H200, workload, 780)
    assert 24 - 0.1 <= at_780.energy_percent <= 32 + 0.1
    assert -1.0 < at_780.throughput_change_percent < 0
    assert -0.1 < physics.true_saving(Product.H200, workload, 1590).throughput_change_percent < 0
    step = 1 - physics.board_watts(Product.H200, workload, 1590) / physics.board_watts(Product.H200, workload, 1830)
    assert 0.065 < step < 0.13


def test_idle_power_is_the_recorded_one():
    for product, cold, loaded in ((Product.H200, 83, 127), (Product.H100, 71, 131)):
        assert physics.idle_watts(product, 345, context_alive=False) == pytest.approx(cold)
        assert physics.idle_watts(product, 1980, context_alive=True) == pytest.approx(loaded)


def test_large_long_gqa_decode_meets_the_power_limit_on_the_h200_and_mla_hardly():
    def point(architecture, batch, context):
        return physics.operating_point(Product.H200, Workload(architecture, Phase.DECODE, batch, context))

    assert point(Architecture.GQA, 128, 4096).power_limited
    assert point(Architecture.GQA, 32, 16384).power_limited
    assert not point(Architecture.GQA, 32, 4096).power_limited
    assert point(Architecture.MLA, 128, 4096).clock_mhz >= 1950


@fewer_examples
@given(products, workloads, clocks, clocks)
def test_a_higher_clock_is_never_slower_and_never_draws_less(product, workload, one, other):
    low, high = sorted((one, other))
    slow, fast = (physics.step_seconds(product, workload, c) for c in (low, high))
    assert slow >= fast
    less, more = (physics.board_watts(product, workload, c) for c in (low, high))
    assert less <= more


@fewer_examples
@given(products, decodes, st.floats(1.01, 4))
def test_more_load_takes_longer_and_more_tokens_per_second(product, workload, factor):
    more = Workload(workload.architecture, workload.phase, workload.batch * factor, workload.context)
    longer = Workload(workload.architecture, workload.phase, workload.batch, workload.context * factor)

    def rate(w):
        return w.batch / physics.step_seconds(product, w, 1980)

    assert physics.step_seconds(product, more, 1980) > physics.step_seconds(product, workload, 1980)
    assert physics.step_seconds(product, longer, 1980) >= physics.step_seconds(product, workload, 1980)
    assert rate(more) > rate(workload)


@fewer_examples
@given(products, workloads, clocks, st.floats(200, 700))
def test_the_governor_obeys_cap_and_limit_and_wastes_no_step(product, workload, cap, limit):
    clock = physics.governed_clock_mhz(product, workload, cap, limit)
    assert clock in physics.supported_clocks_mhz(product)
    assert clock <= cap
    assert physics.board_watts(product, workload, clock) <= limit or clock == physics.MIN_CLOCK_MHZ
    if clock < cap:
        assert physics.board_watts(product, workload, clock + physics.CLOCK_STEP_MHZ) > limit


@fewer_examples
@given(st.integers(0, 3000))
def test_a_cap_goes_down_to_a_supported_clock_and_through_the_clamp(cap):
    effective = physics.effective_cap_mhz(cap)
    assert effective in physics.supported_clocks_mhz(Product.H200)
    assert effective <= physics.CLAMP_MHZ
    if physics.MIN_CLOCK_MHZ <= cap < physics.CLAMP_MHZ:
        assert 0 <= cap - effective < physics.CLOCK_STEP_MHZ


@fewer_examples
@given(products, decodes, st.sampled_from([1590, 1200, 780]))
def test_a_lock_never_costs_energy_per_token_above_the_knee(product, workload, cap):
    saving = physics.true_saving(product, workload, cap)
    assert saving.energy_percent >= 0
    assert saving.capped.clock_mhz <= cap
    assert saving.capped.joules_per_token == pytest.approx(saving.capped.watts / saving.capped.tokens_per_second)


def test_the_lowest_clock_is_not_the_best_one():
    workload = Workload(Architecture.GQA, Phase.DECODE, 32, 4096)
    best = min(
        physics.supported_clocks_mhz(Product.H200),
        key=lambda c: physics.operating_point(Product.H200, workload, c).joules_per_token,
    )
    assert 600 < best < 1000


@pytest.mark.parametrize(("batch", "context"), [(0, 10), (-1, 10), (float("nan"), 10), (1, 0), (1, float("inf"))])
def test_a_workload_without_load_is_refused(batch, context):
    with pytest.raises(ValueError, match="not positive"):
        Workload(Architecture.GQA, Phase.DECODE, batch, context)
