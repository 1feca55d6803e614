"""Writes the findings as a page with a picture and as JSON. No UUID, serial number or host name gets into them."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
from evaluate import CallFigures, Findings

mpl.use("Agg")
from matplotlib import pyplot as plt

_FIELDS = {
    74: "power cap, ns",
    75: "thermal, ns",
    77: "board limit, ns",
    79: "reliability, ns",
    83: "energy",
    186: "instantaneous power",
    187: "lowest power limit",
    188: "highest power limit",
    189: "default power limit",
    190: "current power limit",
    230: "recovery action",
    269: "software thermal slowdown, ns",
    270: "hardware thermal slowdown, ns",
    271: "power brake, ns",
}
_GAP_SECONDS = 3.0
_CODES = {
    0: "ok",
    2: "invalid argument",
    3: "not supported",
    4: "no permission",
    6: "not found",
    7: "size told",
    13: "no such function",
}
_VERDICTS = {True: "holds", False: "**DOES NOT HOLD**", None: "not made"}


def _number(value: float | None, digits: int = 0, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''},.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _answers(figures: CallFigures) -> str:
    return ", ".join(f"{_CODES.get(code, f'code {code}')} {count:,}" for code, count in sorted(figures.codes.items()))


def headline(findings: Findings) -> str:
    """Return how many checks hold, and what no check could be made of."""
    checks = findings.checks
    holding, made = sum(check.holds is True for check in checks), sum(check.holds is not None for check in checks)
    left_out = [f"{each.name} ({each.note})" for each in findings.phases if each.watts is None]
    if findings.torch and findings.overhead.slowdown_percent is None:
        left_out.append("the agent's effect on the load")
    if not left_out:
        return f"{holding} of {len(checks)} checks hold"
    return f"{made} of {len(checks)} checks made, {holding} hold; not measured: {', '.join(left_out)}"


def page_text(findings: Findings, picture: str, day: str) -> str:
    """Return the page in Markdown."""
    phases = _table(
        (
            "phase", "s", "W, agent", "W, integrated", "difference", "SM MHz, agent", "SM MHz, observer",
            "at power cap, counter", "at power cap, bit", "tokens/s", "J/token, agent", "J/token, integrated",
            "computes prompts",
        ),
        (
            (
                each.name,
                _number(each.seconds),
                _number(each.watts, 1),
                _number(each.independent_watts, 1),
                "-" if each.energy_error_percent is None else f"{each.energy_error_percent:+.2f} %",
                _number(each.sm_mhz),
                _number(each.independent_sm_mhz),
                "-" if each.power_cap_percent is None else f"{each.power_cap_percent:.1f} %",
                "-" if each.independent_power_cap_percent is None else f"{each.independent_power_cap_percent:.1f} %",
                _number(each.tokens_per_second),
                _number(each.joules_per_token, 4),
                _number(each.independent_joules_per_token, 4),
                {None: "-", True: "yes", False: "no"}[each.computes_prompts] + (f" ({each.note})" if each.note else ""),
            )
            for each in findings.phases
        ),
    )  # fmt: skip
    calls = _table(
        ("NVML function", "calls", "supported", "answers", "median us", "p95 us", "max us"),
        (
            (
                f"`{each.name}`",
                f"{each.count:,}",
                "yes" if each.supported else "**no**",
                _answers(each),
                _number(each.median_us, 1),
                _number(each.p95_us, 1),
                _number(each.max_us, 1),
            )
            for each in findings.calls
        ),
    )
    fields = _table(
        ("field of nvmlDeviceGetFieldValues", "reads", "supported", "answers"),
        (
            (
                f"{each.name}: {_FIELDS.get(int(each.name), 'see nvml.h')}",
                f"{each.count:,}",
                "yes" if each.supported else "**no**",
                _answers(each),
            )
            for each in findings.fields
        ),
    )
    overhead, checks = findings.overhead, findings.checks
    effect = "Its effect on a load was not measured."
    if overhead.slowdown_percent is not None and overhead.slowdown_ci is not None:
        low, high = overhead.slowdown_ci
        effect = (
            f"Decode ran {overhead.slowdown_percent:+.3f} % slower while the agent ran than while it stood still "
            f"(95 % interval {low:+.3f} to {high:+.3f}, {overhead.pairs} pairs of turns in alternating order)."
        )
    missing = (
        f"\n\nFunctions that this library does not have: {', '.join(findings.missing)}." if findings.missing else ""
    )
    load = f"PyTorch {findings.torch}" if findings.torch else "no load: no PyTorch here"
    memory = f"{overhead.anonymous_mib:.0f} MiB of memory of its own and {overhead.file_mib:.0f} MiB of libraries"
    return f"""# {findings.product}, driver {findings.versions["driver"]}

