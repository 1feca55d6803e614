"""Proof on samples that the simulated pairs are those that the agent would report: through its own Switchback."""

from dataclasses import replace

import numpy as np
from estimator_world import BEGIN_UNIX_SECONDS, PARTS, Scenario, draw_load, draw_schedule, epoch_power, pairs_of
from wattlock_agent.clock import Clock
from wattlock_agent.epochs import END_MARGIN_SECONDS, SCRAPE_SECONDS, SETTLE_SECONDS, Sample
from wattlock_agent.experiment import Switchback
from wattlock_api.schedule import Arm, arm_of, epoch_start_seconds


def _scrape_offsets_seconds(epoch_seconds: int) -> list[float]:
    first, last = SETTLE_SECONDS, epoch_seconds - END_MARGIN_SECONDS
    return [first, *np.arange(first + SCRAPE_SECONDS, last - 1, SCRAPE_SECONDS).tolist(), last]


def compare_with_agent(scenario: Scenario, pool: int) -> float:
    """Feed a pool's counters to one Switchback for each instance; return the largest difference of the sums."""
    scenario = replace(scenario, sensor=0.0, effect="physics")
    chance = np.random.default_rng(pool)
    schedule = draw_schedule(scenario, range(pool, pool + 1))
    load = draw_load(scenario, schedule[0], chance)
    d = pairs_of(scenario, schedule, load, chance).d[0]
    worst = 0.0
    for instance in range(scenario.instances):
        stats = _agent_sums(scenario, pool, instance, schedule[0][0, instance], load[0, instance])
        mine = (d.shape[-1], d[instance].sum(), (d[instance] ** 2).sum())
        assert stats[0] == mine[0], (stats, mine)
        worst = max(worst, abs(stats[1] - mine[1]), abs(stats[2] - mine[2]))
    return worst


def _agent_sums(
    scenario: Scenario, pool: int, instance: int, first: np.ndarray, load: np.ndarray
) -> tuple[int, float, float]:
    experiment = scenario.experiment(f"pool-{pool}")
    name = f"llm/decode-{instance}"
    switchback = Switchback()
    switchback.configure(experiment, name, 1590)
    begin = BEGIN_UNIX_SECONDS // scenario.epoch_seconds
    length = experiment.block_epochs
    joules = tokens = 1e6
    for number in range(scenario.blocks * length):
        block, place = divmod(number, length)
        epoch = begin + number
        start = epoch_start_seconds(experiment, epoch)
        arm = "released" if arm_of(experiment, name, epoch) is Arm.CONTROL else "capped"
        position = place - first[block]
        log_batch = load[block, position] if position in (0, 1) else np.zeros(PARTS)
        watts, rates = epoch_power(log_batch, arm)
        switchback.note(Clock(start, start), True)
        window_seconds = scenario.epoch_seconds - SETTLE_SECONDS - END_MARGIN_SECONDS
        for offset in _scrape_offsets_seconds(scenario.epoch_seconds):
            # Counters rise in straight lines within a part.
            done = np.clip((offset - SETTLE_SECONDS) / window_seconds * PARTS - np.arange(PARTS), 0, 1)
            seconds = done * window_seconds / PARTS
            switchback.add(
                Sample(
                    unix_seconds=start + offset,
                    generated_tokens=tokens + float((rates * seconds).sum()),
                    latency_sum_seconds=None,
                    latency_count=None,
                    joules=joules + float((watts * seconds).sum()),
                    lives=(0,),
                )
            )
        joules, tokens = joules + 1e5, tokens + 1e6
        switchback.note(Clock(start + scenario.epoch_seconds - 0.1, start + scenario.epoch_seconds - 0.1), True)
    end = epoch_start_seconds(experiment, begin + scenario.blocks * length) + 5
    switchback.note(Clock(end, end), True)
    (stats,) = switchback.pair_stats()
    return stats.pairs, float(stats.energy.total), float(stats.energy.squares)
