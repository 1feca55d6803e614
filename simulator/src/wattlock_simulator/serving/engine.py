"""The engine's book-keeping: model steps of the GPU become tokens, requests and latencies. Pure but for its counters.

The GPU does the work: the node process counts model steps at the speed that the clock allows, and the engine turns
them into tokens. So tokens and joules always belong together, however late a scrape is.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum

from wattlock_simulator.physics import Architecture, Phase, Workload


class Role(StrEnum):
    """What the instance does for its requests."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"


# Bucket bounds of vLLM 0.32.0, in seconds (tests/data/vllm-0.32.0-pd-nixl-decode.txt).
TOKEN_LATENCY_BOUNDS_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
FIRST_TOKEN_BOUNDS_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_BOUNDS_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

_TRANSFER_SECONDS = 0.03  # KV transfer from the prefill peer, a plausible constant
_KV_CAPACITY_TOKENS = 655_360
_LOAD_MEMORY = 0.3  # from one second to the next the running batch keeps little of its deviation
_PREFILL_BACKLOG_PROMPTS = 4  # a mixed engine collects prompts and computes them together
_PREFILL_EVERY_TOKENS = 20_000  # generated, with a share of prompts: seconds apart, so that whole ticks matter little


@dataclass
class Histogram:
    """Counts by upper bound, with bulk observation: thousands of tokens per second are one call."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int) -> None:
        """Counts one value several times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


