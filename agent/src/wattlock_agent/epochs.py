"""Judges one epoch of one instance: what was measured in it, or why it cannot be used. Pure.

An epoch is measured from the first scrape at least three seconds after its start to the last scrape before its end;
tokens and joules are taken at exactly the times of these scrapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from wattlock_api.schedule import Experiment, epoch_start_seconds

#: What happens so soon after a switch is not measured: the clock, the power and the batch settle.
SETTLE_SECONDS = 3.0
#: The last scrape of an epoch is made so long before its end.
END_MARGIN_SECONDS = 0.3
SCRAPE_SECONDS = 5.0
MIN_SAMPLES_SHARE = 0.8


class Drop(StrEnum):
    """Why an epoch is not used; the values are the fields of DroppedEpochs.

    None may depend on the arm: the coin makes capped and released epochs alike only as long as both are dropped for the
    same things. So limiters are no reason (a lower clock keeps a GPU off its power and thermal limits: that is part of
    its effect, and without the hot epochs the capped ones that are left had more load), and what would have tripped the
    guardrail drops a released epoch too (``experiment.Switchback.spoil``).
    """

    RESTART = "restart"
    NO_TOKENS = "no_tokens"
    SAMPLES = "samples"
    NOT_APPLIED = "not_applied"
    PEERS = "peers"


@dataclass(frozen=True)
class Sample:
    """One scrape and the energy of the instance's GPUs at its time."""

    unix_seconds: float
    generated_tokens: float
    latency_sum_seconds: float | None
    latency_count: float | None
    joules: float
    lives: tuple[object, ...]
    """Changes with every restart of the engine or of an energy counter, and with the set of GPUs."""
    computed_prompt_tokens: float | None = None


@dataclass(frozen=True)
class EpochResult:
    """What was measured in an epoch."""

    seconds: float
    joules: float
    generated_tokens: float
    mean_latency_seconds: float | None


def judge_epoch(
    experiment: Experiment,
    epoch: int,
    samples: Sequence[Sample],
    as_asked: bool,
    needs_tokens: bool = True,
    lives_before: tuple[object, ...] | None = None,
) -> EpochResult | Drop:
    """Return what was measured in the epoch, or why it cannot be used.

    ``needs_tokens`` is False where only the energy is measured: the tokens are counted on another node.
    ``lives_before`` are those of the last sample before the epoch. An engine takes half a minute to start and answers
    nothing in the meantime: the epoch in which it comes back lacks samples because of the restart.
    """
    start = epoch_start_seconds(experiment, epoch)
    inside = sorted(
        (each for each in samples if start + SETTLE_SECONDS <= each.unix_seconds < start + experiment.epoch_seconds),
        key=lambda each: each.unix_seconds,
    )
    if not as_asked:
        return Drop.NOT_APPLIED
    if any(each.lives != inside[0].lives for each in inside):
        return Drop.RESTART
    window_seconds = experiment.epoch_seconds - SETTLE_SECONDS - END_MARGIN_SECONDS
    expected = 2 + int(window_seconds // SCRAPE_SECONDS)
    came_back = lives_before is not None and any(each.lives != lives_before for each in inside)
    too_few = Drop.RESTART if came_back else Drop.SAMPLES
    if len(inside) < MIN_SAMPLES_SHARE * expected:
        return too_few
    first, last = inside[0], inside[-1]
    seconds = last.unix_seconds - first.unix_seconds
    if seconds < MIN_SAMPLES_SHARE * window_seconds:
        return too_few
    tokens, joules = last.generated_tokens - first.generated_tokens, last.joules - first.joules
    if joules <= 0 or (needs_tokens and tokens < 1):
        return Drop.NO_TOKENS
    return EpochResult(seconds, joules, tokens, _mean_latency_seconds(first, last))


def _mean_latency_seconds(first: Sample, last: Sample) -> float | None:
    counts, sums = (first.latency_count, last.latency_count), (first.latency_sum_seconds, last.latency_sum_seconds)
    if counts[0] is None or counts[1] is None or sums[0] is None or sums[1] is None:
        return None
    count, total = counts[1] - counts[0], sums[1] - sums[0]
    return total / count if count > 0 and total > 0 else None
