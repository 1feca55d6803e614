"""The API client and its two threads against a small HTTP server that plays the API server."""

import contextlib
import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from wattlock_agent.api_client import ApiClient, ApiError
from wattlock_agent.kube import ApiAnswered, LeaseSeen, OrdersSeen, OrderWatch, StatusLink, StatusWritten
from wattlock_agent.orders import NO_ORDERS
from wattlock_agent.staleness import Freshness, lease_read, why_stale
from wattlock_api.base import timestamp
from wattlock_api.constants import LEASE_RENEW_SECONDS
from wattlock_api.nodeenergy import NodeEnergyStatus

PATH = "/apis/wattlock.dev/v1alpha1/nodeenergies"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(("GET", self.path, self.headers["Authorization"], None))
        answer = self.server.answers.get(self.path.partition("?")[0] + ("?watch" if "watch=1" in self.path else ""))
        self.reply(*(answer or (404, {"message": "not found"})))

    def do_PATCH(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(("PATCH", self.path, self.headers["Content-Type"], json.loads(body)))
        self.reply(*self.server.answers.get("PATCH", (200, {})))

    def reply(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if not self.server.drip:
            self.wfile.write(body)
            return
        with contextlib.suppress(OSError):
            for number in range(len(body)):
                self.wfile.write(body[number : number + 1])
                self.wfile.flush()
                self.server.stopped.wait(0.1)

    def date_time_string(self, timestamp=None):
        return super().date_time_string(self.server.unix_seconds)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.requests = {}, []
    server.drip, server.stopped, server.unix_seconds = False, threading.Event(), None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(server, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "ca.crt").write_text("")
    client = ApiClient(f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield client
    client.close()


def node_energy(make_order, generation=3, status=None):
    return {
        "metadata": {"uid": "u", "generation": generation, "resourceVersion": "17"},
        "spec": {"orders": [make_order().to_api()]},
        **({"status": status} if status else {}),
    }


def events_of(post):
    events = []
    while not post.empty():
        events.append(post.get())
    return events


def test_a_missing_object_means_no_orders(server, client):
    post = queue.SimpleQueue()
    assert OrderWatch(client, "node-1", post.put).follow() is False
    assert events_of(post) == [OrdersSeen(NO_ORDERS)]
    assert server.requests[0][1:3] == (f"{PATH}/node-1", "Bearer secret")


def test_follows_changes_and_ignores_its_own_status(server, client, make_order):
    post = queue.SimpleQueue()
    old, new = node_energy(make_order, status={"locked": 1}), node_energy(make_order, generation=4)
    watch_events = [
        {"type": "MODIFIED", "object": old},
        {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "18"}}},
        {"type": "MODIFIED", "object": new},
        {"type": "DELETED", "object": new},
    ]
    server.answers = {
        f"{PATH}/node-1": (200, old),
        f"{PATH}?watch": (200, b"\n".join(json.dumps(event).encode() for event in watch_events) + b"\n"),
    }
    assert OrderWatch(client, "node-1", post.put).follow() is False
    first, own, bookmark, changed, deleted = events_of(post)
    assert (first.orders.generation, len(first.orders.orders), first.status) == (3, 1, {"locked": 1})
    assert own == bookmark == ApiAnswered()
    assert (changed.orders.generation, changed.status) == (4, None)
    assert deleted == OrdersSeen(NO_ORDERS)
    query = server.requests[1][1]
    assert "fieldSelector=metadata.name=node-1" in query
    assert "resourceVersion=17" in query
    assert "timeoutSeconds=" in query


def test_an_expired_watch_starts_over(server, client, make_order):
    post = queue.SimpleQueue()
    error = json.dumps({"type": "ERROR", "object": {"code": 410}}).encode() + b"\n"
    server.answers = {f"{PATH}/node-1": (200, node_energy(make_order)), f"{PATH}?watch": (200, error)}
    watch = OrderWatch(client, "node-1", post.put)
    assert watch.follow() is True
    assert watch.follow() is True
    assert [type(event) for event in events_of(post)] == [OrdersSeen, ApiAnswered]


@pytest.mark.parametrize("answer", [(500, b"oops"), (200, b"not json"), (200, b"[1]"), (403, b'{"message": "no"}')])
def test_answers_that_cannot_be_used_are_errors(server, client, answer):
    server.answers = {f"{PATH}/node-1": answer}
    with pytest.raises(ApiError, match="node-1"):
        client.get(f"{PATH}/node-1")


def test_a_broken_watch_is_an_error(server, client):
    server.answers = {f"{PATH}?watch": (200, b'{"type": "MODI\n')}
    with pytest.raises(ApiError):
        list(client.watch(f"{PATH}?watch=1"))


def test_no_server_is_an_error_within_the_time_out(tmp_path):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "ca.crt").write_text("")
    client = ApiClient("http://127.0.0.1:1", tmp_path)
    with pytest.raises(ApiError, match="does not answer"):
        client.get("/x")
    client.close()


