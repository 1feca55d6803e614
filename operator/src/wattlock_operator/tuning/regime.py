"""Whether a pool does another kind of work than the one that its clock was found for. Pure.

A GPU's best clock depends on batch, context, model, driver, and on whether the power limit acts. Batch and latency are
measured; at the same batch a longer context or another model shows as another latency. What is another engine or model
for sure comes with other pods: the hash of their template is part of ``Regime.kind``, with products and drivers.
"""

import math
from dataclasses import replace

from wattlock_operator.tuning.model import Regime

#: From a factor of this on the batch is another one: ordinary traffic moves it by a fifth.
BATCH_FACTOR = 1.6
#: The same for the latency, which moves with the square root of the batch, roughly.
LATENCY_FACTOR = 1.35
#: While a search lasts, the reference follows slow changes with this time constant.
FOLLOW_SECONDS = 1800.0


def ratio(one: float, other: float) -> float:
    """Return by what factor two positive numbers differ, at least 1; 1 where one of them is no such number."""
    if not (one > 0 and other > 0 and math.isfinite(one) and math.isfinite(other)):
        return 1.0
    return math.exp(abs(math.log(one) - math.log(other)))


def moved(reference: Regime | None, now: Regime | None) -> str:
    """Return what is different, for people; empty: nothing, or it is not known."""
    if reference is None or now is None:
        return ""
    if reference.kind != now.kind:
        return "other pods, GPUs or drivers"
    if ratio(reference.batch, now.batch) > BATCH_FACTOR:
        return f"an instance decodes {now.batch:.0f} sequences at once instead of {reference.batch:.0f}"
    if ratio(reference.latency_seconds, now.latency_seconds) > LATENCY_FACTOR:
        before, after = 1000 * reference.latency_seconds, 1000 * now.latency_seconds
        return f"inter-token latency is {after:.1f} ms instead of {before:.1f} ms: other contexts or another model"
    if None not in (reference.power_limited, now.power_limited) and reference.power_limited != now.power_limited:
        return "the power limit holds the clock down now" if now.power_limited else "the power limit acts no more"
    return ""


def is_other_kind(reference: Regime | None, now: Regime | None) -> bool:
    """Return whether pods, GPUs or drivers are other ones: no matter of load."""
    return reference is not None and now is not None and reference.kind != now.kind


def follow(reference: Regime, now: Regime, seconds: float, time_constant_seconds: float = FOLLOW_SECONDS) -> Regime:
    """Return the reference moved towards what is seen, as far as the time since the last look allows."""
    share = -math.expm1(-max(0.0, seconds) / time_constant_seconds)

    def between(old: float, new: float) -> float:
        if not (old > 0 and new > 0 and math.isfinite(old) and math.isfinite(new)):
            return old
        return math.exp((1 - share) * math.log(old) + share * math.log(new))

    return replace(
        reference,
        batch=between(reference.batch, now.batch),
        latency_seconds=between(reference.latency_seconds, now.latency_seconds),
    )
