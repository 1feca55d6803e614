"""Evidence that holds at every look: for people who watch the status all day. Pure.

A 95 % interval is right at one look. Whoever looks every minute and stops at the first interval without zero is fooled
far more often. What is computed here may be looked at as often as one likes.

Where the cap does nothing, the coin that orders a pair decides the sign of d and nothing else: given their sizes |d|,
the signs of all pairs of all instances are independent fair coins, whatever load, noise and correlation are. For any
number b > 0 the product over the pairs of exp(b d) / cosh(b |d|) is then a martingale that begins at 1: money in a fair
game. It is bounded from below by exp(b S) / cosh(b r)^n with n pairs, their sum S and root mean square r, because log
cosh(b sqrt(u)) is concave in u. The mean of that over b and -b and over a fixed list of b is

    E = sum_k w_k cosh(b_k S) / cosh(b_k r)^n

and by Ville's inequality it ever reaches 20 with a probability of at most 1/20: exactly, for any sample size and with
no variance to be estimated.

J. Ville, "Étude critique de la notion de collectif" (1939). H. Robbins, "Statistical methods related to the law of the
iterated logarithm", Annals of Mathematical Statistics 41 (1970) 1397-1409. V. H. de la Peña, "A general class of
exponential inequalities for martingales and ratios", Annals of Probability 27 (1999) 537-564. S. R. Howard, A. Ramdas,
J. McAuliffe and J. Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49
(2021) 1055-1080.
"""

import math
from collections.abc import Callable, Sequence

from wattlock_operator.pooling import Sample

#: From here on it is evidence: at no effect it is ever reached in at most 5 % of all experiments.
LOG_ENOUGH = math.log(20)
#: The b of the mixture, fixed in advance and weighed alike. Best is about mean / (mean square) of d: from small effects
#: in much noise (2) to effects of some percent that are hardly disturbed (128).
BETS = tuple(2.0**power for power in range(1, 8))
_MOST_PAIRS = 1_000_000
#: The farthest effect that is looked at, and how exactly an end is found, in log units.
_MAX_EFFECT = 4.0
_ROUGHLY = 1e-6


def _log_cosh(x: float) -> float:
    x = abs(x)
    return x + math.log1p(math.exp(-2 * x)) - math.log(2)


def log_evidence(pairs: int, total: float, squares: float) -> float:
    """Return log E for the sum and the sum of squares of d over that many pairs; 0 (no evidence) without pairs."""
    if pairs <= 0 or not (math.isfinite(total) and squares > 0):
        return 0.0
    # By Cauchy and Schwarz; rounded sums could break it by a hair.
    root_mean_square = math.sqrt(max(squares, total**2 / pairs) / pairs)
    logs = [_log_cosh(bet * total) - pairs * _log_cosh(bet * root_mean_square) for bet in BETS]
    highest = max(logs)
    return highest + math.log(sum(math.exp(each - highest) for each in logs) / len(BETS))


def log_evidence_above(pairs: int, total: float, squares: float, level: float) -> float:
    """Return log E against "no pair has an effect above ``level``", good at every look; 0 without pairs.

    The bet is on one side: the mean over b > 0 of exp(b S) / cosh(b r)^n with d - level for d. With an effect e <= 0 in
    a pair, of which the coin decides the sign of the rest x, a factor has the mean 1 + (tanh(b (e + x)) +
    tanh(b (e - x))) / 2, which is at most 1 since tanh is odd and rises: nobody can expect to gain, so Ville's
    inequality holds here as well.
    """
    if pairs <= 0 or not (math.isfinite(total) and math.isfinite(squares) and squares >= 0):
        return 0.0
    moved = total - pairs * level
    moved_squares = max(squares - 2 * level * total + pairs * level**2, moved * moved / pairs)
    root_mean_square = math.sqrt(max(0.0, moved_squares) / pairs)
    if not math.isfinite(root_mean_square):
        return 0.0
    logs = [bet * moved - pairs * _log_cosh(bet * root_mean_square) for bet in BETS]
    highest = max(logs)
    return highest + math.log(sum(math.exp(each - highest) for each in logs) / len(BETS))


def pairs_needed_above(pairs: int, total: float, squares: float, level: float, log_wanted: float) -> int | None:
    """Return about how many pairs it takes in all for that much evidence, if they go on as so far.

    ``None``: beyond a million, or never.
    """
    if pairs <= 0 or not total > pairs * level:
        return None

    def enough(count: int) -> bool:
        return log_evidence_above(count, total * count / pairs, squares * count / pairs, level) >= log_wanted

    return _first(pairs, enough)


def pooled(samples: Sequence[Sample]) -> tuple[int, float, float]:
    """Return pairs, sum and sum of squares over all instances: their coins are independent."""
    return (
        sum(sample.pairs for sample in samples),
        sum(sample.total for sample in samples),
        sum(sample.squares for sample in samples),
    )


def is_enough(log_value: float) -> bool:
    """Return whether the evidence holds at every look."""
    return log_value >= LOG_ENOUGH


def pairs_needed(pairs: int, total: float, squares: float, chances: int = 1) -> int | None:
    """Return about how many pairs there must be in all, if they go on as so far; ``None``: beyond a million.

    ``chances``: out of how many such experiments this one may have been picked.
    """
    if pairs <= 0:
        return None

    def enough(count: int) -> bool:
        found = log_evidence(count, total * count / pairs, squares * count / pairs)
        return is_enough(found - math.log(chances))

    return _first(pairs, enough)


def _first(pairs: int, enough: Callable[[int], bool]) -> int | None:
    """Return the lowest number from ``pairs`` on that is enough; ``None``: beyond a million."""
    high = pairs
    while not enough(high):
        high *= 2
        if high > _MOST_PAIRS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return max(high, pairs)


def interval_at_every_look(pairs: int, total: float, squares: float, chances: int = 1) -> tuple[float, float]:
    """Return the mean effects that the evidence has not ruled out, in log units: a 95 % confidence sequence.

    An effect of t in every pair is ruled out where d - t has evidence enough against zero. The interval holds the
    truth at all looks at once with 95 % probability, so also at the look at which somebody decides to stop. Infinite
    while there is too little data. ``chances``: out of how many such experiments this one may have been picked.
    """

    def ruled_out(effect: float) -> bool:
        moved = squares - 2 * effect * total + pairs * effect**2
        return is_enough(log_evidence(pairs, total - pairs * effect, max(0.0, moved)) - math.log(chances))

    if pairs <= 0:
        return -math.inf, math.inf
    mean = total / pairs
    ends = []
    for sign in (-1.0, 1.0):
        inside, outside = 0.0, _MAX_EFFECT
        if not ruled_out(mean + sign * outside):
            ends.append(sign * math.inf)
            continue
        while outside - inside > _ROUGHLY:
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if ruled_out(mean + sign * middle) else (middle, outside)
        ends.append(mean + sign * outside)
    return ends[0], ends[1]
