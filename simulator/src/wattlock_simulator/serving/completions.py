"""``POST /v1/completions`` as OpenAI and vLLM know it: what is read of a request, and what is answered. Pure."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from wattlock_simulator.serving.control import ControlError
from wattlock_simulator.serving.requests import Request

PATH = "/v1/completions"

_MAX_TOKENS = 1_048_576
_CHARACTERS_PER_TOKEN = 4
_WORD = " watt"


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        request: for the engine.
        stream: whether tokens are to be sent as they come.
        usage_with_each: vLLM's ``stream_options.continuous_usage_stats``.
        usage_at_end: ``stream_options.include_usage``.
    """

    request: Request
    stream: bool
    usage_with_each: bool
    usage_at_end: bool


def models(model_name: str) -> dict[str, Any]:
    """The answer to ``GET /v1/models``."""
    return {"object": "list", "data": [{"id": model_name, "object": "model", "owned_by": "wattlock-simulator"}]}


def parse(body: bytes) -> Asked:
    """Checks a request body.

    Args:
        body: JSON object. ``prompt`` is text (four characters are a token) or a list of token numbers; of the other
            keys ``max_tokens`` (16 by default), ``stream`` and ``stream_options`` are read. Every request gets all
            its tokens: there is no end-of-text token.

    Raises:
        ControlError: no JSON or a value that makes no sense.
    """
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ControlError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ControlError('the body must be a JSON object such as {"prompt": "Hello", "max_tokens": 16}')
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and prompt:
        prompt_tokens = max(1, len(prompt) // _CHARACTERS_PER_TOKEN)
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        prompt_tokens = len(prompt)
    else:
        raise ControlError("prompt must be a text or a list of token numbers, not empty")
    output_tokens = fields.get("max_tokens", 16)
    if type(output_tokens) is not int or not 1 <= output_tokens <= _MAX_TOKENS or prompt_tokens > _MAX_TOKENS:
        raise ControlError(
            f"max_tokens must be a whole number from 1 to {_MAX_TOKENS}, and so must the prompt's length"
        )
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ControlError('stream_options must be an object such as {"include_usage": true}')
    key = zlib.crc32(json.dumps(prompt).encode())
    return Asked(
        Request(key, prompt_tokens, output_tokens),
        stream=bool(fields.get("stream")),
        usage_with_each=bool(options.get("continuous_usage_stats")),
        usage_at_end=bool(options.get("include_usage")),
    )


class Answer:
    """The answer to one request; ``events`` remembers what it has sent."""

    def __init__(self, asked: Asked, model_name: str) -> None:
        self._asked = asked
        self._model_name = model_name
        self._sent_tokens = 0

    def events(self, tokens: int, *, done: bool) -> bytes:
        """Server-sent events for the tokens that are new; one event may carry several, as with a busy real engine."""
        events = []
        new, self._sent_tokens = tokens - self._sent_tokens, tokens
        if new or done:
            chunk = self._chunk(new, "length" if done else None)
            if self._asked.usage_with_each:
                chunk["usage"] = self._usage(tokens)
            events.append(json.dumps(chunk))
        if done and self._asked.usage_at_end:
            events.append(json.dumps({**self._chunk(0, None), "choices": [], "usage": self._usage(tokens)}))
        if done:
            events.append("[DONE]")
        if not events:
            return b": nothing yet\n\n"  # a comment, so that a client that has left is noticed
        return "".join(f"data: {event}\n\n" for event in events).encode()

    def whole(self, tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self._chunk(tokens, "length"), "usage": self._usage(tokens)}

    def _chunk(self, tokens: int, reason: str | None) -> dict[str, Any]:
        return {
            "id": f"cmpl-{id(self._asked):x}",
            "object": "text_completion",
            "model": self._model_name,
            "choices": [{"index": 0, "text": _WORD * tokens, "finish_reason": reason}],
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt_tokens = self._asked.request.prompt_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
