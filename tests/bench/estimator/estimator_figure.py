"""The plot of docs/savings.md: half-width against pairs, and coverage by scenario."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from estimator_checks import Coverage
from estimator_scenarios import HIGHEST, HOURS, LOWEST
from wattlock_operator.verdict import MAX_HALF_WIDTH_POINTS

mpl.use("Agg")
import matplotlib.pyplot as plt

GREY = "#8a8f98"
COLOURS = ("#1b6ca8", "#2a9d8f", "#e9a03b", "#d1495b", "#7b5ea7", "#5c6670")


def draw(path: Path, percents: Mapping[str, Sequence[float]], curves: Mapping[str, Mapping[float, Coverage]]) -> None:
    """Write the PNG."""
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": GREY, "axes.linewidth": 0.8})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.15, 1))
    _half_widths(left, curves)
    _coverage(right, percents)
    figure.tight_layout(w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _half_widths(axes: plt.Axes, curves: Mapping[str, Mapping[float, Coverage]]) -> None:
    labels: list[tuple[float, str, str]] = []
    for colour, (name, looks) in zip(COLOURS, curves.items(), strict=False):
        pairs = [float(np.median(look.pairs)) for look in looks.values()]
        widths = [float(np.median(look.half_widths)) for look in looks.values()]
        axes.plot(pairs, widths, color=colour, linewidth=1.8, marker="o", markersize=3)
        labels.append((widths[-1], name, colour))
    lowest = 0.0
    for width, name, colour in sorted(labels):
        lowest = max(width, 1.2 * lowest)  # labels that would touch move up
        axes.text(pairs[-1] * 1.15, lowest, name, color=colour, va="center", fontsize=8)
    axes.axhline(MAX_HALF_WIDTH_POINTS, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(pairs[-1] * 1.15, MAX_HALF_WIDTH_POINTS * 1.06, "bound of Verified", color=GREY, fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(10, 3000)
    axes.set_xticks([12, 24, 48, 96, 192, 576], ["12", "24", "48", "96", "192", "576"])
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.grid(color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("pairs of epochs, four instances")
    axes.set_ylabel("half-width of the 95 % interval, points")
    axes.set_title("How narrow (medians)", loc="left", fontweight="bold")


def _coverage(axes: plt.Axes, percents: Mapping[str, Sequence[float]]) -> None:
    names = list(percents)[::-1]
    axes.axvspan(LOWEST, HIGHEST, color="#e8f3ee", zorder=0)
    axes.axvline(95, color="#2a9d8f", linewidth=1, zorder=1)
    for row, name in enumerate(names):
        for look, value in enumerate(percents[name]):
            axes.plot(value, row, "o", color="#1b6ca8", alpha=0.25 + 0.25 * look, markersize=4.5, zorder=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlim(91.5, 100)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("intervals that hold the truth, %")
    axes.set_title(f"How right ({len(HOURS)} looks: pale early, dark late)", loc="left", fontweight="bold")
