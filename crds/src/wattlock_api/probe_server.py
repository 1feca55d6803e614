"""The HTTP server under /metrics and the probes of operator and agent: bounded, and not to be had by one client."""

import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: Connections at a time, in all and from one address. The kubelet probes from the node's address, so a pod that keeps
#: all of its own connections open does not turn the probes away.
MAX_CONNECTIONS = 32
MAX_CONNECTIONS_OF_ADDRESS = 4
#: A connection that says nothing for so long is closed.
TIMEOUT_SECONDS = 5


class ProbeServer(ThreadingHTTPServer):
    """A thread for each connection; those over the bounds are closed at once."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        """Bind; port 0 takes any free one. An empty host is every address: a cluster may have IPv4 or IPv6 alone.

        Raises:
            OSError: the port is taken.
        """
        if not address[0] and socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6
        self._connections: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind to IPv4 as well, whatever the node's default is."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: object, client_address: object) -> None:
        """Serve a connection in a thread, if there is room for it."""
        host = _host(client_address)
        with self._lock:
            room = self._connections.total() < MAX_CONNECTIONS and self._connections[host] < MAX_CONNECTIONS_OF_ADDRESS
            self._connections[host] += room
        if room:
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        """Serve a connection, then make room."""
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            with self._lock:
                self._connections[_host(client_address)] -= 1
                self._connections += Counter()  # forgets addresses without a connection

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that went away."""


def _host(client_address: object) -> str:
    # A client by IPv4 is the same one whether or not the socket is one of IPv6.
    return str(client_address[0]).removeprefix("::ffff:") if isinstance(client_address, tuple) else ""
