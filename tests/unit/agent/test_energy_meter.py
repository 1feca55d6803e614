"""The energy meter and the limiter accounting, on made-up trouble. Recorded GPUs: ``test_replay_traces``."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.energy import IMPLAUSIBLE_LIMIT_FACTOR, MAX_GAP_SECONDS, EnergyMeter
from wattlock_agent.gpu.base import GpuReading, LimiterNanoseconds
from wattlock_agent.limiters import LIMITER_NAMES, RECENT_BUSY_SECONDS, RecentCap, growth
from wattlock_agent.track import GpuTrack
from wattlock_agent.verify import Finding


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


#: Seconds since the last reading, and what happened in them: watts, and whether the driver began anew.
steps = st.lists(
    st.tuples(st.floats(0.3, 40), st.floats(0, 700), st.booleans() | st.just(False)), min_size=1, max_size=60
)


def play(history, told=False):
    """A counter that lives through ``history``; ``told``: the agent knows of restarts. Yields the meter, by reading."""
    meter, at, counter_joules, used_joules = EnergyMeter(), 0.0, 123.0, 0.0
    meter.add(at, round(counter_joules * 1000), 700)
    intervals = []
    for seconds, watts, restart in history:
        at += seconds
        used_joules += watts * seconds
        before = counter_joules
        counter_joules = watts * seconds / 2 if restart else counter_joules + watts * seconds
        if restart and told:
            meter.interrupt()
        fell = meter.add(at, round(counter_joules * 1000), 700)
        intervals.append((watts * seconds, restart))
        yield meter, used_joules, intervals, fell, (before, counter_joules)


@given(steps)
def test_energy_never_falls_and_is_never_more_than_what_was_used(history):
    last_joules = 0.0
    for meter, used_joules, intervals, fell, (before, after) in play(history):
        assert last_joules <= meter.joules <= used_joules + 0.001 * len(intervals)
        assert fell == (round(after * 1000) < round(before * 1000))
        last_joules = meter.joules


@given(steps)
def test_a_restart_that_is_known_loses_its_own_interval_and_no_other(history):
    for meter, _, intervals, _, _ in play(history, told=True):
        kept = sum(joules for joules, restart in intervals if not restart)
        assert meter.joules == pytest.approx(kept, abs=0.001 * len(intervals))
        assert meter.gaps == sum(restart for _, restart in intervals)


@given(st.lists(st.integers(0, 10**15), min_size=2, max_size=50))
def test_no_counter_whatever_it_does_gives_more_than_the_board_can_use(counter):
    meter, last_joules = EnergyMeter(), 0.0
    for number, value in enumerate(counter):
        meter.add(float(number), value, 700.0)
        assert 0 <= meter.joules - last_joules <= IMPLAUSIBLE_LIMIT_FACTOR * 700 * 1.5
        last_joules = meter.joules
    rises = sum(max(0, later - earlier) for earlier, later in pairwise(counter))
    assert meter.joules <= rises / 1000
    assert (meter.mean_watts(20.0) or 0) <= IMPLAUSIBLE_LIMIT_FACTOR * 700 * 1.5


@given(steps, st.data())
def test_missed_readings_cost_no_energy(history, data):
    all_of_them, some = EnergyMeter(), EnergyMeter()
    at, counter_joules = 0.0, 50.0
    for meter in (all_of_them, some):
        meter.add(at, 50_000, 700)
    for seconds, watts, _ in history:
        at, counter_joules = at + seconds, counter_joules + watts * seconds
        all_of_them.add(at, round(counter_joules * 1000), 700)
        if data.draw(st.booleans()):
            some.add(at, round(counter_joules * 1000), 700)
    some.add(at + 1, round(counter_joules * 1000), 700)
    assert some.joules == pytest.approx(all_of_them.joules)


@given(st.floats(0, 39), st.floats(0, 39))
def test_energy_between_readings_is_monotone_and_within_them(one, other):
    meter = EnergyMeter()
    for second in range(40):
        meter.add(float(second), second * second * 7000)
    early, late = sorted((one, other))
    assert meter.at(early).joules <= meter.at(late).joules
    assert meter.at(float(int(early))).joules <= meter.at(early).joules <= meter.joules


def test_a_restart_ends_the_interval():
    meter = EnergyMeter()
    for at_seconds, value in ((0, 10_000), (1, 510_000), (2, 100), (3, 500_100)):
        fell = meter.add(float(at_seconds), value)
        assert fell == (at_seconds == 2)
    assert meter.joules == pytest.approx(1000)
    assert meter.at(0.5).joules == pytest.approx(250)
    assert meter.at(1.5) is None
    assert meter.at(2.5).life == 1


def test_a_counter_that_drops_to_zero_for_one_reading_costs_two_intervals_and_adds_nothing():
    meter = EnergyMeter()
    for second in range(10):
        meter.add(float(second), 0 if second == 5 else 10**12 + second * 500_000, 700)
    assert meter.joules == pytest.approx(500 * (4 + 2))
    assert meter.gaps == 2


def test_power_above_the_limit_for_a_moment_is_energy_like_any_other():
    """1.5 times the limit over 0.1 s was recorded; a limit may also have been lowered between two readings."""
    meter = EnergyMeter()
    meter.add(0.0, 0, 350)
    meter.add(1.0, 700_000, 350)
    meter.add(11.0, 7_700_000, 350)
    assert (meter.joules, meter.gaps) == (7700, 0)
    meter.add(12.0, 11_000_000, 350)
    assert (meter.joules, meter.gaps) == (7700, 1), "3.3 kW on a board of 350 W"


def test_a_machine_that_was_suspended_used_what_its_counter_says_and_no_power_is_made_of_it():
    meter = EnergyMeter()
    for second in range(10):
        meter.add(float(second), second * 500_000, 700)
    meter.add(3600.0, 9 * 500_000 + 80 * 3590 * 1000, 700)  # the clock goes on in suspend, see wattlock_api.boottime
    assert meter.joules == pytest.approx(9 * 500 + 80 * 3590)
    assert meter.mean_watts(20) is None
    assert meter.at(1800.0) is None


def test_a_reading_that_is_not_later_is_ignored():
    meter = EnergyMeter()
    meter.add(1.0, 1_000, 700)
    assert not meter.add(1.0, 900, 700)
    assert not meter.add(0.5, 500, 700)
    meter.add(2.0, 401_000, 700)
    assert meter.joules == pytest.approx(400)
    assert meter.gaps == 0


def test_power_is_the_rise_of_the_counter_over_the_window_and_not_told_from_a_moment():
    meter = EnergyMeter()
    told = []
    for second in range(41):
        meter.add(float(second), second * 300_000 if second <= 20 else 20 * 300_000 + (second - 20) * 500_000)
        told.append(meter.mean_watts(20))
    assert told[:5] == [None] * 5
    assert told[5:21] == pytest.approx([300.0] * 16)
    assert told[30] == pytest.approx(400.0)
    assert told[40] == pytest.approx(500.0)


def test_nothing_is_interpolated_over_missing_readings_or_beyond_them():
    meter = EnergyMeter()
    for at_seconds in (0.0, 1.0, 6.0):
        meter.add(at_seconds, int(at_seconds * 500_000))
    assert meter.at(0.25).joules == pytest.approx(125)
    assert meter.at(3.0) is None
    assert meter.at(-1.0) is None
    assert meter.at(6.5) is None
    assert meter.at(6.0).joules == pytest.approx(3000)


def test_a_gpu_without_a_counter_has_no_energy_not_even_zero():
    meter = EnergyMeter()
    meter.add(1.0, None)
    assert not meter.measured
    assert meter.mean_watts(15) is None
    meter.add(2.0, 5)
    assert meter.measured


def test_memory_is_bounded_over_a_day_of_readings():
    meter = EnergyMeter()
    for at_seconds in range(86_400):
        meter.add(float(at_seconds), at_seconds * 500_000)
    assert meter.joules == pytest.approx(86_399 * 500)
    assert meter.at(86_399 - 100.5) is not None
    assert meter.at(86_399 - 130.5) is None


counters = st.lists(st.tuples(st.floats(0.3, 40), st.floats(0, 1)), min_size=1, max_size=60)


@given(counters)
def test_limiter_time_is_exactly_what_the_counters_say_however_far_readings_are_apart(history):
    track, at, counter_ns = GpuTrack("uid"), 0.0, 5_000_000_000
    track.add(reading(at, 0, power_cap=counter_ns, thermal=7), None, 15, None)
    for seconds, share in history:
        at, counter_ns = at + seconds, counter_ns + round(seconds * share * 1e9)
        track.add(reading(at, 0, power_cap=counter_ns, thermal=7), None, 15, None)
    assert track.limiter_seconds["power_cap"] == pytest.approx(counter_ns / 1e9 - 5)
    assert track.limiter_seconds["thermal"] == 0
    known = [(seconds, share) for seconds, share in history if seconds <= MAX_GAP_SECONDS]
    assert track.busy_seconds == pytest.approx(sum(seconds for seconds, _ in known))
    assert track.recent_cap.busy_seconds == pytest.approx(track.busy_seconds)
    assert track.recent_cap.capped_seconds == pytest.approx(
        sum(seconds * share for seconds, share in known), abs=1e-9 * len(known)
    )


def test_a_limiter_counter_that_falls_tells_of_a_restart_that_the_energy_hides():
    track = GpuTrack("uid")
    for second in range(5):
        track.add(reading(float(second), second * 1000, power_cap=10**9 + second), 1590, 15, 100.0)
    _, restarted = track.add(reading(5.0, 300_000, power_cap=3), 1590, 15, 100.0)
    assert restarted
    assert track.meter.joules == pytest.approx(4)
    assert (track.meter.gaps, track.limiter_seconds["power_cap"]) == (1, pytest.approx(4e-9))
    _, restarted = track.add(reading(6.0, 600_000, power_cap=3), 1590, 15, 100.0)
    assert not restarted
    assert track.meter.joules == pytest.approx(304)


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.floats(0.3, 60))
def test_no_limiter_counter_gives_more_time_than_there_was(before, after, seconds):
    grown = growth(LimiterNanoseconds(power_cap=before), LimiterNanoseconds(power_cap=after), seconds)
    assert grown.restarted == (after < before)
    assert 0 <= sum(grown.seconds.values()) <= 2 * seconds + 1
    assert set(grown.seconds) <= set(LIMITER_NAMES)


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), min_size=1, max_size=3000))
def test_the_cap_is_judged_by_the_last_quarter_of_an_hour_of_busy_time(intervals):
    recent = RecentCap()
    for busy_seconds, share in intervals:
        recent.add(busy_seconds, busy_seconds * share)
    total = sum(busy_seconds for busy_seconds, _ in intervals)
    assert min(total, RECENT_BUSY_SECONDS) - 1e-6 <= recent.busy_seconds <= min(total, RECENT_BUSY_SECONDS + 63) + 1e-6
    assert recent.capped_seconds <= recent.busy_seconds + 1e-6


def test_a_cap_that_binds_since_a_while_is_not_hidden_by_weeks_without():
    recent = RecentCap()
    for _ in range(100_000):
        recent.add(1.0, 0.0)
    for _ in range(60):
        recent.add(1.0, 0.5)
    assert recent.capped_seconds == pytest.approx(30)
    assert recent.busy_seconds < 1000


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


def test_a_lull_neither_undoes_the_finding_nor_counts():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1755)
    before = track.clamp_seconds
    run(track, 60, start=30, sm_mhz=345, busy=0)
    assert track.clamped
    assert track.clamp_seconds == before
    run(track, 12, start=90, sm_mhz=1830)
    assert not track.clamped
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


def test_what_was_observed_under_one_cap_is_not_shown_for_the_next():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1755, cap_mhz=1830)
    assert track.observed_mhz == 1755
    run(track, 1, start=30, sm_mhz=1590, cap_mhz=1590, age=0.5)
    assert (track.observed_mhz, track.clamped) == (None, False)
    run(track, 3, start=31, sm_mhz=1590, cap_mhz=1590)
    assert track.observed_mhz == 1590


def test_a_released_gpu_is_observed_too():
    track = GpuTrack("uid")
    run(track, 30, sm_mhz=1980, cap_mhz=None)
    assert (track.observed_mhz, track.released_mhz) == (None, 1980)
