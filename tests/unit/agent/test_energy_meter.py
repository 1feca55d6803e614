"""The energy meter and the limiter accounting, on recorded readings of real GPUs and on made-up trouble."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.energy import EnergyMeter
from wattlock_agent.gpu.base import GpuReading, LimiterNanoseconds
from wattlock_agent.track import GpuTrack
from wattlock_agent.verify import Finding

DATA = Path(__file__).parents[2] / "data"


def trace(product):
    content = json.loads(gzip.decompress((DATA / f"nvidia-{product}-trace.json.gz").read_bytes()))
    return [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


def reading(at_seconds, energy_mj=None, sm_mhz=1590, busy=100, reasons=0, **limiters):
    return GpuReading(
        "GPU-0",
        at_seconds,
        energy_mj,
        500_000,
        700_000,
        sm_mhz,
        3201,
        50,
        busy,
        reasons,
        LimiterNanoseconds(**limiters),
    )


@pytest.mark.parametrize("product", ["h100", "h200"])
def test_energy_of_each_phase_from_readings_once_a_second(product):
    """Interpolated at the borders of the recorded phases, against the counter read 50 times a second."""
    rows = trace(product)
    meter = EnergyMeter()
    second = -1
    for row in rows:
        if int(row["t"]) != second:
            second = int(row["t"])
            meter.add(row["t"], row["energy_mj"])
    assert meter.joules == pytest.approx((rows[-1]["energy_mj"] - rows[0]["energy_mj"]) / 1000, rel=0.02)
    meter = EnergyMeter()
    energy = {}
    borders = [row for before, row in pairwise(rows) if row["mark"] != before["mark"]]
    waiting = list(borders)
    for row in rows[::5]:
        meter.add(row["t"], row["energy_mj"])
        while waiting and waiting[0]["t"] <= row["t"]:
            border = waiting.pop(0)
            energy[border["t"]] = meter.at(border["t"]).joules
    checked = 0
    for start, end in pairwise(border for border in borders if border["t"] in energy):
        if end["t"] - start["t"] < 2:
            continue
        truth = (end["energy_mj"] - start["energy_mj"]) / 1000
        # The counter moves every 100 ms, by 80 J at 800 W: that much is left open at the borders of a phase.
        assert energy[end["t"]] - energy[start["t"]] == pytest.approx(truth, rel=0.005, abs=80)
        checked += 1
    assert checked >= 30


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=50))
def test_energy_never_goes_back(counter):
    meter = EnergyMeter()
    previous = 0.0
    for number, value in enumerate(counter):
        meter.add(float(number), value)
        assert meter.joules >= previous
        previous = meter.joules
    rises = sum(max(0, later - earlier) for earlier, later in pairwise(counter))
    assert meter.joules == pytest.approx(rises / 1000)


def test_a_restart_ends_the_interval():
    meter = EnergyMeter()
    for at_seconds, value in ((0, 10_000), (1, 510_000), (2, 100), (3, 500_100)):
        meter.add(float(at_seconds), value)
    assert meter.joules == pytest.approx(1000)
    assert meter.at(0.5).joules == pytest.approx(250)
    assert meter.at(1.5) is None
    assert meter.at(2.5).life == 1
    assert meter.mean_watts(10) == pytest.approx(500)


def test_nothing_is_interpolated_over_missing_readings_or_beyond_them():
    meter = EnergyMeter()
    for at_seconds in (0.0, 1.0, 6.0):
        meter.add(at_seconds, int(at_seconds * 500_000))
    assert meter.at(0.25).joules == pytest.approx(125)
    assert meter.at(3.0) is None
    assert meter.at(-1.0) is None
    assert meter.at(6.5) is None
    assert meter.at(6.0).joules == pytest.approx(3000)


def test_a_gpu_without_a_counter_has_no_energy():
    meter = EnergyMeter()
    meter.add(1.0, None)
    assert meter.joules == 0
    assert meter.mean_watts(15) is None


def test_memory_is_bounded_over_a_day_of_readings():
    meter = EnergyMeter()
    for at_seconds in range(86_400):
        meter.add(float(at_seconds), at_seconds * 500_000)
    assert meter.joules == pytest.approx(86_399 * 500)
    assert meter.at(86_399 - 100.5) is not None
    assert meter.at(86_399 - 130.5) is None


def run(track, seconds, start=0, cap_mhz=1830, step_mhz=15, age=100.0, **values):
    counter = values.pop("power_cap_per_second", None)
    finding = Finding.FINE
    for number in range(start, start + seconds):
        limiters = {"power_cap": 0 if counter is None else number * counter}
        finding, _ = track.add(reading(float(number), number * 500_000, **values, **limiters), cap_mhz, step_mhz, age)
    return finding


def test_a_clock_below_the_cap_with_no_limiter_is_a_clamp():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1755)
    assert track.clamped
    assert 20 <= track.clamp_seconds <= 29
    assert track.observed_mhz == 1755


def test_a_raised_cap_is_no_clamp():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1590, cap_mhz=1590)
    run(track, 3, start=30, sm_mhz=1590, cap_mhz=1830, age=1.0)  # the new lock needs a moment
    run(track, 20, start=33, sm_mhz=1830, cap_mhz=1830)
    assert not track.clamped
    assert track.clamp_seconds == 0
    assert track.observed_mhz == 1830


def test_a_control_epoch_does_not_undo_the_finding():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1755)
    before = track.clamp_seconds
    run(track, 70, start=30, sm_mhz=1980, cap_mhz=None)
    assert track.clamped
    assert track.observed_mhz == 1755
    assert track.clamp_seconds == before


def test_a_clock_one_step_below_the_cap_is_no_clamp():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1815)
    assert not track.clamped


def test_a_limiter_that_acts_is_no_clamp():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1700, power_cap_per_second=200_000_000)
    assert not track.clamped
    assert track.clamp_seconds == 0
    assert track.limiter_seconds["power_cap"] == pytest.approx(29 * 0.2)
    assert track.hot_seconds == 0, "the power cap is part of the effect"


def test_without_counters_the_event_reasons_tell_of_limiters():
    track = GpuTrack("uid")
    for number in range(30):
        track.add(reading(float(number), None, 1700, 100, 0x4), 1830, 15, 100.0)
    assert not track.clamped


@pytest.mark.parametrize(("cap_mhz", "busy"), [(None, 100), (1830, 60)])
def test_released_and_half_idle_gpus_are_never_clamped(cap_mhz, busy):
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1200, cap_mhz=cap_mhz, busy=busy)
    assert not track.clamped


def test_recorded_decode_is_not_taken_for_limited_by_the_reasons_alone():
    """Power-cap bits of a recorded run: prefill has them, decode with small batches has not."""
    limited = {}
    for row in trace("h100"):
        share = limited.setdefault(row["mark"], [0, 0])
        share[0] += bool(row["clock_event_reasons"] & 0x4)
        share[1] += 1
    prefill = next(mark for mark in limited if mark.startswith("prefill/gqa"))
    decode = next(mark for mark in limited if mark.startswith("decode/gqa/B1/"))
    assert limited[prefill][0] / limited[prefill][1] > 0.9
    assert limited[decode][0] / limited[decode][1] < 0.2
