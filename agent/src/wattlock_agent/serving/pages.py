"""Turns the /metrics page of a serving engine into ServingCounters. Pure: bytes in, a value out, never an exception.

Only the dozen families that we need are parsed, by a strict small grammar, not by prometheus_client: its parser
builds an object for each of ~600 samples of a vLLM page (about 10 ms for 60 kB, ours takes well under 1 ms), reads
names and labels of any form, and accepts what must be refused here, such as a page that was cut off in the middle.
Grammar: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from wattlock_api.constants import Reason

from wattlock_agent.serving.base import ScrapeFailure, ServingCounters

#: Bounds of a page. A vLLM page has about 60 kB and 720 lines for one engine.
MAX_PAGE_BYTES = 4 * 1024 * 1024
MAX_LINES = 100_000
MAX_LINE_BYTES = 16 * 1024
MAX_SERIES = 4_096
#: Bounds of its numbers, far above what an engine can count: a million tokens a second for thirty years, a petaflop a
#: second for as long. What is larger would break every sum that it enters.
MAX_COUNTER, MAX_WORK, MAX_GAUGE = 1e15, 1e27, 1e9

#: Start of the process, from prometheus_client's own collector; absent in its multiprocess mode.
_PROCESS_START = b"process_start_time_seconds"
_PREFIXES = (b"vllm:", b"sglang:", _PROCESS_START)
#: Series of generated tokens that are kept apart; a page with more has only its sum watched.
_MAX_PARTS = 64
_LABELS = rb'\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*+")*+)\}'
_SAMPLE = re.compile(
    rb"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*+)(?:" + _LABELS + rb")?[ \t]*+"
    rb"(?P<value>[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?|[+-]?[Ii]nf|[Nn]a[Nn])"
    rb"(?:[ \t]++-?[0-9.]++)?[ \t]*+(?:#.*+)?\r?"
)
_LABEL = re.compile(rb'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"((?:[^"\\]|\\.)*+)"[ \t]*+(?:,|\Z)')

#: The label ``le`` of a bucket: a number that is not negative, or infinity.
_BOUND = re.compile(rb"\+?(?:[0-9]++(?:\.[0-9]*+)?(?:[eE][+-]?[0-9]{1,3})?|[Ii]nf)")

#: Labels that tell ranks of one replica apart: every rank counts the same tokens and requests.
_RANK_LABELS = frozenset({b"tp_rank", b"pp_rank", b"moe_ep_rank"})


@dataclass(frozen=True)
class _Source:
    """A series by name, and by the value of one label where a family counts several things."""

    name: bytes
    label: bytes | None = None
    value: bytes | None = None
    must_match: bool = False
    """Without a series of this label the next source is asked; otherwise there being none means zero."""

    def of(self, families: Mapping[bytes, "_Family"]) -> "_Family | None":
        """Return the family, if the page has it for this purpose."""
        family = families.get(self.name)
        if family is None or not self.must_match:
            return family
        return family if any((self.label, self.value) in labels for labels in family.samples) else None


def _sources(*names: str) -> tuple[_Source, ...]:
    return tuple(_Source(name.encode()) for name in names)


#: Where each value comes from, newest or best name first: the first family that the page has is taken, never a mixture.
#:
#: vLLM: https://docs.vllm.ai/en/v0.32.0/usage/metrics/ and, for the V0 engine, /en/v0.5.5/serving/metrics.html. Series
#: had only ``model_name`` then; V1 added ``engine``, and renamed the KV use. Its per-request histogram
#: request_prefill_kv_computed_tokens is no stand-in for prompt_tokens_by_source_total: on the recorded page of a
#: decode instance it counts the KV that NIXL brought as computed.
#: SGLang: docs.sglang.io/docs/references/production_metrics; its generation_tokens_total grows only when a request
#: ends, realtime_tokens_total while it runs. Each rank writes its own series.
_COUNTERS: Mapping[str, tuple[_Source, ...]] = {
    "generated_tokens": (
        _Source(b"vllm:generation_tokens_total"),
        _Source(b"sglang:realtime_tokens_total", b"mode", b"decode", must_match=True),
        _Source(b"sglang:generation_tokens_total"),
    ),
    "prompt_tokens": _sources("vllm:prompt_tokens_total", "sglang:prompt_tokens_total"),
    "computed_prompt_tokens": (
        _Source(b"vllm:prompt_tokens_by_source_total", b"source", b"local_compute"),
        _Source(b"sglang:realtime_tokens_total", b"mode", b"prefill_compute"),
    ),
    "inter_token_latency_sum_seconds": _sources(
        "vllm:inter_token_latency_seconds_sum",
        "vllm:time_per_output_token_seconds_sum",  # until vLLM 0.12
        "sglang:inter_token_latency_seconds_sum",
        "sglang:time_per_output_token_seconds_sum",  # older SGLang
    ),
    "inter_token_latency_count": _sources(
        "vllm:inter_token_latency_seconds_count",
        "vllm:time_per_output_token_seconds_count",
        "sglang:inter_token_latency_seconds_count",
        "sglang:time_per_output_token_seconds_count",
    ),
    "preemptions": _sources("vllm:num_preemptions_total"),
    # Both engines: only with --enable-mfu-metrics; without it vLLM shows zeros.
    "estimated_flops_per_gpu": _sources("vllm:estimated_flops_per_gpu_total", "sglang:estimated_flops_per_gpu_total"),
}
#: Summed into estimated_bytes_per_gpu.
_BYTES = (
    _sources("vllm:estimated_read_bytes_per_gpu_total", "sglang:estimated_read_bytes_per_gpu_total"),
    _sources("vllm:estimated_write_bytes_per_gpu_total", "sglang:estimated_write_bytes_per_gpu_total"),
)
_GAUGES: Mapping[str, tuple[_Source, ...]] = {
    "running_requests": _sources("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting_requests": _sources("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
}
#: Shares, of which a sum over engines would mean nothing. The second name is vLLM's until 0.10.
_KV_USAGE = _sources("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
#: Histogram of the same families as inter_token_latency_count.
_LATENCY_BUCKETS = tuple(
    _Source(source.name.removesuffix(b"_count") + b"_bucket") for source in _COUNTERS["inter_token_latency_count"]
)
_MAX_BUCKETS = 64
_BIRTHS = _sources("vllm:generation_tokens_created", "sglang:generation_tokens_created")
_WANTED = frozenset(
    source.name
    for sources in (
        *_COUNTERS.values(),
        *_BYTES,
        *_GAUGES.values(),
        _KV_USAGE,
        _LATENCY_BUCKETS,
        _BIRTHS,
        (_Source(_PROCESS_START),),
    )
    for source in sources
)


class _BadPageError(Exception):
    """A page that cannot be used; becomes a ScrapeFailure."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class _Family:
    """Samples of one name: labels (sorted pairs) to value."""

    samples: dict[tuple[tuple[bytes, bytes], ...], float] = field(default_factory=dict)


