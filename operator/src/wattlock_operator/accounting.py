"""Sums that go on: energy used and energy saved, from counters that come, go and restart. Pure.

How a saving becomes kilowatt-hours. Energy E (joules of the GPU boards, from judged epochs under the cap) was used
while the pool's saving was Verified, with y = mean log(joules per token, capped / released). Released, the same tokens
would have used E e^-y, so E (e^-y - 1) were saved. The ends of y's 95 % interval give the ends of the saving's.

How uncertainty adds up. All joules that are valued by one estimate share its error, so the errors do not average out
over time: for a sum of terms that are wholly correlated the standard deviations add (Var(sum a_i X) = (sum a_i)^2
Var(X); BIPM, JCGM 100:2008, section 5.2.2, note 1). Ends of intervals are therefore added, end to end. For estimates
that are independent (the cap before and after a change) that is wider than need be, never narrower.

What was counted stays: every joule is valued once, by the estimate in force when it was reported. A later estimate
values later joules only. So the sum falls only while a cap is verified to cost energy, and then its reason says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wattlock_api.base import MAX_CLOCK_MHZ, MIN_CLOCK_MHZ

from wattlock_operator.pooling import Effect
from wattlock_operator.reports import NodeInstance, PoolKey, PoolReport, number

JOULES_PER_KWH = 3.6e6
#: Counters of instances that went away are remembered for so many: their node may only have been away.
MAX_GONE = 1024
_MAX_LOG_EFFECT = 50.0

CounterKey = tuple[str, str]
"""Node, and key of the instance."""


@dataclass(frozen=True)
class Counters:
    """Last seen counters of an instance on a node, in joules."""

    energy_joules: float
    arm_joules: Mapping[int, float]
    """By cap in MHz; 0 is the control arm."""


@dataclass(frozen=True)
class Saved:
    """An amount saved with its 95 % interval, low <= joules <= high. Negative: the cap cost energy."""

    joules: float = 0.0
    low_joules: float = 0.0
    high_joules: float = 0.0

    def __add__(self, other: "Saved") -> "Saved":
        """Add end to end: errors are taken as common to both."""
        return Saved(
            self.joules + other.joules, self.low_joules + other.low_joules, self.high_joules + other.high_joules
        )


@dataclass(frozen=True)
class Worth:
    """A verified effect, and the caps (in MHz) that it is about."""

    effect: Effect
    caps_mhz: frozenset[int]

    def of(self, capped_joules: float) -> Saved:
        """Return what was saved while so many joules were used under the cap."""

        def saved(log_effect: float) -> float:
            return capped_joules * math.expm1(min(_MAX_LOG_EFFECT, -log_effect))

        return Saved(saved(self.effect.mean), saved(self.effect.high), saved(self.effect.low))


@dataclass(frozen=True)
class Account:
    """A pool's sums. ``None`` is unknown: nothing was measured yet."""

    energy_joules: float | None = None
    saved: Saved | None = None
    last: Mapping[CounterKey, Counters] = field(default_factory=dict)
    """Counters as far as they are counted; those of instances that went away come first."""
    present: frozenset[CounterKey] = frozenset()
    """Whose counters were in the last report."""


@dataclass(frozen=True)
class Sums:
    """A pool's sums as its policy's status keeps them. ``None`` is unknown."""

    energy_joules: float | None = None
    saved: Saved | None = None
    counted_joules: float | None = None
    """Sum of the energy counters that energy_joules includes."""
    counted_capped_joules: Mapping[int, float] = field(default_factory=dict)
    """By cap in MHz: sum of the counters of energy under it that ``saved`` has looked at."""
    verified: bool = False
    """Whether the saving was verified then."""


def delta(before: float | None, after: float) -> float:
    """Return by how much a counter grew. One that fell began anew at zero; a first sight counts from zero."""
    if before is None or after < before:
        return after
    return after - before


def _counters(instance: NodeInstance) -> Counters:
    arms = {arm.cap_mhz: number(arm.joules) for arm in instance.instance.arms}
    return Counters(number(instance.instance.energy_joules), arms)


def _key(item: NodeInstance) -> CounterKey:
    return item.node, item.instance.key


def counted_joules(report: PoolReport) -> float:
    """Return the sum of the pool's energy counters."""
    return sum(number(item.instance.energy_joules) for item in report.instances)


