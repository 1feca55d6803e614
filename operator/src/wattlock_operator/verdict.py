"""The rule by which a saving is called verified: pure numbers in, one reason out, and a sentence for people."""

import math
from dataclasses import dataclass, replace

from wattlock_api.base import decimal_string
from wattlock_api.constants import Reason
from wattlock_api.energypolicy import Verification
from wattlock_api.schedule import Experiment

from wattlock_operator import sequential
from wattlock_operator.pooling import Effect, saving_percent

#: With fewer pairs there is nothing to publish: even six that agree to the last digit are barely evidence.
MIN_PAIRS = 6
MAX_HALF_WIDTH_POINTS = 3.0

#: Reasons of the verdict Verified.
VERIFIED = (Reason.INTERVAL_EXCLUDES_ZERO, Reason.CAP_COSTS_ENERGY)


@dataclass(frozen=True)
class Pooled:
    """What all pairs of a pool say about one quantity, in log units."""

    effect: Effect
    total: float
    squares: float
    chances: int = 1
    """Out of how many caps this one may have been picked by what it showed. The evidence for each starts with its
    share of the 1: the sum over all of them is fair game again."""

    @property
    def log_evidence(self) -> float:
        """Logarithm of the evidence against "the cap does nothing", good at every look and for every pick."""
        return sequential.log_evidence(self.effect.pairs, self.total, self.squares) - math.log(self.chances)


def judge(pooled: Pooled | None) -> Reason:
    """Return the reason for the verdict on the energy for each token.

    Verified needs all of: six pairs, a half-width under three points, an interval of this look without zero, and
    evidence that holds at every look.
    """
    if pooled is None or pooled.effect.pairs < MIN_PAIRS:
        return Reason.TOO_FEW_PAIRS
    saving = saving_percent(pooled.effect)
    if saving.half_width >= MAX_HALF_WIDTH_POINTS:
        return Reason.INTERVAL_TOO_WIDE
    if saving.low <= 0 <= saving.high:
        return Reason.INTERVAL_INCLUDES_ZERO
    if not sequential.is_enough(pooled.log_evidence):
        return Reason.NEEDS_MORE_EVIDENCE
    return Reason.INTERVAL_EXCLUDES_ZERO if saving.value > 0 else Reason.CAP_COSTS_ENERGY


def pairs_to_go(pooled: Pooled, reason: Reason) -> int | None:
    """Return about how many more pairs the verdict needs if they go on as so far; ``None`` where nobody can tell."""
    pairs = pooled.effect.pairs
    if reason is Reason.INTERVAL_TOO_WIDE:
        ratio = saving_percent(pooled.effect).half_width / MAX_HALF_WIDTH_POINTS
        return max(1, math.ceil(pairs * min(ratio, 1000.0) ** 2) - pairs)
    if reason is Reason.NEEDS_MORE_EVIDENCE:
        wanted = sequential.pairs_needed(pairs, pooled.total, pooled.squares, pooled.chances)
        return None if wanted is None else max(1, wanted - pairs)
    return None


def _rounded(value: float) -> int:
    """Return one significant digit, rounded up: a forecast that changes with every pair would only be noise."""
    size = int(10 ** math.floor(math.log10(max(1.0, value))))
    return math.ceil(value / size) * size


def forecast(pooled: Pooled, reason: Reason, verification: Verification) -> str:
    """Return a half-sentence on how much longer it takes, empty where nobody can tell."""
    more = pairs_to_go(pooled, reason)
    if more is None:
        return ""
    text = f"about {_rounded(more)} more pair(s) if they are like those so far"
    instances = pooled.effect.instances
    if instances:
        experiment = Experiment("", verification.epoch_seconds, verification.control_share)
        minutes = _rounded(more / instances) * experiment.block_epochs * experiment.epoch_seconds / 60
        span = f"{_rounded(minutes)} min" if minutes < 100 else f"{_rounded(minutes / 60)} h"
        text += f", some {span} with {instances} instance(s)"
    return text


def at_every_look(pooled: Pooled) -> Effect | None:
    """Return the effect with the interval that holds at every look; ``None`` while it has no ends."""
    effect = pooled.effect
    low, high = sequential.interval_at_every_look(effect.pairs, pooled.total, pooled.squares, pooled.chances)
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return replace(effect, low=low, high=high)


def signed(text: str) -> str:
    """Write minus zero as zero."""
    return text.removeprefix("-") if float(text) == 0 else text


def percent_text(value: float, places: int = 2) -> str:
    """Return a percentage as status shows it."""
    return signed(decimal_string(max(-1e9, min(1e9, value)), places))


def sentence(pooled: Pooled, reason: Reason, verification: Verification) -> str:
    """Return the verdict as a sentence, for pools with at least six pairs."""
    saving = saving_percent(pooled.effect)
    value, low, high = (percent_text(each, 1) for each in (saving.value, saving.low, saving.high))
    interval = f"{value}% (95% interval {low} to {high})"
    if reason is Reason.INTERVAL_INCLUDES_ZERO:
        return f"saving {interval}: it may be none"
    if reason is Reason.CAP_COSTS_ENERGY:
        return f"the cap costs energy: saving {interval} for each token, and savedKWh falls. Raise or remove the cap"
    if reason is Reason.INTERVAL_EXCLUDES_ZERO:
        return f"saving {interval} for each token"
    if reason is Reason.INTERVAL_TOO_WIDE:
        text = f"saving {interval}: the half-width must be under {MAX_HALF_WIDTH_POINTS:.0f} points"
    else:
        text = f"saving {interval}: enough for one look, not yet for someone who looks again and again"
    more = forecast(pooled, reason, verification)
    return f"{text}; {more}" if more else text
