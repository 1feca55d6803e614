"""Recordings of a real H100 and H200 through the unchanged agent: driver session, meter, tracker, report, pool verdict.

The agent reads once a second, as on a node; phases of the recordings last 3 to 5 seconds. What it reports of a phase
is therefore judged between its own first and last reading in the phase, at several offsets of its second against the
recording, so that together they cover the phases. What interpolation at the borders can and cannot tell has a test of
its own. Truth is taken from the rows and from the summaries made when the recording was taken, by other code.
"""

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median

import pytest
from replay_driver import DATA, POWER_LIMIT_MW, UUID, ReplayDriver, Row, counted, load, phases, prolonged, step_seconds
from wattlock_agent.holders.base import PodName
from wattlock_agent.report import build_status
from wattlock_api.constants import PowerCapVerdict
from wattlock_api.nodeenergy import GpuStatus
from wattlock_operator.poolstatus import power_cap
from wattlock_operator.reports import NodeGpu

PRODUCTS = ("h100", "h200")
OFFSETS = (0.0, 0.2, 0.4, 0.6, 0.8)
LEAD_SECONDS = 5
#: What status and docs/measurements.md say of power and peaks.
WINDOW_SECONDS = 20.0
#: The bound of the claim: energy by phase against the counter's own difference.
ENERGY_TOLERANCE = 0.005
#: The status rounds joules and busy seconds to one place: half a place at each end.
ROUNDING = 0.1 + 1e-9

recordings = pytest.mark.parametrize("product", PRODUCTS)


@dataclass(frozen=True)
class Seen:
    """What the agent reported after a pass, and the row that it had just read."""

    row: Row
    gpu: GpuStatus

    @property
    def joules(self):
        return float(self.gpu.energy_joules)


@pytest.fixture(scope="module")
def recorded():
    return {product: load(product) for product in PRODUCTS}


@pytest.fixture
def play(make_node, make_order):
    """Returns a function that plays rows to an agent in virtual time and returns what it reported, pass by pass."""

    def play(rows, offset_seconds=0.0, missed=frozenset(), **order):
        node = make_node(gpus=1)
        node.driver = ReplayDriver(rows, node.now_seconds + LEAD_SECONDS + offset_seconds)
        node.pods = {UUID: (PodName("llm", "decode-0"),)}
        node.start()
        # A cap at the highest clock changes nothing on a GPU, so the recording of a free GPU is one under this lock.
        node.order(make_order(metricsURL=None, capMHz=1980, **order))
        node.run(LEAD_SECONDS)
        seen = []
        for second in range(int(rows[-1].t - rows[0].t - offset_seconds) + 1):
            if second in missed:
                node.now_seconds += 1
                continue
            node.run(1)
            status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
            seen.append(Seen(node.driver.row, status.gpus[0]))
        return seen, node

    return play


def disagreements(seen, rows):
    """What the agent reported of each phase and the recording contradicts: (phase, quantity) with both numbers."""
    wrong = {}
    for phase in phases(rows):
        inside = [each for each in seen if phase.rows[0].t <= each.row.t <= phase.rows[-1].t]
        if len(inside) < 3:
            wrong[phase.mark, "readings"] = len(inside)
            continue
        first, last = inside[0], inside[-1]
        between = [row for row in phase.rows if first.row.t <= row.t <= last.row.t]
        told, truth = last.joules - first.joules, (between[-1].energy_mj - between[0].energy_mj) / 1000
        if abs(told - truth) > ENERGY_TOLERANCE * truth + ROUNDING:
            wrong[phase.mark, "energy"] = told, truth
        limited = sum(later.t - row.t for row, later in pairwise(between) if row.capped)
        told = float(last.gpu.limiters.power_cap_seconds) - float(first.gpu.limiters.power_cap_seconds)
        if abs(told - limited) > 0.001 + 1e-9:
            wrong[phase.mark, "limiter"] = told, limited
        busy = sum((b.row.t - a.row.t) * b.row.gpu_util / 100 for a, b in pairwise(inside))
        told = float(last.gpu.busy_seconds) - float(first.gpu.busy_seconds)
        if abs(told - busy) > ROUNDING:
            wrong[phase.mark, "busy"] = told, busy
    return wrong


@recordings
@pytest.mark.parametrize("offset", OFFSETS)
def test_energy_limiters_and_busy_time_of_every_phase(play, recorded, product, offset):
    rows = recorded[product]
    seen, node = play(rows, offset)
    assert disagreements(seen, rows) == {}
    # The whole recording, gaps between the phases included.
    truth = (seen[-1].row.energy_mj - seen[0].row.energy_mj) / 1000
    assert seen[-1].joules - seen[0].joules == pytest.approx(truth, rel=1e-6, abs=ROUNDING)
    others = seen[-1].gpu.limiters
    assert {others.thermal_seconds, others.power_brake_seconds, others.reliability_seconds} == {"0.000"}
    # Whenever the clock was low a limiter said so: nothing on these GPUs is the firmware's doing, and no lock was lost.
    assert seen[-1].gpu.clamp_seconds == "0.0"
    assert seen[-1].gpu.energy_gaps == 0
    assert node.driver.writes == ["lock 1980"]