def counted_capped_joules(report: PoolReport) -> Mapping[int, float]:
    """Return the sums of the pool's counters of energy under a cap, by cap in MHz, the newest sixteen."""
    sums: dict[int, float] = {}
    for item in report.instances:
        for arm in item.instance.arms:
            # Zero is the control arm. What else is no clock was ordered by nobody, and no status could hold it.
            if MIN_CLOCK_MHZ <= arm.cap_mhz <= MAX_CLOCK_MHZ:
                sums[arm.cap_mhz] = sums.get(arm.cap_mhz, 0.0) + number(arm.joules)
    return dict(list(sums.items())[-16:])


def opening(report: PoolReport, sums: Sums, worth: Worth | None) -> Account:
    """Return the account as an operator finds it at its start.

    What the counters grew by while no operator watched is added. With the same instances that is exact; where
    instances came, went or restarted it is a lower bound, because what they lost is subtracted. Energy under the cap
    counts as saved where the saving was verified before and is verified now, at the estimate of now. A policy that
    has no sum yet counts its energy from zero, all of it, and its saving from now on.
    """
    if sums.energy_joules is None:
        return Account(saved=sums.saved)
    now = {_key(item): _counters(item) for item in report.instances if item.instance.energy_joules is not None}
    missed = 0.0 if sums.counted_joules is None else max(0.0, counted_joules(report) - sums.counted_joules)
    saved = sums.saved
    if worth is not None and sums.verified:
        capped = counted_capped_joules(report)
        grown = sum(
            max(0.0, capped.get(cap, 0.0) - before)
            for cap, before in sums.counted_capped_joules.items()
            if cap in worth.caps_mhz
        )
        saved = (saved or Saved()) + worth.of(grown)
    return Account(energy_joules=sums.energy_joules + missed, saved=saved, last=now, present=frozenset(now))


def _known(account: Account, others: Sequence[Account]) -> Mapping[CounterKey, Counters]:
    """Return all counters of a policy's instances, each as far as a pool has counted it.

    A pod may move to another pool and back, and its counters go on. The pool that it is in has counted furthest; what
    another one remembers of it is what it was when it left.
    """
    known: dict[CounterKey, Counters] = {}
    for other in others:
        known |= other.last
    known |= account.last
    for other in others:
        known |= {key: other.last[key] for key in other.present}
    return known


def advance(account: Account, report: PoolReport, worth: Worth | None, others: Sequence[Account] = ()) -> Account:
    """Return the account after a report.

    ``worth`` is None while nothing is verified: then nothing is saved. ``others`` are the accounts of the policy's
    other pools before this report.
    """
    known = _known(account, others)
    energy, saved = account.energy_joules, account.saved
    present: dict[CounterKey, Counters] = {}
    for item in report.instances:
        if item.instance.energy_joules is None:
            continue  # unknown is not zero: what was counted last is remembered
        key, now = _key(item), _counters(item)
        # Energy counts from the start of the counter. Savings count from the first look: what was used before it was
        # not looked at, so nobody knows whether it was counted already.
        before = known.get(key) or Counters(0.0, now.arm_joules)
        if now.energy_joules < before.energy_joules:
            before = Counters(0.0, {})  # its counters began anew
        energy = (energy or 0.0) + delta(before.energy_joules, now.energy_joules)
        if worth is not None:
            capped = sum(
                delta(before.arm_joules.get(cap), joules)
                for cap, joules in now.arm_joules.items()
                if cap in worth.caps_mhz
            )
            saved = (saved or Saved()) + worth.of(capped)
        present[key] = now
    gone = [(key, known[key]) for key in account.last if key not in present]
    return Account(energy, saved, dict(gone[-MAX_GONE:]) | present, frozenset(present))


def open_or_advance(
    accounts: Mapping[PoolKey, Account], key: PoolKey, report: PoolReport, sums: Sums, worth: Worth | None
) -> Account:
    """Return the pool's account after a report, opening it where there is none."""
    account = accounts.get(key)
    others = [other for (uid, pool), other in accounts.items() if uid == key[0] and pool != key[1]]
    if account is None:
        account = opening(report, sums, worth)
    return advance(account, report, worth, others)
