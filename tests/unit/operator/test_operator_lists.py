"""Whole lists: large objects keep no other from being read, and a list that fails keeps no pass from being made."""

import asyncio
import io
import json
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kopf
import pytest
import urllib3
from wattlock_operator.handlers import configure
from wattlock_operator.kube import MAX_ANSWER_BYTES, PAGE, PODS, Kube, KubeError, TooLongError
from wattlock_operator.metrics import Metrics
from wattlock_operator.reconcile import HUNG_SECONDS, MAX_RESYNC_RETRY_SECONDS, RESYNC_RETRY_SECONDS, Reconciler
from wattlock_operator.settings import from_environment
from wattlock_operator.store import NODE, POD

SMALL = 10


class Lists:
    """The official client before an API server with a list of objects of these sizes; continue tokens are places."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.asked = sizes, list[tuple[int, int]]()
        """And what it was asked for: from where, and how many."""

    def param_serialize(self, method: str, path: str, **_: Any) -> tuple[Any, ...]:
        return (path,)

    def call_api(self, path: str, **_: Any) -> Any:
        query = parse_qs(urlsplit(path).query)
        start, limit = int(query.get("continue", ["0"])[0]), int(query["limit"][0])
        self.asked.append((start, limit))
        end = min(start + limit, len(self.sizes))
        items = [
            {"metadata": {"name": f"p{place}", "namespace": "a"}, "spec": {"x": "x" * self.sizes[place]}}
            for place in range(start, end)
        ]
        metadata = {"resourceVersion": "9"} | ({"continue": str(end)} if end < len(self.sizes) else {})
        body = json.dumps({"kind": "PodList", "metadata": metadata, "items": items}).encode()
        self.status, self.headers = 200, dict[str, str]()
        self.response = urllib3.HTTPResponse(io.BytesIO(body), status=200, preload_content=False)
        return self


def names(client: Lists) -> list[str]:
    return [body["metadata"]["name"] for body in Kube(client).list_all(PODS)]


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("wattlock_operator.kube.MAX_ANSWER_BYTES", 20_000)
    return 20_000


def test_the_pods_of_a_tenant_that_are_as_large_as_they_may_be_are_read():
    client = Lists([1_450_000] * 30)
    assert len(names(client)) == 30
    assert max(limit for _, limit in client.asked) == PAGE
    assert MAX_ANSWER_BYTES <= 16 * 2**20


def test_kopf_reads_no_page_that_is_many_times_as_long():
    configure(settings := kopf.OperatorSettings())
    assert settings.watching.chunk_size is not None
    assert settings.watching.chunk_size * 1_450_000 < 5 * MAX_ANSWER_BYTES


@pytest.mark.parametrize("size", [SMALL, 1_000, 9_000, 15_000])
def test_a_page_that_is_too_long_is_asked_for_again_with_half_the_objects(bounded, size):
    sizes = [SMALL] * 10 + [size] * 37 + [SMALL] * 3 * PAGE
    client = Lists(sizes)
    assert names(client) == [f"p{place}" for place in range(len(sizes))]
    pages = [start for start, _ in client.asked]
    assert pages == sorted(pages), "it goes on from where it was"
    assert client.asked[-1][1] == PAGE, "and with whole pages once the objects are small again"
    assert len(client.asked) < 4 + 2.5 * 37


def test_a_single_object_that_is_too_long_is_an_error_and_no_end_of_the_list(bounded):
    client = Lists([SMALL, 2 * bounded, SMALL])
    with pytest.raises(TooLongError):
        names(client)
    assert client.asked[-1] == (1, 1)


class Faulty(Kube):
    """Fails for the pods where there is an error; all other lists are empty, and each object is there."""

    def __init__(self) -> None:
        self.error: KubeError | None = None

    def request(self, method: str, path: str, query: Any = None, body: Any = None, content_type: str = "") -> Any:
        if self.error is not None and path == PODS:
            raise self.error
        return {"kind": "List", "metadata": {"uid": path}, "items": []} if method == "GET" else body


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Operator(Reconciler):
    """Leads, and counts its passes."""

    def __init__(self, kube: Kube) -> None:
        super().__init__(from_environment({"WATTLOCK_NAMESPACE": "wattlock"}), kube, Metrics())
        self._leading_until_seconds, self._lease.term = math.inf, 1
        self.passes = 0

    def _pass(self) -> float:
        self.passes += 1
        return super()._pass()

    def turn(self) -> None:
        asyncio.run(self._turn())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("wattlock_operator.reconcile.time.monotonic", clock)
    return clock


NO_ANSWER = KubeError("no answer", None)
BROKEN = KubeError("the list is broken", 500)


@pytest.mark.parametrize("error", [NO_ANSWER, BROKEN, TooLongError("an answer of more than 16 MiB", None)])
def test_a_list_that_cannot_be_read_keeps_no_pass_from_being_made(clock, error):
    operator = Operator(kube := Faulty())
    operator.turn()
    assert (operator.passes, operator.ready) == (1, True)
    kube.error = error
    for turn in range(600):
        operator._resync_at = 0.0  # as after a write without an answer, or a change of our kinds
        operator.turn()
        assert operator.passes == turn + 2
        clock.seconds += 1
    assert 600 / MAX_RESYNC_RETRY_SECONDS < operator._metrics._errors["lists"] < 20, "again, and not all the time"
    assert operator.ready
    kube.error = None
    clock.seconds += MAX_RESYNC_RETRY_SECONDS
    operator.store.put(POD, {"metadata": {"name": "gone", "namespace": "a"}})
    operator.turn()
    assert operator.store.world((), "").pods == (), "read again, and what the watch missed is gone"


@pytest.mark.parametrize("error", [BROKEN, TooLongError("an answer of more than 16 MiB", None)])
def test_a_list_that_cannot_be_read_keeps_no_other_from_being_read(clock, error):
    operator = Operator(kube := Faulty())
    operator.turn()
    operator.store.put(NODE, {"metadata": {"name": "gone"}})
    kube.error, operator._resync_at = error, 0.0
    operator.turn()
    assert operator.store.world((), "").nodes == {}


def test_an_api_server_that_wants_to_be_left_alone_is_and_then_asked_for_other_things_first(clock):
    operator = Operator(kube := Faulty())
    operator.turn()
    kube.error = KubeError("overloaded", 429, retry_after_seconds=7)
    operator._resync_at = 0.0
    with pytest.raises(KubeError):
        operator.turn()
    assert operator.passes == 1
    operator.turn()
    assert operator.passes == 2
    clock.seconds += RESYNC_RETRY_SECONDS
    with pytest.raises(KubeError):
        operator.turn()


@pytest.mark.parametrize("error", [NO_ANSWER, BROKEN])
def test_who_begins_to_lead_decides_nothing_until_it_has_read_everything(clock, error):
    operator = Operator(kube := Faulty())
    kube.error = error
    for _ in range(3):
        with pytest.raises(KubeError):
            operator.turn()
    assert (operator.passes, operator.ready) == (0, False)
    kube.error = None
    operator.turn()
    assert (operator.passes, operator.ready) == (1, True)

    operator._lease.term += 1  # another one led meanwhile
    kube.error = error
    with pytest.raises(KubeError):
        operator.turn()
    assert operator.passes == 1
    kube.error = None
    operator.turn()
    assert operator.passes == 2


def test_a_long_list_is_a_sign_of_life(clock, monkeypatch):
    def slow(self: Kube, path: str) -> Any:
        for place in range(5 if path == PODS else 0):
            clock.seconds += HUNG_SECONDS / 2
            yield {"metadata": {"name": f"p{place}", "namespace": "a"}}

    monkeypatch.setattr(Kube, "list_all", slow)
    operator = Operator(Faulty())
    operator.turn()
    assert operator.alive


def test_a_restore_from_a_backup_is_looked_at_once_more(clock):
    def pods(version: int) -> Callable[[str], Any]:
        body = {"metadata": {"name": "p", "namespace": "a", "resourceVersion": str(version)}}
        return lambda path: iter([body] if path == PODS else [])

    operator = Operator(kube := Faulty())
    kube.list_all = pods(1000)
    operator.turn()
    assert operator._resync_at > clock.seconds + 100
    kube.list_all, operator._resync_at = pods(400), 0.0
    operator.turn()
    assert clock.seconds < operator._resync_at < clock.seconds + 10
    clock.seconds = operator._resync_at
    operator.turn()
    assert operator._resync_at > clock.seconds + 100
