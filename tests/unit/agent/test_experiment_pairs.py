"""Epochs and pairs: what is used, what is dropped, and whether the truth is found."""

import math
import random
from dataclasses import replace

import pytest
from wattlock_agent.clock import Clock
from wattlock_agent.epochs import Drop, Sample, judge_epoch
from wattlock_agent.experiment import Switchback
from wattlock_api.base import parse_timestamp
from wattlock_api.nodeenergy import InstanceStatus
from wattlock_api.schedule import Arm, Experiment, Pair, arm_of, epoch_at, pair_of

EXPERIMENT = Experiment("seed", 20, 0.5)
START = 1_800_000_000.0


def samples(start=START, times=(3, 8, 13, 18, 19.7), tokens_per_second=1000.0, watts=500.0):
    return [
        Sample(start + t, tokens_per_second * t, 0.01 * tokens_per_second * t, tokens_per_second * t, watts * t, (0,))
        for t in times
    ]


def judge(given, as_asked=True):
    return judge_epoch(EXPERIMENT, epoch_at(EXPERIMENT, START), given, as_asked)


def test_measures_between_first_and_last_scrape():
    result = judge(samples(times=(0.5, 2.9, 3, 8, 13, 18, 19.7, 20.1)))
    assert result.seconds == pytest.approx(16.7)
    assert result.joules / result.generated_tokens == pytest.approx(0.5)
    assert result.mean_latency_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("spoil", "drop"),
    [
        (lambda given: given[:3], Drop.SAMPLES),
        (lambda given: [], Drop.SAMPLES),
        (lambda given: [*given[:4], replace(given[4], lives=(1,))], Drop.RESTART),
        (lambda given: [replace(each, generated_tokens=5.0) for each in given], Drop.NO_TOKENS),
    ],
)
def test_drops_what_cannot_be_compared(spoil, drop):
    assert judge(spoil(samples())) is drop


def test_an_engine_that_takes_long_to_come_back_costs_epochs_by_restart():
    switchback = Switchback()
    switchback.configure(EXPERIMENT, "decode-0", 1590)

    def run(epoch, times, life):
        for second in range(20):
            unix = START + 20 * epoch + second
            switchback.note(Clock(unix - START, unix), True)
            for sample in samples(START + 20 * epoch, [each for each in times if second <= each < second + 1]):
                switchback.add(replace(sample, lives=(life,)))

    run(0, (3, 8, 13, 18, 19.7), 0)
    run(1, (3, 8), 0)  # killed
    run(2, (), 0)
    run(3, (18, 19.7), 1)  # back
    run(4, (3, 8, 13, 18, 19.7), 1)
    run(5, (), 1)
    dropped = switchback.dropped()
    assert (dropped.restart, dropped.samples) == (1, 2)
    assert sum(float(arm.generated_tokens) for arm in switchback.arms()) == pytest.approx(2 * 16_700)


def test_an_epoch_that_was_not_as_scheduled_is_dropped():
    assert judge(samples(), as_asked=False) is Drop.NOT_APPLIED


def run_epochs(switchback, instance, epochs, effect, noise, draw, cap_mhz=1590, spoiled=frozenset(), slower=0.0):
    """Feed epochs whose energy per token is ``effect`` lower under the cap, with noise and a slow drift."""
    switchback.configure(EXPERIMENT, instance, cap_mhz)
    first = epoch_at(EXPERIMENT, START)
    tokens = joules = 0.0
    for epoch in range(first, first + epochs):
        start = epoch * 20.0
        cap = arm_of(EXPERIMENT, instance, epoch) is Arm.CAP
        drift = 0.05 * math.sin(epoch / 40)
        per_token = 0.5 * math.exp(drift + draw.gauss(0, noise) + (effect if cap else 0.0))
        rate = 1000 * math.exp(draw.gauss(0, noise) - (slower if cap else 0.0))
        before = 0.0
        for offset in (0.5, 3.0, 8.0, 13.0, 18.0, 19.7):
            tokens += rate * (offset - before)
            joules += rate * (offset - before) * per_token
            before = offset
            unix = start + offset
            switchback.note(Clock(unix - START, unix), epoch not in spoiled)
            switchback.add(Sample(unix, tokens, tokens * 0.01, tokens, joules, (0,)))
    end = (first + epochs) * 20.0 + 5
    switchback.note(Clock(end - START, end), True)


