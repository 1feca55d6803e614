"""The cap of a pod: a fixed number, the row of a ClockProfile, or what the tuner of its pool wants."""

from collections.abc import Mapping
from dataclasses import dataclass

from wattlock_api.clockprofile import ClockProfileSpec
from wattlock_api.constants import Reason
from wattlock_api.energypolicy import Pool
from wattlock_api.nodeenergy import Hold, NodeEnergyStatus

from wattlock_operator.rows import find_row, why_no_row
from wattlock_operator.tuning.model import Regime


@dataclass(frozen=True)
class Cap:
    """An upper bound of the SM clock."""

    mhz: int
    control_share: float | None = None
    """Share of released epochs; ``None``: the policy's own."""


def hold(reason: Reason, message: str) -> Hold:
    """Return why nothing is capped."""
    return Hold(reason=reason.value, message=message[:1024])


def products_of(report: NodeEnergyStatus | None, pod_uid: str) -> frozenset[str]:
    """Return the GPU products of a pod: of the GPUs that it holds, else the node's only product.

    Empty when the node's agent has not told yet. Several: the node's GPUs differ and the pod's are not known.
    """
    if report is None:
        return frozenset()
    held = {gpu.product for gpu in report.gpus if gpu.holder is not None and gpu.holder.uid == pod_uid and gpu.product}
    if held:
        return frozenset(held)
    products = {gpu.product for gpu in report.gpus if gpu.product}
    return frozenset(products | {entry.product for entry in report.agent.products})


def cap_for(
    pool: Pool,
    products: frozenset[str],
    profiles: Mapping[str, ClockProfileSpec],
    tuned: Cap | Hold | None = None,
    regime: Regime | None = None,
) -> Cap | Hold:
    """Return the cap that a pool asks of a pod with GPUs of these products, or why there is none.

    ``tuned``: what the pool's tuner wants; ``None`` where it does not work. ``regime``: the work that chooses
    the row of a profile; ``None``: not known.
    """
    if pool.clock is None:
        return hold(Reason.NO_PROFILE_ROW, f"pool {pool.name} has no clock: write clock.maxSMClockMHz or clock.profile")
    if pool.clock.max_sm_clock_mhz is not None:
        return Cap(pool.clock.max_sm_clock_mhz)
    if pool.clock.tune is not None:
        text = "the tuner works in mode Enforce alone: it finds the clock by experiments on the GPUs"
        return hold(Reason.TUNING, text) if tuned is None else tuned
    name = pool.clock.profile or ""
    profile = profiles.get(name)
    if profile is None:
        known = ", ".join(sorted(profiles)[:5]) or "none"
        return hold(
            Reason.PROFILE_NOT_FOUND,
            f"there is no readable ClockProfile {name!r} (there are: {known}): create it, or name another in "
            f"pool {pool.name}'s clock.profile",
        )
    if len(products) != 1:
        said = "are of several products: " + ", ".join(sorted(products)) if products else "are not known yet"
        return hold(
            Reason.PRODUCT_UNKNOWN,
            f"the GPUs {said}; a profile's cap depends on the product. Wait for the node's agent, or write "
            f"clock.maxSMClockMHz in pool {pool.name}",
        )
    (product,) = products
    found = find_row(profile, product, pool.architecture, regime)
    if found is None:
        return hold(Reason.NO_PROFILE_ROW, f"ClockProfile {name} {why_no_row(profile, product, pool, regime)}")
    return Cap(found.row.max_sm_clock_mhz)
