"""Statistics of the experiment: from the paired epochs of many instances to one effect with its interval.

Every pair gives y = log(capped / released). Instances differ (load, model, node), and pairs of one instance are
not independent, so the instance is the unit: the variance is cluster-robust and the quantile is Student's t with
one degree of freedom less than there are instances. A single instance can only speak for itself: there the pairs
are the unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist


@dataclass(frozen=True)
class Sample:
    """Sufficient statistics of y over the pairs of one instance."""

    pairs: int
    total: float
    squares: float


@dataclass(frozen=True)
class Effect:
    """Mean of y with its 95 % confidence interval, in log units."""

    mean: float
    low: float
    high: float
    pairs: int
    instances: int

    @property
    def bounded(self) -> bool:
        """Whether the interval is known: two pairs at least."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Percent:
    """An effect in percent, low <= value <= high."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length, in points."""
        return (self.high - self.low) / 2


@lru_cache(maxsize=4096)
def t_quantile_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, so that +- the result holds 95 %.

    Exact for 1 and 2 degrees of freedom; else the expansion of G. W. Hill, "Algorithm 396: Student's
    t-quantiles", Communications of the ACM 13 (1970) 619-620, good to six digits.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, got {degrees}")
    tails, n = 0.05, float(degrees)
    if degrees == 1:
        return 1 / math.tan(tails * math.pi / 2)
    if degrees == 2:
        return math.sqrt(2 / (tails * (2 - tails)) - 2)
    a = 1 / (n - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * n
    y = (d * tails) ** (2 / n)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(tails / 2)
        y = x * x
        if degrees < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((n + 6) / (n * y) - 0.089 * d - 0.822) * (n + 2) * 3) + 0.5 / (n + 4)) * y - 1) * (n + 1) / (
            n + 2
        ) + 1 / y
    return math.sqrt(n * y)


def pool(samples: Sequence[Sample]) -> Effect | None:
    """Return the pooled effect, or None without any pair.

    The mean weighs every pair alike. With G > 1 instances the variance is G/(G-1) times the sum over instances of
    (total_i - pairs_i mean)^2, over the squared number of pairs (Liang and Zeger 1986, with the usual small-sample
    factor). With one instance it is the sample variance of its pairs.
    """
    used = [sample for sample in samples if sample.pairs > 0 and math.isfinite(sample.total)]
    pairs = sum(sample.pairs for sample in used)
    if pairs == 0:
        return None
    mean = sum(sample.total for sample in used) / pairs
    groups = len(used)
    if groups > 1:
        spread = sum((sample.total - sample.pairs * mean) ** 2 for sample in used)
        error, degrees = math.sqrt(groups / (groups - 1) * spread) / pairs, groups - 1
    elif pairs > 1:
        # Rounding of the reported sums can make a tiny variance negative.
        variance = max(0.0, used[0].squares - used[0].total ** 2 / pairs) / (pairs - 1)
        error, degrees = math.sqrt(variance / pairs), pairs - 1
    else:
        return Effect(mean, -math.inf, math.inf, pairs, groups)
    margin = t_quantile_975(degrees) * error
    return Effect(mean, mean - margin, mean + margin, pairs, groups)


def _exp(value: float) -> float:
    return math.exp(min(50.0, max(-50.0, value)))


def saving_percent(effect: Effect) -> Percent:
    """Return the energy saved for each token, in percent of what it is when released: 100 (1 - e^y)."""
    return Percent(100 * (1 - _exp(effect.mean)), 100 * (1 - _exp(effect.high)), 100 * (1 - _exp(effect.low)))


def change_percent(effect: Effect) -> Percent:
    """Return a change under the cap, in percent: 100 (e^y - 1)."""
    return Percent(100 * (_exp(effect.mean) - 1), 100 * (_exp(effect.low) - 1), 100 * (_exp(effect.high) - 1))
