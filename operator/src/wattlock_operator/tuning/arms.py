"""When an arm is decided, and which one comes next. Pure.

From high to low in steps of a fifth. Each arm is measured until it is clear whether it gains on the one before. Going
down ends where an arm is too slow, or where by convexity the next step cannot gain TIE_POINTS any more; between the
lowest good arm and the highest one that is too slow the search halves. The best arm is then measured until it is shown
that it keeps the bounds (or that this would take too long: then the next better one is).

Convexity: energy for each token over the clock is convex for a GPU that reaches its cap (power falls faster than
linearly with frequency and voltage, time grows), so what a step gained bounds what the next one gains for each MHz.
Where nothing has gained yet, this is not used: caps above what the GPU reaches (a power limit) do nothing at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from wattlock_operator.tuning.evidence import (
    MAX_TRIALS,
    Mean,
    breach,
    can_be_fast_enough,
    can_pay,
    is_admitted,
    objective_of,
)
from wattlock_operator.tuning.model import TOO_SLOW, Goal, Outcome, Trial

#: Each step down leaves so much of the clock.
STEP = 0.8
#: Two clocks that are closer than this part of themselves are not told apart.
RESOLUTION = 0.06
#: An objective that is better by less is not worth a lower clock, in log units: half a point of energy.
TIE = 0.005
#: No arm is given up as hopeless, and none is clear, with fewer pairs.
MIN_PAIRS = 12
#: After so many pairs an arm is clear enough to go on to the next.
SCREEN_PAIRS = 72
#: It must be possible to decide an arm with so many pairs.
MOST_PAIRS = 1000
#: How many standard errors the truth may be better than what was measured, where an arm is given up as hopeless: many
#: as long as it is only screened, since everything below such an arm is given up with it.
OPTIMISM_EARLY, OPTIMISM = 2.5, 1.5
LATE_PAIRS = 108


@dataclass(frozen=True)
class Try:
    """Measure a cap that was not tried yet."""

    cap_mhz: int


@dataclass(frozen=True)
class Confirm:
    """Measure a cap until it is decided."""

    cap_mhz: int


@dataclass(frozen=True)
class Choose:
    """The search is over: this cap is the best."""

    cap_mhz: int


@dataclass(frozen=True)
class Nothing:
    """The search is over: no cap is worth it."""


Next = Try | Confirm | Choose | Nothing


@lru_cache(maxsize=256)
def judged(trial: Trial, goal: Goal) -> Trial:
    """Return the arm with its outcome as far as the pairs decide it; what is decided stays so.

    An arm that was admitted can still turn out to break a bound.
    """
    sums = trial.sums
    if trial.outcome in (*TOO_SLOW, Outcome.DOES_NOT_PAY):
        return trial
    if worse := breach(goal, sums):
        return replace(trial, outcome=Outcome.BREACH, note=f"{worse} is worse than allowed")
    if trial.outcome is Outcome.ADMITTED or is_admitted(goal, sums):
        return replace(trial, outcome=Outcome.ADMITTED, note="")
    if sums.pairs < MIN_PAIRS:
        return trial
    if goal.most_log_latency is not None and sums.latency_pairs == 0:
        return replace(trial, outcome=Outcome.NOT_SHOWN, note="no inter-token latency was measured")
    optimism = OPTIMISM if sums.pairs >= LATE_PAIRS else OPTIMISM_EARLY
    if sums.pairs >= MOST_PAIRS or not can_be_fast_enough(goal, sums, MOST_PAIRS, optimism):
        return replace(trial, outcome=Outcome.NOT_SHOWN, note="too close to a bound, or beyond it")
    if not can_pay(goal, sums, MOST_PAIRS, optimism):
        return replace(trial, outcome=Outcome.DOES_NOT_PAY, note=f"saves less than {goal.min_saving_percent:g} %")
    return trial


def floor_mhz(trials: Sequence[Trial]) -> int | None:
    """Return the highest cap that is too slow: nothing at or below it is in question. ``None``: none is.

    A lower clock is never faster. So where a cap was admitted, one above it that could not be shown to keep the bounds
    just had bad luck. An admitted cap at or below a breach is out of question itself, and speaks for none.
    """
    breach = max((trial.cap_mhz for trial in trials if trial.outcome is Outcome.BREACH), default=0)
    admitted = min(
        (trial.cap_mhz for trial in trials if trial.outcome is Outcome.ADMITTED and trial.cap_mhz > breach),
        default=math.inf,
    )
    not_shown = [trial.cap_mhz for trial in trials if trial.outcome is Outcome.NOT_SHOWN and trial.cap_mhz < admitted]
    return max([breach, *not_shown]) or None


def in_question(trials: Sequence[Trial]) -> list[Trial]:
    """Return the arms that are not too slow."""
    floor = floor_mhz(trials) or 0
    return [trial for trial in trials if trial.cap_mhz > floor and trial.outcome not in TOO_SLOW]


def is_clear(trial: Trial, others: Sequence[Trial], goal: Goal) -> bool:
    """Return whether the arm is decided, or known well enough to go on to another."""
    if trial.outcome is not Outcome.OPEN:
        return True
    pairs = trial.sums.pairs
    if pairs < MIN_PAIRS:
        return False
    if pairs >= SCREEN_PAIRS:
        return True
    mine = objective_of(goal, trial.sums)
    above = [other for other in others if other.cap_mhz > trial.cap_mhz and other.sums.pairs >= MIN_PAIRS]
    before = min(above, key=lambda other: other.cap_mhz, default=None)
    reference = objective_of(goal, before.sums) if before else Mean(0, 0.0, 0.0)
    error = math.hypot(mine.error, reference.error)
    # One that gains clearly is a step on the way; one that loses clearly is the end of it.
    return abs(mine.value - reference.value) - TIE > 2 * error


def usable_clocks(supported_mhz: Sequence[int], goal: Goal, top_mhz: int) -> tuple[int, ...]:
    """Return the caps that may be tried, highest first."""
    return tuple(
        sorted(
            {
                mhz
                for mhz in supported_mhz
                if mhz < top_mhz
                and (goal.min_mhz is None or mhz >= goal.min_mhz)
                and (goal.max_mhz is None or mhz <= goal.max_mhz)
            },
            reverse=True,
        )
    )


def _points(trials: Sequence[Trial], goal: Goal, top_mhz: int) -> list[tuple[int, Mean]]:
    """Return clock and objective of the arms that were measured, from the released clock down."""
    known = [
        (trial.cap_mhz, objective_of(goal, trial.sums))
        for trial in sorted(in_question(trials), key=lambda trial: -trial.cap_mhz)
        if trial.sums.pairs >= 2
    ]
    return [(top_mhz, Mean(0, 0.0, 0.0)), *known]


def _can_gain(trials: Sequence[Trial], goal: Goal, top_mhz: int, target_mhz: int) -> bool:
    points = _points(trials, goal, top_mhz)
    if len(points) < 2 or all(mean.value > -2 * mean.error for _, mean in points[1:]):
        return True  # nothing has gained yet
    (upper_mhz, upper), (lowest_mhz, lowest) = points[-2:]
    gain = upper.value - lowest.value + math.hypot(upper.error, lowest.error)
    return gain / max(1, upper_mhz - lowest_mhz) * (lowest_mhz - target_mhz) > TIE


def _lower(trials: Sequence[Trial], goal: Goal, clocks_mhz: Sequence[int], top_mhz: int, start_mhz: int) -> int | None:
    """Return the next cap below the lowest good one, if there is one that could gain."""
    if len(trials) >= MAX_TRIALS:
        return None
    lowest, floor = min((trial.cap_mhz for trial in in_question(trials)), default=top_mhz), floor_mhz(trials)
    tried = {trial.cap_mhz for trial in trials}
    if floor is None:
        target = start_mhz if not trials else STEP * lowest
        free = [mhz for mhz in clocks_mhz if mhz < lowest and mhz not in tried]
        choice = max((mhz for mhz in free if mhz <= target), default=min(free, default=None))
    else:
        if lowest - floor <= RESOLUTION * lowest:
            return None
        free = [mhz for mhz in clocks_mhz if floor < mhz < lowest and mhz not in tried]
        middle = (lowest + floor) / 2
        choice = min(free, key=lambda mhz: (abs(mhz - middle), mhz), default=None)
    if choice is None or not _can_gain(trials, goal, top_mhz, choice):
        return None
    return choice


def best_arm(trials: Sequence[Trial], goal: Goal) -> Trial | None:
    """Return the arm with the best objective; of those that hardly differ the one with the highest clock."""
    good = [trial for trial in in_question(trials) if trial.outcome is not Outcome.DOES_NOT_PAY and trial.sums.pairs]
    if not good:
        return None
    best = min(objective_of(goal, trial.sums).value for trial in good)
    return max(
        (trial for trial in good if objective_of(goal, trial.sums).value <= best + TIE), key=lambda trial: trial.cap_mhz
    )


def next_arm(trials: Sequence[Trial], goal: Goal, clocks_mhz: Sequence[int], top_mhz: int, start_mhz: int) -> Next:
    """Return what to do when all arms so far are clear. ``start_mhz``: the first cap is at most this."""
    lower = _lower(trials, goal, clocks_mhz, top_mhz, start_mhz)
    if lower is not None:
        return Try(lower)
    best = best_arm(trials, goal)
    if best is None:
        return Nothing()
    return Choose(best.cap_mhz) if best.outcome is Outcome.ADMITTED else Confirm(best.cap_mhz)


def arms_left(trials: Sequence[Trial], clocks_mhz: Sequence[int], top_mhz: int) -> int:
    """Return how many more arms there can be, roughly: steps down, or halvings."""
    lowest, floor = min((trial.cap_mhz for trial in in_question(trials)), default=top_mhz), floor_mhz(trials)
    if not clocks_mhz or lowest <= clocks_mhz[-1]:
        return 0
    if floor is None:
        steps = math.ceil(math.log(lowest / clocks_mhz[-1]) / -math.log(STEP))
    else:
        steps = math.ceil(math.log2(max(1.0, (lowest - floor) / (RESOLUTION * lowest))))
    return max(0, min(steps, MAX_TRIALS - len(trials)))