def parse_page(page: bytes, at_seconds: float) -> ServingCounters | ScrapeFailure:
    """Return the counters of a /metrics page that was asked for at ``at_seconds`` (monotonic).

    Values are summed over engines (data-parallel replicas) and models. A family that the page does not have is
    ``None``: some appear only after the first finished request. Of a family that has labels for the origin of
    prompt tokens but no series for computed ones, the computed tokens are 0.

    Failures: ``MetricsTooLarge`` over 4 MiB, 100,000 lines or 4,096 series of interest; ``MetricsInvalid`` for
    binary content, HTML, JSON, a page cut off, a malformed or duplicate series, a counter that is negative or
    not finite; ``NoServingMetrics`` for a sound page without anything of a serving engine.
    """
    try:
        families = _families(page)
        values: dict[str, float | None] = {}
        for name, sources in _COUNTERS.items():
            values[name] = _counter(families, sources)
        for name, sources in _GAUGES.items():
            values[name] = _gauge(families, sources)
        parts = _parts(families, _COUNTERS["generated_tokens"])
        values["estimated_bytes_per_gpu"] = _moved_bytes(families)
        values["kv_cache_usage"] = _largest(families, _KV_USAGE)
        born = _largest(families, _BIRTHS)
        if all(value is None for value in values.values()):
            raise _BadPageError(
                Reason.NO_SERVING_METRICS,
                "the page has no metrics of vLLM or SGLang; check spec.pools[].metrics (port and path), "
                "and start SGLang with --enable-metrics",
            )
    except _BadPageError as error:
        return ScrapeFailure(at_seconds, error.reason, str(error))
    started = _largest(families, (_Source(_PROCESS_START),))
    return ServingCounters(
        at_seconds=at_seconds,
        born_seconds=born,
        process_started_seconds=started,
        inter_token_latency_buckets=_buckets(families, _LATENCY_BUCKETS),
        generated_by_series=parts,
        **values,
    )


