"""The pages of a sweep: tables in Markdown, a CSV of the points, and the ClockProfile. Pure."""

import math
from collections.abc import Mapping, Sequence

import yaml
from wattlock_api.base import decimal_string
from wattlock_api.clockprofile import ClockProfileSpec, Evidence, ProfileRow
from wattlock_api.constants import API_VERSION, Architecture

from wattlock_agent.sweep.estimates import Change, Row
from wattlock_agent.sweep.findings import (
    Choice,
    choose,
    crossings,
    elasticity,
    front,
    request_joules,
    verdict,
)
from wattlock_agent.sweep.plan import STOCK, Lever, Shape, Workload
from wattlock_agent.sweep.record import Run, csv_line

_POINT_COLUMNS = (
    *("shape", "concurrency", "length_tokens", "output_tokens", "lever", "value", "windows", "watts"),
    *("tokens_per_second", "joules_per_token", "observed_mhz", "cap_share", "energy_percent", "energy_low_percent"),
    *("energy_high_percent", "throughput_percent", "throughput_low_percent", "throughput_high_percent", "pareto"),
)


def _by_workload(rows: Sequence[Row]) -> dict[Workload, list[Row]]:
    grouped: dict[Workload, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.workload, []).append(row)
    order = {Lever.STOCK: 0, Lever.CLOCK: 1, Lever.POWER: 2}
    for own in grouped.values():
        own.sort(key=lambda row: (order[row.setting.lever], -row.setting.value))
    return grouped


def points_csv(rows: Sequence[Row]) -> str:
    """Return one line for each point and workload."""
    lines = [csv_line(_POINT_COLUMNS)]
    for workload, own in _by_workload(rows).items():
        best = front(own)
        lines += [_point(workload, row, row in best) for row in own]
    return "".join(lines)


def _point(workload: Workload, row: Row, is_best: bool) -> str:
    return csv_line(
        [
            *(workload.shape, workload.concurrency, workload.length_tokens, workload.output_tokens),
            *(row.setting.lever, row.setting.value, row.windows),
            *(_plain(row.watts), _plain(row.tokens_per_second), _plain(row.joules_per_token)),
            *(_plain(row.observed_mhz), _plain(row.cap_share), *_ends(row.energy), *_ends(row.throughput)),
            int(is_best),
        ]
    )


def page(run: Run, rows: Sequence[Row], max_loss_percent: float) -> str:
    """Return the report of one run."""
    parts = [_head(run)]
    grouped = _by_workload(rows)
    for shape, title in ((Shape.DECODE, "Decode"), (Shape.PREFILL, "Prefill")):
        own = {workload: found for workload, found in grouped.items() if workload.shape is shape}
        if own:
            parts.append(f"## {title}\n\n{_points(own)}")
    parts += [_classes(grouped), _lengths({run.label: rows}), _profile_text(rows, max_loss_percent)]
    return "\n".join(part for part in parts if part)


def comparison(runs: Sequence[tuple[Run, Sequence[Row]]]) -> str:
    """Return the page that puts several runs beside each other; labels must differ."""
    products = sorted({run.product for run, _ in runs})
    by_label = {run.label: rows for run, rows in runs}
    head = f"# Energy by request length\n\n{len(runs)} runs on {', '.join(products)}, all at stock clocks and limits.\n"
    if len(products) > 1:
        head += "\n**Different GPUs: differences are not those of the architectures alone.**\n"
    answers = sorted({work.output_tokens for rows in by_label.values() for work in _decode(rows)})
    if len(answers) > 1:
        head += (
            f"\n**Answers of {', '.join(map(str, answers))} tokens: only runs with the same --output-tokens can be "
            "compared by generated tokens and requests, and have cross-over points.**\n"
        )
    return head + "\n" + _lengths(by_label)


def _decode(rows: Sequence[Row]) -> set[Workload]:
    return {row.workload for row in rows if row.workload.shape is Shape.DECODE}


def profile(run: Run, choice: Choice) -> str:
    """Return the ClockProfile as YAML, valid by the API's own model."""
    row = ProfileRow(
        product=run.product,
        phase="Decode",
        architecture=Architecture(run.architecture) if run.architecture else None,
        max_sm_clock_mhz=choice.cap_mhz,
        expected_saving_percent=decimal_string(choice.saving_percent, 1),
        expected_throughput_change_percent=decimal_string(choice.throughput_percent, 2),
        evidence=Evidence(
            kind="Measured",
            source=f"wattlock-agent sweep, model {run.model}"[:512],
            date=run.date,
            driver_version=run.driver_version[:64],
            samples=choice.pairs,
        ),
    )
    document = {
        "apiVersion": API_VERSION,
        "kind": "ClockProfile",
        "metadata": {"name": "measured"},
        "spec": ClockProfileSpec(rows=[row]).to_api(),
    }
    return str(yaml.safe_dump(document, sort_keys=False))


def _head(run: Run) -> str:
    limit = "unknown" if run.limit_watts is None else f"{run.limit_watts:g} W"
    return (
        f"# Sweep: {run.label}\n\n"
        f"{run.gpus} x {run.product}, driver {run.driver_version}, power limit {limit} each, model {run.model}, "
        f"{run.date}. Load by {run.client}, tokens counted by {run.tokens_from}. Each point {run.repeats} times for "
        f"{run.window_seconds:g} s after {run.settle_seconds:g} s, in an order drawn from the seed `{run.seed}`, "
        "stock before and after. Energy is that of the GPU boards.\n"
    )


