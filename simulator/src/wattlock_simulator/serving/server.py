"""The HTTP face of an instance: /metrics, /healthz, POST /simulate, and the part of OpenAI's API in ``completions``."""

from __future__ import annotations

import json
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wattlock_simulator.serving import completions
from wattlock_simulator.serving.control import ControlError, MetricsFault, parse
from wattlock_simulator.serving.instance import TICK_SECONDS, Instance

_log = logging.getLogger(__name__)

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT_SECONDS = 10.0
_MAX_BODY_BYTES = 65_536
_MAX_COMPLETION_BYTES = 8 << 20
_BACKLOG = 256
_HUGE_BYTES = 64 << 20
_SLOW_SECONDS = 30.0
_ENDLESS_SECONDS = 600.0
_STREAM_WAIT_SECONDS = 5.0  # how late a client that left is noticed, when there is no token for it
_FILLER = (b'vllm:filler_total{engine="0",model_name="simulated"} 1.0\n' * 1200)[:65_536]


class Server(ThreadingHTTPServer):
    """Serves one instance; ``stop`` ends slow and endless answers as well."""

    daemon_threads = True
    request_queue_size = _BACKLOG  # a load begins with all its connections at once

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
        elif path == "/v1/models":
            self._json(HTTPStatus.OK, completions.models(self.server.instance.model_name))
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "try /metrics, /healthz, /v1/models, / or POST /simulate"})

    def do_POST(self) -> None:
        if self.path not in ("/simulate", completions.PATH):
            self._json(HTTPStatus.NOT_FOUND, {"error": f"POST goes to /simulate or {completions.PATH}"})
            return
        length = self.headers.get("Content-Length", "")
        most = _MAX_BODY_BYTES if self.path == "/simulate" else _MAX_COMPLETION_BYTES
        if not length.isdigit() or int(length) > most:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"send a Content-Length of at most {most}"})
            return
        if self.path == completions.PATH:
            self._complete(self.rfile.read(int(length)))
            return
        instance = self.server.instance
        try:
            change = parse(self.rfile.read(int(length)), instance.settings)
        except ControlError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        instance.apply(change)
        self._json(HTTPStatus.OK, instance.describe())

    def _complete(self, body: bytes) -> None:
        instance = self.server.instance
        try:
            asked = completions.parse(body)
        except ControlError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": {"message": str(error), "type": "BadRequestError"}})
            return
        if not instance.submit(asked.request):
            message = "this instance makes up its own load: start it with --requests"
            self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": {"message": message, "type": "Unavailable"}})
            return
        answer = completions.Answer(asked, instance.model_name)
        try:
            if asked.stream:
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
            tokens, done = 0, False
            while not done:
                tokens, done = instance.wait(asked.request, tokens, _STREAM_WAIT_SECONDS)
                if asked.stream:
                    self.wfile.write(answer.events(tokens, done=done))
            if not asked.stream:
                self._json(HTTPStatus.OK, answer.whole(tokens))
        except OSError:
            self.close_connection = True  # the client left
        finally:
            instance.withdraw(asked.request)

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
