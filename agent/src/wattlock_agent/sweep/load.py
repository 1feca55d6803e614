"""A load on the endpoint, always the same number of requests: what a client must do, and our own one."""

import http.client
import json
import random
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Protocol

from wattlock_api import boottime

from wattlock_agent.sweep.endpoint import Endpoint, EndpointError, Tokens, headers
from wattlock_agent.sweep.plan import Shape, Workload

#: A request may take so long in all: 16k tokens at 20 a second.
REQUEST_SECONDS = 900.0
#: No byte of an answer for so long is a failure. Prompts of others may be computed first.
SILENCE_SECONDS = 120.0
_RETRY_SECONDS = 0.5
_FAILURES = 3
_READ_BYTES = 64 * 1024
_MAX_LINE_BYTES = 1 << 20
_JOIN_SECONDS = 10.0
# Token numbers that the smallest vocabularies have too (vLLM refuses others) and that are no special tokens.
_FIRST_TOKEN, _LAST_TOKEN = 300, 499


class LoadError(Exception):
    """The load does not run. The message says what the endpoint answered and what to check."""


class Load(Protocol):
    """A load. All methods are called from one thread."""

    def start(self, workload: Workload) -> None:
        """Begin; returns at once. Raises LoadError."""

    def ready(self) -> bool:
        """Return whether all requests are on the way, so that measuring makes sense. Raises LoadError."""

    def steady(self) -> bool:
        """Return whether the load has run without a gap since the last call. Raises LoadError when it cannot run."""

    def stop(self) -> None:
        """End it; never raises, and waits until its requests are gone, for some seconds."""


