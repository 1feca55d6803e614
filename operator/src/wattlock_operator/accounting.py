"""Sums that only grow: energy used and energy saved, from counters that come, go and restart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from wattlock_operator.reports import NodeInstance, PoolKey, PoolReport, number

JOULES_PER_KWH = 3.6e6

CounterKey = tuple[str, str]
"""Node, and key of the instance."""


@dataclass(frozen=True)
class Counters:
    """Last seen counters of an instance on a node, in joules."""

    energy_joules: float
    arm_joules: Mapping[int, float]
    """By cap in MHz; 0 is the control arm."""


@dataclass(frozen=True)
class Account:
    """A pool's sums. ``None`` is unknown: nothing was measured yet."""

    energy_joules: float | None = None
    saved_joules: float | None = None
    last: Mapping[CounterKey, Counters] = field(default_factory=dict)


def delta(before: float | None, after: float) -> float:
    """Return by how much a counter grew. One that fell began anew at zero; a first sight counts from zero."""
    if before is None or after < before:
        return after
    return after - before


def _counters(instance: NodeInstance) -> Counters:
    arms = {arm.cap_mhz: number(arm.joules) for arm in instance.instance.arms}
    return Counters(number(instance.instance.energy_joules), arms)


@dataclass(frozen=True)
class Sums:
    """A pool's sums as its policy's status keeps them. ``None`` is unknown."""

    energy_kwh: float | None = None
    saved_kwh: float | None = None
    counted_joules: float | None = None
    """Sum of the counters that energy_kwh includes."""


def counted_joules(report: PoolReport) -> float:
    """Return the sum of the pool's energy counters."""
    return sum(number(item.instance.energy_joules) for item in report.instances)


def opening(report: PoolReport, sums: Sums) -> Account:
    """Return the account as an operator finds it at its start.

    What the counters grew by while no operator watched is added. With the same instances that is exact; where
    instances came, went or restarted it is a lower bound, because what they lost is subtracted. Savings of that
    time are not counted. A policy that has no sum yet counts from zero, all of it.
    """
    if sums.energy_kwh is None:
        return Account()
    now = counted_joules(report)
    missed = 0.0 if sums.counted_joules is None else max(0.0, now - sums.counted_joules)
    return Account(
        energy_joules=sums.energy_kwh * JOULES_PER_KWH + missed,
        saved_joules=None if sums.saved_kwh is None else sums.saved_kwh * JOULES_PER_KWH,
        last={(item.node, item.instance.key): _counters(item) for item in report.instances},
    )


def advance(account: Account, report: PoolReport, log_effect: float | None) -> Account:
    """Return the account after a report.

    ``log_effect`` is the verified mean of log(joules per token capped / released), or None while nothing is
    verified. The capped arms then used E joules; released, the same tokens would have used E e^-effect, so
    E (e^-effect - 1) were saved. Negative where the cap costs energy.
    """
    energy, saved = account.energy_joules, account.saved_joules
    last = dict(account.last)
    for item in report.instances:
        key = (item.node, item.instance.key)
        now, before = _counters(item), last.get(key)
        restarted = before is not None and now.energy_joules < before.energy_joules
        if restarted:
            before = None
        energy = (energy or 0.0) + delta(before.energy_joules if before else None, now.energy_joules)
        if log_effect is not None:
            capped = sum(
                delta(before.arm_joules.get(cap) if before else None, joules)
                for cap, joules in now.arm_joules.items()
                if cap > 0
            )
            saved = (saved or 0.0) + capped * math.expm1(-log_effect)
        last[key] = now
    present = {(item.node, item.instance.key) for item in report.instances}
    return Account(energy, saved, {key: counters for key, counters in last.items() if key in present})


def open_or_advance(
    accounts: Mapping[PoolKey, Account], key: PoolKey, report: PoolReport, sums: Sums, log_effect: float | None
) -> Account:
    """Return the pool's account after a report, opening it where there is none."""
    account = accounts.get(key)
    if account is None:
        account = opening(report, sums)
    return advance(account, report, log_effect)
