"""Fetches the metrics page of one pod: bounded in time and size, to the literal address of an order, nowhere else.

``http.client`` of the standard library and not urllib3: it has no redirects, no proxies from the environment, no
retries and no decompression to switch off, and its socket can be ours. A time-out for each read does not bound a
peer that drips one byte a second into its headers; ``_DeadlineSocket`` gives every read only what is left of the whole.
"""

import http.client
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from wattlock_api import boottime
from wattlock_api.constants import Reason

from wattlock_agent.serving.base import ScrapeFailure, ServingCounters
from wattlock_agent.serving.pages import MAX_PAGE_BYTES, parse_page

CONNECT_TIMEOUT_SECONDS = 2.0
TOTAL_TIMEOUT_SECONDS = 3.0
_CHUNK_BYTES = 64 * 1024
_HEADERS = {"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity", "Connection": "close"}


class Scraper:
    """Scrapes metrics pages. Has no state, so one object serves any number of threads."""

    def __init__(
        self,
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        total_timeout_seconds: float = TOTAL_TIMEOUT_SECONDS,
        now_seconds: Callable[[], float] = boottime.now_seconds,
    ) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._total_timeout_seconds = total_timeout_seconds
        self._now_seconds = now_seconds

    def scrape(self, url: str) -> ServingCounters | ScrapeFailure:
        """Fetch and parse one page; blocks for ``total_timeout_seconds`` at most and never raises.

        ``url`` is ``http://ADDRESS:PORT/PATH`` with a literal IP address, as in an order.

        Failures: ``MetricsUnreachable`` for no connection, no answer in time, any status but 200 (a redirect is not
        followed) and a URL of another form; ``MetricsInvalid`` for an answer that is not HTTP, compressed or cut
        off; ``MetricsTooLarge`` over 4 MiB; and those of ``pages.parse_page``.
        """
        at_seconds = self._now_seconds()
        try:
            page = self._fetch(url)
        except _FetchError as error:
            return ScrapeFailure(at_seconds, error.reason, f"{url}: {error}")
        except TimeoutError:
            return ScrapeFailure(
                at_seconds,
                Reason.METRICS_UNREACHABLE,
                f"{url}: no complete answer within {self._total_timeout_seconds:g} s; "
                "the engine is overloaded or a network policy drops packets from the agent",
            )
        except OSError as error:
            return ScrapeFailure(
                at_seconds,
                Reason.METRICS_UNREACHABLE,
                f"{url}: {error.strerror or error}; check that the engine runs and listens on this port "
                "(spec.pools[].metrics.port) and that network policies admit the agent",
            )
        except (http.client.HTTPException, ValueError) as error:
            return ScrapeFailure(
                at_seconds,
                Reason.METRICS_INVALID,
                f"{url}: the answer is not proper HTTP ({type(error).__name__}); does the port serve plain HTTP?",
            )
        result = parse_page(page, at_seconds)
        return replace(result, message=f"{url}: {result.message}") if isinstance(result, ScrapeFailure) else result

    def _fetch(self, url: str) -> bytes:
        address, port, path = _split(url)
        deadline_seconds = time.monotonic() + self._total_timeout_seconds
        connection = _Connection(address, port, self._connect_timeout_seconds, deadline_seconds)
        try:
            connection.request("GET", path, headers=_HEADERS)
            with connection.getresponse() as response:
                _check_head(response)
                return _read_body(response)
        finally:
            connection.close()


class _FetchError(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _DeadlineSocket(socket.socket):
    """A socket whose every read ends at one deadline for the whole exchange."""

    deadline_seconds: float

    def recv_into(self, *arguments: Any) -> int:
        """Receive, waiting no longer than until the deadline.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left_seconds = self.deadline_seconds - time.monotonic()
        if left_seconds <= 0:
            raise TimeoutError("deadline passed")
        self.settimeout(left_seconds)
        return super().recv_into(*arguments)


class _Connection(http.client.HTTPConnection):
    """A connection to a literal address: no name is resolved and no proxy asked."""

    def __init__(self, address: str, port: int, connect_timeout_seconds: float, deadline_seconds: float) -> None:
        super().__init__(address, port)
        self._connect_timeout_seconds = connect_timeout_seconds
        self._deadline_seconds = deadline_seconds

    def connect(self) -> None:
        """Connect within the shorter of the two time-outs."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        connected = _DeadlineSocket(family, socket.SOCK_STREAM)
        connected.deadline_seconds = self._deadline_seconds
        self.sock = connected  # closed with the connection, also when connecting fails
        left_seconds = self._deadline_seconds - time.monotonic()
        connected.settimeout(max(min(self._connect_timeout_seconds, left_seconds), 0.001))
        connected.connect((self.host, self.port))


def _split(url: str) -> tuple[str, int, str]:
    """Return address, port and path.

    Raises:
        _FetchError: not plain HTTP to a literal address.
    """
    try:
        parts = urlsplit(url)
        address = str(ipaddress.ip_address(parts.hostname or ""))
        port = parts.port or 80
    except ValueError:
        raise _FetchError(Reason.METRICS_UNREACHABLE, "not a URL with a literal IP address; not asked") from None
    path = parts.path or "/"
    plain = path.isascii() and path.isprintable() and " " not in path
    if parts.scheme != "http" or parts.username is not None or parts.query or parts.fragment or not plain:
        raise _FetchError(
            Reason.METRICS_UNREACHABLE, "not a plain http:// URL without user, query and fragment; not asked"
        )
    return address, port, path


def _check_head(response: http.client.HTTPResponse) -> None:
    if 300 <= response.status < 400:
        raise _FetchError(
            Reason.METRICS_UNREACHABLE,
            f"HTTP {response.status}: redirects are not followed; set spec.pools[].metrics to the final port and path",
        )
    if response.status != 200:
        raise _FetchError(
            Reason.METRICS_UNREACHABLE,
            f"HTTP {response.status}; check spec.pools[].metrics (port and path) and the engine's log",
        )
    encoding = (response.getheader("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _FetchError(
            Reason.METRICS_INVALID, "compressed although plain text was asked for; is a proxy in between?"
        )
    if response.length is not None and response.length > MAX_PAGE_BYTES:
        raise _too_large()


def _read_body(response: http.client.HTTPResponse) -> bytes:
    """Return the body.

    Raises:
        _FetchError: longer than the bound, or shorter than the server had announced.
    """
    announced = response.length
    parts: list[bytes] = []
    size = 0
    while part := response.read(_CHUNK_BYTES):
        size += len(part)
        if size > MAX_PAGE_BYTES:
            raise _too_large()
        parts.append(part)
    if announced is not None and size < announced:
        raise _FetchError(Reason.METRICS_INVALID, f"cut off after {size} of {announced} bytes")
    return b"".join(parts)


def _too_large() -> _FetchError:
    return _FetchError(Reason.METRICS_TOO_LARGE, f"the page is larger than {MAX_PAGE_BYTES // 1024} KiB")
