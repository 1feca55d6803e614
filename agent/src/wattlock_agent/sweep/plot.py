"""The Pareto plot: throughput against joules per token, one panel for each load, both levers in each.

Needs matplotlib, the extra ``wattlock-agent[sweep]``; the image of the agent does not have it.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wattlock_agent.sweep.estimates import Row
from wattlock_agent.sweep.findings import Verdict, verdict
from wattlock_agent.sweep.plan import STOCK, Lever
from wattlock_agent.sweep.record import Run

_CLOCK, _POWER, _STOCK, _GREY = "#1b6ca8", "#d1782b", "#20242a", "#8a8f98"
_PANEL_INCHES = (4.6, 3.9)
_COLUMNS = 3
_LEAST_SPAN = 0.25
#: Points closer than this share of the panel would have their labels on top of each other.
_LABEL_DISTANCE = 0.055


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, run: Run, rows: Sequence[Row]) -> None:
    """Write the PNG; the same rows give the same file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    workloads = sorted(dict.fromkeys(row.workload for row in rows))  # decode first
    columns = min(_COLUMNS, len(workloads))
    lines = -(-len(workloads) // columns)
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": _GREY, "axes.linewidth": 0.8})
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + 0.5)
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(workloads) :]:
        panel.set_visible(False)
    for panel, workload in zip(panels.flat, workloads, strict=False):
        _panel(panel, [row for row in rows if row.workload == workload])
        unit = "prompt " if workload.shape == "prefill" else ""
        panel.set_title(str(workload), loc="left", fontweight="bold")
        panel.set_xlabel(f"{unit}tokens/s")
        panel.set_ylabel(f"J per {unit or 'generated '}token")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{run.label} on {run.gpus} x {run.product}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    clocks = sorted((row for row in rows if row.setting.lever is Lever.CLOCK), key=lambda row: -row.setting.value)
    limits = sorted((row for row in rows if row.setting.lever is Lever.POWER), key=lambda row: -row.setting.value)
    bound = [row for row in limits if verdict(row) is Verdict.BINDING]
    inert = [row for row in limits if verdict(row) is not Verdict.BINDING]
    panel.plot(
        *_xy(clocks), color=_CLOCK, marker="o", markersize=5, linewidth=1.2, label="SM clock locked, MHz", zorder=3
    )
    panel.plot(*_xy(limits), color=_POWER, linewidth=0.9, linestyle=(0, (3, 2)), marker="", zorder=2)
    panel.plot(
        *_xy(bound), color=_POWER, marker="s", markersize=6, linestyle="", label="power limit that binds, W", zorder=4
    )
    style = {"marker": "s", "markersize": 9, "markerfacecolor": "none", "linestyle": "", "zorder": 5}
    panel.plot(*_xy(inert), color=_POWER, label="power limit that does nothing, W", **style)
    stock = [row for row in rows if row.setting == STOCK]
    panel.plot(*_xy(stock), color=_STOCK, marker="*", markersize=11, linestyle="", label="stock", zorder=6)
    panel.margins(0.16, 0.14)
    _widen(panel)
    panel.grid(color="#e6e8eb", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.ticklabel_format(useOffset=False)
    _label(panel, clocks, _CLOCK, left=False)
    _label(panel, limits, _POWER, left=True)


def _widen(panel: Any) -> None:
    """Give each axis a span of at least a quarter of its values: noise shall not fill the panel."""
    for get, put in ((panel.get_xlim, panel.set_xlim), (panel.get_ylim, panel.set_ylim)):
        low, high = get()
        missing = max(0.0, _LEAST_SPAN * high - (high - low))
        put(low - missing / 2, high + missing / 2)


def _xy(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.tokens_per_second for row in rows], [row.joules_per_token for row in rows]


def _label(panel: Any, rows: Sequence[Row], colour: str, *, left: bool) -> None:
    """Write values beside points; those that lie on one spot share one label."""
    low_x, high_x = panel.get_xlim()
    low_y, high_y = panel.get_ylim()
    groups: list[tuple[float, float, list[int]]] = []
    for row in rows:
        x, y = row.tokens_per_second, row.joules_per_token
        for at_x, at_y, values in groups:
            near_x = abs(x - at_x) < _LABEL_DISTANCE * (high_x - low_x)
            if near_x and abs(y - at_y) < _LABEL_DISTANCE * (high_y - low_y):
                values.append(row.setting.value)
                break
        else:
            groups.append((x, y, [row.setting.value]))
    for x, y, values in groups:
        text = str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
        offset = (-9, 0) if left else (9, 0)
        side = "right" if left else "left"
        panel.annotate(
            text, (x, y), textcoords="offset points", xytext=offset, ha=side, va="center", fontsize=7.5, color=colour
        )
