"""The guardrail: releases an instance by itself when serving got worse under the cap. Pure.

| state | goes to | when |
| --- | --- | --- |
| quiet | suspicious | a scrape window breaches one of the bounds on a window: see ``breach`` |
| suspicious | tripped | the next window, two seconds long, breaches one as well |
| suspicious | quiet | the next window does not |
| quiet, suspicious | tripped | pairs of epochs show a larger loss than is allowed, at 99 % confidence |
| tripped | quiet | the cool-down is over |
| any | quiet | an order asks for another cap, or has other bounds |

A cool-down outlives the order that it began under: the operator withdraws a cap for a moment for reasons of its own,
and what breached would breach again.

A relapse soon after a cool-down doubles the next one, so that an instance which cannot stand the cap is slowed
less and less often, instead of flapping for ever.
"""

import math
from dataclasses import dataclass, replace

from wattlock_api.energypolicy import MAX_COOLDOWN_SECONDS, Guardrail

from wattlock_agent.experiment import PairRatios
from wattlock_agent.serving.base import ServingCounters, difference

#: After a first breach the next scrape is made so soon.
CONFIRM_SECONDS = 2.0
#: Pages are read so often where a window is bounded. A breach early in a window hardly moves its mean, so it takes up
#: to two windows to show: with these numbers it is acted upon within 2 * 3 + 2 seconds.
WATCH_SECONDS = 3.0
MAX_RATIOS = 10
MIN_RATIOS = 4
#: A 99th percentile of fewer tokens is the word of one token.
MIN_TOKENS_P99 = 100
#: 99 % quantile of Student's t distribution by degrees of freedom (one-sided). Every pair of every instance is one more
#: look, and a trip takes a whole rollout back: at 95 % an instance that truly loses 1 % of its tokens, with pairs that
#: scatter by 3 %, trips the default bound once in 500 pairs, at 99 % once in 2,900. A loss of 5 % is seen one pair
#: later at most where pairs scatter by 1.5 %, three pairs later where they scatter by 3 %.
_T99 = {3: 4.541, 4: 3.747, 5: 3.365, 6: 3.143, 7: 2.998, 8: 2.896, 9: 2.821}


@dataclass(frozen=True)
class Window:
    """What serving did between two scrapes. ``None`` and empty: not known, which is no sign of anything."""

    seconds: float
    mean_latency_seconds: float | None = None
    """Mean inter-token latency."""
    latency_buckets: tuple[tuple[float, float], ...] = ()
    """Tokens that came within so many seconds of the one before, cumulative, by rising bound; the last is infinite."""
    waiting_requests: float | None = None
    """The smaller of the queue's lengths at both ends."""
    preemptions: float | None = None


@dataclass(frozen=True)
class GuardrailState:
    """What the guardrail remembers of an instance. Times are monotonic seconds."""

    suspicious: bool = False
    tripped_until_seconds: float | None = None
    cooldown_seconds: float = 0.0
    """Length of the last cool-down."""
    message: str = ""
    trips: int = 0
    withdrawn: bool = False
    """Whether the cap was withdrawn since the breach."""
    throughput_ratios: tuple[float, ...] = ()
    """Of the last pairs, at most ten."""
    latency_ratios: tuple[float, ...] = ()


def window(before: ServingCounters, after: ServingCounters) -> Window:
    """Return the window between two pages of the same life of the engine."""
    done = difference(before, after)
    total, count = done.inter_token_latency_sum_seconds, done.inter_token_latency_count
    queues = (before.waiting_requests, after.waiting_requests)
    return Window(
        seconds=done.seconds,
        mean_latency_seconds=total / count if total is not None and count else None,
        latency_buckets=done.inter_token_latency_buckets,
        waiting_requests=None if queues[0] is None or queues[1] is None else min(queues[0], queues[1]),
        preemptions=done.preemptions,
    )


def watches_windows(guardrail: Guardrail | None) -> bool:
    """Return whether there is a bound on single windows, for which pages must be read often."""
    return guardrail is not None and any(
        bound is not None
        for bound in (
            guardrail.max_inter_token_latency_ms,
            guardrail.max_inter_token_latency_p99_ms,
            guardrail.max_waiting_requests,
            guardrail.max_preemptions_per_minute,
        )
    )


def breach(seen: Window, guardrail: Guardrail) -> str:
    """Return which bound the window breaches, with its numbers; empty: none that is known.

    The percentile is never interpolated: it is above its bound when more than one token in a hundred came later than
    the first bucket boundary at or above the bound. Whether the others were late is not known, and not guessed.
    """
    if (bound_ms := guardrail.max_inter_token_latency_ms) is not None and seen.mean_latency_seconds is not None:
        mean_ms = 1000 * seen.mean_latency_seconds
        if mean_ms > bound_ms:
            return f"mean inter-token latency of {mean_ms:.1f} ms in two windows, the bound is {bound_ms:g} ms"
    if (bound_ms := guardrail.max_inter_token_latency_p99_ms) is not None:
        late = late_share(seen.latency_buckets, bound_ms / 1000)
        if late is not None and late[1] > 0.01:
            return (
                f"{100 * late[1]:.1f} % of the tokens came more than {1000 * late[0]:g} ms after the one before in two "
                f"windows, the bound for the 99th percentile is {bound_ms:g} ms"
            )
    most = guardrail.max_waiting_requests
    if most is not None and seen.waiting_requests is not None and seen.waiting_requests > most:
        return f"{seen.waiting_requests:.0f} requests waited in two windows, {most} are allowed"
    rate = guardrail.max_preemptions_per_minute
    if rate is not None and seen.preemptions is not None and seen.seconds > 0:
        per_minute = 60 * seen.preemptions / seen.seconds
        if per_minute > rate:
            return f"{per_minute:.0f} preemptions a minute in two windows, {rate:g} are allowed"
    return ""


