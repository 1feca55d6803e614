"""Events of policies: told when a condition changes, and bounded where it keeps changing. Pure.

Two bounds, as client-go's correlator has them (tools/record/events_cache.go): one for the same news, one for all news
of an object, so that a policy that flaps between ever new reasons cannot fill the cluster's events either.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from wattlock_api.base import Condition
from wattlock_api.constants import ConditionReason, ConditionType, Reason
from wattlock_api.policystatus import PoolStatus

from wattlock_operator.world import PolicyView

REPEAT_SECONDS = 300.0
#: All Events of a policy: so many at once, then one in each so many seconds. Up to 58 in the first hour.
BURST = 10
REFILL_SECONDS = 75.0
MAX_MEMORY = 4096

#: Conditions that tell of trouble when they become true.
_TROUBLE = {
    ConditionType.GUARDRAIL_TRIPPED,
    ConditionType.CLOCK_CLAMPED,
    ConditionType.POWER_CAP_BINDING,
    ConditionType.CONFLICT,
}
#: Of Progressing only the rollout is told: the rest is told by Ready already.
_ROLLOUT = (ConditionReason.ROLLING_OUT, ConditionReason.ROLLOUT_PAUSED, ConditionReason.ROLLED_OUT)
#: What is told of a tuner that comes into a phase; of any other that it begins anew.
_TUNING: Mapping[str, str] = {
    "Searching": ConditionReason.TUNING_ARM,
    "Settled": ConditionReason.TUNED,
    "Released": Reason.NO_CLOCK_PAYS,
}
#: Why Enforced is not true (yet), as far as Ready tells it or it passes by itself within seconds.
_TOLD_BY_READY = {
    Reason.NO_AGENT,
    Reason.AGENT_SILENT,
    Reason.NO_GPUS,
    Reason.NO_MATCHING_PODS,
    Reason.WAITING_TO_WRITE,
}


@dataclass(frozen=True)
class Told:
    """What was told when."""

    reasons: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """When a reason was last told of a policy (UID), in seconds."""
    spent: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """How much of its burst a policy (UID) has used, and when that was so, in seconds."""

    def room(self, uid: str, now_seconds: float) -> bool:
        """Return whether one more Event of the policy may be told."""
        return self.used(uid, now_seconds) <= BURST - 1

    def used(self, uid: str, now_seconds: float) -> float:
        """Return how much of its burst the policy has used by now."""
        used, at_seconds = self.spent.get(uid, (0.0, now_seconds))
        return max(0.0, used - max(0.0, now_seconds - at_seconds) / REFILL_SECONDS)

    def after(self, uid: str, reason: str, now_seconds: float) -> "Told":
        """Return the memory with one more Event; what says nothing any more is forgotten."""
        reasons = {**self.reasons, (uid, reason): now_seconds}
        spent = {**self.spent, uid: (self.used(uid, now_seconds) + 1, now_seconds)}
        if len(reasons) > MAX_MEMORY:
            reasons = {key: time for key, time in reasons.items() if now_seconds - time < REPEAT_SECONDS}
        if len(spent) > MAX_MEMORY:
            spent = {each: entry for each, entry in spent.items() if now_seconds - entry[1] < BURST * REFILL_SECONDS}
        return Told(reasons, spent)

    def untold(self, uids: Set[str], before: "Told") -> "Told":
        """Return the memory with that of some policies (UIDs) as it was before: nothing was told of them after all."""
        reasons = {key: time for key, time in self.reasons.items() if key[0] not in uids}
        spent = {uid: entry for uid, entry in self.spent.items() if uid not in uids}
        reasons |= {key: time for key, time in before.reasons.items() if key[0] in uids}
        spent |= {uid: entry for uid, entry in before.spent.items() if uid in uids}
        return Told(reasons, spent)


@dataclass(frozen=True)
class Telling:
    """An Event to post on a policy."""

    policy: PolicyView
    warning: bool
    reason: str
    message: str


def _worth_telling(condition: Condition, previous: Condition | None) -> bool:
    if condition.type == ConditionType.PROGRESSING and condition.reason not in _ROLLOUT:
        return False
    statuses = (condition.status, previous.status if previous else "")
    if condition.type == ConditionType.VERIFIED and "True" not in statuses:
        return False  # on the way to a verdict the reason changes now and then: status has it
    if condition.type == ConditionType.ENFORCED and "True" not in statuses and condition.reason in _TOLD_BY_READY:
        return False
    if condition.type in _TROUBLE and "True" not in statuses:
        return False  # that there is no trouble is news only where there was some
    if previous is None:
        return condition.status == "True" or (condition.type == ConditionType.READY and condition.status == "False")
    return (condition.status, condition.reason) != (previous.status, previous.reason)


def _is_warning(condition: Condition) -> bool:
    if condition.reason == Reason.ROLLED_BACK:
        return True
    if condition.type in _TROUBLE:
        return condition.status == "True"
    if condition.type == ConditionType.VERIFIED:
        return condition.reason == Reason.CAP_COSTS_ENERGY
    routine = (ConditionReason.WAITING_FOR_AGENTS, ConditionReason.RELEASING, ConditionReason.RELEASED)
    return condition.type == ConditionType.READY and condition.status == "False" and condition.reason not in routine


def tell_tuning(
    policy: PolicyView, before: Sequence[PoolStatus], after: Sequence[PoolStatus], told: Told, now_seconds: float
) -> tuple[tuple[Telling, ...], Told]:
    """Return the Events for what the tuners of pools did: a new arm, a choice, nothing that pays, a new search.

    They share the bound on all Events of a policy.
    """
    known = {pool.name: pool.tuning for pool in before}
    tellings = []
    for pool in after:
        now, last = pool.tuning, known.get(pool.name)
        if now is None or not told.room(policy.uid, now_seconds):
            continue
        if last is not None and (now.phase, now.cap_mhz) == (last.phase, last.cap_mhz):
            continue
        if now.phase == "Starting" and last is None:
            continue  # the policy was just written
        reason = _TUNING.get(now.phase, ConditionReason.TUNING_ANEW)
        told = told.after(policy.uid, reason, now_seconds)
        tellings.append(Telling(policy, False, reason, f"pool {pool.name}: {now.message}"[:1024]))
    return tuple(tellings), told


def tell_profiles(
    policy: PolicyView, before: Sequence[PoolStatus], after: Sequence[PoolStatus], told: Told, now_seconds: float
) -> tuple[tuple[Telling, ...], Told]:
    """Return the Events for pools that now use another row of their ClockProfile.

    The first row, and another profile, come with the policy: nobody needs to be told. They share the bound on all
    Events of a policy.
    """
    known = {pool.name: pool.profile for pool in before}
    tellings = []
    for pool in after:
        now, last = pool.profile, known.get(pool.name)
        if now is None or last is None or now.name != last.name or not told.room(policy.uid, now_seconds):
            continue
        old = {each.product: each.cap_mhz for each in last.rows}
        moved = [each for each in now.rows if each.cap_mhz != old.get(each.product, each.cap_mhz)]
        if not moved:
            continue
        work = now.regime
        why = ""
        if work is not None:
            why = f" at batch {float(work.batch):.0f} and {float(work.inter_token_latency_ms):.1f} ms between tokens"
        rows = ", ".join(
            f"{each.cap_mhz} MHz instead of {old[each.product]} MHz for {each.product} (row {each.row})"
            for each in moved
        )
        told = told.after(policy.uid, ConditionReason.PROFILE_ROW, now_seconds)
        text = f"pool {pool.name}: ClockProfile {now.name} asks for {rows}{why}"
        tellings.append(Telling(policy, False, ConditionReason.PROFILE_ROW, text[:1024]))
    return tuple(tellings), told


def tell(
    policy: PolicyView, before: Sequence[Condition], after: Sequence[Condition], told: Told, now_seconds: float
) -> tuple[tuple[Telling, ...], Told]:
    """Return the Events for a change of conditions, and the memory of what was told when.

    The same reason is told at most once in five minutes for a policy, and all its reasons together are bounded.
    """
    known = {condition.type: condition for condition in before}
    tellings = []
    for condition in after:
        if not _worth_telling(condition, known.get(condition.type)):
            continue
        # Whatever the condition: one word such as Releasing is that of several, and is told once.
        key = (policy.uid, condition.reason)
        if now_seconds - told.reasons.get(key, -REPEAT_SECONDS) < REPEAT_SECONDS:
            continue
        if not told.room(policy.uid, now_seconds):
            continue
        told = told.after(*key, now_seconds)
        tellings.append(
            Telling(policy, _is_warning(condition), condition.reason, f"{condition.type}: {condition.message}")
        )
    return tuple(tellings), told
