"""Serves /metrics, /healthz and /readyz from the newest snapshot."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from wattlock_api import boottime
from wattlock_api.probe_server import TIMEOUT_SECONDS, ProbeServer

from wattlock_agent.metrics import SnapshotBoard, make_registry

#: Without a pass of the loop for so long the agent counts as dead.
HEARTBEAT_SECONDS = 15.0


class AgentServer(ProbeServer):
    """The HTTP server. Ready and alive are judged by the loop's snapshot, never by whether /metrics works."""

    def __init__(
        self, address: tuple[str, int], board: SnapshotBoard, now_seconds: Callable[[], float] = boottime.now_seconds
    ) -> None:
        """Bind; port 0 takes any free one. Raises OSError when the port is taken."""
        super().__init__(address, _Handler)
        self.board = board
        self.registry: CollectorRegistry = make_registry(board)
        self.now_seconds = now_seconds

    def start(self) -> None:
        """Serve in a thread of its own."""
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body for a path."""
        text = "text/plain; charset=utf-8"
        snapshot = self.board.snapshot
        if path == "/metrics":
            return 200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.registry)
        if path == "/healthz":
            age_seconds = self.now_seconds() - snapshot.at_seconds
            alive = age_seconds < HEARTBEAT_SECONDS
            return (200 if alive else 503), text, f"last pass {age_seconds:.1f} s ago\n".encode()
        if path == "/readyz":
            if snapshot.ready:
                return 200, text, b"every order is in force or refused with a reason\n"
            return 503, text, f"not yet: {snapshot.status.agent.message or 'orders wait to be carried out'}\n".encode()
        return 404, text, b"try /metrics, /healthz or /readyz\n"


class _Handler(BaseHTTPRequestHandler):
    server: AgentServer
    timeout = TIMEOUT_SECONDS
    server_version = "wattlock-agent"
    sys_version = ""

    def do_GET(self) -> None:
        status, content_type, body = self.server.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write no access log."""
