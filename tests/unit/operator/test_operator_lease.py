"""The lease against a small API server in memory that minds resource versions."""

import copy
from typing import Any

import pytest
from wattlock_operator.kube import KubeError
from wattlock_operator.lease import DURATION_SECONDS, Lease, parse_lease


class Server:
    """Keeps one lease; refuses a write over an old version, as the API server does."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.requests: list[str] = []
        self._version = 0

    def get(self, path: str) -> dict[str, Any] | None:
        self.requests.append("GET")
        return copy.deepcopy(self.lease)

    def request(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(method)
        if method == "PUT":
            if self.lease is None:
                raise KubeError("not found", 404)
            if body["metadata"].get("resourceVersion") != self.lease["metadata"]["resourceVersion"]:
                raise KubeError("conflict", 409)
        return self.touch(body)

    def touch(self, body: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self._version)
        return copy.deepcopy(self.lease)


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_held_lease_is_renewed_with_one_request(server):
    lease = Lease(server, "wattlock", "operator-a")
    assert lease.renew(1000.0)
    assert server.requests == ["GET", "POST"]
    for number in range(1, 4):
        assert lease.renew(1000.0 + 15 * number)
    assert server.requests[2:] == ["PUT", "PUT", "PUT"]
    assert parse_lease(server.lease).renewed_at_seconds == 1045


def test_a_touched_or_deleted_lease_is_read_again_and_kept(server):
    lease = Lease(server, "wattlock", "operator-a")
    lease.renew(1000.0)
    server.touch(server.lease)
    assert lease.renew(1015.0)
    server.lease = None
    assert lease.renew(1030.0)
    assert parse_lease(server.lease).holder == "operator-a"
    assert server.lease["spec"]["leaseTransitions"] == 0


def test_a_lease_that_another_took_is_not_written_over(server):
    first, second = Lease(server, "wattlock", "operator-a"), Lease(server, "wattlock", "operator-b")
    assert first.renew(1000.0)
    assert not second.renew(1010.0)
    late = 1000.0 + DURATION_SECONDS + 1
    assert second.renew(late)
    assert not first.renew(late + 1)
    assert parse_lease(server.lease).holder == "operator-b"
    assert server.lease["spec"]["leaseTransitions"] == 1


def test_a_lease_that_was_given_up_can_be_taken_at_once(server):
    first, second = Lease(server, "wattlock", "operator-a"), Lease(server, "wattlock", "operator-b")
    first.renew(1000.0)
    first.give_up()
    assert second.renew(1001.0)
    assert parse_lease(server.lease).renewed_at_seconds == 1001
