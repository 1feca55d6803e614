"""A tuner's result as a row of a ClockProfile. Pure: from status to text, or to a sentence why there is none.

The row says no more than the search has shown: for one product and architecture, and for the work under which it
searched, within the factors from which on the tuner itself would search anew.
"""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError
from wattlock_api.clockprofile import (
    MAX_BATCH,
    MAX_LATENCY_MS,
    MIN_BATCH,
    MIN_LATENCY_MS,
    ClockProfileSpec,
    Evidence,
    ProfileRegime,
    ProfileRow,
)
from wattlock_api.constants import API_VERSION
from wattlock_api.energypolicy import Pool
from wattlock_api.policystatus import PoolStatus
from wattlock_api.tuningstatus import TuningRegime, TuningStatus

from wattlock_operator.reports import number
from wattlock_operator.rows import holds, width
from wattlock_operator.tuning.model import Regime
from wattlock_operator.tuning.regime import BATCH_FACTOR, LATENCY_FACTOR
from wattlock_operator.world import PolicyView

#: Rows of a profile, by its schema.
MAX_ROWS = 128
#: Two regimes whose widths differ by less are as wide: bounds are rounded to three digits.
_AS_WIDE = 0.05
#: kubectl's own; it would be written into itself.
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


class NoRowError(Exception):
    """There is nothing to be written. The message says why and what to do."""


def tuned_row(policy: PolicyView, pool_name: str = "") -> ProfileRow:
    """Return what a pool's tuner found as a row. ``pool_name``: empty where the policy has one pool with a tuner.

    Raises:
        NoRowError: it has found nothing (yet), or the status does not say all that a row needs.
    """
    pool = _pool(policy, pool_name)
    where = f"pool {pool.name} of policy {policy.title}"
    told = next((each for each in policy.status.pools if each.name == pool.name), None) if policy.status else None
    tuning = _settled(policy, told, where)
    arm = next((each for each in tuning.tried if each.cap_mhz == tuning.cap_mhz), None)
    if arm is None or tuning.cap_mhz is None or tuning.regime is None or tuning.since is None or arm.sums.pairs < 1:
        raise NoRowError(f"the status of {where} does not say how its clock was found: wait for the next search")
    product, driver = _hardware(tuning.regime, where)
    return ProfileRow(
        product=product,
        phase="Decode",
        architecture=pool.architecture,
        regime=_band(tuning.regime),
        max_sm_clock_mhz=tuning.cap_mhz,
        expected_saving_percent=arm.energy_percent,
        expected_throughput_change_percent=arm.throughput_change_percent,
        evidence=Evidence(
            kind="Measured",
            source=f"clock.tune, {where}"[:512],
            date=tuning.since,
            driver_version=driver,
            samples=arm.sums.pairs,
        ),
    )


def _pool(policy: PolicyView, name: str) -> Pool:
    if policy.spec is None:
        raise NoRowError(f"policy {policy.title} is not understood ({policy.problem}): upgrade the operator")
    tuned = [pool for pool in policy.spec.pools if pool.clock is not None and pool.clock.tune is not None]
    names = ", ".join(pool.name for pool in tuned) or "none"
    if name:
        found = next((pool for pool in tuned if pool.name == name), None)
        if found is None:
            raise NoRowError(f"policy {policy.title} has no pool {name} with clock.tune (there are: {names})")
        return found
    if not tuned:
        raise NoRowError(f"no pool of policy {policy.title} has a tuner: write clock: {{tune: {{}}}} and let it search")
    if len(tuned) > 1:
        raise NoRowError(f"policy {policy.title} has several pools with a tuner: choose one by --pool ({names})")
    return tuned[0]


def _settled(policy: PolicyView, pool: PoolStatus | None, where: str) -> TuningStatus:
    tuning = pool.tuning if pool is not None else None
    if tuning is None:
        hint = "set spec.mode to Enforce: it searches by experiments on the GPUs"
        if policy.spec is not None and policy.spec.mode == "Enforce":
            hint = "wait a minute, and look at the operator's log if it does not begin"
        raise NoRowError(f"the tuner of {where} has not begun: {hint}")
    match tuning.phase:
        case "Settled":
            return tuning
        case "Released":
            raise NoRowError(f"no clock pays in {where}, so there is nothing to write: {tuning.message}")
        case "Starting":
            raise NoRowError(f"the tuner of {where} is about to search: {tuning.message}. Come back when it is done")
    raise NoRowError(f"the tuner of {where} still searches: {tuning.message}. Come back when it is done")


