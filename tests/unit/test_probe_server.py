"""Probes of agent and operator answer while one client keeps as many connections open as it can."""

import socket
import time
import urllib.request
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry
from wattlock_agent.http_server import AgentServer
from wattlock_agent.metrics import Snapshot, SnapshotBoard
from wattlock_api import boottime
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_api.probe_server import MAX_CONNECTIONS, MAX_CONNECTIONS_OF_ADDRESS
from wattlock_operator.http import Probes, serve

#: All of 127.0.0.0/8 is this machine: addresses of different clients.
TENANT, KUBELET = "127.0.0.2", "127.0.0.1"


@pytest.fixture(params=["agent", "operator"])
def server(request):
    if request.param == "agent":
        board = SnapshotBoard()
        board.snapshot = Snapshot(NodeEnergyStatus(), at_seconds=boottime.now_seconds())
        made = AgentServer(("", 0), board)
        made.start()
    else:
        made = serve(0, Probes(CollectorRegistry(), alive=lambda: True, ready=lambda: True))
    yield made
    made.shutdown()
    made.server_close()


def connect(server, source):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=5, source_address=(source, 0))


def is_turned_away(connection):
    connection.settimeout(2)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def healthy(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/healthz", timeout=5) as response:
        return response.status == 200


def test_one_client_cannot_take_the_probes_away(server):
    with ExitStack() as stack:
        held = [stack.enter_context(connect(server, TENANT)) for _ in range(MAX_CONNECTIONS_OF_ADDRESS)]
        more = [stack.enter_context(connect(server, TENANT)) for _ in range(MAX_CONNECTIONS)]
        assert all(is_turned_away(each) for each in more)
        assert healthy(server)
        held[0].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert held[0].recv(12) == b"HTTP/1.0 200"


def test_many_clients_together_are_bounded(server):
    with ExitStack() as stack:
        for number in range(MAX_CONNECTIONS // MAX_CONNECTIONS_OF_ADDRESS):
            for _ in range(MAX_CONNECTIONS_OF_ADDRESS):
                stack.enter_context(connect(server, f"127.0.1.{number + 1}"))
        assert is_turned_away(stack.enter_context(connect(server, KUBELET)))


def test_room_is_made_when_a_connection_ends(server):
    for _ in range(3 * MAX_CONNECTIONS_OF_ADDRESS):
        assert healthy(server)
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS_OF_ADDRESS):
            stack.enter_context(connect(server, KUBELET))
    deadline = time.monotonic() + 5
    while server._connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert healthy(server)


def test_it_answers_on_every_kind_of_address_that_the_machine_has(server):
    for host in ("127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])):
        with urllib.request.urlopen(f"http://{host}:{server.server_port}/healthz", timeout=5) as response:
            assert response.status == 200