def _points(grouped: Mapping[Workload, Sequence[Row]]) -> str:
    lines = [
        "| load | point | SM MHz | at limit | W | tokens/s | mJ/token | energy | throughput | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for workload, rows in grouped.items():
        best = front(rows)
        for row in rows:
            share = "-" if row.cap_share is None else f"{100 * row.cap_share:.0f} %"
            cells = [
                f"{workload.concurrency} x {workload.length_tokens}",
                str(row.setting),
                "-" if row.observed_mhz is None else f"{row.observed_mhz:.0f}",
                f"{share} {verdict(row)}" if row.setting.lever is not Lever.CLOCK else share,
                f"{row.watts:.0f}",
                f"{row.tokens_per_second:,.0f}",
                f"{1000 * row.joules_per_token:.1f}",
                _change(row.energy),
                _change(row.throughput),
                "Pareto" if row in best else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _classes(grouped: Mapping[Workload, Sequence[Row]]) -> str:
    lines = ["| load | elasticity | class |", "| --- | --- | --- |"]
    for workload, rows in grouped.items():
        found = elasticity(rows)
        text = "- | too few clocks" if found is None else f"{found.slope:.3f} | {found.behaviour}"
        lines.append(f"| {workload} | {text} |")
    return "## How throughput answers to the clock\n\n" + "\n".join(lines) + "\n"


def _lengths(by_label: Mapping[str, Sequence[Row]]) -> str:
    """Energy by length at stock: a prompt token, a generated token, and a whole request; then where lines cross."""
    stock = {
        (label, row.workload): row.joules_per_token
        for label, rows in by_label.items()
        for row in rows
        if row.setting == STOCK
    }
    requests = {label: request_joules(rows) for label, rows in by_label.items()}
    places = sorted({(work.concurrency, work.length_tokens) for _, work in stock})
    lines = [
        "| prompt tokens | at a time | run | mJ/prompt token | mJ/generated token | J/request |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for concurrency, length in places:
        for label in by_label:
            here = {
                work: joules
                for (name, work), joules in stock.items()
                if name == label and (work.concurrency, work.length_tokens) == (concurrency, length)
            }
            if not here:
                continue
            own = {work.shape: joules for work, joules in here.items()}
            whole = next((joules for work, joules in requests[label].items() if work in here), None)
            cells = [
                f"{length:,}",
                str(concurrency),
                label,
                f"{1000 * own[Shape.PREFILL]:.2f}" if Shape.PREFILL in own else "-",
                f"{1000 * own[Shape.DECODE]:.1f}" if Shape.DECODE in own else "-",
                "-" if whole is None else f"{whole:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    text = "## Energy by request length\n\n" if len(by_label) == 1 else ""
    return text + "\n".join(lines) + "\n" + (_crossing_text(by_label, stock, requests) if len(by_label) > 1 else "")


def _crossing_text(
    labels: Mapping[str, object],
    stock: Mapping[tuple[str, Workload], float],
    requests: Mapping[str, Mapping[Workload, float]],
) -> str:
    lines = []
    decode = {
        label: {work: joules for (name, work), joules in stock.items() if name == label and work.shape is Shape.DECODE}
        for label in labels
    }
    # A generated token too is one of another request where answers are longer: it comes after more context.
    for concurrency, answer in sorted(
        {(work.concurrency, work.output_tokens) for own in decode.values() for work in own}
    ):
        for kind, energies in (("a generated token", decode), ("a whole request", requests)):
            joules = {
                label: {
                    work.length_tokens: each
                    for work, each in energies[label].items()
                    if (work.concurrency, work.output_tokens) == (concurrency, answer)
                }
                for label in labels
            }
            lines += [
                f"- {kind}, {concurrency} at a time: {cross.shorter} takes less up to about "
                f"{_two_digits(cross.length_tokens):,} prompt tokens, {cross.longer} from there on"
                for cross in crossings(joules)
            ]
    if not lines:
        lines = ["- none between the lengths that were measured"]
    return "\nCross-over points, interpolated between measured lengths:\n\n" + "\n".join(lines) + "\n"


def _profile_text(rows: Sequence[Row], max_loss_percent: float) -> str:
    choice = choose(rows, max_loss_percent)
    if choice is None:
        return (
            "## Cap\n\nNone: no clock saves energy in every decode load measured with a loss surely below "
            f"{max_loss_percent:g} %. More repeats narrow the intervals.\n"
        )
    return (
        f"## Cap\n\n**{choice.cap_mhz} MHz** saves {choice.saving_percent:.1f} % of energy per token in the decode "
        "load in which it saves least, and changes throughput by "
        f"{choice.throughput_percent:+.2f} % where it loses most. The profile is in `profile.yaml`. It is the best of "
        "several clocks, so expect a little less; the policy's own experiment will tell.\n"
    )


def _change(found: Change | None) -> str:
    if found is None:
        return ""
    if math.isinf(found.low_percent):
        return f"{found.percent:+.1f} %"
    return f"{found.percent:+.1f} % ({found.low_percent:+.1f} to {found.high_percent:+.1f})"


def _two_digits(value: float) -> int:
    scale = 10 ** (math.floor(math.log10(value)) - 1) if value >= 10 else 1
    return int(round(value / scale) * scale)


def _plain(value: float | None) -> str:
    return "" if value is None or math.isinf(value) else f"{value:.6g}"


def _ends(found: Change | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    return _plain(found.percent), _plain(found.low_percent), _plain(found.high_percent)
