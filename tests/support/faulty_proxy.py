"""An HTTP server that passes requests on to the API server, except where a test wants it to misbehave."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import urllib3
import yaml
from wattlock_operator.kube import Kube

#: Headers that are about one connection, not about the message, and whose place the proxy's own right takes.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "te", "upgrade"}
_REPLACED = _HOP_BY_HOP | {"authorization", "accept-encoding"}
_BLOCKED_SECONDS = 120.0


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    query: dict[str, list[str]] = field(default_factory=dict)

    @property
    def watches(self) -> bool:
        """Whether it is a watch."""
        return self.query.get("watch", [""])[0] in ("1", "true")

    @property
    def writes(self) -> bool:
        """Whether it changes something."""
        return self.method != "GET"


Fault = Callable[["_Handler", Request, bytes], None]
"""Answers in place of the API server."""


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Answer that, whatever is asked; underscores in names of headers stand for hyphens."""

    def fault(handler: "_Handler", request: Request, sent: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return fault


def refusal(status: int, reason: str, **headers: str) -> Fault:
    """Refuse as the API server does."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": status, "metadata": {}}
    return answer(status, json.dumps(body | {"message": reason}).encode(), Content_Type="application/json", **headers)


def expired_watch(handler: "_Handler", request: Request, sent: bytes) -> None:
    """End a watch as the API server does when the version that it begins at is too old; pass on the rest."""
    if not request.watches:
        return handler.forward(sent)
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 410, "reason": "Expired", "message": "old"}
    return answer(200, json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")(handler, request, sent)


def truncated(handler: "_Handler", request: Request, sent: bytes) -> None:
    """Break off in the middle of the answer."""
    handler.forward(sent, share=0.5)


def no_http(handler: "_Handler", request: Request, sent: bytes) -> None:
    """Answer something that is not HTTP."""
    handler.wfile.write(b"\x00\x01\x02 this is no HTTP \xff\xfe\r\n\r\n")
    handler.close_connection = True


def no_answer(handler: "_Handler", request: Request, sent: bytes) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def silence(handler: "_Handler", request: Request, sent: bytes) -> None:
    """Keep watches open without ever an event; pass on the rest."""
    if not request.watches:
        return handler.forward(sent)
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.flush()
    handler.server.watches_broken.wait(_BLOCKED_SECONDS)
    handler.close_connection = True
    return None


def slow(seconds: float) -> Fault:
    """Pass requests on after a while; watches at once."""

    def fault(handler: "_Handler", request: Request, sent: bytes) -> None:
        if not request.watches:
            handler.server.closed.wait(seconds)
        handler.forward(sent)

    return fault


class Gate:
    """Holds requests up until it is opened, then passes them on."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.waiting = threading.Semaphore(0)
        """Released once for each request that came."""
        self.passed: list[int] = []
        """HTTP status of what was passed on afterwards."""

    def __call__(self, handler: "_Handler", request: Request, sent: bytes) -> None:
        """Hold one up."""
        self.waiting.release()
        self.opened.wait(_BLOCKED_SECONDS)
        with contextlib.suppress(OSError):  # who asked may be gone; what is asked for is done all the same
            handler.forward(sent, passed=self.passed)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    upstream: Kube
    choose: Callable[[Request], Fault | None]
    requests: list[Request]
    closed: threading.Event
    watches_broken: threading.Event

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: broken connections are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        request = Request(self.command, url.path, parse_qs(url.query))
        self.server.requests.append(request)
        fault = self.server.choose(request)
        if fault is None:
            self.forward(sent)
        else:
            fault(self, request, sent)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _serve

    def forward(self, sent: bytes, share: float = 1.0, passed: list[int] | None = None) -> None:
        """Pass the request on and its answer back; a share below 1 ends in the middle of it."""
        client = self.server.upstream.client
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _REPLACED}
        # Compressed answers could not be cut in the middle of their text.
        headers["Accept-Encoding"] = "identity"
        client.update_params_for_auth(headers, [], ["BearerToken"], "", "", None)
        broken = self.server.watches_broken
        response = client.rest_client.pool_manager.request(
            self.command,
            client.configuration.host + self.path,
            body=sent or None,
            headers=headers,
            preload_content=False,
            retries=False,
            timeout=urllib3.Timeout(connect=5, read=300),
        )
        try:
            if passed is not None:
                passed.append(response.status)
            self.send_response_only(response.status)
            for name, value in response.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            if "watch=" in self.path:
                self._stream(response, broken)
                return
            body = response.read()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: int(len(body) * share)])
            self.close_connection = share < 1
        finally:
            response.close()

    def _stream(self, response: Any, broken: threading.Event) -> None:
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        ended = threading.Event()

        def cut() -> None:
            while not ended.wait(0.1):
                if broken.is_set():
                    with contextlib.suppress(OSError, AttributeError, ValueError):  # it may have ended just now
                        self.connection.shutdown(2)
                        response.shutdown()
                    return

        threading.Thread(target=cut, daemon=True).start()
        try:
            for chunk in response.stream(64 * 1024):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (OSError, urllib3.exceptions.HTTPError):
            self.close_connection = True
        finally:
            ended.set()

    def log_message(self, *_: Any) -> None:
        pass


class FaultyProxy:
    """Plain HTTP on this machine, to the API server behind ``upstream`` with its credentials."""

    def __init__(self, upstream: Kube) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.upstream, self._server.choose, self._server.requests = upstream, self._choose, []
        self._server.closed, self._server.watches_broken = threading.Event(), threading.Event()
        self._fault: Fault | None = None
        self._where: Callable[[Request], bool] = lambda _: True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> list[Request]:
        """All that came."""
        return self._server.requests

    def kubeconfig(self, path: Path) -> str:
        """Write a kubeconfig for it; return its path."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
            "current-context": "proxy",
        }
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def _choose(self, request: Request) -> Fault | None:
        return self._fault if self._where(request) else None

    def break_watches(self) -> None:
        """End all watches, which begin anew."""
        broken, self._server.watches_broken = self._server.watches_broken, threading.Event()
        broken.set()

    @contextlib.contextmanager
    def faulty(self, fault: Fault, where: Callable[[Request], bool] = lambda _: True) -> Iterator[None]:
        """Misbehave, where the test says so, also towards watches that stood before."""
        self._where, self._fault = where, fault
        self.break_watches()
        try:
            yield
        finally:
            self._fault = None
            self.break_watches()

    def close(self) -> None:
        """End for good."""
        self._server.closed.set()
        self._server.watches_broken.set()
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()