def test_a_missing_token_is_explained(server, tmp_path):
    client = ApiClient(f"http://127.0.0.1:{server.server_port}", tmp_path)
    with pytest.raises(ApiError, match="token"):
        client.get("/x")
    client.close()


def link(client, post):
    return StatusLink(client, "node-1", "wattlock", post.put)


def test_writes_the_status_as_its_field_manager(server, client):
    post = queue.SimpleQueue()
    link(client, post).write(NodeEnergyStatus(observed_generation=5, locked=2))
    assert events_of(post) == [StatusWritten("")]
    method, path, content_type, body = server.requests[0]
    assert (method, path) == ("PATCH", f"{PATH}/node-1/status?fieldManager=wattlock-agent")
    assert content_type == "application/merge-patch+json"
    assert body["status"]["observedGeneration"] == 5
    assert set(body) == {"status"}


@pytest.mark.parametrize(("status", "missing"), [(404, True), (403, False)])
def test_tells_a_missing_object_from_a_refusal(server, client, status, missing):
    post = queue.SimpleQueue()
    server.answers = {"PATCH": (status, {"message": "no"})}
    link(client, post).write(NodeEnergyStatus())
    (event,) = events_of(post)
    assert event.problem
    assert event.missing is missing


LEASE = "/apis/coordination.k8s.io/v1/namespaces/wattlock/leases/wattlock-operator"
LONG_AGO = "2001-01-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    ("spec", "stamps_seconds_ago", "renewal", "age_seconds"),
    [
        ({"renewTime": LONG_AGO}, [400, 7], LONG_AGO, 7),  # the operator's clock is decades behind
        ({"renewTime": "2101-01-01T00:00:00.000000Z"}, [7], "2101-01-01T00:00:00.000000Z", 7),
        ({"renewTime": LONG_AGO}, [], LONG_AGO, None),
        ({"renewTime": LONG_AGO}, ["odd", None], LONG_AGO, None),
        ({"renewTime": "x"}, [7], None, None),
        ({}, [7], None, None),
    ],
)
def test_reads_the_lease_by_the_api_servers_clock(server, client, spec, stamps_seconds_ago, renewal, age_seconds):
    post = queue.SimpleQueue()
    fields = [
        {"time": timestamp(time.time() - ago)} if isinstance(ago, int) else {"time": ago} for ago in stamps_seconds_ago
    ]
    server.answers = {LEASE: (200, {"metadata": {"managedFields": fields}, "spec": spec})}
    link(client, post).read_lease()
    (event,) = events_of(post)
    assert isinstance(event, LeaseSeen)
    assert event.renewal == renewal
    assert event.age_seconds == (None if age_seconds is None else pytest.approx(age_seconds, abs=2))


