"""Which row of a ClockProfile is for a pool. Total and pure; the order is told in docs/profiles.md."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from wattlock_api.clockprofile import (
    MAX_BATCH,
    MAX_LATENCY_MS,
    MIN_BATCH,
    MIN_LATENCY_MS,
    ClockProfileSpec,
    ProfileRegime,
    ProfileRow,
)
from wattlock_api.constants import Architecture
from wattlock_api.energypolicy import Pool
from wattlock_api.policystatus import MAX_PRODUCT_CAPS, ProfileRowInUse

from wattlock_operator.tuning.model import Regime


@dataclass(frozen=True)
class FoundRow:
    """A row and its place in the profile."""

    row: ProfileRow
    place: int
    """From 1."""


def holds(bounds: ProfileRegime | None, regime: Regime | None) -> bool:
    """Return whether a row with these bounds is for this work; one without bounds is for any, known or not."""
    if bounds is None:
        return True
    if regime is None:
        return False
    latency_ms = 1000 * regime.latency_seconds
    return (
        (bounds.min_batch is None or regime.batch >= bounds.min_batch)
        and (bounds.max_batch is None or regime.batch <= bounds.max_batch)
        and (bounds.min_inter_token_latency_ms is None or latency_ms >= bounds.min_inter_token_latency_ms)
        and (bounds.max_inter_token_latency_ms is None or latency_ms <= bounds.max_inter_token_latency_ms)
    )


def width(bounds: ProfileRegime | None) -> float:
    """Return how much work a regime holds: the logarithm of the factors between its bounds.

    An absent bound counts as the widest that may be written. A regime within another is never wider.
    """
    bounds = bounds or ProfileRegime()
    batches = (bounds.max_batch or MAX_BATCH) / (bounds.min_batch or MIN_BATCH)
    latencies = (bounds.max_inter_token_latency_ms or MAX_LATENCY_MS) / (
        bounds.min_inter_token_latency_ms or MIN_LATENCY_MS
    )
    return math.log(batches) + math.log(latencies)


def rank(row: ProfileRow) -> tuple[bool, bool, bool, float]:
    """Return the key by which the first of several rows is used; of equals the first in the list."""
    measured = row.evidence.kind == "Measured"
    # To nine digits: the same band elsewhere must not win by how floating point rounds.
    return row.architecture is None, row.regime is None, not measured, round(width(row.regime), 9)


def _of_product(profile: ClockProfileSpec, product: str, architecture: Architecture | None) -> list[FoundRow]:
    return [
        FoundRow(row, place)
        for place, row in enumerate(profile.rows, 1)
        if row.product == product and row.phase == "Decode" and row.architecture in (None, architecture)
    ]


def find_row(
    profile: ClockProfileSpec, product: str, architecture: Architecture | None, regime: Regime | None = None
) -> FoundRow | None:
    """Return the row for decoding on a product.

    One that names the architecture before one that does not, then one with a regime, then a measured one, then the
    narrower regime, then the first in the list. ``regime``: the pool's work; ``None``: not known, so only rows without
    a regime are for it.
    """
    rows = [found for found in _of_product(profile, product, architecture) if holds(found.row.regime, regime)]
    return min(rows, key=lambda found: rank(found.row), default=None)


def rows_in_use(
    profile: ClockProfileSpec, products: Iterable[str], architecture: Architecture | None, regime: Regime | None
) -> list[ProfileRowInUse]:
    """Return the rows of a pool by product, for status."""
    found = {product: find_row(profile, product, architecture, regime) for product in sorted(products)}
    return [
        ProfileRowInUse(product=product, row=each.place, cap_mhz=each.row.max_sm_clock_mhz)
        for product, each in found.items()
        if each is not None
    ][:MAX_PRODUCT_CAPS]


def regime_text(bounds: ProfileRegime) -> str:
    """Return a regime for people: ``batch 16 to 64, at most 20 ms between tokens``."""

    def span(low: float | None, high: float | None, unit: str) -> str:
        if low is not None and high is not None:
            return f"{low:g} to {high:g}{unit}"
        return f"at least {low:g}{unit}" if low is not None else f"at most {high:g}{unit}"

    parts = []
    if bounds.min_batch is not None or bounds.max_batch is not None:
        parts.append("batch " + span(bounds.min_batch, bounds.max_batch, ""))
    low_ms, high_ms = bounds.min_inter_token_latency_ms, bounds.max_inter_token_latency_ms
    if low_ms is not None or high_ms is not None:
        parts.append(span(low_ms, high_ms, " ms") + " between tokens")
    return ", ".join(parts)


def why_no_row(profile: ClockProfileSpec, product: str, pool: Pool, regime: Regime | None) -> str:
    """Return why a profile has no row for a pool and what to do, to follow its name.

    No number in it is measured anew with every report.
    """
    kind = f"{product} with architecture {pool.architecture}" if pool.architecture else product
    others = [found.row.regime for found in _of_product(profile, product, pool.architecture)]
    remedy = (
        f"let it be found by clock.tune in pool {pool.name}, or measure one and write it as clock.maxSMClockMHz, or as "
        "a row of a ClockProfile of your own"
    )
    if not others:
        return f"has no row for {kind}, and a cap is never guessed: {remedy}"
    said = "; ".join(regime_text(each) for each in others[:4] if each is not None) + ("; ..." if others[4:] else "")
    if regime is None:
        return (
            f"has only rows with a regime for {kind} ({said}), and what the pool does is not known: wait a minute, or "
            "see that its pods serve metrics (metrics.port), or add a row without regime"
        )
    return (
        f"has no row for {kind} at batch {regime.batch:.0f} and {1000 * regime.latency_seconds:.1f} ms between tokens, "
        f"only for {said}. A cap is never guessed: {remedy}"
    )
