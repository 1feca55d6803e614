"""The guardrail: releases an instance by itself when serving got worse under the cap. Pure.

| state | goes to | when |
| --- | --- | --- |
| quiet | suspicious | mean inter-token latency of a scrape window is above the bound |
| suspicious | tripped | the next window, two seconds long, is above it as well |
| suspicious | quiet | the next window is not |
| quiet, suspicious | tripped | tokens per second are below control by more than the allowed loss, at 95 % confidence |
| tripped | quiet | the cool-down is over |
"""

import math
from dataclasses import dataclass, replace

from wattlock_api.energypolicy import Guardrail

#: After a first breach the next scrape is made so soon.
CONFIRM_SECONDS = 2.0
#: Pages are read so often where latency is bounded. A breach early in a window hardly moves its mean, so it takes up to
#: two windows to show: with these numbers it is acted upon within 2 * 3 + 2 seconds.
WATCH_SECONDS = 3.0
MAX_RATIOS = 10
MIN_RATIOS = 4
#: 95 % quantile of Student's t distribution by degrees of freedom (one-sided).
_T95 = {3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}


@dataclass(frozen=True)
class GuardrailState:
    """What the guardrail remembers of an instance. Times are monotonic seconds."""

    suspicious: bool = False
    tripped_until_seconds: float | None = None
    message: str = ""
    trips: int = 0
    throughput_ratios: tuple[float, ...] = ()
    """log(cap) - log(control) of tokens per second of the last pairs, at most ten."""


def bounds_latency(guardrail: Guardrail | None) -> bool:
    """Return whether there is a bound on the inter-token latency."""
    return guardrail is not None and guardrail.max_inter_token_latency_ms is not None


def is_tripped(state: GuardrailState, now_seconds: float) -> bool:
    """Return whether the instance is held released."""
    return state.tripped_until_seconds is not None and now_seconds < state.tripped_until_seconds


def trip(state: GuardrailState, guardrail: Guardrail, now_seconds: float, message: str) -> GuardrailState:
    """Return the state after a breach: released for the cool-down, and judged by new pairs afterwards."""
    return GuardrailState(
        tripped_until_seconds=now_seconds + guardrail.cooldown_seconds,
        message=f"{message}; released for {guardrail.cooldown_seconds} s",
        trips=state.trips + 1,
    )


def latency_window(
    state: GuardrailState, guardrail: Guardrail, now_seconds: float, mean_latency_seconds: float | None
) -> GuardrailState:
    """Return the state after a scrape window in which the instance was locked all the time.

    ``None``: no token was generated, which is no sign of anything.
    """
    bound_ms = guardrail.max_inter_token_latency_ms
    if is_tripped(state, now_seconds) or mean_latency_seconds is None or bound_ms is None:
        return replace(state, suspicious=False)
    mean_ms = 1000 * mean_latency_seconds
    if mean_ms <= bound_ms:
        return replace(state, suspicious=False)
    if not state.suspicious:
        return replace(state, suspicious=True)
    text = f"mean inter-token latency of {mean_ms:.1f} ms in two windows, the bound is {bound_ms:g} ms"
    return trip(state, guardrail, now_seconds, text)


def throughput_pair(
    state: GuardrailState, guardrail: Guardrail, now_seconds: float, log_ratio: float
) -> GuardrailState:
    """Return the state after a pair of epochs.

    Trips when the upper end of the one-sided 95 % interval of the mean log ratio (Student's t) is below the allowed
    loss: the loss is then larger than allowed with 95 % confidence.
    """
    if is_tripped(state, now_seconds):
        return state
    ratios = (*state.throughput_ratios, log_ratio)[-MAX_RATIOS:]
    state = replace(state, throughput_ratios=ratios)
    count = len(ratios)
    if count < MIN_RATIOS:
        return state
    mean = sum(ratios) / count
    deviation = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / (count - 1))
    upper = mean + _T95[count - 1] * deviation / math.sqrt(count)
    loss_percent = guardrail.max_throughput_loss_percent
    if upper >= math.log(1 - loss_percent / 100):
        return state
    text = (
        f"{-100 * math.expm1(mean):.1f} % fewer tokens per second than when released (at least "
        f"{-100 * math.expm1(upper):.1f} % with 95 % confidence, {count} pairs), {loss_percent:g} % are allowed"
    )
    return trip(state, guardrail, now_seconds, text)