def _families(page: bytes) -> dict[bytes, _Family]:
    """Return the wanted families of a page.

    Raises:
        _BadPageError: the page is too large or is no sound metrics page.
    """
    if len(page) > MAX_PAGE_BYTES:
        raise _BadPageError(Reason.METRICS_TOO_LARGE, f"the page is larger than {MAX_PAGE_BYTES // 1024} KiB")
    if page.count(b"\n") > MAX_LINES:
        raise _BadPageError(Reason.METRICS_TOO_LARGE, f"the page has more than {MAX_LINES} lines")
    _check_text(page)
    families: dict[bytes, _Family] = {}
    series = 0
    for line in page.split(b"\n"):
        if not line.startswith(_PREFIXES):
            continue
        name = line.partition(b"{")[0].split(None, 1)[0]
        if name not in _WANTED:
            continue
        series += 1
        if series > MAX_SERIES:
            raise _BadPageError(Reason.METRICS_TOO_LARGE, f"the page has more than {MAX_SERIES} series of interest")
        if name == _PROCESS_START and _SAMPLE.fullmatch(line) is None:
            continue  # a hint about restarts, no reason to refuse the page
        labels, value = _sample(line)
        samples = families.setdefault(name, _Family()).samples
        if labels in samples and name != _PROCESS_START:
            raise _invalid(f"the series {_shown(line)} is on the page twice")
        samples[labels] = value
    return families


def _check_text(page: bytes) -> None:
    if b"\0" in page:
        raise _invalid("the page is binary; does the port serve metrics over plain HTTP?")
    try:
        page.decode()
    except UnicodeDecodeError:
        raise _invalid("the page is not UTF-8 text; does the port serve metrics over plain HTTP?") from None
    first = page[:64].lstrip()[:1]
    if first in (b"<", b"{", b"["):
        kind = "HTML" if first == b"<" else "JSON"
        raise _invalid(f"the page looks like {kind}, not like metrics; check spec.pools[].metrics.path")
    # The format demands a line feed at the end: without it the last value may have lost digits.
    if page and not page.endswith((b"\n", b"# EOF")):
        raise _invalid("the page ends in the middle of a line: it was cut off")


def _sample(line: bytes) -> tuple[tuple[tuple[bytes, bytes], ...], float]:
    match = _SAMPLE.fullmatch(line) if len(line) <= MAX_LINE_BYTES else None
    if match is None:
        raise _invalid(f"malformed series {_shown(line)}")
    labels = match["labels"] or b""
    pairs: list[tuple[bytes, bytes]] = []
    position = 0
    while position < len(labels):
        label = _LABEL.match(labels, position)
        if label is None:
            raise _invalid(f"malformed labels in {_shown(line)}")
        pairs.append((label[1], label[2]))
        position = label.end()
    return tuple(sorted(pairs)), float(match["value"])


