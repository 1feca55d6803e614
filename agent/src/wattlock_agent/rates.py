"""What an instance does now, from its last scrapes and the energy at their times. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from wattlock_api.base import decimal_string
from wattlock_api.constants import Reason, Role

from wattlock_agent.epochs import Sample
from wattlock_agent.serving.base import ServingCounters, ServingDelta, difference
from wattlock_agent.track import WINDOW_SECONDS

#: No instance does more of anything: tokens each second, milliseconds or joules for a token, 10^9 operations or bytes
#: each second on one GPU, requests that wait. A page is the pod's to write, and any number may stand on it.
_MOST = 1e9


@dataclass(frozen=True)
class Scrape:
    """A page that was read."""

    counters: ServingCounters
    unix_seconds: float
    life: int
    """Grows with each restart of the engine: counters of different lives are not compared."""
    sharp: bool
    """Whether the page came quickly enough to know its time."""


def work_rates(scrapes: Sequence[Scrape], life: int, now_seconds: float) -> dict[str, object]:
    """Return the fields of InstanceStatus about work, over the last report interval of this life of the engine.

    What is not on the pages is left out: unknown, not zero.
    """
    recent = [each for each in scrapes if each.life == life]
    if not recent or now_seconds - recent[-1].counters.at_seconds > 2 * WINDOW_SECONDS:
        return {}
    newest = recent[-1].counters
    rates: dict[str, object] = {}
    if newest.waiting_requests is not None and newest.waiting_requests <= _MOST:
        rates["waiting_requests"] = int(newest.waiting_requests)
    if newest.kv_cache_usage is not None and newest.kv_cache_usage <= 1:
        rates["kv_cache_usage_percent"] = decimal_string(100 * newest.kv_cache_usage, 1)
    first = next(each for each in recent if newest.at_seconds - each.counters.at_seconds <= WINDOW_SECONDS + 1)
    done = difference(first.counters, newest)
    if done.seconds > 0:
        rates |= _per_second(done)
    return rates


def _per_second(done: ServingDelta) -> dict[str, object]:
    rates: dict[str, tuple[float, int]] = {}  # each with the number of its places
    if done.generated_tokens is not None:
        rates["tokens_per_second"] = (done.generated_tokens / done.seconds, 1)
    if done.computed_prompt_tokens is not None:
        rates["prompt_tokens_per_second"] = (done.computed_prompt_tokens / done.seconds, 1)
    if done.inter_token_latency_sum_seconds is not None and done.inter_token_latency_count:
        mean_seconds = done.inter_token_latency_sum_seconds / done.inter_token_latency_count
        rates["inter_token_latency_ms"] = (1000 * mean_seconds, 3)
    # Zero is an engine that was idle or does not estimate: nothing to tell in both cases.
    if done.estimated_flops_per_gpu and done.estimated_bytes_per_gpu:
        rates["estimated_gigaflops"] = (done.estimated_flops_per_gpu / done.seconds / 1e9, 6)
        rates["estimated_gigabytes"] = (done.estimated_bytes_per_gpu / done.seconds / 1e9, 6)
    # What no engine can do was not measured, so it is unknown.
    return {name: decimal_string(value, places) for name, (value, places) in rates.items() if 0 <= value <= _MOST}


def token_energy(samples: Sequence[Sample], role: Role, spans_nodes: bool) -> dict[str, object]:
    """Return the fields of InstanceStatus about energy for each token, or why there is none.

    Prefill works on computed prompt tokens, Decode and Mixed on generated ones. ``spans_nodes``: the
    samples have the energy of some of the instance's GPUs only.
    """
    samples = [each for each in samples if each.lives == samples[-1].lives]
    samples = [each for each in samples if samples[-1].unix_seconds - each.unix_seconds <= WINDOW_SECONDS + 1]
    if len(samples) < 2:
        return {}
    if spans_nodes:
        return {"token_energy_reason": Reason.SPANS_NODES.value}
    first, last = samples[0], samples[-1]
    tokens = last.generated_tokens - first.generated_tokens
    field = "joules_per_generated_token"
    if role is Role.PREFILL:
        if first.computed_prompt_tokens is None or last.computed_prompt_tokens is None:
            return {}
        tokens = last.computed_prompt_tokens - first.computed_prompt_tokens
        field = "joules_per_prompt_token"
    if tokens <= 0:
        return {"token_energy_reason": Reason.NO_TOKENS.value}
    joules = (last.joules - first.joules) / tokens
    return {field: decimal_string(joules, 6)} if joules <= _MOST else {}