class ClientLoad:
    """Our own client: one thread for each request, which streams its tokens and begins anew.

    Prompts are lists of token numbers, so their length is exact without a tokenizer. A decode request sends the same
    prompt again and again, which engines with a prefix cache compute once; a prefill request never sends one twice.

    A prompt of decode has one token more than was asked for. Engines cache whole blocks (vLLM: 16 tokens, on CPU 128)
    and compute one token at least: of a prompt that ends with a block they compute that block again each time.
    """

    def __init__(self, endpoint: Endpoint, model: str, seed: int) -> None:
        self._endpoint = endpoint
        self._model = model
        self._random = random.Random(seed)  # noqa: S311 - prompts, not secrets
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._generated = 0
        self._prompt = 0
        self._begun: set[int] = set()
        self._sockets: set[socket.socket] = set()
        self._problem = ""

    def start(self, workload: Workload) -> None:
        """As Load."""
        self._stop = threading.Event()
        self._begun = set()
        self._problem = ""
        seeds = [self._random.getrandbits(64) for _ in range(workload.concurrency)]
        self._threads = [
            threading.Thread(
                target=self._slot, args=(slot, workload, seed, self._stop), name=f"load-{slot}", daemon=True
            )
            for slot, seed in enumerate(seeds)
        ]
        for thread in self._threads:
            thread.start()

    def ready(self) -> bool:
        """As Load: every request has had a token."""
        self.steady()
        with self._lock:
            return len(self._begun) == len(self._threads)

    def steady(self) -> bool:
        """As Load: this client has no gaps."""
        with self._lock:
            if self._problem:
                raise LoadError(self._problem)
        return True

    def stop(self) -> None:
        """As Load. Connections are shut, upon which engines give up what they compute for them.

        A thread that still opens one is left to its time-out, after these seconds.
        """
        with self._lock:  # whoever has it next sees that it is over
            self._stop.set()
            for each in self._sockets:
                _shut(each)
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._threads = []

    def read(self) -> Tokens:
        """Return the tokens that came back so far: as TokenSource, for endpoints without metrics.

        Prompts count when their first token comes.
        """
        with self._lock:
            return Tokens(boottime.now_seconds(), float(self._generated), float(self._prompt))

    def _slot(self, slot: int, workload: Workload, seed: int, stop: threading.Event) -> None:
        own = random.Random(seed)  # noqa: S311 - prompts, not secrets
        prompt = _prompt(own, workload)
        failures = 0
        while not stop.is_set():
            try:
                self._request(slot, workload, prompt, stop)
                failures = 0
            except (EndpointError, OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                failures += 1
                if failures >= _FAILURES:
                    with self._lock:
                        if not stop.is_set():
                            self._problem = self._problem or f"{self._endpoint.url}/v1/completions: {error}"
                    return
                stop.wait(_RETRY_SECONDS)
            if workload.shape is Shape.PREFILL:
                prompt = _prompt(own, workload)

    def _request(self, slot: int, workload: Workload, prompt: list[int], stop: threading.Event) -> None:
        connection = self._endpoint.connect(SILENCE_SECONDS)
        connection.connect()
        opened = connection.sock  # the connection forgets it where the answer says that it is the last one
        try:
            with self._lock:
                if stop.is_set():
                    return
                self._sockets.add(opened)
            connection.request(
                "POST", f"{self._endpoint.prefix}/v1/completions", _body(self._model, workload, prompt), headers()
            )
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                answer = response.read(500).decode(errors="replace").strip()
                raise EndpointError(
                    f"HTTP {response.status} for {len(prompt)} prompt and {workload.output_tokens} output "
                    f"tokens: {answer}"
                )
            self._stream(slot, len(prompt), response, stop)
        finally:
            with self._lock:
                self._sockets.discard(opened)
            connection.close()

    def _stream(self, slot: int, prompt_tokens: int, response: http.client.HTTPResponse, stop: threading.Event) -> None:
        deadline = time.monotonic() + REQUEST_SECONDS
        pending = b""
        seen = 0
        while not stop.is_set() and (part := response.read1(_READ_BYTES)):
            if time.monotonic() > deadline or len(pending) > _MAX_LINE_BYTES:
                raise EndpointError(
                    f"a request took more than {REQUEST_SECONDS:g} s, or sent no lines; is it overloaded?"
                )
            *lines, pending = (pending + part).split(b"\n")
            before = seen
            try:
                for line in lines:
                    seen = tokens_in(line, seen)
            finally:  # an error among the lines does not undo the tokens before it
                self._count(slot, prompt_tokens, before, seen, stop)
        if seen == 0 and not stop.is_set():
            raise EndpointError("an answer without tokens; does the endpoint stream (server-sent events)?")

    def _count(self, slot: int, prompt_tokens: int, before: int, seen: int, stop: threading.Event) -> None:
        """Count the tokens of a part of an answer.

        What comes after the load of this request was stopped belongs to none: the next one may have begun, and would be
        ready before a request of its own has had a token.
        """
        with self._lock:
            if seen == before or stop.is_set():
                return
            self._generated += seen - before
            if before == 0:
                self._begun.add(slot)
                self._prompt += prompt_tokens


def _shut(opened: socket.socket) -> None:
    """End a connection that another thread reads from: it reads the end, or fails.

    Not with a method of TLS's, which would have that thread read on without it.
    """
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(opened, socket.SHUT_RDWR)


def tokens_in(line: bytes, seen: int) -> int:
    """Return how many tokens a streamed answer has after a line of it, of which ``seen`` had come before.

    Counted by the engine's own usage where each event has it (``continuous_usage_stats``), else one token an event.

    Raises:
        ValueError: an event that is no JSON object, or one that tells of an error.
    """
    if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
        return seen
    event: Any = json.loads(data)
    if not isinstance(event, dict) or "error" in event:
        raise ValueError(f"the engine answered {data[:200].decode(errors='replace')}")
    usage = event.get("usage")
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        return max(seen, int(usage["completion_tokens"]))
    choices = event.get("choices")
    has_text = isinstance(choices, list) and any(isinstance(each, dict) and each.get("text") for each in choices)
    return seen + 1 if has_text else seen


def _body(model: str, workload: Workload, prompt: list[int]) -> bytes:
    return json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": workload.output_tokens,
            "temperature": 0,
            "ignore_eos": True,  # vLLM, SGLang: every request has its full length
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()


def prompt_seed() -> int:
    """Return a seed for the prompts of one sweep: another each time, as engines may have those of the last cached.

    Not ``--seed``, which is of the order of the points.
    """
    return random.SystemRandom().getrandbits(31)


def _prompt(source: random.Random, workload: Workload) -> list[int]:
    tokens = workload.length_tokens + (1 if workload.shape is Shape.DECODE else 0)
    return [source.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(tokens)]