@recordings
def test_the_offsets_cover_the_phases(recorded, product):
    """Between the first and the last reading of any offset lies nearly all of each phase."""
    for phase in phases(recorded[product]):
        starts = [-(-(phase.rows[0].t - offset) // 1) + offset for offset in OFFSETS]
        ends = [(phase.rows[-1].t - offset) // 1 + offset for offset in OFFSETS]
        assert min(starts) - phase.rows[0].t < 0.25
        assert phase.rows[-1].t - max(ends) < 0.25


@recordings
@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_counter_that_is_off_by_a_hundredth_is_found_out_in_every_phase(play, recorded, product, factor):
    """The bound means something: energy that is wrong by 1 % contradicts the recording."""
    rows = recorded[product]
    seen, _ = play([replace(row, energy_mj=round(row.energy_mj * factor)) for row in rows])
    found = {mark for mark, quantity in disagreements(seen, rows) if quantity == "energy"}
    assert found == {phase.mark for phase in phases(rows)}


@recordings
def test_power_is_the_counters_rise_and_peak_the_highest_reading_of_the_window(play, recorded, product):
    seen, _ = play(recorded[product], 0.3)
    for number, each in enumerate(seen):
        if each.row.t <= WINDOW_SECONDS + 1:
            continue
        window = [other for other in seen[: number + 1] if each.row.t - other.row.t <= WINDOW_SECONDS]
        assert each.gpu.peak_watts == round(max(other.row.power_instant_mw for other in window) / 1000)
        assert each.gpu.power_limit_watts == 700
        first, last = window[0].row, window[-1].row
        watts = (last.energy_mj - first.energy_mj) / 1000 / (last.t - first.t)
        assert each.gpu.power_watts == pytest.approx(watts, abs=0.5 + 1e-6)
    # Single readings pass the limit, mean power over the window hardly does.
    assert max(each.gpu.peak_watts for each in seen) > 720
    assert max(each.gpu.power_watts or 0 for each in seen) < 710


@recordings
def test_idle_phases_are_not_busy(play, recorded, product):
    seen, _ = play(recorded[product], 0.1)
    for mark, from_seconds, to_seconds in (("idle", 0, 5.0), ("idle-end", 1.0, 99)):
        (phase,) = [phase for phase in phases(recorded[product]) if phase.mark == mark]
        begin = phase.rows[0].t
        inside = [
            each for each in seen if begin + from_seconds <= each.row.t <= min(phase.rows[-1].t, begin + to_seconds)
        ]
        assert len(inside) >= 4
        assert inside[-1].gpu.busy_seconds == inside[0].gpu.busy_seconds
        assert inside[-1].gpu.limiters == inside[0].gpu.limiters


@recordings
def test_borders_of_phases_by_a_straight_line_between_readings(play, recorded, product):
    """As the agent does for the times of scrapes. Through a step of power P, a line over one second is off by up to
    P / 4 joules: in an epoch of a minute, 0.5 % if the load turns from idle to full exactly at one of its ends.
    """
    rows = recorded[product]
    driver = None
    borders = [row for before, row in pairwise(rows) if row.mark != before.mark]
    waiting, checked = list(borders), 0
    _, node = play(rows[:2])
    node.driver = driver = ReplayDriver(rows, node.now_seconds + 1.37)
    node.start()
    while waiting and driver.row is not rows[-1]:
        node.run(1)
        meter = node.agent.tracks[UUID].meter
        while waiting and driver.at(waiting[0].t) <= meter.newest_seconds:
            border = waiting.pop(0)
            around = [row for row in rows if abs(row.t - border.t) <= 1.0]
            swing_watts = (
                max(row.power_instant_mw for row in around) - min(row.power_instant_mw for row in around)
            ) / 1000
            told = meter.at(driver.at(border.t)).joules
            truth = (border.energy_mj - rows[0].energy_mj) / 1000
            # And the counter itself moves every 0.1 s, and rows are 0.02 s apart.
            assert told == pytest.approx(
                truth, abs=swing_watts / 4 + 0.12 * max(row.power_instant_mw for row in around) / 1000
            )
            checked += 1
    assert checked >= 50


def expected_percent(summary):
    """Share of samples with the power-cap bit in tests/data/*-phases.json: counted when the recording was taken."""
    return 100 * summary["reasons"].get("0x4", 0) / sum(summary["reasons"].values())


def summaries(product):
    found = json.loads((DATA / f"nvidia-{product}-phases.json").read_text())
    return {each["label"]: each for each in found}


def labelled(product):
    return [pytest.param(product, label, id=f"{product}-{label}") for label in summaries(product)]


@pytest.mark.parametrize(("product", "label"), [each for product in PRODUCTS for each in labelled(product)])
def test_clock_and_power_cap_verdict_of_every_phase(play, recorded, product, label):
    """Each phase as a pod that takes the GPU over and then does nothing else: as recorded, then its last two thirds
    over and over. What the phase before leaves behind (the power-cap bit trails by up to 0.4 s) makes no verdict."""
    summary = summaries(product)[label]
    (phase,) = [phase for phase in phases(recorded[product]) if phase.mark == label]
    rows = phase.steady.rows
    seen, _ = play(prolonged(phase, 120), mode="Observe")
    found = [power_cap([NodeGpu("node", each.gpu, silent=False)]) for each in seen]
    expected = PowerCapVerdict.BINDING if expected_percent(summary) > 1 else PowerCapVerdict.INERT
    assert {each.verdict for each in found} == {PowerCapVerdict.UNKNOWN, expected}
    assert found[-1].verdict is expected
    # Busy time counts by utilisation, so launch gaps of eager decode raise the share.
    percent = min(100.0, expected_percent(summary) / (mean(row.gpu_util for row in rows) / 100))
    assert float(found[-1].time_at_cap_percent) == pytest.approx(percent, abs=1.5)
    assert found[-1].limit_watts == POWER_LIMIT_MW / 1000
    # Clock: medians of 20 readings against that of 100 to 250 rows. Power: against the counter.
    assert seen[-1].gpu.requested_mhz is None
    observed_mhz = median(each.gpu.observed_mhz for each in seen[40:])
    assert observed_mhz == pytest.approx(median(row.sm_mhz for row in rows), abs=45)  # three steps
    watts = (rows[-1].energy_mj - rows[0].energy_mj) / 1000 / (rows[-1].t - rows[0].t + step_seconds(phase))
    assert mean([each.gpu.power_watts for each in seen[40:]]) == pytest.approx(watts, rel=0.005)


def test_the_recordings_hold_both_verdicts_in_decode():
    """Otherwise the test above would prove little."""
    binding = {label for label, each in summaries("h200").items() if expected_percent(each) > 1}
    assert {label for label in binding if label.startswith("decode")} == {
        "decode/gqa/B32/L16384",
        "decode/gqa/B128/L4096",
    }
    assert not any(expected_percent(each) > 1 for label, each in summaries("h100").items() if "decode" in label)


@recordings
def test_no_verdict_from_a_moment_or_from_an_idle_gpu(play, recorded, product):
    for phase in phases(recorded[product]):
        if phase.mark.startswith("prefill"):
            seen, _ = play(prolonged(phase, 55))
            verdicts = {power_cap([NodeGpu("node", each.gpu, silent=False)]).verdict for each in seen}
            assert verdicts == {PowerCapVerdict.UNKNOWN}
            break
    (idle,) = [phase for phase in phases(recorded[product]) if phase.mark == "idle-end"]
    seen, _ = play(prolonged(idle, 200))
    assert power_cap([NodeGpu("node", seen[-1].gpu, silent=False)]).verdict is PowerCapVerdict.UNKNOWN
    assert seen[-1].gpu.observed_mhz is None


def reloaded(rows, at_seconds):
    """The recording with a driver reload: both counters begin anew."""
    zero = next(row for row in rows if row.t >= at_seconds)
    before = [row for row in rows if row.t < at_seconds]
    after = [replace(row, energy_mj=row.energy_mj - zero.energy_mj) for row in rows if row.t >= at_seconds]
    return (*counted(before), *counted(after))


@recordings
@pytest.mark.parametrize("at_seconds", [3.3, 60.5, 100.0])
def test_a_driver_reload_costs_one_interval(play, recorded, product, at_seconds):
    """Also the one at 3.3 s: the counter had counted little before, and soon passes its old value."""
    rows = recorded[product]
    seen, node = play(reloaded(rows, at_seconds))
    kept_mj = kept_seconds = 0.0
    for earlier, later in pairwise(seen):
        if later.row.t < at_seconds or earlier.row.t >= at_seconds:
            kept_mj += later.row.energy_mj - earlier.row.energy_mj
            kept_seconds += (later.row.capped_ns - earlier.row.capped_ns) / 1e9
    assert seen[-1].joules - seen[0].joules == pytest.approx(kept_mj / 1000, abs=ROUNDING)
    assert float(seen[-1].gpu.limiters.power_cap_seconds) == pytest.approx(kept_seconds, abs=0.01)
    assert seen[-1].gpu.energy_gaps == 1
    assert node.driver.writes == ["lock 1980", "lock 1980"], "a reload loses the lock"


@recordings
def test_missed_readings_cost_neither_energy_nor_limiter_time(play, recorded, product):
    rows = recorded[product]
    missed = frozenset({7, 8, 20, 33, 34, 35, 36, 37, 38, 60, 90, 91, 92, 93})  # one, two, four and six in a row
    seen, _ = play(rows, missed=missed)
    complete, _ = play(rows)
    assert len(complete) - len(seen) == len(missed)
    assert seen[-1].gpu.energy_joules == complete[-1].gpu.energy_joules
    assert seen[-1].gpu.limiters == complete[-1].gpu.limiters
    # Whether it was busy is not known over a gap of more than two readings, and not guessed.
    unknown_seconds = 7 + 5
    busy, whole = float(seen[-1].gpu.busy_seconds), float(complete[-1].gpu.busy_seconds)
    assert whole - unknown_seconds - 1 <= busy < whole - 5
