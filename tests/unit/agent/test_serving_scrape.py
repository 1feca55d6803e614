"""Fetching of metrics pages, against a real server on this machine that misbehaves on request."""

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters
from wattlock_agent.serving.pages import MAX_PAGE_BYTES
from wattlock_agent.serving.scrape import Scraper
from wattlock_api.constants import Reason

PAGE = (Path(__file__).parents[2] / "data" / "vllm-0.32.0-metrics-t1.txt").read_bytes()
SCRAPER = Scraper(connect_timeout_seconds=0.3, total_timeout_seconds=0.4)

Answer = Callable[[socket.socket], None]


class Server:
    """Answers every connection with the same function of the socket, and remembers the requests."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/metrics"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(5)
            self.requests.append(connection.recv(65536))
            self._answer(connection)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.stop()


def head(status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: text/plain; version=0.0.4", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def sends(*parts: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)

    return answer


def drips(beginning: bytes, drop: bytes, seconds: float) -> Answer:
    """Send one drop every so many seconds until the client has had enough."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(beginning)
        connection.settimeout(seconds)
        while True:
            with suppress(TimeoutError):
                if not connection.recv(1):
                    return
            connection.sendall(drop)

    return answer


def floods(beginning: bytes, block: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(beginning)
        while True:
            connection.sendall(block)

    return answer


def failure(answer: Answer) -> tuple[ScrapeFailure, float]:
    with serving(answer) as server:
        started = time.monotonic()
        result = SCRAPER.scrape(server.url)
        elapsed_seconds = time.monotonic() - started
    assert isinstance(result, ScrapeFailure), result
    assert server.url in result.message
    return result, elapsed_seconds


def test_a_page_is_fetched_and_parsed() -> None:
    length = f"Content-Length: {len(PAGE)}"
    with serving(sends(head("200 OK", length), PAGE)) as server:
        before = time.monotonic()
        result = SCRAPER.scrape(server.url)
    assert isinstance(result, ServingCounters)
    assert result.generated_tokens == 18_000
    assert before <= result.at_seconds <= time.monotonic()
    assert server.requests[0].startswith(b"GET /metrics HTTP/1.1\r\n")
    assert b"Accept-Encoding: identity" in server.requests[0]


def test_a_chunked_page_and_one_that_ends_with_the_connection_are_fetched() -> None:
    chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (PAGE[:30_000], PAGE[30_000:]))
    for answer in (
        sends(head("200 OK", "Transfer-Encoding: chunked"), chunks, b"0\r\n\r\n"),
        sends(head("200 OK", "Connection: close"), PAGE),
    ):
        with serving(answer) as server:
            result = SCRAPER.scrape(server.url)
        assert isinstance(result, ServingCounters)
        assert result.prompt_tokens == 579


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(sends(head("500 Internal Server Error"), b"oops"), Reason.METRICS_UNREACHABLE, id="500"),
        pytest.param(sends(head("404 Not Found"), PAGE), Reason.METRICS_UNREACHABLE, id="404"),
        pytest.param(sends(head("204 No Content")), Reason.METRICS_UNREACHABLE, id="204"),
        pytest.param(sends(b""), Reason.METRICS_UNREACHABLE, id="closed without an answer"),
        pytest.param(sends(b"\x15\x03\x03\x00\x02\x02\x28"), Reason.METRICS_INVALID, id="TLS alert"),
        pytest.param(sends(b"\x00\xff" * 70_000), Reason.METRICS_INVALID, id="binary instead of HTTP"),
        pytest.param(sends(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500), Reason.METRICS_INVALID, id="many headers"),
        pytest.param(sends(head() + b"\x00\x01\x02"), Reason.METRICS_INVALID, id="binary page"),
        pytest.param(sends(head() + b"<html></html>\n"), Reason.METRICS_INVALID, id="HTML"),
        pytest.param(sends(head() + b"vllm:generation_tokens_total NaN\n"), Reason.METRICS_INVALID, id="NaN"),
        pytest.param(sends(head() + b"up 1\n"), Reason.NO_SERVING_METRICS, id="another program"),
        pytest.param(
            sends(head("200 OK", "Content-Length: 1073741824")), Reason.METRICS_TOO_LARGE, id="1 GB announced"
        ),
        pytest.param(
            sends(head("200 OK", f"Content-Length: {len(PAGE)}"), PAGE[:-9]), Reason.METRICS_INVALID, id="cut off"
        ),
        pytest.param(
            sends(head("200 OK", "Transfer-Encoding: chunked"), b"5\r\nvllm:"), Reason.METRICS_INVALID, id="chunk cut"
        ),
        pytest.param(
            sends(head("200 OK", "Transfer-Encoding: chunked"), b"zz\r\n"), Reason.METRICS_INVALID, id="bad chunk"
        ),
        pytest.param(
            sends(head("200 OK", "Content-Encoding: gzip"), gzip.compress(b"\n" * 20_000_000)),
            Reason.METRICS_INVALID,
            id="gzip bomb",
        ),
        pytest.param(floods(head(), b"# x\n" * 16_384), Reason.METRICS_TOO_LARGE, id="endless stream"),
    ],
)
def test_bad_answers_end_at_once_with_a_reason(answer: Answer, reason: Reason) -> None:
    result, _ = failure(answer)
    assert result.reason == reason


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(drips(b"", b"", 0.02), id="silence"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nX-", b"x", 0.02), id="headers by the byte"),
        pytest.param(drips(head(), b"#", 0.02), id="page by the byte"),
        pytest.param(
            drips(head("200 OK", "Transfer-Encoding: chunked") + b"ff\r\n", b"#", 0.02), id="chunk by the byte"
        ),
        pytest.param(floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500), id="endless promises"),
    ],
)
def test_slow_answers_end_at_the_deadline_however_busy_they_look(answer: Answer) -> None:
    result, elapsed_seconds = failure(answer)
    assert result.reason == Reason.METRICS_UNREACHABLE
    assert "within 0.4 s" in result.message
    assert elapsed_seconds < 1.0


