"""Fits the physics to the recorded phases and writes ``fitted.py``.

Run ``python -m wattlock_simulator.fit tests/data`` to print the fit beside the readings, and with ``--write`` to
replace the constants. Least squares in plain Python: a dozen rows need no numerical library.

Decode, at 1980 MHz: ``seconds = fixed + per_sequence * batch + per_cached_token * batch * context`` by relative
least squares with no negative coefficient. ``watts = fixed + stream * u ** q + joules_per_token * tokens_per_second``,
with ``u`` the share of the step that is not the fixed part; ``q`` is common to all rows and ``joules_per_token`` to a
product. Rows that met the power limit are first taken to 1980 MHz with ``physics.relative_watts``.
Prefill: cycles per token, linear in the prompt length, from the two lengths recorded; watts likewise at 1980 MHz.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from wattlock_simulator import physics
from wattlock_simulator.curves import DecodeCurve, PrefillCurve
from wattlock_simulator.physics import Architecture, Phase, Product, Workload

_NAMES = {
    "gqa": Architecture.GQA,
    "mla": Architecture.MLA,
    "gdn": Architecture.GATED_DELTA_NET,
    "mamba2": Architecture.MAMBA2,
}


@dataclass(frozen=True)
class Row:
    """One recorded phase: what ran, how long a step took (s), the board power (W) and the mean SM clock (MHz)."""

    product: Product
    workload: Workload
    step_seconds: float
    watts: float
    clock_mhz: float

    @property
    def full_watts(self) -> float:
        """Board power in W taken to 1980 MHz."""
        return self.watts / physics.relative_watts(self.workload, self.clock_mhz)


def load_rows(directory: Path) -> tuple[Row, ...]:
    """Decode (CUDA graph) and prefill rows of both products.

    Args:
        directory: holds ``nvidia-h200-phases.json`` and ``nvidia-h100-phases.json``.

    Raises:
        OSError: a file is missing.
    """
    rows = []
    for product in Product:
        text = (directory / f"nvidia-{product.value.lower()}-phases.json").read_text()
        for entry in json.loads(text):
            if entry.get("phase") not in ("decode", "prefill"):
                continue  # idle rows, and eager decode, whose launch gaps are not modelled
            phase = Phase(entry["phase"])
            prefill = phase is Phase.PREFILL
            batch, context = (1, entry["tokens"]) if prefill else (entry["B"], entry["L"])
            workload = Workload(_NAMES[entry["arch"]], phase, batch, context)
            rows.append(Row(product, workload, entry["ms_step"] / 1000.0, entry["W_avg"], entry["sm"]))
    return tuple(rows)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with pivoting; raises ZeroDivisionError when singular."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(rows[r][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for other in range(column + 1, size):
            factor = rows[other][column] / rows[column][column]
            rows[other] = [a - factor * b for a, b in zip(rows[other], rows[column], strict=True)]
    result = [0.0] * size
    for index in reversed(range(size)):
        known = sum(rows[index][k] * result[k] for k in range(index + 1, size))
        result[index] = (rows[index][size] - known) / rows[index][index]
    return result


def nonnegative_fit(features: Sequence[Sequence[float]], targets: Sequence[float]) -> tuple[list[float], float]:
    """Relative least squares with no negative coefficient, by trying every set of active columns.

    Returns:
        The coefficients and the sum of squared relative errors.
    """
    count = len(features[0])
    scaled = [[value / target for value in line] for line, target in zip(features, targets, strict=True)]
    best: tuple[list[float], float] = ([0.0] * count, float(len(targets)))
    for size in range(1, count + 1):
        for columns in combinations(range(count), size):
            normal = [[sum(line[a] * line[b] for line in scaled) for b in columns] for a in columns]
            try:
                solution = _solve(normal, [sum(line[a] for line in scaled) for a in columns])
            except ZeroDivisionError:
                continue
            if min(solution) < 0:
                continue
            full = [0.0] * count
            for column, value in zip(columns, solution, strict=True):
                full[column] = value
            error = sum((sum(c * v for c, v in zip(full, line, strict=True)) - 1.0) ** 2 for line in scaled)
            if error < best[1] - 1e-12:
                best = (full, error)
    return best


def _decode_times(rows: Sequence[Row]) -> list[float]:
    features = [[1.0, r.workload.batch, r.workload.batch * r.workload.context] for r in rows]
    return nonnegative_fit(features, [r.step_seconds for r in rows])[0]


def _decode_powers(
    rows: Sequence[Row], times: Sequence[float], joules_per_token: float, exponent: float
) -> tuple[list[float], float]:
    plain = DecodeCurve(times[0], times[1], times[2], 0.0, 0.0)
    features, targets = [], []
    for row in rows:
        seconds = plain.seconds(row.workload.batch, row.workload.context)
        features.append([1.0, (1.0 - times[0] / seconds) ** exponent])
        targets.append(row.full_watts - joules_per_token * row.workload.batch / seconds)
    return nonnegative_fit(features, targets)


@dataclass(frozen=True)
class Fit:
    """All fitted constants."""

    decode: dict[tuple[Product, Architecture], DecodeCurve]
    prefill: dict[tuple[Product, Architecture], PrefillCurve]
    joules_per_token: dict[Product, float]
    stream_exponent: float


def fit(rows: Sequence[Row]) -> Fit:
    """Fits every curve; grid search over the two shared constants, least squares for the rest."""

    def of(product: Product, architecture: Architecture, phase: Phase) -> list[Row]:
        wanted = (product, architecture, phase)
        return [r for r in rows if (r.product, r.workload.architecture, r.workload.phase) == wanted]

    times = {(p, a): _decode_times(of(p, a, Phase.DECODE)) for p in Product for a in Architecture}

    def error(product: Product, joules: float, exponent: float) -> float:
        return sum(
            _decode_powers(of(product, a, Phase.DECODE), times[product, a], joules, exponent)[1] for a in Architecture
        )

    joules_grid = [k * 0.0005 for k in range(41)]
    exponent_grid = [1.0 + k * 0.05 for k in range(21)]
    totals = {
        exponent: sum(min(error(p, joules, exponent) for joules in joules_grid) for p in Product)
        for exponent in exponent_grid
    }
    exponent = min(totals, key=lambda key: totals[key])
    joules = {p: min(joules_grid, key=lambda j, p=p: error(p, j, exponent)) for p in Product}  # type: ignore[misc]
    decode, prefill = {}, {}
    for key, (fixed, sequence, cached) in times.items():
        watts = _decode_powers(of(*key, Phase.DECODE), times[key], joules[key[0]], exponent)[0]
        decode[key] = DecodeCurve(fixed, sequence, cached, watts[0], watts[1])
        two = of(*key, Phase.PREFILL)
        cycles = [r.step_seconds * r.clock_mhz * 1e6 / r.workload.context for r in two]
        coefficients = nonnegative_fit([[1.0, r.workload.context] for r in two], cycles)[0]
        prefill[key] = PrefillCurve(coefficients[0], coefficients[1], sum(r.full_watts for r in two) / len(two))
    return Fit(decode, prefill, joules, exponent)


def render(result: Fit) -> str:
    """Source text of ``fitted.py``."""
    lines = [
        '"""Constants of the physics, fitted to the recordings. Written by ``python -m wattlock_simulator.fit``."""',
        "",
        "from __future__ import annotations",
        "",
        "from wattlock_simulator.curves import DecodeCurve, PrefillCurve",
        "",
        f"STREAM_EXPONENT = {result.stream_exponent:.4g}",
        '"""How power rises with the share of a decode step that streams state or cache."""',
        "",
        "JOULES_PER_TOKEN: dict[str, float] = {",
        *(f'    "{product}": {value:.4g},' for product, value in result.joules_per_token.items()),
        "}",
        '"""Energy of the arithmetic of one generated token, in J, by product."""',
        "",
        "DECODE: dict[tuple[str, str], DecodeCurve] = {",
    ]
    for (product, architecture), d in result.decode.items():
        values = ", ".join(
            f"{v:.5g}" for v in (d.fixed_seconds, d.sequence_seconds, d.cache_seconds, d.fixed_watts, d.stream_watts)
        )
        lines.append(f'    ("{product}", "{architecture}"): DecodeCurve({values}),')
    lines += ["}", '"""By product and architecture."""', "", "PREFILL: dict[tuple[str, str], PrefillCurve] = {"]
    for (product, architecture), c in result.prefill.items():
        values = ", ".join(f"{v:.5g}" for v in (c.cycles_per_token, c.cycles_per_token_and_token, c.watts))
        lines.append(f'    ("{product}", "{architecture}"): PrefillCurve({values}),')
    return "\n".join([*lines, "}", '"""By product and architecture."""', ""])


def table(rows: Sequence[Row]) -> str:
    """Readings beside the model (as committed), one line per row, with relative errors in percent."""
    lines = [f"{'row':40} {'W':>6} {'model':>6} {'err%':>6} {'ms':>8} {'model':>8} {'err%':>6} {'MHz':>5} {'model':>5}"]
    for row in rows:
        point = physics.operating_point(row.product, row.workload)
        w = row.workload
        name = f"{row.product} {w.architecture} {w.phase} {w.batch:g} x {w.context:g}"
        lines.append(
            f"{name:40} {row.watts:6.0f} {point.watts:6.0f} {100 * (point.watts / row.watts - 1):6.1f} "
            f"{row.step_seconds * 1e3:8.2f} {point.step_seconds * 1e3:8.2f} "
            f"{100 * (point.step_seconds / row.step_seconds - 1):6.1f} {row.clock_mhz:5.0f} {point.clock_mhz:5d}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the fit; with ``--write`` replaces ``fitted.py``."""
    parser = argparse.ArgumentParser(prog="wattlock_simulator.fit", description=main.__doc__)
    parser.add_argument("data", type=Path, help="directory with nvidia-*-phases.json")
    parser.add_argument("--write", action="store_true", help="replace fitted.py")
    options = parser.parse_args(arguments)
    rows = load_rows(options.data)
    if options.write:
        Path(__file__).with_name("fitted.py").write_text(render(fit(rows)))
        sys.stdout.write("fitted.py written; run again without --write to see the fit\n")
        return 0
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
