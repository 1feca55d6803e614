"""What the operator writes, and what it leaves when it does not lead any more or somebody else was faster."""

import io
import json
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import urllib3
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, node_energy, pod, policy, world
from wattlock_api.constants import FINALIZER, PEER_POWER_ANNOTATION
from wattlock_operator.apply import Applier, NotLeadingError, orders_patch
from wattlock_operator.decide import Decision, Memory, decide
from wattlock_operator.events import Told
from wattlock_operator.kube import Kube, KubeError, OvertakenError
from wattlock_operator.metrics import Metrics
from wattlock_operator.orders import give_orders
from wattlock_operator.reconcile import Reconciler
from wattlock_operator.settings import from_environment
from wattlock_operator.store import NODE_ENERGY, POLICY, Store

NODES = [f"n{number}" for number in range(1, 6)]
WORLD = world(
    [policy()],
    [pod(f"d-{node}", DECODE, node=node) for node in NODES]
    + [pod("p0", PREFILL)]
    + [agent_pod(node) for node in NODES],
    nodes=NODES,
)


@dataclass(frozen=True)
class FakeKube(Kube):
    """Notes every request and answers as told."""

    client: Any = None
    errors: dict[str, KubeError] = field(default_factory=dict)
    """By a part of method and path."""
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def request(self, method, path, query=None, body=None, content_type="application/json"):
        self.requests.append((method, path, body))
        for part, error in self.errors.items():
            if part in f"{method} {path}":
                raise error
        if method == "GET":
            return self.found
        return body if isinstance(body, dict) else {"metadata": {"name": path.rsplit("/", 1)[1]}, "spec": {}}

    def paths(self, method: str) -> list[str]:
        return [path for sent, path, _ in self.requests if sent == method]


class SlowKube(FakeKube):
    """Takes so long that most writes still wait when the first is answered."""

    def request(self, method, path, query=None, body=None, content_type="application/json"):
        time.sleep(0.002)
        return super().request(method, path, query, body, content_type)


def applier(kube: Kube, is_leading=lambda: True) -> Applier:
    return Applier(kube, "wattlock", "me", Metrics(), Store(lambda: None), is_leading)


def carry_out(writer: Applier, decision: Decision) -> tuple[bool, frozenset[str]]:
    """Write a decision and tell its Events, as a pass does."""
    well, failed = writer.apply(decision)
    writer.tell(decision.tellings, failed, NOW)
    return well, failed


def test_who_leads_no_more_writes_nothing():
    kube = FakeKube()
    with pytest.raises(NotLeadingError):
        applier(kube, lambda: False).apply(decide(WORLD, None, Memory(), NOW))
    assert kube.requests == []


@pytest.mark.parametrize("writes", [1, 4, 6])
def test_a_pass_stops_at_the_write_before_which_the_lead_was_lost(writes):
    kube = FakeKube()
    decision = decide(WORLD, None, Memory(), NOW)
    assert len(decision.write_orders) + len(decision.write_statuses) + len(decision.tellings) > writes
    left = iter([True] * writes)
    with pytest.raises(NotLeadingError):
        carry_out(applier(kube, lambda: next(left, False)), decision)
    assert len(kube.requests) == writes


def test_a_status_that_another_operator_has_written_is_not_told_of():
    kube = FakeKube(errors={"PATCH /apis/wattlock.dev/v1alpha1/namespaces/llm": KubeError("conflict", 409)})
    decision = decide(WORLD, None, Memory(), NOW)
    assert decision.tellings
    assert carry_out(applier(kube), decision) == (False, frozenset({"uid-qwen"}))
    assert not [path for path in kube.paths("POST") if "/events" in path]
    fine = FakeKube()
    assert carry_out(applier(fine), decision) == (True, frozenset())
    assert len([path for path in fine.paths("POST") if "/events" in path]) == len(decision.tellings)