@dataclass
class Counters:
    """Everything that grows and that a restart sets back. Times in s, ``created_seconds`` since 1970."""

    created_seconds: float
    generation_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    transferred_prompt_tokens: int = 0
    finished_requests: int = 0
    preemptions: int = 0
    inter_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_LATENCY_BOUNDS_SECONDS))
    per_output_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_LATENCY_BOUNDS_SECONDS))
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS_SECONDS))
    request: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_SECONDS))

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all sources."""
        return self.computed_prompt_tokens + self.cached_prompt_tokens + self.transferred_prompt_tokens


@dataclass(frozen=True)
class Settings:
    """What the engine is asked to be; changed while it runs.

    Attributes:
        role: what it does for its requests.
        architecture: attention architecture of its model.
        batch: mean number of running sequences (prefill: prompts per step).
        context: mean tokens per sequence (prefill: prompt length).
        jitter: standard deviation of the running batch from one second to the next, relative.
        computes_prompts: a decode engine that computes its prompts itself, whatever its label says.
        prompt_share: computed prompt tokens of all tokens of an engine that computes prompts, 0 to 0.95; the rest of a
            prompt comes from its prefix cache. None: prompts are computed whole.
        extra_step_seconds: idle time added to each step, in s.
        idle: no requests at all.
        waiting: waiting requests to report.
        output_tokens: tokens that a request generates.
    """

    role: Role
    architecture: Architecture
    batch: float = 32.0
    context: float = 4096.0
    jitter: float = 0.03
    computes_prompts: bool = False
    prompt_share: float | None = None
    extra_step_seconds: float = 0.0
    idle: bool = False
    waiting: int = 0
    output_tokens: int = 256

    @property
    def prompt_tokens(self) -> int:
        """Length of a prompt, so that the mean context comes out right."""
        if self.role is Role.PREFILL:
            return round(self.context)
        return max(1, round(self.context - self.output_tokens / 2))


class Engine:
    """Turns model steps into counters and says what the GPUs shall work on next."""

    def __init__(self, settings: Settings, *, seed: int, now_seconds: float) -> None:
        self.settings = settings
        self.counters = Counters(now_seconds)
        self._random = random.Random(seed)  # noqa: S311 - load noise, not secrets
        self._deviation = 0.0
        self._tokens = 0.0  # generated, not yet a whole token
        self._progress = 0.0  # generated tokens towards the next finished request
        self._prompts = 0.0  # computed, not yet a whole prompt
        self._backlog_tokens = 0.0  # prompts that wait to be computed
        self._phase = Phase.PREFILL if settings.role is Role.PREFILL else Phase.DECODE

    @property
    def running(self) -> float:
        """Sequences in the running batch."""
        if self.settings.idle:
            return 0.0
        return self.settings.batch * max(0.2, 1.0 + self._deviation)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self._kv_share(self.running * self.settings.context)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self.settings.waiting

    @property
    def workload(self) -> Workload | None:
        """What the GPUs shall work on; None when idle."""
        settings = self.settings
        if settings.idle:
            return None
        if self._phase is Phase.PREFILL and settings.role is not Role.PREFILL:
            return Workload(settings.architecture, Phase.PREFILL, 1.0, settings.prompt_tokens)
        return Workload(settings.architecture, self._phase, self.running, settings.context)

    @staticmethod
    def _kv_share(tokens: float) -> float:
        return min(1.0, tokens / _KV_CAPACITY_TOKENS)

    def restart(self, now_seconds: float) -> None:
        """All counters begin again, as after a crash of the engine."""
        self.counters = Counters(now_seconds)
        self._tokens = self._progress = self._prompts = self._backlog_tokens = 0.0

    def change(self, settings: Settings) -> None:
        """Takes new settings."""
        if settings.role is Role.PREFILL:
            self._phase = Phase.PREFILL
        elif self.settings.role is Role.PREFILL or not _computes(settings):
            self._phase, self._backlog_tokens = Phase.DECODE, 0.0
        self.settings = settings

    def draw_load(self) -> None:
        """Draws the running batch anew; call once a second."""
        drive = (1.0 - _LOAD_MEMORY**2) ** 0.5 * self.settings.jitter
        self._deviation = _LOAD_MEMORY * self._deviation + drive * self._random.gauss(0.0, 1.0)

    def account(self, steps: float, seconds: float) -> None:
        """Books the work of an interval in which the workload did not change.

        Args:
            steps: model steps that the slowest GPU did.
            seconds: length of the interval in s.
        """
        if steps <= 0 or seconds <= 0 or self.settings.idle:
            return
        if self.settings.role is Role.PREFILL:
            self._account_prefill(steps, seconds / steps)
        elif self._phase is Phase.PREFILL:
            self._account_own_prompts(steps)
        else:
            self._account_decode(steps, seconds / steps)

    def _account_prefill(self, steps: float, step_seconds: float) -> None:
        counters = self.counters
        self._prompts += steps * self.running
        done = int(self._prompts)
        self._prompts -= done
        counters.computed_prompt_tokens += done * self.settings.prompt_tokens
        counters.generation_tokens += done  # a prefill engine emits the first token of each request
        counters.finished_requests += done
        if done:
            counters.first_token.observe(step_seconds, done)
            counters.request.observe(step_seconds, done)

    def _account_own_prompts(self, steps: float) -> None:
        computed = min(self._backlog_tokens, steps * self.settings.prompt_tokens)
        self.counters.computed_prompt_tokens += round(computed)
        self._backlog_tokens -= computed
        if self._backlog_tokens < 1.0:
            self._backlog_tokens, self._phase = 0.0, Phase.DECODE

    def _account_decode(self, steps: float, step_seconds: float) -> None:
        counters, settings = self.counters, self.settings
        tokens = steps * self.running
        self._tokens += tokens
        whole = int(self._tokens)
        self._tokens -= whole
        counters.generation_tokens += whole
        counters.inter_token.observe(step_seconds, whole)
        self._progress += tokens
        done = int(self._progress / settings.output_tokens)
        self._progress -= done * settings.output_tokens
        if not done:
            return
        counters.finished_requests += done
        first = step_seconds + _TRANSFER_SECONDS
        counters.per_output_token.observe(step_seconds, done)
        counters.first_token.observe(first, done)
        counters.request.observe(first + step_seconds * (settings.output_tokens - 1), done)
        prompts = done * settings.prompt_tokens  # each finished request makes room for a new one
        if not _computes(settings):
            counters.transferred_prompt_tokens += prompts
            return
        computed, enough = float(prompts), float(_PREFILL_BACKLOG_PROMPTS * settings.prompt_tokens)
        if settings.prompt_share is not None:
            for_each_token = settings.prompt_share / (1.0 - settings.prompt_share)
            computed, enough = done * settings.output_tokens * for_each_token, _PREFILL_EVERY_TOKENS * for_each_token
            counters.cached_prompt_tokens += max(0, prompts - round(computed))
        self._backlog_tokens += computed
        if self._backlog_tokens >= max(1.0, enough):
            self._phase = Phase.PREFILL


def _computes(settings: Settings) -> bool:
    return settings.role is Role.MIXED or settings.computes_prompts