def _hardware(regime: TuningRegime, where: str) -> tuple[str, str]:
    """Return the product and the driver version that the result is about."""
    if len(regime.products) > 1:
        raise NoRowError(
            f"the GPUs of {where} are of several products ({', '.join(regime.products)}): a cap that was found on all "
            "together is no evidence for any of them. Let a pool with one product find its own"
        )
    if not regime.products or not regime.driver_versions:
        raise NoRowError(
            f"the status of {where} does not tell product and driver of its GPUs: wait for a report of their agents"
        )
    return regime.products[0], ", ".join(regime.driver_versions)[:64]


def _rounded(value: float, low: float, high: float) -> float:
    return float(f"{min(high, max(low, value)):.3g}")


def _band(regime: TuningRegime) -> ProfileRegime:
    batch, latency_ms = number(regime.batch), number(regime.inter_token_latency_ms)
    return ProfileRegime(
        min_batch=_rounded(batch / BATCH_FACTOR, MIN_BATCH, MAX_BATCH),
        max_batch=_rounded(batch * BATCH_FACTOR, MIN_BATCH, MAX_BATCH),
        min_inter_token_latency_ms=_rounded(latency_ms / LATENCY_FACTOR, MIN_LATENCY_MS, MAX_LATENCY_MS),
        max_inter_token_latency_ms=_rounded(latency_ms * LATENCY_FACTOR, MIN_LATENCY_MS, MAX_LATENCY_MS),
    )


def _replaces(new: ProfileRow, old: ProfileRow) -> bool:
    """Return whether a row is about the same as a new one, by a measurement of before.

    It holds for the work that the new one was measured under, and for no more than that one: a wider row stays, and so
    do published ones, and those for any work. The new one goes before them.
    """
    if old.regime is None or new.regime is None or old.evidence.kind != "Measured":
        return False
    same = (old.product, old.phase, old.architecture) == (new.product, new.phase, new.architecture)
    return same and holds(old.regime, _middle(new.regime)) and width(old.regime) <= width(new.regime) + _AS_WIDE


def _middle(bounds: ProfileRegime) -> Regime:
    """Return the work in the middle of a band."""
    batch = ((bounds.min_batch or MIN_BATCH) * (bounds.max_batch or MAX_BATCH)) ** 0.5
    low_ms = bounds.min_inter_token_latency_ms or MIN_LATENCY_MS
    high_ms = bounds.max_inter_token_latency_ms or MAX_LATENCY_MS
    return Regime(batch, (low_ms * high_ms) ** 0.5 / 1000)


def _same_work(new: ProfileRow, old: Any) -> bool:
    try:
        return _replaces(new, ProfileRow.model_validate(old))
    except ValidationError:  # of a later version: not ours to judge
        return False


def profile_of(name: str, row: ProfileRow, existing: Mapping[str, Any] | None = None) -> tuple[str, tuple[int, ...]]:
    """Return a ClockProfile as YAML, and the places (from 1) of the rows of an existing one that the row replaces.

    ``existing``: the object whose other rows are kept as they are, with its labels and annotations.

    Raises:
        NoRowError: the existing one is full.
    """
    metadata: dict[str, Any] = {"name": name}
    rows: list[Any] = []
    if existing is not None:
        rows = list((existing.get("spec") or {}).get("rows") or [])
        for kind in ("labels", "annotations"):
            found = dict((existing.get("metadata") or {}).get(kind) or {})
            found.pop(_LAST_APPLIED, None)
            metadata |= {kind: found} if found else {}
    replaced = tuple(place for place, old in enumerate(rows, 1) if _same_work(row, old))
    kept = [old for place, old in enumerate(rows, 1) if place not in replaced]
    at = replaced[0] - 1 if replaced else len(kept)
    kept.insert(at, ClockProfileSpec(rows=[row]).to_api()["rows"][0])
    if len(kept) > MAX_ROWS:
        raise NoRowError(f"the profile has {len(rows)} rows, and more than {MAX_ROWS} are refused: remove some of them")
    document = {"apiVersion": API_VERSION, "kind": "ClockProfile", "metadata": metadata, "spec": {"rows": kept}}
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True)), replaced
