"""The choice of the clock against its alternatives, in simulated pools: prints a table, saves the plot, judges.

Run by ``make bench-decision``. Everything is seeded: two runs print the same numbers.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from decision_figure import draw
from decision_levers import Alternatives, compare
from decision_tuned import Tuned, effect_of, tune
from decision_world import EPOCH_SECONDS, INSTANCES, REGIMES, Cell, Effect, Levers, cells

IMAGE = Path(__file__).resolve().parents[3] / "docs/images/decision.png"
#: Pools of each cell, with loads and coins of their own.
POOLS = 3
#: Of the oracle's saving: in every pool of every cell, and the median over all.
LEAST_SHARE, LEAST_MEDIAN_SHARE = 0.95, 0.98


@dataclass(frozen=True)
class Run:
    """What the tuner came to in one pool, and what that truly does."""

    tuned: Tuned
    effect: Effect


@dataclass(frozen=True)
class Row:
    """A cell with all levers."""

    cell: Cell
    alternatives: Alternatives
    runs: tuple[Run, ...]

    def share(self, run: Run) -> float:
        """Return how much of the oracle's saving a pool gets."""
        return run.effect.saving / self.alternatives.oracle.saving

    @property
    def worst(self) -> Run:
        """The pool that gets the least of it."""
        return min(self.runs, key=lambda run: run.effect.saving)


def work(cell: Cell, pools: int) -> Row:
    """Do one cell."""
    levers = Levers(cell)
    runs = []
    for seed in range(pools):
        tuned = tune(cell, seed)
        runs.append(Run(replace(tuned, final=replace(tuned.final, trials=())), effect_of(tuned, levers)))
    return Row(Cell(cell.product, cell.architecture, cell.regime), compare(cell, levers), tuple(runs))


def failures_of(rows: list[Row]) -> list[str]:
    """Return what is out of bounds."""
    found = []
    for row in rows:
        for run in row.runs:
            if not run.tuned.converged:
                found.append(f"{row.cell.name}: no end after {run.tuned.hours:.0f} hours")
            if not run.effect.within:
                found.append(f"{row.cell.name}: ends in a breach, {run.effect.throughput:.2f} % throughput")
            if not row.alternatives.exists:
                if run.tuned.cap_mhz is not None:
                    found.append(f"{row.cell.name}: capped although nothing is to be saved")
                continue
            if row.share(run) < LEAST_SHARE:
                found.append(f"{row.cell.name}: {100 * row.share(run):.1f} % of the oracle's saving")
            if run.effect.saving <= row.alternatives.power_at(run.effect.throughput):
                found.append(f"{row.cell.name}: a power cap saves as much at the same throughput")
    shares = [row.share(run) for row in rows if row.alternatives.exists for run in row.runs]
    if statistics.median(shares) < LEAST_MEDIAN_SHARE:
        found.append(f"median share of the oracle's saving: {100 * statistics.median(shares):.1f} %")
    return found


def _percents(effect: Effect) -> str:
    return f"{effect.saving + 0.0:5.1f} {effect.throughput + 0.0:5.1f}"


def print_rows(rows: list[Row]) -> None:
    """Print the table: of the tuned pools the one that saves least."""
    print("Energy saved for each token against the default governor, and change of throughput, in percent")
    print(
        f"  {'':<41} {'best power cap':^16} {'1590 MHz':^11} {'profile':^11} {'tuned, worst of the pools':^40}"
        f" {'oracle':^17} {'breach':>9} {'hours':>5}"
    )
    print(
        f"  {'cell':<41} {'W':>4} {'saves':>5} {'tput':>5} {'saves':>5} {'tput':>5} {'saves':>5} {'tput':>5} {'MHz':>5}"
        f" {'saves':>5} {'tput':>5} {'worst ITL':>9} {'cap=tput':>8} {'share':>6} {'MHz':>4} {'saves':>5} {'tput':>5}"
        f" {'epochs':>9} {'most':>5}"
    )
    for row in rows:
        found, worst = row.alternatives, row.worst
        mhz = "-" if worst.tuned.cap_mhz is None else str(worst.tuned.cap_mhz)
        share = f"{100 * row.share(worst):5.1f}%" if found.exists else "  none"
        breach = max(row.runs, key=lambda run: run.tuned.breach_epochs).tuned
        print(
            f"  {row.cell.name:<41} {found.power_watts:>4} {_percents(found.power)} {_percents(found.published)}"
            f" {_percents(found.profile)} {mhz:>5} {_percents(worst.effect)} {worst.effect.worst_latency:+9.1f}"
            f" {found.power_at(worst.effect.throughput):8.1f} {share} {found.oracle_mhz:>4} {_percents(found.oracle)}"
            f" {breach.breach_epochs:>4}/{breach.capped_epochs:<4} {max(run.tuned.hours for run in row.runs):5.1f}"
        )


