"""Stand-ins for what an agent meets on a node: the API server (its own NodeEnergy and the operator's lease) and the
kubelet's PodResources API. Just enough for one agent that observes; the real ones are met in tests/cluster and e2e.
"""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import grpc
from wattlock_agent.holders.podresources import LIST_METHOD
from wattlock_agent.holders.podresources_pb2 import ListPodResourcesResponse
from wattlock_api.constants import GROUP, LEASE_NAME, VERSION
from wattlock_api.nodeenergy import Order

_BOOKMARK_SECONDS = 20.0
_NODES = f"/apis/{GROUP}/{VERSION}/nodeenergies"


class ApiServer(ThreadingHTTPServer):
    """Serves one NodeEnergy: get, watch, and patches of its status."""

    daemon_threads = True

    def __init__(self, node_name: str) -> None:
        super().__init__(("127.0.0.1", 0), _ApiHandler)
        self.node_name = node_name
        self.changed = threading.Condition()
        self.statuses: list[dict[str, Any]] = []
        self.closing = False
        self._orders: list[dict[str, Any]] = []
        self._generation = 1
        threading.Thread(target=self.serve_forever, name="api", daemon=True).start()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_port}"

    def give(self, orders: Sequence[Order]) -> None:
        """Make these the orders of the node."""
        with self.changed:
            self._orders = [order.to_api() for order in orders]
            self._generation += 1
            self.changed.notify_all()

    def node_energy(self) -> dict[str, Any]:
        """Return the object as it is now."""
        return {
            "metadata": {
                "name": self.node_name,
                "uid": "hardware-tier",
                "generation": self._generation,
                "resourceVersion": str(self._generation),
            },
            "spec": {"orders": self._orders},
        }

    def take_status(self, status: dict[str, Any]) -> None:
        """Keep a report of the agent."""
        with self.changed:
            self.statuses.append(status)
            self.changed.notify_all()

    def wait_for_report(self, generation: int, timeout_seconds: float) -> bool:
        """Wait until the agent has acted on a generation of the orders; returns whether it did."""
        with self.changed:
            return self.changed.wait_for(
                lambda: any(each.get("observedGeneration", 0) >= generation for each in self.statuses), timeout_seconds
            )

    @property
    def generation(self) -> int:
        """Generation of the orders."""
        return self._generation

    def close(self) -> None:
        """Stop serving."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.shutdown()
        self.server_close()


class _ApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.endswith(f"/leases/{LEASE_NAME}"):
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self._answer({"metadata": {"managedFields": [{"time": now}]}, "spec": {"renewTime": now}})
        elif path == f"{_NODES}/{self.server.node_name}":
            self._answer(self.server.node_energy())
        elif path == _NODES and "watch=1" in query:
            self._watch(int(parse_qs(query).get("resourceVersion", ["0"])[0]))
        else:
            self.send_error(404)

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.take_status(body["status"])
        self._answer({})

    def _answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _watch(self, seen: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        # As the real one does: a client that reads a stream in blocks would wait for a full one otherwise.
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        server, sent = self.server, seen
        while True:
            with server.changed:
                if server.generation == sent and not server.closing:
                    server.changed.wait(_BOOKMARK_SECONDS)
                if server.closing:
                    return
                kind = "MODIFIED" if server.generation != sent else "BOOKMARK"
                sent = server.generation
                event = {"type": kind, "object": server.node_energy()}
            line = json.dumps(event).encode() + b"\n"
            try:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
                self.wfile.flush()
            except OSError:
                return

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write no access log."""


class Kubelet:
    """Says which pod holds which GPU, on the kubelet's own socket and in its own messages."""

    def __init__(self, socket: Path) -> None:
        self._answer = b""
        self._server = grpc.server(ThreadPoolExecutor(2))
        service, name = LIST_METHOD.strip("/").split("/")
        method = grpc.unary_unary_rpc_method_handler(lambda request, context: self._answer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
        self._server.add_insecure_port(f"unix://{socket}")
        self._server.start()

    def say(self, holder: tuple[str, str] | None, gpu_uuid: str) -> None:
        """Let one pod (namespace, name) hold the GPU; None: nobody."""
        answer = ListPodResourcesResponse()
        if holder is not None:
            pod = answer.pod_resources.add(namespace=holder[0], name=holder[1])
            device = pod.containers.add(name="server").devices.add(resource_name="nvidia.com/gpu")
            device.device_ids.append(gpu_uuid)
        self._answer = answer.SerializeToString()

    def close(self) -> None:
        """Stop serving."""
        self._server.stop(None).wait()


def now_seconds() -> float:
    """Return the clock that all processes of the tier and the agent share: CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