def late_share(buckets: tuple[tuple[float, float], ...], bound_seconds: float) -> tuple[float, float] | None:
    """Return the first finite boundary that is not below the bound, and the share of tokens that came later than it.

    ``None``: there is no such boundary, or too few tokens to speak of a percentile.
    """
    if not buckets or not math.isinf(buckets[-1][0]):
        return None
    total = buckets[-1][1]
    if total < MIN_TOKENS_P99:
        return None
    for boundary_seconds, count in buckets[:-1]:
        if boundary_seconds >= bound_seconds:
            return boundary_seconds, (total - count) / total
    return None


def is_tripped(state: GuardrailState, now_seconds: float) -> bool:
    """Return whether the instance is held released."""
    return state.tripped_until_seconds is not None and now_seconds < state.tripped_until_seconds


def trip(state: GuardrailState, guardrail: Guardrail, now_seconds: float, message: str) -> GuardrailState:
    """Return the state after a breach: released for the cool-down, and judged by new pairs afterwards.

    A relapse, within the length of the last cool-down after its end, doubles the cool-down, up to a day.
    """
    cooldown_seconds = float(guardrail.cooldown_seconds)
    ended = state.tripped_until_seconds
    again = ended is not None and now_seconds - ended <= state.cooldown_seconds
    if again:
        cooldown_seconds = min(max(cooldown_seconds, 2 * state.cooldown_seconds), MAX_COOLDOWN_SECONDS)
    text = " (longer, because it breached again soon after the last time)" if again else ""
    return GuardrailState(
        tripped_until_seconds=now_seconds + cooldown_seconds,
        cooldown_seconds=cooldown_seconds,
        message=f"{message}; released for {cooldown_seconds:.0f} s{text}",
        trips=state.trips + 1,
    )


@dataclass(frozen=True)
class Remembered:
    """What outlives the orders of an instance."""

    state: GuardrailState
    cap_mhz: int | None
    """Of the last order that had one; another cap is tried at once."""
    bounds: Guardrail | None


def without_cap(state: GuardrailState) -> GuardrailState:
    """Return what is left of a state while the order has no cap: the cool-down; what was seen of the cap is over."""
    return GuardrailState(
        tripped_until_seconds=state.tripped_until_seconds,
        cooldown_seconds=state.cooldown_seconds,
        message=state.message,
        trips=state.trips,
        withdrawn=True,
    )


def judge_window(state: GuardrailState, guardrail: Guardrail, now_seconds: float, seen: Window) -> GuardrailState:
    """Return the state after a scrape window in which the instance was locked all the time."""
    text = "" if is_tripped(state, now_seconds) else breach(seen, guardrail)
    if not text or not state.suspicious:
        return replace(state, suspicious=bool(text))
    return trip(state, guardrail, now_seconds, text)


def judge_pair(state: GuardrailState, guardrail: Guardrail, now_seconds: float, pair: PairRatios) -> GuardrailState:
    """Return the state after a pair of epochs.

    Trips when the end of the one-sided 99 % interval of the mean log ratio (Student's t) that is nearer to no change
    is beyond the bound: the change is then larger than allowed with 99 % confidence.
    """
    if is_tripped(state, now_seconds):
        return state
    latency = state.latency_ratios if pair.latency is None else (*state.latency_ratios, pair.latency)[-MAX_RATIOS:]
    throughput = (*state.throughput_ratios, pair.throughput)[-MAX_RATIOS:]
    state = replace(state, throughput_ratios=throughput, latency_ratios=latency)
    loss_percent = guardrail.max_throughput_loss_percent
    least, mean = _at_least(tuple(-ratio for ratio in throughput))
    if least > -math.log(1 - loss_percent / 100):
        text = (
            f"{-100 * math.expm1(-mean):.1f} % fewer tokens per second than when released (at least "
            f"{-100 * math.expm1(-least):.1f} % with 99 % confidence, {len(throughput)} pairs), "
            f"{loss_percent:g} % are allowed"
        )
        return trip(state, guardrail, now_seconds, text)
    increase_percent = guardrail.max_inter_token_latency_increase_percent
    least, mean = _at_least(latency)
    if increase_percent is not None and least > math.log(1 + increase_percent / 100):
        text = (
            f"{100 * math.expm1(mean):.1f} % more inter-token latency than when released (at least "
            f"{100 * math.expm1(least):.1f} % with 99 % confidence, {len(latency)} pairs), "
            f"{increase_percent:g} % are allowed"
        )
        return trip(state, guardrail, now_seconds, text)
    return state


def _at_least(ratios: tuple[float, ...]) -> tuple[float, float]:
    """Return the lower end of the one-sided 99 % interval of the mean, and the mean; -inf with too few values."""
    count = len(ratios)
    if count < MIN_RATIOS:
        return -math.inf, 0.0
    mean = sum(ratios) / count
    deviation = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / (count - 1))
    return mean - _T99[count - 1] * deviation / math.sqrt(count), mean