def print_summary(rows: list[Row]) -> None:
    """Print the figures that are judged."""
    with_saving = [row for row in rows if row.alternatives.exists]
    shares = [row.share(run) for row in with_saving for run in row.runs]
    runs = [run for row in rows for run in row.runs]
    ahead = [
        run.effect.saving - row.alternatives.power_at(run.effect.throughput) for row in with_saving for run in row.runs
    ]
    left = [run for row in rows if not row.alternatives.exists for run in row.runs]
    breach, capped = (sum(getattr(run.tuned, name) for run in runs) for name in ("breach_epochs", "capped_epochs"))
    hours = sorted(run.tuned.hours for run in runs)
    print()
    print(f"Tuned, {len(runs)} pools of {INSTANCES} instances, epochs of {EPOCH_SECONDS} s, half of them released")
    print(
        f"  share of the oracle's saving       worst {100 * min(shares):.1f} %, median {statistics.median(shares):.1%}"
    )
    print(f"  ends in a breach of the guardrail  {sum(not run.effect.within for run in runs)} of {len(runs)}")
    print("  ahead of a power cap that costs as much throughput, points")
    print(f"                                     least {min(ahead):.1f}, median {statistics.median(ahead):.1f}")
    alone = sum(run.tuned.cap_mhz is None for run in left)
    print(f"  where nothing is to be saved       left alone {alone} of {len(left)}")
    lost = sum(run.tuned.breach_loss for run in runs) / max(1, breach)
    print(f"  capped epochs beyond the bounds    {breach} of {capped} ({breach / capped:.1%}), all during the search,")
    print(f"                                     which lost {lost:.1f} % of throughput on average")
    arms = max(run.tuned.arms for run in runs)
    print(f"  hours to converge                  median {statistics.median(hours):.1f}, most {hours[-1]:.1f}")
    print(f"  arms of a search                   at most {arms}")
    print("Mean saving over the cells where one exists")
    for name, values in (
        ("default governor", [0.0]),
        ("Wattlock's shipped profile", [row.alternatives.profile.saving for row in with_saving]),
        ("1590 MHz everywhere", [row.alternatives.published.saving for row in with_saving]),
        ("best static power cap", [row.alternatives.power.saving for row in with_saving]),
        ("Wattlock tuned", [run.effect.saving for row in with_saving for run in row.runs]),
        ("oracle", [row.alternatives.oracle.saving for row in with_saving]),
    ):
        print(f"  {name:<34} {statistics.fmean(values):5.1f} %")


def main() -> int:
    """Run all cells; return 1 if anything is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=int, default=POOLS, help="tuned pools of each cell")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--no-plot", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    chosen = [cell for cell in cells() if arguments.only in cell.name]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as workers:
        rows = list(workers.map(work, chosen, [arguments.pools] * len(chosen)))
    order = {regime.name: index for index, regime in enumerate(REGIMES)}
    rows.sort(key=lambda row: (-ord(row.cell.product.value[2]), order[row.cell.regime.name]))
    print_rows(rows)
    print_summary(rows)
    if not arguments.no_plot:
        draw(IMAGE, rows)
        print(f"\nPlot: {IMAGE.relative_to(IMAGE.parents[2])}")
    print(f"{time.monotonic() - started:.0f} s")
    failures = failures_of(rows)
    for failure in failures:
        print(f"out of bounds: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
