"""The HTTP face of an instance: /metrics, /healthz and POST /simulate."""

from __future__ import annotations

import json
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wattlock_simulator.serving.control import ControlError, MetricsFault, parse
from wattlock_simulator.serving.instance import TICK_SECONDS, Instance

_log = logging.getLogger(__name__)

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT_SECONDS = 10.0
_MAX_BODY_BYTES = 65_536
_HUGE_BYTES = 64 << 20
_SLOW_SECONDS = 30.0
_ENDLESS_SECONDS = 600.0
_FILLER = (b'vllm:filler_total{engine="0",model_name="simulated"} 1.0\n' * 1200)[:65_536]


class Server(ThreadingHTTPServer):
    """Serves one instance; ``stop`` ends slow and endless answers as well."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], instance: Instance) -> None:
        self.instance = instance
        self.stopping = threading.Event()
        super().__init__(address, _Handler)

    def run(self, stop: threading.Event) -> None:
        """Serves and ticks until told to stop, then leaves the GPUs."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        thread.start()
        try:
            while not stop.wait(TICK_SECONDS):
                self.instance.tick()
        finally:
            self.instance.leave()
            self.stopping.set()
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _REQUEST_TIMEOUT_SECONDS  # seconds of silence on the connection, used by the base class

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._metrics()
        elif path == "/healthz":
            self._answer(HTTPStatus.OK, b"ok\n", "text/plain")
        elif path == "/":
            self._json(HTTPStatus.OK, self.server.instance.describe())
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "try /metrics, /healthz, / or POST /simulate"})

    def do_POST(self) -> None:
        if self.path != "/simulate":
            self._json(HTTPStatus.NOT_FOUND, {"error": "POST goes to /simulate"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"send a Content-Length of at most {_MAX_BODY_BYTES}"})
            return
        instance = self.server.instance
        try:
            change = parse(self.rfile.read(int(length)), instance.settings)
        except ControlError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        instance.apply(change)
        self._json(HTTPStatus.OK, instance.describe())

    def _metrics(self) -> None:
        fault = self.server.instance.metrics_fault
        if fault is MetricsFault.GARBAGE:
            self._answer(
                HTTPStatus.OK, b"\x00\xff<html>{{{ not metrics\nvllm:generation_tokens_total{ 12 12 12\n", _TEXT
            )
        elif fault is MetricsFault.HUGE:
            self._stream(_HUGE_BYTES, pause_seconds=0.0)
        elif fault is MetricsFault.ENDLESS:
            self._stream(None, pause_seconds=0.05)
        else:
            if fault is MetricsFault.SLOW:
                self.server.stopping.wait(_SLOW_SECONDS)
            self._answer(HTTPStatus.OK, self.server.instance.page(), _TEXT)

    def _stream(self, size_bytes: int | None, *, pause_seconds: float) -> None:
        """Sends filler: so many bytes, or for ten minutes; ends when the client has had enough."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _TEXT)
        self.end_headers()
        left = _ENDLESS_SECONDS / pause_seconds if size_bytes is None else size_bytes / len(_FILLER)
        try:
            while left > 0 and not self.server.stopping.wait(pause_seconds):
                self.wfile.write(_FILLER)
                left -= 1
        except OSError:
            self.close_connection = True

    def _json(self, status: HTTPStatus, value: object) -> None:
        self._answer(status, json.dumps(value).encode() + b"\n", "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client left

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - named by the base class
        _log.debug(format, *args)
