"""Draws the plots of docs/simulator.md: ``uv run python simulator/plot_fit.py tests/data docs/images``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from wattlock_simulator import fit, physics
from wattlock_simulator.physics import Architecture, Phase, Product, Workload

_COLOURS = dict(zip(Architecture, ("#1b6ca8", "#d1782b", "#2f8f5b", "#8a4fa3"), strict=True))
_MARKERS = {Product.H200: "o", Product.H100: "s"}


def draw_fit(rows: tuple[fit.Row, ...], target: Path) -> None:
    """Model over reading: board power, and time per step."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for row in rows:
        point = physics.operating_point(row.product, row.workload)
        filled = _COLOURS[row.workload.architecture] if row.workload.phase is Phase.DECODE else "none"
        style = {
            "marker": _MARKERS[row.product],
            "markeredgecolor": _COLOURS[row.workload.architecture],
            "markerfacecolor": filled,
            "linestyle": "none",
        }
        axes[0].plot(row.watts, point.watts, **style)
        axes[1].loglog(row.step_seconds * 1e3, point.step_seconds * 1e3, **style)
    for axis, ends in ((axes[0], (320, 730)), (axes[1], (3, 700))):
        axis.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
    axes[0].set(xlabel="measured, W", ylabel="model, W", title="Board power, no lock")
    axes[1].set(xlabel="measured, ms", ylabel="model, ms", title="Time per step")
    handles = [plt.Line2D([], [], color=c, marker="o", linestyle="none", label=a) for a, c in _COLOURS.items()]
    handles += [plt.Line2D([], [], color="#444444", marker=m, linestyle="none", label=p) for p, m in _MARKERS.items()]
    handles.append(
        plt.Line2D(
            [], [], color="#444444", marker="o", markerfacecolor="none", linestyle="none", label="prefill (hollow)"
        )
    )
    axes[0].legend(handles=handles, fontsize=8, loc="upper left")
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def draw_clock(target: Path) -> None:
    """What a cap does to energy per token and to throughput: the simulator's truth."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.0), layout="constrained")
    clocks = [c for c in physics.supported_clocks_mhz(Product.H200) if c >= 450]
    for architecture, colour in _COLOURS.items():
        workload = Workload(architecture, Phase.DECODE, 32, 4096)
        savings = [physics.true_saving(Product.H200, workload, c) for c in clocks]
        axes[0].plot(clocks, [s.energy_percent for s in savings], color=colour, label=architecture)
        axes[1].plot(clocks, [s.throughput_change_percent for s in savings], color=colour)
    for axis in axes:
        axis.axvline(1590, color="#888888", linewidth=0.8, linestyle="--")
        axis.set_xlabel("cap, MHz (dashed: 1590)")
    axes[0].set(ylabel="%", title="Saved energy per token, H200 decode 32 x 4096")
    axes[1].set(ylabel="%", title="Change of throughput", ylim=(-12, 0.5))
    axes[0].legend(fontsize=8)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Reads the recordings from the first argument and writes both plots to the second."""
    data, images = Path(sys.argv[1]), Path(sys.argv[2])
    plt.rcParams["svg.hashsalt"] = "wattlock"  # the same plot is the same file
    draw_fit(fit.load_rows(data), images / "simulator-fit.svg")
    draw_clock(images / "simulator-clock.svg")


if __name__ == "__main__":
    main()
