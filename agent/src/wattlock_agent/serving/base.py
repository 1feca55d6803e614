"""What a serving engine tells about its work, whatever engine it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingCounters:
    """Cumulative counters and gauges of one /metrics page. ``None``: the page does not have it."""

    at_seconds: float
    """Monotonic time at which the page was asked for."""
    generated_tokens: float | None
    """Where the engine has two counters, the one that grows while a request runs, not when it ends."""
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
    """Time of birth of the generated-tokens counter, in seconds since 1970; a new value means a restart. Of several
    engines on the page the newest."""
    kv_cache_usage: float | None = None
    """Share of the KV cache in use, 0 to 1; of several engines the fullest."""
    estimated_flops_per_gpu: float | None = None
    """Floating-point operations so far, estimated by the engine for one GPU; zero while it does not estimate."""
    estimated_bytes_per_gpu: float | None = None
    """Bytes read and written in the GPU's memory so far, estimated in the same way."""
    process_started_seconds: float | None = None
    """Start of the process that serves the page, in seconds since 1970."""
    inter_token_latency_buckets: tuple[tuple[float, float], ...] = ()
    """Tokens that came within so many seconds of the one before, cumulative, by rising bound; the last is infinite."""
    generated_by_series: tuple[tuple[str, float], ...] = ()
    """The parts of generated_tokens by series, sorted: one restarted engine of several may hide in the sum."""


def no_tokens(at_seconds: float) -> ServingCounters:
    """Return what stands for a page where none is read, because the instance has its metrics on another node."""
    return ServingCounters(at_seconds, 0.0, None, None, None, None, None, None, None, None)


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
    estimated_flops_per_gpu: float | None = None
    estimated_bytes_per_gpu: float | None = None
    preemptions: float | None = None
    inter_token_latency_buckets: tuple[tuple[float, float], ...] = ()
    """Empty: unknown."""


def is_restart(before: ServingCounters, after: ServingCounters) -> bool:
    """Return whether a counter began anew between two pages, so that their difference is no work.

    A counter that went back is the plain sign. One that comes back *higher* than it was, because the new engine was
    quick or was not looked at for long, shows in its ``_created`` time (however often it restarted), and where the
    client library leaves those out (multiprocess mode, PROMETHEUS_DISABLE_CREATED_SERIES) in the start of the
    process. A series that vanished, or counts under another name since an upgrade, is a restart too; one that is new
    is not: engines make some at first use.
    """
    if _differ(before.born_seconds, after.born_seconds):
        return True
    if _differ(before.process_started_seconds, after.process_started_seconds):
        return True
    parts = dict(after.generated_by_series)
    if any(series not in parts or parts[series] < value for series, value in before.generated_by_series):
        return True
    names = (
        "generated_tokens",
        "prompt_tokens",
        "computed_prompt_tokens",
        "inter_token_latency_count",
        "estimated_flops_per_gpu",
        "estimated_bytes_per_gpu",
    )
    return any(
        (old := getattr(before, name)) is not None and (new := getattr(after, name)) is not None and new < old
        for name in names
    )


def _differ(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and before != after


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
        estimated_flops_per_gpu=delta(before.estimated_flops_per_gpu, after.estimated_flops_per_gpu),
        estimated_bytes_per_gpu=delta(before.estimated_bytes_per_gpu, after.estimated_bytes_per_gpu),
        preemptions=delta(before.preemptions, after.preemptions),
        inter_token_latency_buckets=_bucket_difference(
            before.inter_token_latency_buckets, after.inter_token_latency_buckets
        ),
    )


def _bucket_difference(
    before: tuple[tuple[float, float], ...], after: tuple[tuple[float, float], ...]
) -> tuple[tuple[float, float], ...]:
    if [bound for bound, _ in before] != [bound for bound, _ in after]:
        return ()
    return tuple((bound, new - old) for (bound, old), (_, new) in zip(before, after, strict=True))
