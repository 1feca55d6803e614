"""What dropping epochs does to the estimate: by a rule that depends on the arm, and by one that does not."""

from dataclasses import dataclass, replace

import numpy as np
from estimator_scenarios import BURSTS, BUSY
from estimator_world import draw_load, draw_schedule, epoch_power, pairs_of

#: A released GPU that draws more than this in some part of an epoch counts as held by a thermal limiter.
HOT_WATTS = 660.0
#: Some part of an epoch with a larger batch is too slow for the guardrail.
SLOW_BATCH = 60.0


@dataclass(frozen=True)
class Bias:
    """Estimate minus the truth of the same pairs, in points."""

    name: str
    dropped_percent: float
    points: float
    error_points: float
    """Standard error."""
    used: bool
    """Whether it is the product's rule."""


def _bias(name: str, d: np.ndarray, truth: np.ndarray, keep: np.ndarray, used: bool) -> Bias:
    saving, true = (100 * (1 - np.exp(each[keep].mean())) for each in (d, truth))
    error = 100 * (d - truth)[keep].std() / np.sqrt(keep.sum())
    return Bias(name, float(100 * (1 - keep.mean())), float(saving - true), float(error), used)


def biases(pools: int) -> list[Bias]:
    """Return what each rule does."""
    found = []
    for scenario in (replace(BUSY, slow=0.25), BURSTS):
        chance = np.random.default_rng(20261123)
        schedule = draw_schedule(scenario, range(pools))
        load = draw_load(scenario, schedule[0], chance)
        pairs = pairs_of(scenario, schedule, load, chance)
        # By epoch of the pair: whether it is the released one.
        released = np.stack([schedule[1], ~schedule[1]], axis=-1)
        hot = np.where(released, *((epoch_power(load, arm)[0] > HOT_WATTS).any(-1) for arm in ("released", "capped")))
        slow = (load > np.log(SLOW_BATCH)).any(-1)
        name = "busy" if scenario is not BURSTS else "bursts"
        rules = (
            ("limiter: the epochs that it held are dropped", hot.any(-1), False),
            ("limiter: nothing is dropped", np.zeros(hot.shape[:-1], bool), True),
            ("guardrail: drops the capped epochs that it ended", (slow & ~released).any(-1), False),
            ("guardrail: drops the released ones alike", slow.any(-1), True),
        )
        found += [_bias(f"{name}, {rule}", pairs.d, pairs.truth, ~drop, used) for rule, drop, used in rules]
    return found
