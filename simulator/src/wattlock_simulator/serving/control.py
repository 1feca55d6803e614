"""What ``POST /simulate`` accepts: checked here, with a sentence for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from wattlock_simulator.physics import Architecture
from wattlock_simulator.serving.engine import Role, Settings

_Choice = TypeVar("_Choice", bound=StrEnum)


class MetricsFault(StrEnum):
    """Ways in which the metrics page can be broken."""

    NONE = "none"
    GARBAGE = "garbage"
    HUGE = "huge"
    ENDLESS = "endless"
    NAN = "nan"
    BACKWARDS = "backwards"
    SLOW = "slow"


class ControlError(ValueError):
    """The request makes no sense; the message says what to send."""


@dataclass(frozen=True)
class Change:
    """A checked request: new settings, a metrics fault to switch to (None: as before), and whether to restart."""

    settings: Settings
    metrics_fault: MetricsFault | None
    restart: bool


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ControlError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ControlError(f"{name} must be true or false, not {value!r}")
    return value


def _one_of(kind: type[_Choice]) -> Callable[[str, Any], _Choice]:
    def check(name: str, value: Any) -> _Choice:
        try:
            return kind(value)
        except ValueError:
            raise ControlError(f"{name} must be one of {', '.join(kind)}, not {value!r}") from None

    return check


# JSON name -> field of Settings, check, factor to the field's unit
_SETTINGS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "batch": ("batch", _number(0.1, 4096)),
    "context": ("context", _number(1, 1_048_576)),
    "phase": ("role", _one_of(Role)),
    "architecture": ("architecture", _one_of(Architecture)),
    "jitter": ("jitter", _number(0, 0.5)),
    "computesPrompts": ("computes_prompts", _flag),
    "promptShare": ("prompt_share", _number(0, 0.95)),
    "extraLatencyMs": ("extra_step_seconds", _number(0, 10_000)),
    "idle": ("idle", _flag),
    "waiting": ("waiting", _number(0, 100_000)),
}


def parse(body: bytes, settings: Settings) -> Change:
    """Checks a request body against the present settings.

    Args:
        body: JSON object; absent keys stay as they are.
        settings: the present settings.

    Raises:
        ControlError: not JSON, an unknown key or a value out of range.
    """
    try:
        request = json.loads(body)
    except ValueError as error:
        raise ControlError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ControlError('the body must be a JSON object such as {"batch": 32}')
    known = {*_SETTINGS, "metricsFault", "restart"}
    if unknown := sorted(set(request) - known):
        raise ControlError(f"unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    changes: dict[str, Any] = {}
    for name, (field, check) in _SETTINGS.items():
        if name in request:
            changes[field] = check(name, request[name])
    if "extra_step_seconds" in changes:
        changes["extra_step_seconds"] /= 1000.0
    if "waiting" in changes:
        changes["waiting"] = int(changes["waiting"])
    fault = _one_of(MetricsFault)("metricsFault", request["metricsFault"]) if "metricsFault" in request else None
    restart = _flag("restart", request.get("restart", False))
    return Change(replace(settings, **changes), fault, restart)
