"""What operator and agent make alike of an answer of the API server: bounded reading, and when to ask again."""

from collections.abc import Mapping
from typing import Protocol

from wattlock_api.boottime import now_seconds

#: A server that asks for more patience than this is asked again all the same.
MAX_RETRY_AFTER_SECONDS = 60.0
_CHUNK_BYTES = 64 * 1024


class Body(Protocol):
    """The body of an answer, as urllib3 gives it."""

    def read1(self, amt: int) -> bytes:
        """Return what is there, at most so many bytes; nothing at the end."""


class UnreadableAnswerError(OSError):
    """The answer is too long, or takes too long."""


def read_bounded(body: Body, max_bytes: int, timeout_seconds: float) -> bytes:
    """Return the whole body.

    A socket's time-out bounds each single read: a body that drips would never end.

    Raises:
        UnreadableAnswerError: it has more than ``max_bytes``, or is not over after ``timeout_seconds``.
    """
    deadline_seconds = now_seconds() + timeout_seconds
    parts: list[bytes] = []
    size = 0
    while part := body.read1(_CHUNK_BYTES):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise UnreadableAnswerError(f"an answer of more than {max_bytes} bytes")
        if now_seconds() > deadline_seconds:
            raise UnreadableAnswerError(f"an answer that is not over after {timeout_seconds:g} s")
    return b"".join(parts)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return for how long the server wants to be left alone (RFC 9110, 10.2.3); None where it does not say.

    The API server writes whole seconds (with 429 and 503); a date, which HTTP allows as well, is not understood.
    """
    text = headers.get("Retry-After") or ""
    if not text.isascii() or not text.isdigit():
        return None
    return min(float(text[:6]), MAX_RETRY_AFTER_SECONDS)