@pytest.mark.parametrize("skew_seconds", [-6 * 3600, 6 * 3600])
def test_the_nodes_own_clock_says_nothing_about_the_operator(server, client, monkeypatch, skew_seconds):
    """By this node's clock, which is hours off, a lease of hours ago was renewed just now."""
    now = time.time()
    hours_ago = timestamp(now + skew_seconds) if skew_seconds < 0 else timestamp(now - skew_seconds)
    lease = {"metadata": {"managedFields": [{"time": hours_ago}]}, "spec": {"renewTime": hours_ago}}
    server.answers = {LEASE: (200, lease)}
    server.unix_seconds = now
    monkeypatch.setattr(time, "time", lambda: now + skew_seconds)
    post = queue.SimpleQueue()
    link(client, post).read_lease()
    (event,) = events_of(post)
    assert event.age_seconds == pytest.approx(6 * 3600, abs=2)
    assert why_stale(lease_read(Freshness(0.0), 0.0, event.renewal, event.age_seconds), 1.0)


def test_a_server_that_wants_to_be_left_alone_is(server, client):
    server.answers = {"PATCH": (429, {"message": "too many"}, {"Retry-After": "2"}), LEASE: (500, b"")}
    post = queue.SimpleQueue()
    status_link = link(client, post)
    thread = threading.Thread(target=status_link.run)
    thread.start()
    begun = time.monotonic()
    asked: list[float] = []
    try:
        while len(asked) < 2:
            status_link.put(NodeEnergyStatus())
            post.get(timeout=10)
            asked.append(time.monotonic())
    finally:
        status_link.close()
        thread.join(5)
    assert asked[0] - begun < 1
    assert asked[1] - asked[0] >= 1.9
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("answer", "bound"),
    [
        (json.dumps({"type": "ERROR", "object": {"code": 410}}).encode() + b"\n", 4),
        (b"", 4),  # the server ends each watch at once
        (b"garbage\n", 4),
    ],
)
def test_a_watch_that_never_holds_is_no_hot_loop(server, client, make_order, answer, bound):
    server.answers = {f"{PATH}/node-1": (200, node_energy(make_order)), f"{PATH}?watch": (200, answer)}
    post = queue.SimpleQueue()
    watch = OrderWatch(client, "node-1", post.put)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        thread.join(2.5)  # the time over which requests are counted
        watches = sum("watch=1" in path for _, path, _, _ in server.requests)
        assert 2 <= watches <= bound
        server.answers[f"{PATH}/node-1"] = (200, node_energy(make_order, generation=9))
        while True:  # it goes on all the same
            event = post.get(timeout=10)
            if isinstance(event, OrdersSeen) and event.orders.generation == 9:
                break
    finally:
        watch.close()
        thread.join(5)


def test_a_dripping_answer_ends(server, client, monkeypatch):
    monkeypatch.setattr("wattlock_agent.api_client.WHOLE_SECONDS", 0.5)
    server.drip = True
    server.answers = {f"{PATH}/node-1": (200, b" " * 100)}
    begun = time.monotonic()
    with pytest.raises(ApiError, match="not over after"):
        client.get(f"{PATH}/node-1")
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(("stale_seconds", "lease_seconds"), [(60, 12), (600, 120), (86_400, 120)])
def test_the_lease_is_read_often_enough_to_be_seen_to_change(client, stale_seconds, lease_seconds):
    made = StatusLink(client, "node-1", "wattlock", queue.SimpleQueue().put, stale_seconds)
    assert made._lease_seconds == lease_seconds
    assert lease_seconds + LEASE_RENEW_SECONDS < stale_seconds


def test_drain_waits_for_the_newest_status(server, client):
    post = queue.SimpleQueue()
    status_link = link(client, post)
    status_link.put(NodeEnergyStatus(locked=1))
    status_link.put(NodeEnergyStatus(locked=2))
    assert not status_link.drain(0.01)
    thread = threading.Thread(target=status_link.run)
    thread.start()
    drained = status_link.drain(5)
    status_link.close()
    thread.join(5)
    assert drained
    assert not thread.is_alive()
    patches = [body["status"]["locked"] for method, _, _, body in server.requests if method == "PATCH"]
    assert patches == [2]
