"""The metrics page, with the names, labels and series of vLLM 0.32.0."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from wattlock_simulator.serving.engine import Engine, Histogram, Role

_LABELS = ("model_name", "engine")


class _EngineCollector(Collector):
    """One engine's series at one moment."""

    def __init__(self, engine: Engine, model_name: str, scale: float) -> None:
        self._engine = engine
        self._labels = (model_name, "0")
        self._scale = scale

    def collect(self) -> Iterator[Metric]:
        """All metric families, gauges first as vLLM orders them."""
        engine, counters = self._engine, self._engine.counters
        waiting = float(engine.waiting)
        yield self._gauge(
            "num_requests_running", "Number of requests in model execution batches.", round(engine.running)
        )
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting)
        yield self._gauge_by(
            "num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            "reason",
            {"capacity": waiting, "deferred": 0.0},
        )
        if engine.settings.role is Role.DECODE and not engine.settings.computes_prompts:
            yield self._gauge_by(
                "num_requests_kv_fetch_by_stage",
                "Number of waiting requests by async KV load stage.",
                "stage",
                {"waiting_to_start": 0.0, "in_progress": 0.0, "completed_waiting": 0.0},
            )
        yield self._gauge_by(
            "engine_sleep_state",
            "Engine sleep state.",
            "sleep_state",
            {"awake": 1.0, "weights_offloaded": 0.0, "discard_all": 0.0},
        )
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", engine.kv_usage)
        yield from self._counter("num_preemptions", "Cumulative number of preemptions.", {"": counters.preemptions})
        yield from self._counter("prompt_tokens", "Number of prefill tokens processed.", {"": counters.prompt_tokens})
        yield from self._counter(
            "prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            {
                "local_compute": counters.computed_prompt_tokens,
                "local_cache_hit": counters.cached_prompt_tokens,
                "external_kv_transfer": counters.transferred_prompt_tokens,
            },
            "source",
        )
        yield from self._counter(
            "prompt_tokens_cached",
            "Number of cached prompt tokens.",
            {"": counters.cached_prompt_tokens + counters.transferred_prompt_tokens},
        )
        yield from self._counter(
            "generation_tokens", "Number of generation tokens processed.", {"": counters.generation_tokens}
        )
        yield from self._counter(
            "request_success",
            "Count of successfully processed requests.",
            {"stop": 0, "length": counters.finished_requests, "abort": 0, "error": 0, "repetition": 0},
            "finished_reason",
        )
        yield from self._histogram(
            "time_to_first_token_seconds", "Histogram of time to first token in seconds.", counters.first_token
        )
        yield from self._histogram(
            "inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", counters.inter_token
        )
        yield from self._histogram(
            "request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            counters.per_output_token,
        )
        yield from self._histogram(
            "e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", counters.request
        )

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _gauge_by(self, name: str, text: str, label: str, values: dict[str, float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=(*_LABELS, label))
        for key, value in values.items():
            family.add_metric((*self._labels, key), value)
        return family

    def _counter(self, name: str, text: str, values: dict[str, int], label: str = "") -> Iterator[Metric]:
        labels = (*_LABELS, label) if label else _LABELS
        family = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
        for key, value in values.items():
            family.add_metric(
                (*self._labels, key) if label else self._labels,
                value * self._scale,
                created=self._engine.counters.created_seconds,
            )
        yield family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Iterator[Metric]:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        buckets, seen = [], 0
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            seen += count
            buckets.append((bound, seen * self._scale))
        family.add_metric(self._labels, buckets, histogram.total * self._scale)
        yield family
        yield self._gauge(f"{name}_created", text, self._engine.counters.created_seconds)


def page(engine: Engine, model_name: str, *, scale: float = 1.0) -> bytes:
    """The metrics page as bytes of Prometheus text.

    Args:
        engine: the engine.
        model_name: value of the label ``model_name``.
        scale: factor on all counters and histograms; NaN or below 1 to simulate a broken exporter.
    """
    registry = CollectorRegistry()
    registry.register(_EngineCollector(engine, model_name, scale))
    return generate_latest(registry)