@pytest.mark.parametrize(
    "error",
    [
        KubeError("exceeded the rate limit of the namespace", 429),
        KubeError("leave me alone", 429, retry_after_seconds=5),
        KubeError("unavailable", 503),
        KubeError("the namespace is being terminated", 403),
    ],
)
def test_an_event_that_is_refused_or_throttled_is_dropped_and_counted(error):
    kube = FakeKube(errors={"POST /api/v1/namespaces/": error})
    decision = decide(WORLD, None, Memory(), NOW)
    writer = applier(kube)
    assert carry_out(writer, decision) == (True, frozenset())
    assert len([path for path in kube.paths("POST") if "/events" in path]) == len(decision.tellings)
    assert writer._metrics._errors == {"Event": len(decision.tellings)}


def test_without_any_answer_no_more_events_are_tried():
    kube = FakeKube(errors={"POST /api/v1/namespaces/": KubeError("no answer", None)})
    decision = decide(WORLD, None, Memory(), NOW)
    with pytest.raises(KubeError):
        applier(kube).tell(decision.tellings * 3, frozenset(), NOW)
    assert len([path for path in kube.paths("POST") if "/events" in path]) == 1


@pytest.mark.parametrize("status", [429, 403, None])
def test_policies_are_let_go_whatever_becomes_of_the_events(status):
    kube = FakeKube(errors={"POST /api/v1/namespaces/": KubeError("not now", status)})
    operator = Reconciler(from_environment({"WATTLOCK_NAMESPACE": "wattlock"}), kube, Metrics())
    operator._leading_until_seconds = math.inf
    leaving = policy("old", deleting=True)
    metadata = {"name": "old", "namespace": leaving.namespace, "uid": leaving.uid, "resourceVersion": "5"}
    asked = {"finalizers": [FINALIZER], "deletionTimestamp": "2027-01-15T08:00:00Z"}
    operator.store.put(POLICY, {"metadata": metadata | asked})
    somewhere = world([*WORLD.policies, leaving], WORLD.pods, nodes=list(WORLD.nodes))
    decision = decide(somewhere, None, Memory(), NOW)
    assert leaving.uid in decision.released
    assert decision.tellings
    if status is None:
        with pytest.raises(KubeError):
            operator._carry_out(decision, NOW)
    else:
        assert operator._carry_out(decision, NOW)
    finalizers = [body["metadata"]["finalizers"] for _, path, body in kube.requests if path.endswith("/old")]
    assert finalizers == [[]]


def test_what_was_not_told_is_told_later():
    before = Told().after("a", "Old", NOW).after("b", "Old", NOW)
    after = before.after("a", "New", NOW + 1).after("b", "New", NOW + 1)
    told = after.untold(frozenset({"a"}), before)
    assert ("a", "New") not in told.reasons
    assert told.used("a", NOW + 1) == pytest.approx(before.used("a", NOW + 1))
    assert {("a", "Old"), ("b", "Old"), ("b", "New")} == set(told.reasons)
    assert told.used("b", NOW + 1) == pytest.approx(after.used("b", NOW + 1))


def test_statuses_are_written_over_what_was_decided_on():
    kube = FakeKube()
    seen = replace(WORLD, policies=(replace(WORLD.policies[0], version="17"),))
    applier(kube).apply(decide(seen, None, Memory(), NOW))
    (body,) = [body for method, path, body in kube.requests if path.endswith("/qwen/status")]
    assert body["metadata"]["resourceVersion"] == "17"
    assert body["metadata"]["uid"] == "uid-qwen"


def test_orders_are_written_over_the_spec_that_was_decided_on_whatever_was_reported_meanwhile():
    orders = give_orders(WORLD).by_node["n1"]
    present = replace(node_energy(generation=7), uid="u")
    tests, changes = [], []
    for operation in orders_patch(orders, "", present):
        (tests if operation["op"] == "test" else changes).append(operation)
    assert {(each["path"], each["value"]) for each in tests} == {("/metadata/generation", 7), ("/metadata/uid", "u")}
    assert [(each["op"], each["path"]) for each in changes] == [("add", "/spec")]
    assert changes[0]["value"] == {"orders": [order.to_api() for order in orders]}


