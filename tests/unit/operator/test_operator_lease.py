"""The lease against a small API server in memory that minds resource versions, on clocks that disagree."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_api.constants import LEASE_RENEW_SECONDS
from wattlock_operator.kube import KubeError
from wattlock_operator.lease import DURATION_SECONDS, LEADING_SECONDS, Lease, LeaseView, may_take, parse_lease, sight

HOUR = 3600.0


class Server:
    """Keeps one lease; refuses a write over an old version, as the API server does."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.requests: list[str] = []
        self.swallow_answers = False
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
        answer = self.touch(body)
        if self.swallow_answers:
            raise KubeError("no answer", None)
        return answer

    def touch(self, body: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self._version)
        return copy.deepcopy(self.lease)

    @property
    def holder(self) -> str:
        assert self.lease is not None
        return parse_lease(self.lease).holder


@dataclass
class Time:
    """True time; each machine's clocks are off by their own."""

    seconds: float = 1_000_000.0


class Machine:
    """An operator's clocks: the wall clock is skewed, the clock for durations began at some other moment."""

    def __init__(self, server: Server, time: Time, identity: str, skew_seconds: float = 0.0) -> None:
        self.skew_seconds = skew_seconds
        self.lease = Lease(
            server,
            "wattlock",
            identity,
            now_seconds=lambda: time.seconds - 999_000.0,
            unix_seconds=lambda: time.seconds + self.skew_seconds,
        )


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_held_lease_is_renewed_with_one_request(server, time):
    lease = Machine(server, time, "operator-a").lease
    assert lease.renew()
    assert server.requests == ["GET", "POST"]
    begun = time.seconds
    for _ in range(3):
        time.seconds += LEASE_RENEW_SECONDS
        assert lease.renew()
    assert server.requests[2:] == ["PUT", "PUT", "PUT"]
    assert parse_lease(server.lease).renewed_at_seconds == begun + 3 * LEASE_RENEW_SECONDS
    assert lease.term == 1


def test_a_touched_or_deleted_lease_is_read_again_and_kept(server, time):
    lease = Machine(server, time, "operator-a").lease
    lease.renew()
    server.touch(server.lease)
    assert lease.renew()
    server.lease = None
    assert lease.renew()
    assert server.holder == "operator-a"
    assert server.lease["spec"]["leaseTransitions"] == 0


@pytest.mark.parametrize("skew_seconds", [-7 * HOUR, -30, 0, 30, 7 * HOUR])
def test_a_living_leader_is_left_alone_and_a_dead_one_replaced_whatever_the_clocks_say(server, time, skew_seconds):
    first = Machine(server, time, "operator-a").lease
    second = Machine(server, time, "operator-b", skew_seconds).lease
    assert first.renew()
    for _ in range(20):
        time.seconds += LEASE_RENEW_SECONDS
        assert first.renew()
        assert not second.renew()
    died = time.seconds
    while not second.renew():
        time.seconds += 2
        assert time.seconds - died < 2 * DURATION_SECONDS
    assert DURATION_SECONDS <= time.seconds - died <= DURATION_SECONDS + 2
    assert not first.renew()
    assert server.holder == "operator-b"
    assert server.lease["spec"]["leaseTransitions"] == 1


@given(
    skews=st.tuples(*[st.floats(-12 * HOUR, 12 * HOUR)] * 3),
    steps=st.lists(
        st.tuples(
            st.integers(0, 2), st.sampled_from([1.0, 7.0, 20.0, 44.0, 61.0]), st.sampled_from([0.0, 0.0, 5 * HOUR])
        )
    ),
)
def test_there_is_one_leader_at_most_at_any_time(skews, steps):
    """Three operators that sleep and wake as they like, with clocks that step."""
    server, time = Server(), Time()
    machines = [Machine(server, time, f"operator-{number}", skew) for number, skew in enumerate(skews)]
    leads_until = [0.0, 0.0, 0.0]
    for number, pause_seconds, step_seconds in steps:
        time.seconds += pause_seconds
        machines[number].skew_seconds += step_seconds
        asked = time.seconds
        leads_until[number] = asked + LEADING_SECONDS if machines[number].lease.renew() else 0.0
        assert sum(until > time.seconds for until in leads_until) <= 1


def test_a_lease_that_was_given_up_can_be_taken_at_once(server, time):
    first, second = Machine(server, time, "operator-a").lease, Machine(server, time, "operator-b").lease
    first.renew()
    assert not second.renew()
    renewal = parse_lease(server.lease).renewal
    first.give_up()
    assert parse_lease(server.lease) == LeaseView("", renewal, 0)
    assert not first.renew(), "who is stopping must not come back"
    assert second.renew()
    assert server.holder == "operator-b"


def test_who_leads_again_knows_that_another_led_meanwhile(server, time):
    first, second = Machine(server, time, "operator-a").lease, Machine(server, time, "operator-b").lease
    first.renew()
    assert not second.renew()
    time.seconds += DURATION_SECONDS  # the first one is stopped
    assert second.renew()
    second.give_up()
    assert first.renew(), "nobody holds it: it never learns who did"
    assert first.term == 2


def test_an_answer_that_got_lost_may_have_been_a_yes(server, time):
    lease = Machine(server, time, "operator-b").lease
    Machine(server, time, "operator-a").lease.renew()
    assert not lease.renew()
    time.seconds += DURATION_SECONDS
    server.swallow_answers = True
    with pytest.raises(KubeError):
        lease.renew()
    server.swallow_answers = False
    assert server.holder == "operator-b"
    assert lease.renew()
    assert lease.term == 1
    assert server.lease["spec"]["leaseTransitions"] == 1


def test_what_is_seen_late_is_taken_for_fresh():
    """The answer may have been long on its way: the change counts from its end, the question from its beginning."""
    view = LeaseView("operator-a", "2026-01-01T00:00:00.000000Z", 0)
    first = sight(None, view, answered_seconds=100.0)
    assert sight(first, view, answered_seconds=150.0) is first
    assert not may_take(first, "operator-b", asked_seconds=100.0 + DURATION_SECONDS - 0.1)
    assert may_take(first, "operator-b", asked_seconds=100.0 + DURATION_SECONDS)
    changed = sight(first, LeaseView("operator-a", "2026-01-01T00:00:20.000000Z", 0), answered_seconds=159.0)
    assert not may_take(changed, "operator-b", asked_seconds=200.0)


@pytest.mark.parametrize("spec", [None, {}, {"renewTime": 5, "leaseTransitions": "x", "holderIdentity": None}])
def test_an_odd_lease_is_free(spec):
    view = parse_lease({"spec": spec})
    assert (view.holder, view.transitions, view.renewed_at_seconds) == ("", 0, None)
