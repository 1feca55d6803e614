"""Statistics of the experiment: from the paired epochs of many instances to one effect with its interval. Pure.

Every pair gives d = log(capped / released). Which of its two epochs is the released one was decided by a fair coin, so

    d = (effect in this pair) + s * (what differed between the two epochs),    s = +1 or -1 by the coin

and the second part is zero on average and uncorrelated between pairs, whatever the load does: within an instance, from
one hour to the next, and between instances that share a load balancer. **The pair is the unit of randomisation**, and
so the unit of the interval. Instances are strata: they may differ in noise and in effect (model, traffic, node), and a
difference between them is not error. The interval is about the instances and the time that were measured.

Why not one number for each instance (a cluster-robust variance): that answers what an instance that nobody has measured
would save. For these instances it is four times too wide with two of them, and covers 100 % where they differ or one is
much noisier than the rest (docs/benchmarks.md). See Abadie, Athey, Imbens and Wooldridge, "When Should You Adjust
Standard Errors for Clustering?", Quarterly Journal of Economics 138 (2023) 1-35: clusters count where samples or
treatments are drawn by cluster; here each pair has a coin of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist


@dataclass(frozen=True)
class Sample:
    """Sufficient statistics of d over the pairs of one instance."""

    pairs: int
    total: float
    squares: float

    @property
    def spread(self) -> float:
        """Sum of the squared distances from the mean. Rounding of reported sums could make it negative: then 0."""
        return max(0.0, self.squares - self.total**2 / self.pairs) if self.pairs else 0.0


@dataclass(frozen=True)
class Effect:
    """Mean of d with its 95 % confidence interval, in log units."""

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
def _t_quantile_975(degrees: int) -> float:
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


def t_quantile_975(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t, so that +- the result holds 95 %.

    Exact for 1 and 2 degrees of freedom; else the expansion of G. W. Hill, "Algorithm 396: Student's
    t-quantiles", Communications of the ACM 13 (1970) 619-620, good to six digits. Between whole numbers a straight
    line over 1/degrees, as printed tables recommend: good to three digits from three degrees on, wide before.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, got {degrees}")
    below = math.floor(degrees)
    if below == degrees or below > 1000:
        return _t_quantile_975(below)
    share = (1 / below - 1 / degrees) / (1 / below - 1 / (below + 1))
    return _t_quantile_975(below) + share * (_t_quantile_975(below + 1) - _t_quantile_975(below))


def _strata(samples: Sequence[Sample]) -> list[Sample]:
    """Return groups of two pairs at least, each with a variance of its own.

    Instances with one pair share a group, where they differ or not: too wide rather than too narrow. A single pair
    that is left alone joins the smallest group.
    """
    strata = [sample for sample in samples if sample.pairs > 1]
    single = [sample for sample in samples if sample.pairs == 1]
    if len(single) == 1 and strata:
        smallest = min(strata, key=lambda sample: sample.pairs)
        strata.remove(smallest)
        single.append(smallest)
    if single:
        strata.append(
            Sample(
                sum(sample.pairs for sample in single),
                sum(sample.total for sample in single),
                sum(sample.squares for sample in single),
            )
        )
    return strata


def pool(samples: Sequence[Sample]) -> Effect | None:
    """Return the pooled effect, or None without any pair.

    The mean weighs every pair alike, so an instance by the time for which it was measured. With the sample variance
    s_i^2 of the n_i pairs of instance i, the variance of the mean is sum(n_i s_i^2) / N^2 (stratified sampling; Neyman,
    "On the two different aspects of the representative method", J. Royal Statistical Society 97 (1934) 558-625). The
    degrees of freedom are Welch's, in the form that is right on average for small groups (Natrella, "Experimental
    Statistics", NBS Handbook 91 (1963), 3-3.1.2): (sum v_i)^2 / sum(v_i^2 / (n_i + 1)) - 2 with v_i = n_i s_i^2.
    """
    used = [
        sample
        for sample in samples
        if sample.pairs > 0 and math.isfinite(sample.total) and math.isfinite(sample.squares)
    ]
    pairs = sum(sample.pairs for sample in used)
    if pairs == 0:
        return None
    mean = sum(sample.total for sample in used) / pairs
    if pairs == 1:
        return Effect(mean, -math.inf, math.inf, pairs, len(used))
    strata = _strata(used)
    parts = [sample.pairs * sample.spread / (sample.pairs - 1) for sample in strata]
    whole, degrees = sum(parts), float(pairs - len(strata))
    if whole > 0:
        # As shares of the whole: squares of tiny numbers would vanish.
        shares = sum((part / whole) ** 2 / (sample.pairs + 1) for part, sample in zip(parts, strata, strict=True))
        degrees = min(degrees, max(1.0, 1 / shares - 2))
    margin = t_quantile_975(degrees) * math.sqrt(whole) / pairs
    return Effect(mean, mean - margin, mean + margin, pairs, len(used))


def _exp(value: float) -> float:
    return math.exp(min(50.0, max(-50.0, value)))


def saving_percent(effect: Effect) -> Percent:
    """Return the energy saved for each token, in percent of what it is when released: 100 (1 - e^y)."""
    return Percent(100 * (1 - _exp(effect.mean)), 100 * (1 - _exp(effect.high)), 100 * (1 - _exp(effect.low)))


def change_percent(effect: Effect) -> Percent:
    """Return a change under the cap, in percent: 100 (e^y - 1)."""
    return Percent(100 * (_exp(effect.mean) - 1), 100 * (_exp(effect.low) - 1), 100 * (_exp(effect.high) - 1))