@pytest.mark.parametrize(
    ("before", "annotated", "power", "change"),
    [
        ("", False, "", None),
        ("", True, "", None),
        ("", False, "x", ("add", "/metadata/annotations", {PEER_POWER_ANNOTATION: "x"})),
        ("", True, "x", ("add", "/metadata/annotations/wattlock.dev~1", "x")),
        ("y", True, "x", ("add", "/metadata/annotations/wattlock.dev~1", "x")),
        ("y", True, "", ("remove", "/metadata/annotations/wattlock.dev~1", None)),
    ],
)
def test_the_power_of_other_nodes_leaves_other_annotations_alone(before, annotated, power, change):
    present = replace(node_energy(), peer_power=before, annotated=annotated)
    changes = orders_patch((), power, present)[3:]
    if change is None:
        assert changes == []
        return
    (only,) = changes
    assert (only["op"], only.get("value")) == (change[0], change[2])
    assert only["path"].startswith(change[1])


def test_an_overtaken_write_looks_again_at_once_and_is_no_error():
    found = {"metadata": {"name": "n1", "uid": "u", "generation": 9, "resourceVersion": "90"}, "spec": {}}
    kube = FakeKube(errors={"PATCH": OvertakenError("no", 422)}, found=found)
    writer = applier(kube)
    assert not writer.write_orders("n1", (), "", node_energy())
    assert writer._store.world((), "").node_energies["n1"].generation == 9
    assert writer._metrics._errors == {}
    refused = applier(FakeKube(errors={"PATCH": KubeError("is invalid", 422)}))
    assert not refused.write_orders("n1", (), "", node_energy())
    assert refused._metrics._errors == {"NodeEnergy": 1}


def test_a_node_that_is_refused_keeps_no_other_from_its_orders():
    nodes = [f"n{number:03}" for number in range(100)]
    pods = [pod(f"d-{node}", DECODE, node=node) for node in nodes] + [pod("p0", PREFILL, nodes[0])]
    somewhere = world([policy()], pods + [agent_pod(node) for node in nodes], [node_energy("n000")], nodes)
    kube = SlowKube(errors={"nodeenergies/n000": KubeError("admission webhook denied the request", 400)})
    well, failed = applier(kube).apply(decide(somewhere, None, Memory(), NOW))
    created = {body["metadata"]["name"] for method, path, body in kube.requests if path.endswith("/nodeenergies")}
    assert created == set(nodes[1:])
    assert (well, failed) == (False, frozenset()), "it is looked at again soon"


def test_finalizers_of_others_stay():
    kube = FakeKube()
    writer = applier(kube)
    new = replace(policy(), finalizers=("other/one",), version="3")
    leaving = replace(policy("old", deleting=True), finalizers=("other/one", FINALIZER), version="4")
    gone = replace(policy("gone", deleting=True), finalizers=())
    assert writer.claim([new, leaving, gone])
    assert writer.let_go([leaving, gone])
    assert [body["metadata"]["finalizers"] for _, _, body in kube.requests] == [
        ["other/one", FINALIZER],
        ["other/one"],
    ]
    assert [body["metadata"]["resourceVersion"] for _, _, body in kube.requests] == ["3", "4"]
    assert not applier(FakeKube()).claim([leaving, gone])


def test_what_turns_out_to_be_gone_is_forgotten_unless_it_is_back():
    """The watch may have missed the deletion: without this every pass would write to it in vain."""
    store = Store(lambda: None)
    store.put(NODE_ENERGY, body_of("n1", 7))
    kube = FakeKube(errors={"PATCH": KubeError("not found", 404), "GET": KubeError("not found", 404)})
    one = Applier(kube, "wattlock", "me", Metrics(), store, lambda: True)
    (present,) = store.world((), "wattlock").node_energies.values()
    assert not one.write_orders("n1", (), present=present)
    assert store.world((), "wattlock").node_energies == {}
    store.put(NODE_ENERGY, body_of("n1", 7))  # a list has it: the server was wrong
    assert set(store.world((), "wattlock").node_energies) == {"n1"}
    store.put(NODE_ENERGY, body_of("n1", 9))
    store.gone(NODE_ENERGY, ("", "n1"), 7)  # said of the one of before
    assert set(store.world((), "wattlock").node_energies) == {"n1"}


