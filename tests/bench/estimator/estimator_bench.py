"""The estimator against simulated truth: prints tables with bounds, saves the plot, fails out of bounds.

Run by ``make bench-estimator``. Everything is seeded: two runs print the same numbers.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from estimator_agent_proof import compare_with_agent
from estimator_chain import run_chain, true_saving_percent
from estimator_checks import Coverage, Watch, compare, coverage, coverage_at_every_look, watch
from estimator_churn import watch_churn
from estimator_figure import draw
from estimator_scenarios import (
    BURSTS,
    CHURN,
    CHURN_LIFE_SECONDS,
    COMPARED,
    COMPARED_HOUR,
    COMPARED_POOLS,
    COVERAGE,
    EVERY_LOOK,
    EVERY_LOOK_HOURS,
    EVERY_LOOK_POOLS,
    HIGHEST,
    LOWEST,
    MOST_FALSE,
    PLOTTED,
    PLOTTED_HOURS,
    PLOTTED_POOLS,
    QUICK,
    SHARED,
    WATCH,
    WATCHED_POOLS,
    Case,
)
from estimator_selection import biases
from estimator_world import Scenario
from wattlock_operator.pooling import pool, saving_percent

IMAGE = Path(__file__).resolve().parents[3] / "docs/images/estimator.png"
#: Pools in one job of a process.
SHARE = 250
MOST_DIFFERENCE = 1e-8
#: Of the whole chain: 1200 pairs with a deviation of 0.6 points leave an error of 0.02 points.
MOST_BIAS_POINTS = 0.1
CHAINS, CHAIN_PAIRS = 4, 300
SELECTED_POOLS = 200

failures: list[str] = []


def line(text: str = "") -> None:
    print(text, flush=True)


def judged(name: str, value: float, fine: bool) -> str:
    """Return the word for the table, and remember what is out of bounds."""
    if not fine:
        failures.append(f"{name}: {value:.1f} %")
    return "pass" if fine else "FAIL"


def shares(pools: int) -> list[range]:
    return [range(start, min(start + SHARE, pools)) for start in range(0, pools, SHARE)]


def submit(workers: ProcessPoolExecutor, work: Callable[..., Any], scenario: Scenario, pools: int, *rest: Any) -> list:
    # The largest pools take the longest: small jobs keep both processes busy to the end.
    return [workers.submit(work, scenario, share, *rest) for share in shares(pools)]


def merged_coverage(results: Iterable[dict[float, Coverage]]) -> dict[float, Coverage]:
    total: dict[float, Coverage] = {}
    for result in results:
        for hour, part in result.items():
            total.setdefault(hour, Coverage()).merge(part)
    return total


def print_coverage(cases: tuple[Case, ...], jobs: dict[str, list]) -> dict[str, list[float]]:
    line(f"Coverage of the published 95 % interval at looks fixed in advance (bounds {LOWEST:.0f} to {HIGHEST:.0f} %)")
    line(f"  {'scenario':<30} {'pools':>6}   {'coverage in %':^27}   {'pairs':^23}   half-width, points")
    shown = {}
    for case in cases:
        found = merged_coverage(job.result() for job in jobs[case.scenario.name])
        looks = list(found.values())
        percents = [look.percent for look in looks]
        top = 100.0 if case.wide else HIGHEST
        worst = max(percents, key=lambda each: abs(each - 95))
        word = judged(f"coverage, {case.scenario.name}", worst, all(LOWEST <= each <= top for each in percents))
        line(
            f"  {case.scenario.name:<30} {looks[0].pools:>6}   {' '.join(f'{each:6.1f}' for each in percents)}   "
            f"{' '.join(f'{np.median(look.pairs):5.0f}' for look in looks)}   "
            f"{' '.join(f'{np.median(look.half_widths):5.2f}' for look in looks)}  {word}"
            + (f" (lower bound only: {case.wide})" if case.wide else "")
        )
        shown[case.scenario.name] = percents
    return shown


def print_watch(jobs: dict[str, list]) -> None:
    line()
    line("The cap does nothing, and someone looks every minute for a day: called Verified at any look")
    line(f"(bound {MOST_FALSE:.0f} %)")
    line(f"  {'scenario':<30} {'pools':>6} {'verdicts':>11}   Verified   by the interval of one look alone")
    for scenario in WATCH:
        total = Watch()
        for job in jobs[scenario.name]:
            total.merge(job.result())
        percent = 100 * total.verified / total.pools
        word = judged(f"false Verified, {scenario.name}", percent, percent <= MOST_FALSE)
        line(
            f"  {scenario.name:<30} {total.pools:>6} {total.looks:>11,}   {percent:6.1f} %   "
            f"{100 * total.one_look / total.pools:6.1f} %   {word}"
        )


def print_churn(jobs: list) -> None:
    kept, forgotten = Watch(), Watch()
    for job in jobs:
        one, other = job.result()
        kept.merge(one)
        forgotten.merge(other)
    percent, without = (100 * each.verified / each.pools for each in (kept, forgotten))
    word = judged(f"false Verified, {CHURN.name}", percent, percent <= MOST_FALSE)
    line(
        f"  {CHURN.name:<30} {kept.pools:>6} {kept.looks:>11,}   {percent:6.1f} %   "
        f"{100 * kept.one_look / kept.pools:6.1f} %   {word} ({without:.1f} % if pairs vanished with their pod)"
    )


def print_every_look(jobs: dict[str, list]) -> None:
    line()
    line("The interval for every look holds the truth at all of 24 looks, one an hour (at least 95 %)")
    for scenario in EVERY_LOOK:
        total = Coverage()
        for job in jobs[scenario.name]:
            total.merge(job.result())
        word = judged(f"every look, {scenario.name}", total.percent, total.percent >= 95)
        line(f"  {scenario.name:<30} {total.pools:>6}   {total.percent:6.1f} %   {word}")


def print_comparison(jobs: dict[str, list]) -> None:
    line()
    line(f"Had the instance been the unit (CR2, Bell-McCaffrey), after {COMPARED_HOUR:.0f} hours; shown, not judged")
    line(f"  {'scenario':<30} {'pools':>6}   pair as the unit           instance as the unit")
    for scenario in COMPARED:
        ours, theirs = Coverage(), Coverage()
        for job in jobs[scenario.name]:
            mine, other = job.result()
            ours.merge(mine)
            theirs.merge(other)
        cells = []
        for each in (ours, theirs):
            width = float(np.median(each.half_widths))
            cells.append(
                f"{each.percent:5.1f} %, "
                + (f"+-{width:5.2f} points" if np.isfinite(width) else "mostly without an end")
            )
        line(f"  {scenario.name:<30} {ours.pools:>6}   {'     '.join(cells)}")


def prove_pairing() -> None:
    line()
    samples = (
        (replace(BURSTS, hours=6), (1, 2)),
        (replace(SHARED, hours=6), (3,)),
        (replace(QUICK, hours=1, instances=2), (4, 5)),
    )
    worst = max(compare_with_agent(scenario, pool) for scenario, pools in samples for pool in pools)
    word = judged("pairing", worst, worst <= MOST_DIFFERENCE)
    line(f"Simulated pairs are the agent's own (wattlock_agent.experiment): sums differ by {worst:.0e}   {word}")


def print_selection(job: Any) -> None:
    line()
    line("What dropping epochs does to the estimate (points off; the product's own rules are judged)")
    for bias in job.result():
        text = (
            f"  {bias.name:<58} {bias.dropped_percent:5.1f} % dropped   {bias.points:+6.2f} +-{bias.error_points:5.2f}"
        )
        line(text + (f"   {judged(bias.name, bias.points, abs(bias.points) <= MOST_BIAS_POINTS)}" if bias.used else ""))


def print_chain(jobs: list) -> None:
    effect = pool([job.result() for job in jobs])
    assert effect is not None
    saving, truth = saving_percent(effect), true_saving_percent()
    line()
    line("Simulated GPU and serving engine, agent, estimate: anything biased?")
    word = judged("bias of the whole chain", saving.value - truth, abs(saving.value - truth) <= MOST_BIAS_POINTS)
    line(
        f"  estimate {saving.value:.3f} % +- {saving.half_width:.3f} from {effect.pairs} pairs, truth {truth:.3f} % "
        f"(at most {MOST_BIAS_POINTS} points apart)   {word}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the pools, to try things out")
    parser.add_argument("--no-plot", action="store_true")
    arguments = parser.parse_args()

    def some(pools: int) -> int:
        return max(20, round(pools * arguments.share))

    started = time.monotonic()
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as workers:
        covered = {
            case.scenario.name: submit(workers, coverage, case.scenario, some(case.pools), case.hours)
            for case in COVERAGE
        }
        watched = {each.name: submit(workers, watch, each, some(WATCHED_POOLS)) for each in WATCH}
        churned = submit(workers, watch_churn, CHURN, some(WATCHED_POOLS), CHURN_LIFE_SECONDS)
        every = {
            each.name: submit(workers, coverage_at_every_look, each, some(EVERY_LOOK_POOLS), EVERY_LOOK_HOURS)
            for each in EVERY_LOOK
        }
        compared = {each.name: submit(workers, compare, each, some(COMPARED_POOLS), COMPARED_HOUR) for each in COMPARED}
        plotted = {each.name: submit(workers, coverage, each, some(PLOTTED_POOLS), PLOTTED_HOURS) for each in PLOTTED}
        selected = workers.submit(biases, some(SELECTED_POOLS))
        chains = [workers.submit(run_chain, seed, some(CHAIN_PAIRS)) for seed in range(CHAINS)]
        prove_pairing()
        line()
        percents = print_coverage(COVERAGE, covered)
        print_watch(watched)
        print_churn(churned)
        print_every_look(every)
        print_comparison(compared)
        print_selection(selected)
        print_chain(chains)
        curves = {name: merged_coverage(job.result() for job in jobs) for name, jobs in plotted.items()}
    if not arguments.no_plot:
        draw(IMAGE, percents, curves)
        line(f"\nPlot: {IMAGE.relative_to(IMAGE.parents[2])}")
    line(f"{time.monotonic() - started:.0f} s")
    for failure in failures:
        line(f"out of bounds: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
