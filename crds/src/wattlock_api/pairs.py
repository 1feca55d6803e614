"""Sums over the paired epochs of the experiment: agents report them, and the operator keeps those of pods that left."""

from typing import Annotated

from pydantic import Field

from wattlock_api.base import ApiModel, DecimalString, PositiveDecimalString


class Moments(ApiModel):
    """Sum and sum of squares of a paired log ratio, log(cap) - log(control)."""

    total: DecimalString = "0"
    """Sum over the pairs."""
    squares: PositiveDecimalString = "0"
    """Sum of the squares."""


class PairStats(ApiModel):
    """Sufficient statistics of the paired epochs of one cap against control."""

    cap_mhz: Annotated[int, Field(ge=100, le=5000)]
    """The cap, in MHz."""
    pairs: int = 0
    """Number of pairs of neighbouring epochs."""
    energy: Moments = Moments()
    """Of joules for each generated token."""
    throughput: Moments = Moments()
    """Of generated tokens per second."""
    latency_pairs: int = 0
    """Pairs in which the inter-token latency was measured in both epochs."""
    latency: Moments = Moments()
    """Of the mean inter-token latency, over latencyPairs."""