def test_a_policy_that_is_not_found_for_a_moment_is_not_forgotten():
    """Its kind may be about to be served anew. Without it all of its orders would be withdrawn."""
    store = Store(lambda: None)
    store.put(POLICY, {"metadata": {"namespace": "llm", "name": "qwen", "uid": "u", "resourceVersion": "7"}})
    (known,) = store.world((), "wattlock").policies
    kube = FakeKube(errors={"PATCH": KubeError("not found", 404), "GET": KubeError("not found", 404)})
    status = decide(WORLD, None, Memory(), NOW).write_statuses[0][1]
    assert not Applier(kube, "wattlock", "me", Metrics(), store, lambda: True).write_status(known, status)
    assert store.world((), "wattlock").policies == (known,)


def body_of(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


def test_a_late_answer_brings_no_deleted_object_back():
    store = Store(lambda: None)
    store.put(NODE_ENERGY, body_of("n1", 5))
    store.drop(NODE_ENERGY, body_of("n1", 8))
    store.put(NODE_ENERGY, body_of("n1", 7))
    assert store.world((), "").node_energies == {}
    store.put(NODE_ENERGY, body_of("n1", 9))
    assert set(store.world((), "").node_energies) == {"n1"}
    store.drop(POLICY, body_of("unknown", 8))
    store.put(POLICY, body_of("unknown", 7))
    assert store.world((), "").policies == ()


class FakeClient:
    """The official client with one answer."""

    def __init__(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}

    def param_serialize(self, *arguments: Any, **_: Any) -> tuple[Any, ...]:
        return arguments

    def call_api(self, *_: Any, **__: Any) -> Any:
        self.response = urllib3.HTTPResponse(
            io.BytesIO(self.body), headers=self.headers, status=self.status, preload_content=False
        )
        return self


@pytest.mark.parametrize(
    ("status", "headers", "wait_seconds", "ends_pass"),
    [
        (429, {"Retry-After": "7"}, 7, True),
        (429, {}, None, True),
        (503, {"Retry-After": "99999999999999999999"}, 60, True),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None, True),
        (429, {"Retry-After": "-5"}, None, True),
        (500, {"Retry-After": "1"}, 1, True),
        (500, {}, None, False),
        (409, {}, None, False),
    ],
)
def test_the_server_says_for_how_long_it_wants_to_be_left_alone(status, headers, wait_seconds, ends_pass):
    with pytest.raises(KubeError) as caught:
        Kube(FakeClient(status, b"{}", headers)).request("GET", "/x")
    assert (caught.value.status, caught.value.retry_after_seconds) == (status, wait_seconds)
    assert caught.value.ends_pass is ends_pass


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"", b"x", b'{"metadata": {}}', b'{"items": []}', b'{"metadata": {}, "items": [1]}']
)
def test_an_answer_that_is_no_list_does_not_pass_for_an_empty_one(body):
    with pytest.raises(KubeError):
        list(Kube(FakeClient(200, body)).list_all("/x"))
    listed = json.dumps({"kind": "PodList", "metadata": {}, "items": []}).encode()
    assert list(Kube(FakeClient(200, listed)).list_all("/x")) == []


def test_an_answer_is_bounded(monkeypatch):
    monkeypatch.setattr("wattlock_operator.kube.MAX_ANSWER_BYTES", 1000)
    with pytest.raises(KubeError, match="more than 1000 bytes"):
        Kube(FakeClient(200, b'{"a": "' + b"x" * 2000 + b'"}')).request("GET", "/x")
