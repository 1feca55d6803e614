"""The plot of docs/benchmarks.md: what each lever saves in each cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

GREY = "#8a8f98"
BLUE, RED, GREEN, ORANGE = "#1b6ca8", "#d1495b", "#2a9d8f", "#e9a03b"


def draw(path: Path, rows: Sequence[Any]) -> None:
    """Write the PNG: one panel for each product, one row for each cell."""
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": GREY, "axes.linewidth": 0.8})
    products = list(dict.fromkeys(row.cell.product.value for row in rows))
    figure, panels = plt.subplots(1, len(products), figsize=(11, 6.6), sharex=True, squeeze=False)
    for axes, product in zip(panels[0], products, strict=True):
        _panel(axes, product, [row for row in rows if row.cell.product.value == product])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1), w_pad=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _panel(axes: plt.Axes, product: str, rows: Sequence[Any]) -> None:
    names, ticks, place, regime = [], [], 0.0, None
    first = True
    for row in rows:
        if row.cell.regime.name != regime:
            regime, place = row.cell.regime.name, place + 1.4
            axes.text(0, place, regime, fontweight="bold", fontsize=8.5, va="center")
        place += 1
        found = row.alternatives

        def mark(value: float, place: float = place, **style: Any) -> None:
            axes.plot([value], [place], linestyle="", **style)

        def label(text: str, first: bool = first) -> str | None:
            return text if first else None

        axes.plot([0, found.oracle.saving], [place, place], color="#e6e8eb", linewidth=3, zorder=0)
        mark(found.published.saving, marker="|", color=GREY, markersize=9, markeredgewidth=2, label=label("1590 MHz"))
        mark(found.power.saving, marker="s", color=RED, markersize=4.5, label=label("best power cap"))
        mark(found.oracle.saving, marker="o", color="none", markeredgecolor=GREEN, markersize=9, label=label("oracle"))
        for index, run in enumerate(row.runs):
            name = label("Wattlock tuned (each pool)") if index == 0 else None
            mark(run.effect.saving, marker="o", color=BLUE, markersize=3.5, alpha=0.8, label=name)
        names.append(row.cell.architecture.value)
        ticks.append(place)
        first = False
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(place + 1, 0.6)
    axes.set_xlim(-1, 36)
    axes.grid(axis="x", color="#eef0f2", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("energy saved for each token, %, within the guardrail")
    axes.set_title(product, loc="left", fontweight="bold")