def _counter(families: Mapping[bytes, _Family], sources: tuple[_Source, ...]) -> float | None:
    for source in sources:
        family = source.of(families)
        if family is None:
            continue
        for value in family.samples.values():
            if not math.isfinite(value) or value < 0:
                raise _invalid(f"{source.name.decode()} is {value}: a counter is never negative or not finite")
        total = _total(family, source)
        if not total <= (MAX_WORK if b"estimated" in source.name else MAX_COUNTER):
            raise _invalid(f"{source.name.decode()} is {total:.6g}: no engine ever counts so far")
        return total
    return None


def _moved_bytes(families: Mapping[bytes, _Family]) -> float | None:
    read, written = (_counter(families, sources) for sources in _BYTES)
    if read is None or written is None:
        return None
    return read + written


def _gauge(families: Mapping[bytes, _Family], sources: tuple[_Source, ...]) -> float | None:
    """Return a gauge, or None where it makes no sense: a gauge decides nothing alone, so the page stays usable."""
    for source in sources:
        if family := families.get(source.name):
            total = _total(family, source)
            return total if 0 <= total <= MAX_GAUGE else None
    return None


def _replicas(family: _Family, source: _Source) -> dict[tuple[tuple[bytes, bytes], ...], float]:
    """Return the value of each replica; of the ranks of one replica the largest counts."""
    groups: dict[tuple[tuple[bytes, bytes], ...], float] = {}
    for labels, value in family.samples.items():
        if source.label is not None and (source.label, source.value) not in labels:
            continue
        replica = tuple(pair for pair in labels if pair[0] not in _RANK_LABELS)
        groups[replica] = max(groups.get(replica, value), value)
    return groups


def _total(family: _Family, source: _Source) -> float:
    return sum(_replicas(family, source).values())


def _parts(families: Mapping[bytes, _Family], sources: tuple[_Source, ...]) -> tuple[tuple[str, float], ...]:
    """Return the replicas of a counter by name and labels; none of a page with too many."""
    for source in sources:
        family = source.of(families)
        if family is None:
            continue
        found = {
            f"{source.name.decode()} {b','.join(b'='.join(pair) for pair in replica).decode()}": value
            for replica, value in _replicas(family, source).items()
        }
        return tuple(sorted(found.items())) if len(found) <= _MAX_PARTS else ()
    return ()


def _buckets(families: Mapping[bytes, _Family], sources: tuple[_Source, ...]) -> tuple[tuple[float, float], ...]:
    """Return bound and cumulative count of each bucket, or none where they make no sense: the page stays usable."""
    for source in sources:
        family = families.get(source.name)
        if family is None:
            continue
        by_bound: dict[bytes, _Family] = {}
        for labels, value in family.samples.items():
            bound = dict(labels).get(b"le", b"")
            rest = tuple(pair for pair in labels if pair[0] != b"le")
            by_bound.setdefault(bound, _Family()).samples[rest] = value
        if len(by_bound) > _MAX_BUCKETS or not all(map(_BOUND.fullmatch, by_bound)):
            return ()
        found = sorted((float(bound), _total(each, source)) for bound, each in by_bound.items())
        sound = all(math.isfinite(count) and count >= 0 for _, count in found)
        return tuple(found) if sound and math.isinf(found[-1][0]) else ()
    return ()


def _largest(families: Mapping[bytes, _Family], sources: tuple[_Source, ...]) -> float | None:
    """Return the largest over all engines. Of births and starts: whichever of them restarts, it changes."""
    for source in sources:
        if family := families.get(source.name):
            value = max(family.samples.values())
            return value if math.isfinite(value) and value >= 0 else None
    return None


def _invalid(message: str) -> _BadPageError:
    return _BadPageError(Reason.METRICS_INVALID, message)


def _shown(line: bytes) -> str:
    """Return the beginning of a line, fit for a status message."""
    text = line[:80].decode(errors="replace")
    return repr(text + ("..." if len(line) > 80 else ""))
