"""An engine whose load are its requests: what clients send decides what the GPUs work on.

Continuous batching in its simplest form: prompts that wait are computed first, one after the other, then all running
requests get a token with each step. A prompt that was computed before is in the prefix cache and is not computed again.

The GPUs tell their progress every 100 ms, so requests end up to one tick late, and clients on a busy machine need a
while to send the next one. Meanwhile the place in the batch counts as taken, and what the GPUs do for it is handed to
the request that takes it, as if it had been there at once. The counters move when the GPUs have done the work, not when
a client comes to fetch it: so tokens and joules belong together here as well.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from wattlock_simulator.physics import Phase, Workload
from wattlock_simulator.serving.engine import Engine, Settings

_CACHED_PROMPTS = 4096
_ALMOST = 1e-6  # steps are floats
_PATIENCE_SECONDS = 0.5  # a place that nobody has taken again after this is empty


@dataclass(eq=False)
class Request:
    """One request on its way through the engine; equal only to itself.

    Attributes:
        prompt_key: the same for equal prompts.
        prompt_tokens: length of the prompt.
        output_tokens: how many tokens are to be generated.
        computed: prompt tokens computed so far; may be fractional.
        generated: tokens generated so far; may be fractional, never above ``output_tokens``.
    """

    prompt_key: int
    prompt_tokens: int
    output_tokens: int
    computed: float = 0.0
    generated: float = 0.0

    @property
    def done(self) -> bool:
        """Whether all tokens are there."""
        return self.generated >= self.output_tokens


@dataclass
class _Place:
    """A place in the batch whose request has ended.

    Attributes:
        tokens: made for whoever comes next.
        seconds: since when it is free.
    """

    tokens: float
    seconds: float = 0.0


class RequestEngine(Engine):
    """Turns model steps into tokens of requests. ``settings.batch`` is the most sequences that run at a time."""

    def __init__(self, settings: Settings, *, seed: int, now_seconds: float) -> None:
        super().__init__(settings, seed=seed, now_seconds=now_seconds)
        self._current: Workload | None = None
        self._forget()

    def _forget(self) -> None:
        self._queue: deque[Request] = deque()
        self._batch: list[Request] = []
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._places: list[_Place] = []
        self._step_seconds = 0.01
        self._fractions: dict[str, float] = {}
        self._prompt_credit = 0.0
        self._last_work = 0.0

    @property
    def running(self) -> float:
        """Requests in decode."""
        return float(len(self._batch))

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self._kv_share(sum(each.prompt_tokens + each.generated for each in self._batch))

    @property
    def waiting(self) -> int:
        """Requests whose prompt is not computed yet."""
        return len(self._queue)

    @property
    def workload(self) -> Workload | None:
        """What the GPUs shall work on; None without requests."""
        return self._current

    def submit(self, request: Request) -> None:
        """Takes a request; its counts move with each call of ``account``."""
        self._queue.append(request)
        self._admit()
        self._choose()

    def withdraw(self, request: Request) -> None:
        """Forgets a request whose client has left."""
        if request in self._queue:
            self._queue.remove(request)
        elif request in self._batch:
            self._batch.remove(request)
        self._admit()
        self._choose()

    def restart(self, now_seconds: float) -> None:
        """All counters begin again; requests that were there are lost, and done with what they have."""
        super().restart(now_seconds)
        for request in (*self._queue, *self._batch):
            request.output_tokens = 0
        self._forget()
        self._choose()

    def change(self, settings: Settings) -> None:
        """Takes new settings."""
        self.settings = settings
        self._choose()

    def account(self, steps: float, seconds: float) -> None:
        """Books the work of an interval in which the workload did not change; see the base class."""
        work = self._current
        if steps <= 0 or seconds <= 0:
            return
        for place in self._places:
            place.seconds += seconds
        self._places = [place for place in self._places if place.seconds <= _PATIENCE_SECONDS]
        if work is None:
            self._prompt_credit = self._last_work = 0.0
        elif work.phase is Phase.PREFILL:
            done = steps * work.batch * work.context
            self.counters.computed_prompt_tokens += self._whole("prompt", done)
            self._prompt_credit = min(self._prompt_credit, self._last_work) + done
            self._last_work = done
        else:
            self._step_seconds = seconds / steps
            self._count_generated(steps * work.batch)
            for place in self._places:
                place.tokens += steps
            for request in self._batch:
                self._generate(request, steps)
            self._batch = [request for request in self._batch if not request.done]
        self._admit()
        self._choose()

    def _count_generated(self, tokens: float) -> None:
        whole = self._whole("generated", tokens)
        self.counters.generation_tokens += whole
        self.counters.inter_token.observe(self._step_seconds, whole)

    def _whole(self, kind: str, tokens: float) -> int:
        """Return whole tokens; the rest waits for the next call."""
        total = self._fractions.get(kind, 0.0) + tokens
        self._fractions[kind] = total - int(total)
        return int(total)

    def _generate(self, request: Request, tokens: float) -> None:
        taken = min(tokens, request.output_tokens - request.generated)
        request.generated += taken
        if request.output_tokens - request.generated > _ALMOST:
            return
        request.generated = float(request.output_tokens)
        self._places.append(_Place(tokens - taken))
        counters, step_seconds = self.counters, self._step_seconds
        counters.finished_requests += 1
        counters.per_output_token.observe(step_seconds, 1)
        counters.request.observe(step_seconds * request.output_tokens, 1)

    def _admit(self) -> None:
        """Computes waiting prompts with what the GPUs have done for them, and puts their requests into the batch."""
        while self._queue and len(self._batch) < self.settings.batch:
            request = self._queue[0]
            if request.computed == 0.0 and request.prompt_key in self._cache:
                self.counters.cached_prompt_tokens += request.prompt_tokens
                self._cache.move_to_end(request.prompt_key)
                self._start(request)
                continue
            taken = min(self._prompt_credit, request.prompt_tokens - request.computed)
            self._prompt_credit -= taken
            request.computed += taken
            if request.prompt_tokens - request.computed > _ALMOST:
                return
            self._count_generated(1.0)
            self._cache[request.prompt_key] = None
            if len(self._cache) > _CACHED_PROMPTS:
                self._cache.popitem(last=False)
            self._start(request, 1.0)  # the step that ends a prompt gives the first token

    def _start(self, request: Request, first_tokens: float | None = None) -> None:
        self._queue.popleft()
        place = self._places.pop(0) if self._places else _Place(0.0)
        tokens = place.tokens if first_tokens is None else first_tokens
        self.counters.first_token.observe(self._step_seconds, 1)
        if tokens:
            self._generate(request, tokens)
        if not request.done:
            self._batch.append(request)

    def _choose(self) -> None:
        """Sets the workload until the next call."""
        settings = self.settings
        prompts = [each.prompt_tokens for each in self._queue if each.prompt_key not in self._cache]
        if settings.idle:
            self._current = None
        elif prompts and len(self._batch) < settings.batch:
            self._current = Workload(settings.architecture, Phase.PREFILL, 1.0, sum(prompts) / len(prompts))
        elif self._batch:
            tokens = sum(each.prompt_tokens + each.generated for each in self._batch)
            batch = min(settings.batch, len(self._batch) + len(self._places))
            self._current = Workload(settings.architecture, Phase.DECODE, batch, tokens / len(self._batch))
        elif not self._places:  # else all have just ended: the work goes on until it shows that nothing came
            self._current = None
