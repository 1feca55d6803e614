"""Events of policies: told once when a condition changes, never again and again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import Condition
from wattlock_api.constants import ConditionType

from wattlock_operator.world import PolicyView

REPEAT_SECONDS = 300.0
MAX_MEMORY = 4096

#: Conditions that tell of trouble when they become true.
_TROUBLE = {
    ConditionType.GUARDRAIL_TRIPPED,
    ConditionType.CLOCK_CLAMPED,
    ConditionType.POWER_CAP_BINDING,
    ConditionType.CONFLICT,
}
#: Its changes are told by Ready already.
_SILENT = {ConditionType.PROGRESSING}

Told = Mapping[tuple[str, str], float]
"""When a reason was last told of a policy (UID), in seconds."""


@dataclass(frozen=True)
class Telling:
    """An Event to post on a policy."""

    policy: PolicyView
    warning: bool
    reason: str
    message: str


def _worth_telling(condition: Condition, previous: Condition | None) -> bool:
    if condition.type in _SILENT:
        return False
    if condition.type in _TROUBLE and "True" not in (condition.status, previous.status if previous else ""):
        return False  # that there is no trouble is news only where there was some
    if previous is None:
        return condition.status == "True" or (condition.type == ConditionType.READY and condition.status == "False")
    return (condition.status, condition.reason) != (previous.status, previous.reason)


def _is_warning(condition: Condition) -> bool:
    if condition.type in _TROUBLE:
        return condition.status == "True"
    routine = ("WaitingForAgents", "Releasing", "Released")
    return condition.type == ConditionType.READY and condition.status == "False" and condition.reason not in routine


def tell(
    policy: PolicyView, before: Sequence[Condition], after: Sequence[Condition], told: Told, now_seconds: float
) -> tuple[tuple[Telling, ...], Told]:
    """Return the Events for a change of conditions, and the memory of what was told when.

    The same reason is told at most once in five minutes for a policy.
    """
    known = {condition.type: condition for condition in before}
    memory = dict(told)
    tellings = []
    for condition in after:
        if not _worth_telling(condition, known.get(condition.type)):
            continue
        # Reason and condition: one word such as Releasing serves several conditions.
        key = (policy.uid, condition.reason)
        if now_seconds - memory.get(key, -REPEAT_SECONDS) < REPEAT_SECONDS:
            continue
        memory[key] = now_seconds
        tellings.append(
            Telling(policy, _is_warning(condition), condition.reason, f"{condition.type}: {condition.message}")
        )
    if len(memory) > MAX_MEMORY:
        memory = {key: time for key, time in memory.items() if now_seconds - time < REPEAT_SECONDS}
    return tuple(tellings), memory