Written by `make test-hardware` on {day} ({headline(findings)}). The agent ran as it is, in Observe mode, without any
capability and with an NVML that refuses every function but reads. NVML {findings.versions["nvml"]}, enforced power
limit {findings.limit_watts:.0f} W, {load}.

![power and clock over time]({picture})

## Checks

{chr(10).join(f"- {_VERDICTS[check.holds]}: {check.text}" for check in checks)}

## Phases

"Agent" is what the agent published: the hardware's energy counter read once a second. "Integrated" is another process
that read the instantaneous power every 20 ms and integrated it by trapezoids over the same time; it also read the
bit of the clock event reasons that tells of the power cap, while the agent reads the driver's nanosecond counter of it.

{phases}

## What the agent costs

{overhead.cpu_percent:.2f} % of a core, {memory} in memory (the driver's among them), {overhead.pass_ms:.1f} ms for a
pass of its loop (one a second). {effect}

## NVML calls of the agent

{calls}

{fields}{missing}
"""


def _line(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the coordinates of a line that is broken where nothing was measured."""
    times: list[float] = []
    values: list[float] = []
    for at, value in points:
        if times and at - times[-1] > _GAP_SECONDS:
            times.append(at)
            values.append(math.nan)
        times.append(at)
        values.append(value)
    return times, values


def _picture(findings: Findings, path: Path) -> None:
    figure, (power, clock) = plt.subplots(
        2, 1, figsize=(11, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for n, (name, began, ended) in enumerate(findings.spans):
        if ended - began < 1:
            continue
        for axes in (power, clock):
            axes.axvspan(began, ended, color="#4477aa" if n % 2 else "#aaaaaa", alpha=0.12, lw=0)
        power.text(
            (began + ended) / 2,
            1.02 + 0.05 * (n % 2),
            name,
            transform=power.get_xaxis_transform(),
            ha="center",
            fontsize=8,
        )
    power.plot(*_line(findings.series["integrated"][::5]), lw=0.5, color="#bbbbbb", label="instantaneous, every 0.1 s")
    power.plot(*_line(findings.series["agent"]), lw=1.4, color="#4477aa", label="agent, energy counter")
    power.axhline(findings.limit_watts, color="#cc3311", lw=0.9, ls="--", label="power limit")
    power.set_ylabel("GPU board, watts")
    power.set_ylim(bottom=0)
    power.legend(loc="lower right", fontsize=8, framealpha=0.9)
    clock.plot(*_line(findings.series["sm"][::5]), lw=0.8, color="#228833")
    clock.set_ylabel("SM clock, MHz")
    clock.set_xlabel("seconds")
    clock.set_ylim(bottom=0)
    for axes in (power, clock):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(findings: Findings, directory: Path) -> Path:
    """Write PRODUCT-driver-VERSION.{md,png,json} into the directory; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    day = datetime.now(UTC).date().isoformat()
    name = re.sub(r"[^a-z0-9.]+", "-", f"{findings.product} driver {findings.versions['driver']}".lower()).strip("-")
    _picture(findings, directory / f"{name}.png")
    (directory / f"{name}.json").write_text(
        json.dumps({"date": day} | asdict(replace(findings, series={})), indent=1) + "\n", encoding="utf-8"
    )
    page = directory / f"{name}.md"
    page.write_text(page_text(findings, f"{name}.png", day), encoding="utf-8")
    return page
