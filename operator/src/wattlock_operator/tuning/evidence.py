"""What the pairs of one arm say: numbers, and whether the bounds are shown to be kept or broken. Pure.

Everything that decides may be looked at after every pair (see sequential). A search may look at up to MAX_TRIALS arms,
and each is a chance to admit a cap that breaks a bound: so each gets only its share of the 5 %. A search then admits
such a cap in at most 5 % of all cases, whatever the load does, and so does every later search of its own.
"""

import math
from dataclasses import dataclass

from wattlock_operator import sequential
from wattlock_operator.ledger import Tally
from wattlock_operator.tuning.model import Goal, Objective

#: Arms of a search.
MAX_TRIALS = 12
#: To admit a cap: 5 % over all arms of a search.
LOG_ADMIT = math.log(20 * MAX_TRIALS)
#: To give an arm up. To give one up for nothing costs a little saving and nothing else: 5 % for each.
LOG_GIVE_UP = math.log(20)


@dataclass(frozen=True)
class Mean:
    """Mean of the pairs of one quantity, in log units, with its standard error."""

    pairs: int
    value: float
    error: float
    """Infinite with fewer than two pairs."""


def mean_of(pairs: int, sums: tuple[float, float]) -> Mean:
    """Return the mean of some pairs by their sum and their sum of squares."""
    if pairs <= 0:
        return Mean(0, 0.0, math.inf)
    value = sums[0] / pairs
    if pairs == 1:
        return Mean(1, value, math.inf)
    return Mean(pairs, value, math.sqrt(max(0.0, sums[1] - pairs * value**2) / (pairs - 1) / pairs))


def grown(before: Tally, now: Tally) -> Tally:
    """Return what sums have grown by. Fewer pairs than before: some were lost, and nothing is told of new ones."""
    pairs, latency_pairs = now.pairs - before.pairs, now.latency_pairs - before.latency_pairs
    if pairs <= 0:
        return Tally()

    def difference(new: tuple[float, float], old: tuple[float, float]) -> tuple[float, float]:
        return new[0] - old[0], max(0.0, new[1] - old[1])

    latency = difference(now.latency, before.latency) if latency_pairs > 0 else (0.0, 0.0)
    return Tally(
        pairs,
        difference(now.energy, before.energy),
        difference(now.throughput, before.throughput),
        max(0, latency_pairs),
        latency,
    )


def objective_of(goal: Goal, sums: Tally) -> Mean:
    """Return the objective as a log ratio to released: the lower the better."""
    energy = mean_of(sums.pairs, sums.energy)
    if goal.objective is Objective.ENERGY_PER_TOKEN:
        return energy
    delay = mean_of(sums.latency_pairs, sums.latency)
    if not sums.latency_pairs:
        slower = mean_of(sums.pairs, sums.throughput)
        delay = Mean(slower.pairs, -slower.value, slower.error)
    # Errors of one pair go together, one way or the other: their sum is never too small.
    return Mean(sums.pairs, energy.value + delay.value, energy.error + delay.error)


@dataclass(frozen=True)
class _Claim:
    """An effect above a level, with the pairs that speak for it."""

    pairs: int
    total: float
    squares: float
    level: float

    @property
    def log_evidence(self) -> float:
        return sequential.log_evidence_above(self.pairs, self.total, self.squares, self.level)

    @property
    def log_counter_evidence(self) -> float:
        return sequential.log_evidence_above(self.pairs, -self.total, self.squares, -self.level)

    def _shifted(self, optimism: float) -> tuple[float, float] | None:
        """Return sum and sum of squares, had the mean been so many standard errors better."""
        mean = mean_of(self.pairs, (self.total, self.squares))
        if mean.pairs < 2:
            return None
        value = mean.value + optimism * mean.error
        spread = max(0.0, self.squares - self.pairs * mean.value**2)
        return self.pairs * value, spread + self.pairs * value**2

    def is_shown_by(self, pairs: int, optimism: float) -> bool:
        """Return whether so many pairs in all would admit, if they go on as so far or a little better."""
        shifted = self._shifted(optimism)
        if shifted is None:
            return False
        share = pairs / self.pairs
        return sequential.log_evidence_above(pairs, shifted[0] * share, shifted[1] * share, self.level) >= LOG_ADMIT

    def pairs_in_all(self) -> int | None:
        """Return how many pairs it takes in all to admit, if they go on as so far; ``None``: they never will."""
        return sequential.pairs_needed_above(self.pairs, self.total, self.squares, self.level, LOG_ADMIT)


def _fast_enough(goal: Goal, sums: Tally) -> list[tuple[str, _Claim]]:
    """Return the claims of a cap that is within the bounds."""
    claims = [("throughput", _Claim(sums.pairs, *sums.throughput, goal.least_log_throughput))]
    if goal.most_log_latency is not None:
        total, squares = sums.latency
        claims.append(("inter-token latency", _Claim(sums.latency_pairs, -total, squares, -goal.most_log_latency)))
    return claims


def _percent_saved(log_ratio: float) -> float:
    return -100 * math.expm1(min(50.0, log_ratio))


def _pays(sums: Tally) -> _Claim:
    total, squares = sums.energy
    return _Claim(sums.pairs, -total, squares, 0.0)


def breach(goal: Goal, sums: Tally) -> str:
    """Return what is shown to be worse than allowed; empty: nothing is."""
    for name, claim in _fast_enough(goal, sums):
        if claim.log_counter_evidence >= LOG_GIVE_UP:
            return name
    return ""


def costs_energy(sums: Tally) -> bool:
    """Return whether it is shown that the cap makes tokens cost more energy."""
    return _Claim(sums.pairs, *sums.energy, 0.0).log_evidence >= LOG_GIVE_UP


def is_admitted(goal: Goal, sums: Tally) -> bool:
    """Return whether it is shown that the bounds are kept and energy is saved, and the saving is worth it."""
    if _percent_saved(mean_of(sums.pairs, sums.energy).value) < goal.min_saving_percent:
        return False
    claims = [claim for _, claim in _fast_enough(goal, sums)] + [_pays(sums)]
    return all(claim.log_evidence >= LOG_ADMIT for claim in claims)


def can_be_fast_enough(goal: Goal, sums: Tally, pairs: int, optimism: float) -> bool:
    """Return whether so many pairs in all could show that the bounds are kept.

    ``optimism``: by how many standard errors the truth may be better than what was measured.
    """
    return all(claim.is_shown_by(pairs, optimism) for _, claim in _fast_enough(goal, sums))


def can_pay(goal: Goal, sums: Tally, pairs: int, optimism: float) -> bool:
    """Return whether so many pairs in all could show a saving that is worth it."""
    energy = mean_of(sums.pairs, sums.energy)
    if energy.pairs < 2 or _percent_saved(energy.value - optimism * energy.error) < goal.min_saving_percent:
        return False
    return _pays(sums).is_shown_by(pairs, optimism)


def pairs_to_admit(goal: Goal, sums: Tally) -> int | None:
    """Return about how many pairs in all admit the cap, if they go on as so far; ``None``: they never will."""
    wanted = [claim.pairs_in_all() for _, claim in _fast_enough(goal, sums)] + [_pays(sums).pairs_in_all()]
    known = [count for count in wanted if count is not None]
    return max(known) if len(known) == len(wanted) else None
