"""From measured windows to one row for each point: means, and differences to stock with their 95 % intervals. Pure.

Each window of a point is compared with the stock windows before and after it, interpolated in time, so what drifts
slowly (temperature, a neighbour's load) cancels. These differences of logarithms, one a repeat, are what the intervals
are made of: Student's t over the repeats, which share no stock window and so are independent.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wattlock_agent.sweep.plan import STOCK, Setting, Shape, Workload

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook, section 1.3.6.7.2).
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_T_NORMAL = 1.960


@dataclass(frozen=True)
class Window:
    """One measurement: means over the window, summed over the GPUs of the endpoint where that makes sense."""

    workload: Workload
    setting: Setting
    at_seconds: float
    """Middle of the window, from the start of the sweep."""
    seconds: float
    watts: float
    """Board power of all GPUs, from their energy counters."""
    generated_per_second: float
    prompt_per_second: float
    """Prompt tokens that the endpoint computed itself."""
    observed_mhz: float | None
    """Median SM clock of all samples and GPUs."""
    cap_share: float | None
    """Share of the time, 0 to 1, in which the power limit held the clock down; the mean of the GPUs."""
    celsius: float | None
    """Mean temperature of the GPUs."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the kind that the workload is about: generated for decode, computed prompt tokens for prefill."""
        return self.prompt_per_second if self.workload.shape is Shape.PREFILL else self.generated_per_second

    @property
    def joules_per_token(self) -> float:
        """Board energy for each such token."""
        return self.watts / self.tokens_per_second


@dataclass(frozen=True)
class Change:
    """A relative difference to stock, in percent, with its 95 % interval."""

    percent: float
    low_percent: float
    high_percent: float
    pairs: int
    """Comparisons with stock behind it. With one there is no interval: it reaches from -inf to inf."""

    @property
    def known(self) -> bool:
        """Whether the interval does not hold zero."""
        return self.low_percent > 0 or self.high_percent < 0


@dataclass(frozen=True)
class Row:
    """One point under one workload."""

    workload: Workload
    setting: Setting
    windows: int
    watts: float
    tokens_per_second: float
    joules_per_token: float
    observed_mhz: float | None
    cap_share: float | None
    energy: Change | None
    """Change of joules per token; ``None`` for stock itself."""
    throughput: Change | None
    """Change of tokens per second; ``None`` for stock itself."""


def change(logarithms: Sequence[float]) -> Change:
    """Return the relative change whose logarithm was seen so often, with its 95 % interval."""
    mean = statistics.fmean(logarithms)
    count = len(logarithms)
    if count < 2:
        return Change(100 * math.expm1(mean), -math.inf, math.inf, count)
    quantile = _T[count - 2] if count - 2 < len(_T) else _T_NORMAL
    half = quantile * statistics.stdev(logarithms) / math.sqrt(count)
    return Change(100 * math.expm1(mean), 100 * math.expm1(mean - half), 100 * math.expm1(mean + half), count)


def summarise(windows: Sequence[Window]) -> tuple[Row, ...]:
    """Return a row for each workload and point, in the order in which they were first measured.

    Windows without work (no tokens) are left out: they have no joules per token.
    """
    rows: list[Row] = []
    good = [window for window in windows if window.tokens_per_second > 0 and window.watts > 0]
    for workload in dict.fromkeys(window.workload for window in good):
        own = sorted((each for each in good if each.workload == workload), key=lambda each: each.at_seconds)
        stocks = [window for window in own if window.setting == STOCK]
        rows += [
            _row([each for each in own if each.setting == setting], stocks)
            for setting in dict.fromkeys(window.setting for window in own)
        ]
    return tuple(rows)


def _row(windows: Sequence[Window], stocks: Sequence[Window]) -> Row:
    first = windows[0]
    is_stock = first.setting == STOCK
    energy = [] if is_stock else [_against(window, stocks, lambda each: each.joules_per_token) for window in windows]
    rate = [] if is_stock else [_against(window, stocks, lambda each: each.tokens_per_second) for window in windows]
    energies = [value for value in energy if value is not None]
    rates = [value for value in rate if value is not None]
    return Row(
        workload=first.workload,
        setting=first.setting,
        windows=len(windows),
        watts=statistics.fmean(window.watts for window in windows),
        tokens_per_second=statistics.fmean(window.tokens_per_second for window in windows),
        joules_per_token=statistics.fmean(window.joules_per_token for window in windows),
        observed_mhz=_mean([window.observed_mhz for window in windows]),
        cap_share=_mean([window.cap_share for window in windows]),
        energy=change(energies) if energies else None,
        throughput=change(rates) if rates else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _against(window: Window, stocks: Sequence[Window], value: Callable[[Window], float]) -> float | None:
    """Return the logarithm of a window's value over that of stock at its time; ``None`` without stock around it."""
    before = [each for each in stocks if each.at_seconds < window.at_seconds]
    after = [each for each in stocks if each.at_seconds > window.at_seconds]
    if not before or not after:
        return None
    left, right = before[-1], after[0]
    share = (window.at_seconds - left.at_seconds) / (right.at_seconds - left.at_seconds)
    stock = (1 - share) * math.log(value(left)) + share * math.log(value(right))
    return math.log(value(window)) - stock
