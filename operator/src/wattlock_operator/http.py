"""HTTP for probes and Prometheus: /healthz, /readyz and /metrics."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from wattlock_api.probe_server import TIMEOUT_SECONDS, ProbeServer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probes:
    """What the server tells."""

    registry: CollectorRegistry
    alive: Callable[[], bool]
    ready: Callable[[], bool]


def serve(port: int, probes: Probes) -> ProbeServer:
    """Serve in a daemon thread; call ``shutdown`` on the result to stop.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT_SECONDS

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, generate_latest(probes.registry), CONTENT_TYPE_PLAIN_0_0_4)
            elif path == "/healthz":
                alive = probes.alive()
                self._answer(200 if alive else 503, b"ok\n" if alive else b"the reconcile task hangs\n")
            elif path == "/readyz":
                ready = probes.ready()
                self._answer(200 if ready else 503, b"ok\n" if ready else b"the cluster has not been listed yet\n")
            else:
                self._answer(404, b"try /metrics, /healthz or /readyz\n")

        def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
            log.debug(format, *args)

    server = ProbeServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