def test_a_page_cut_between_two_lines_is_told_from_a_whole_one() -> None:
    end = PAGE.index(b"\n", len(PAGE) // 2) + 1
    result, _ = failure(sends(head("200 OK", f"Content-Length: {len(PAGE)}"), PAGE[:end]))
    assert f"cut off after {end} of {len(PAGE)} bytes" in result.message


def test_a_compressed_page_is_refused_without_opening_it() -> None:
    result, _ = failure(sends(head("200 OK", "Content-Encoding: deflate"), PAGE))
    assert "compressed" in result.message


def test_a_redirect_is_not_followed() -> None:
    with serving(sends(head(), PAGE)) as target:
        result, _ = failure(sends(head("302 Found", f"Location: {target.url}")))
    assert result.reason == Reason.METRICS_UNREACHABLE
    assert "redirect" in result.message
    assert target.requests == []


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(sends(head(), b"vllm:generation_tokens_total 666\n")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        with serving(sends(head(), PAGE)) as server:
            result = SCRAPER.scrape(server.url)
    assert isinstance(result, ServingCounters)
    assert result.generated_tokens == 18_000
    assert proxy.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:1/metrics",
        "file:///etc/passwd",
        "http://localhost:1/metrics",
        "http://user@127.0.0.1:1/metrics",
        "http://127.0.0.1:1/metrics?token=x",
        "http://127.0.0.1:99999/metrics",
        "http://[::1/metrics",
        "http://127.0.0.1:1/a b\r\nX: y",
        "",
    ],
)
def test_only_plain_http_to_a_literal_address_is_asked(url: str) -> None:
    result = SCRAPER.scrape(url)
    assert isinstance(result, ScrapeFailure)
    assert result.reason == Reason.METRICS_UNREACHABLE
    assert "not asked" in result.message


def test_a_closed_port_says_what_to_check() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = SCRAPER.scrape(f"http://127.0.0.1:{port}/metrics")
    assert isinstance(result, ScrapeFailure)
    assert result.reason == Reason.METRICS_UNREACHABLE
    assert "spec.pools[].metrics.port" in result.message


def test_an_ipv6_address_is_asked() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
    result = SCRAPER.scrape(f"http://[::1]:{port}/metrics")
    assert isinstance(result, ScrapeFailure)
    assert "refused" in result.message


def test_one_scraper_serves_many_threads() -> None:
    with (
        serving(sends(head(), PAGE)) as good,
        serving(drips(head(), b"#", 0.02)) as slow,
        ThreadPoolExecutor(8) as pool,
    ):
        results = list(pool.map(SCRAPER.scrape, [good.url, slow.url] * 4))
    assert [type(result) for result in results] == [ServingCounters, ScrapeFailure] * 4


def test_a_page_of_the_greatest_size_is_still_read() -> None:
    line = b"vllm:generation_tokens_total 5\n"
    page = line + b"#" * (MAX_PAGE_BYTES - len(line) - 1) + b"\n"
    with serving(sends(head("200 OK", f"Content-Length: {len(page)}"), page)) as server:
        result = SCRAPER.scrape(server.url)
    assert isinstance(result, ServingCounters)
    assert result.generated_tokens == 5
