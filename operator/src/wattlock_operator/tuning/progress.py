"""Where the tuner is, in words and in time. Pure."""

import math
from dataclasses import dataclass

from wattlock_operator.pooling import t_quantile_975
from wattlock_operator.tuning.arms import MOST_PAIRS, SCREEN_PAIRS, arms_left, best_arm, usable_clocks
from wattlock_operator.tuning.evidence import Mean, mean_of, pairs_to_admit
from wattlock_operator.tuning.model import Goal, Observation, Outcome, Phase, Trial, Tuning


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    arm: int
    """Number of the arm that is measured now, from 1."""
    arms: int
    """How many it will be, at most."""
    seconds_left: float | None
    """Roughly; ``None``: nobody can tell."""


def percent_of(mean: Mean, sign: float = 1.0) -> tuple[float, float] | None:
    """Return a log ratio as a percentage with its 95 % half-width for one look; ``None`` with fewer than two pairs."""
    if mean.pairs < 2 or not math.isfinite(mean.error):
        return None
    ratio = math.exp(min(50.0, max(-50.0, mean.value)))
    return sign * 100 * (ratio - 1), 100 * ratio * mean.error * t_quantile_975(mean.pairs - 1)


def saving_of(trial: Trial) -> tuple[float, float] | None:
    """Return the energy that an arm saves for each token, in percent, with its half-width."""
    return percent_of(mean_of(trial.sums.pairs, trial.sums.energy), sign=-1.0)


def _to_decide(trial: Trial, goal: Goal) -> int:
    """Return how many more pairs show that an arm keeps the bounds and pays, roughly."""
    wanted = pairs_to_admit(goal, trial.sums)
    return max(1, (MOST_PAIRS if wanted is None else min(wanted, MOST_PAIRS)) - trial.sums.pairs)


def progress(state: Tuning, goal: Goal, seen: Observation) -> Progress | None:
    """Return how far the search is; ``None`` when none is going on."""
    if state.phase is not Phase.SEARCHING:
        return None
    top = state.top_mhz or max(seen.supported_mhz, default=0)
    more = arms_left(state.trials, usable_clocks(seen.supported_mhz, goal, top), top)
    current = state.trial(state.current_mhz)
    number = len(state.trials) if current is None else state.trials.index(current) + 1
    if seen.instances < 1:
        return Progress(number, len(state.trials) + more, None)
    pairs = 0
    if state.confirming and current is not None:
        pairs += _to_decide(current, goal)
    else:
        if current is not None and current.outcome is Outcome.OPEN:
            pairs += max(1, SCREEN_PAIRS - current.sums.pairs)
        # Most arms are clear long before SCREEN_PAIRS; the last one has to be shown in full.
        pairs += more * SCREEN_PAIRS // 2
        best = best_arm(state.trials, goal)
        if best is not None and best.outcome is Outcome.OPEN:
            pairs += _to_decide(best, goal)
    return Progress(number, len(state.trials) + more, pairs * seen.pair_seconds / seen.instances)


def duration_text(seconds: float) -> str:
    """Return a duration for people: one that is only roughly known."""
    minutes = max(1, math.ceil(seconds / 60))
    return f"{minutes} min" if minutes < 100 else f"{math.ceil(minutes / 60)} h"


def _saving_text(trial: Trial) -> str:
    saving = saving_of(trial)
    return "saving not measured yet" if saving is None else f"saving {saving[0]:.1f} % ± {saving[1]:.1f}"


def describe(state: Tuning, goal: Goal, seen: Observation) -> str:
    """Return where the tuner is as a sentence."""
    if state.phase is Phase.STARTING:
        return state.note or "looking at the released pool before the first cap"
    if state.phase is Phase.RELEASED:
        return f"left released after {len(state.trials)} arm(s): {state.note}"
    current = state.trial(state.current_mhz)
    if state.phase is Phase.SETTLED:
        text = f"chose {state.current_mhz} MHz after {len(state.trials)} arm(s)"
        return f"{text}, {_saving_text(current)}" if current is not None else text
    if current is None:
        return f"{state.note or 'between two arms'}: the search goes on when the cool-down is over"
    found = progress(state, goal, seen)
    arms = "" if found is None else f"arm {found.arm} of at most {found.arms}, "
    left = "" if found is None or found.seconds_left is None else f", about {duration_text(found.seconds_left)} left"
    doing = ", until it is shown to keep the bounds" if state.confirming else ""
    return f"{arms}{current.cap_mhz} MHz, {_saving_text(current)}{doing}{left}"