def test_finds_the_true_effect_without_bias():
    draw = random.Random(1)
    truth = math.log(0.85)
    means = []
    throughput = []
    for number in range(60):
        switchback = Switchback()
        run_epochs(switchback, f"i-{number}", 60, truth, 0.02, draw, slower=0.05)
        (stats,) = switchback.pair_stats()
        assert 25 <= stats.pairs <= 31
        means.append(float(stats.energy.total) / stats.pairs)
        throughput.append(float(stats.throughput.total) / stats.pairs)
    assert sum(throughput) / len(throughput) == pytest.approx(-0.05, abs=0.003)
    mean = sum(means) / len(means)
    spread = math.sqrt(sum((each - mean) ** 2 for each in means) / (len(means) - 1))
    assert mean == pytest.approx(truth, abs=4 * spread / math.sqrt(len(means)))
    # The stated squares give the spread that is really there.
    variance = float(stats.energy.squares) / stats.pairs - (float(stats.energy.total) / stats.pairs) ** 2
    assert math.sqrt(variance / stats.pairs) == pytest.approx(spread, rel=0.6)


def test_a_lock_that_does_nothing_shows_nothing():
    switchback = Switchback()
    run_epochs(switchback, "i", 200, 0.0, 0.02, random.Random(2))
    (stats,) = switchback.pair_stats()
    assert abs(float(stats.energy.total) / stats.pairs) < 4 * 0.02 * math.sqrt(2 / stats.pairs)


def test_a_pair_counts_only_when_both_epochs_do():
    first = epoch_at(EXPERIMENT, START)
    pairs = {pair_of(EXPERIMENT, "i", epoch) for epoch in range(first + 2, first + 18)}
    spoiled = sorted(pairs, key=lambda pair: pair.cap)[3]
    whole, part = Switchback(), Switchback()
    run_epochs(whole, "i", 20, 0.1, 0.0, random.Random(3))
    run_epochs(part, "i", 20, 0.1, 0.0, random.Random(3), spoiled=frozenset({spoiled.control}))
    assert part.pair_stats()[0].pairs == whole.pair_stats()[0].pairs - 1
    assert part.dropped().not_applied == whole.dropped().not_applied + 1
    assert isinstance(spoiled, Pair)


def test_caps_are_kept_apart_and_restored():
    switchback = Switchback()
    run_epochs(switchback, "i", 20, -0.1, 0.0, random.Random(3))
    run_epochs(switchback, "i", 20, -0.3, 0.0, random.Random(3), cap_mhz=1200)
    by_cap = {stats.cap_mhz: stats for stats in switchback.pair_stats()}
    # Only the drift is left: it is the same in both arms on average, not in each pair.
    assert float(by_cap[1590].energy.total) / by_cap[1590].pairs == pytest.approx(-0.1, abs=0.005)
    assert float(by_cap[1200].energy.total) / by_cap[1200].pairs == pytest.approx(-0.3, abs=0.005)
    status = InstanceStatus(
        key="p/i",
        policy_uid="p",
        pool="x",
        instance="i",
        arms=switchback.arms(),
        pair_stats=switchback.pair_stats(),
        dropped=switchback.dropped(),
    )
    again = Switchback(InstanceStatus.model_validate(status.to_api()))
    assert again.pair_stats() == switchback.pair_stats()
    assert again.arms() == switchback.arms()
    assert again.dropped() == switchback.dropped()


def test_memory_is_bounded_over_many_caps():
    switchback = Switchback()
    for number in range(30):
        run_epochs(switchback, "i", 8, 0.0, 0.0, random.Random(3), cap_mhz=1000 + 15 * number)
    assert len(switchback.pair_stats()) <= 16
    assert len(switchback.arms()) <= 16
    assert any(arm.cap_mhz == 0 for arm in switchback.arms())
    assert switchback.pair_stats()[-1].cap_mhz == 1000 + 15 * 29


def test_a_step_of_the_wall_clock_spoils_the_epoch():
    switchback = Switchback()
    switchback.configure(EXPERIMENT, "i", 1590)
    for sample in samples():
        step = 1.0 if sample.unix_seconds - START > 10 else 0.0
        switchback.note(Clock(sample.unix_seconds - START - step, sample.unix_seconds), True)
        switchback.add(sample)
    switchback.note(Clock(1000.0, START + 30), True)
    assert switchback.dropped().not_applied == 1


def test_scrapes_are_wanted_at_both_ends_of_the_window():
    switchback = Switchback()
    assert switchback.next_scrape_unix_seconds(START) is None
    switchback.configure(EXPERIMENT, "i", 1590)
    assert switchback.next_scrape_unix_seconds(START) == START + 3
    assert switchback.next_scrape_unix_seconds(START + 3) == pytest.approx(START + 19.7)
    assert switchback.next_scrape_unix_seconds(START + 19.8) == START + 23
    assert parse_timestamp("2027-01-15T08:00:00Z") == START
