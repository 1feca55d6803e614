"""What a serving engine tells about its work, whatever engine it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingCounters:
    """Cumulative counters and gauges of one /metrics page. ``None``: the page does not have it."""

    at_seconds: float
    """Monotonic time at which the page was asked for."""
    generated_tokens: float | None
    prompt_tokens: float | None
    """All prompt tokens, wherever they were computed."""
    computed_prompt_tokens: float | None
    """Prompt tokens computed by this instance itself. ``None`` where the engine cannot tell them apart."""
    inter_token_latency_sum_seconds: float | None
    inter_token_latency_count: float | None
    running_requests: float | None
    waiting_requests: float | None
    preemptions: float | None
    born_seconds: float | None
    """Time of birth of the generated-tokens counter, in seconds since 1970; a new value means a restart."""


@dataclass(frozen=True)
class ScrapeFailure:
    """A page that could not be used."""

    at_seconds: float
    reason: str
    """A wattlock_api.constants.Reason: MetricsUnreachable, MetricsInvalid, MetricsTooLarge, NoServingMetrics."""
    message: str


@dataclass(frozen=True)
class ServingDelta:
    """Work between two pages of the same life of an instance. ``None``: unknown."""

    seconds: float
    generated_tokens: float | None
    computed_prompt_tokens: float | None
    prompt_tokens: float | None
    inter_token_latency_sum_seconds: float | None
    inter_token_latency_count: float | None


def is_restart(before: ServingCounters, after: ServingCounters) -> bool:
    """Return whether a counter went back or was born anew between two pages: the engine restarted."""
    if before.born_seconds is not None and after.born_seconds is not None and before.born_seconds != after.born_seconds:
        return True
    names = ("generated_tokens", "prompt_tokens", "computed_prompt_tokens", "inter_token_latency_count")
    return any(
        (old := getattr(before, name)) is not None and (new := getattr(after, name)) is not None and new < old
        for name in names
    )


def difference(before: ServingCounters, after: ServingCounters) -> ServingDelta:
    """Return the work between two pages; the caller has ruled out a restart."""

    def delta(old: float | None, new: float | None) -> float | None:
        return None if old is None or new is None else new - old

    return ServingDelta(
        seconds=after.at_seconds - before.at_seconds,
        generated_tokens=delta(before.generated_tokens, after.generated_tokens),
        computed_prompt_tokens=delta(before.computed_prompt_tokens, after.computed_prompt_tokens),
        prompt_tokens=delta(before.prompt_tokens, after.prompt_tokens),
        inter_token_latency_sum_seconds=delta(
            before.inter_token_latency_sum_seconds, after.inter_token_latency_sum_seconds
        ),
        inter_token_latency_count=delta(before.inter_token_latency_count, after.inter_token_latency_count),
    )
