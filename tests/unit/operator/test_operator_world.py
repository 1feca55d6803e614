"""Projections of what the cluster shows: nothing that it holds may stop the operator."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_operator.lease import parse_lease
from wattlock_operator.parse import parse_node_energy, parse_pod, parse_policy
from wattlock_operator.store import KINDS, NODE, POD, POLICY, PROFILE, Store
from wattlock_operator.world import MetricsHint

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "metadata",
                    "spec",
                    "status",
                    "orders",
                    "gpus",
                    "containers",
                    "labels",
                    "ports",
                    "conditions",
                    "resources",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["spec", "status"]), json_values), json_values)
def test_no_object_breaks_its_projection(body, labels):
    for kind in KINDS:
        kind.parse({"metadata": {"name": "x", "labels": labels, "annotations": labels}, **body})


def container(name: str = "main", *, gpu: bool = False, ports: list[Any] | None = None) -> dict[str, Any]:
    resources = {"limits": {"nvidia.com/gpu": "1"}} if gpu else {}
    return {"name": name, "ports": ports or [], "resources": resources}


def port(number: int, name: str = "") -> dict[str, Any]:
    return {"containerPort": number} | ({"name": name} if name else {})


@pytest.mark.parametrize(
    ("annotations", "containers", "expected"),
    [
        ({}, [container()], MetricsHint()),
        ({}, [container(ports=[port(8000)]), container("v", gpu=True, ports=[port(8200)])],
         MetricsHint(gpu_container_port=8200)),
        ({}, [container(ports=[port(1, "http"), port(2, "metrics")])], MetricsHint(named_port=2)),
        ({"prometheus.io/port": "9", "prometheus.io/path": "/m"}, [], MetricsHint(9, "/m")),
        ({"prometheus.io/port": "99999", "prometheus.io/path": "no slash"}, [], MetricsHint()),
        ({"prometheus.io/port": "x", "prometheus.io/path": "/a b?c#d"}, [], MetricsHint()),
    ],
)  # fmt: skip
def test_where_a_pod_says_its_metrics_are(annotations, containers, expected):
    body = {"metadata": {"annotations": annotations}, "spec": {"containers": containers}}
    assert parse_pod(body).hint == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"containers": [container()]}, False),
        ({"containers": [container(gpu=True)]}, True),
        ({"containers": [{"resources": {"limits": {"nvidia.com/mig-1g.10gb": "1"}}}]}, True),
        ({"containers": [{"resources": {"claims": [{"name": "gpu"}]}}]}, True),
        ({"containers": [{"resources": {"limits": {"nvidia.com/gpu": "0"}}}]}, False),
        ({"resourceClaims": [{"name": "gpu"}]}, True),
        ({"initContainers": [container(gpu=True)]}, True),
        ({}, False),
    ],
)
def test_which_pods_ask_for_gpus(spec, expected):
    assert parse_pod({"spec": spec}).wants_gpu is expected


def test_a_policy_of_a_later_version_is_a_problem_with_a_place():
    view = parse_policy({"metadata": {"name": "q"}, "spec": {"pools": [{"name": "a", "role": "Speculative"}]}})
    assert view.spec is None
    assert "pools.0.role" in view.problem


def test_a_report_with_one_unknown_gpu_keeps_the_others():
    good = {"uuid": "GPU-1", "index": 0, "state": "Locked", "reason": "Locked"}
    view = parse_node_energy({"status": {"observedGeneration": 4, "gpus": [good, {"uuid": "GPU-2", "state": "New"}]}})
    assert view.status is not None
    assert ([gpu.uuid for gpu in view.status.gpus], view.status.observed_generation) == (["GPU-1"], 4)


def test_orders_of_another_version_are_to_be_written_anew():
    assert not parse_node_energy({"spec": {"orders": [{"pod": 1}]}}).readable


@pytest.mark.parametrize("body", [{}, {"spec": None}, {"spec": {"renewTime": "yesterday"}}])
def test_a_lease_without_a_time_has_none(body):
    assert parse_lease(body).renewed_at_seconds is None


class Changes:
    """Counts the calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def node(name: str, version: int, labels: dict[str, str] | None = None) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": str(version), "labels": labels or {}}}


def test_only_what_a_projection_shows_is_a_change():
    changes = Changes()
    store = Store(changes)
    store.put(NODE, node("a", 1))
    store.put(NODE, node("a", 2) | {"status": {"images": ["x"]}})
    assert changes.count == 1
    store.put(NODE, node("a", 3, {"x": "y"}))
    assert changes.count == 2


def test_older_news_never_wins():
    store = Store(Changes())
    store.put(NODE, node("a", 10, {"new": "1"}))
    store.put(NODE, node("a", 9, {"old": "1"}))
    store.drop(NODE, node("a", 8))
    assert store.world((), "").nodes["a"].labels == {"new": "1"}


def test_a_whole_list_removes_what_a_watch_missed_but_not_what_came_meanwhile():
    store = Store(Changes())
    store.put(NODE, node("gone", 1))

    def page():
        yield node("listed", 5)
        store.put(NODE, node("new", 6))

    store.replace(NODE, page())
    assert set(store.world((), "").nodes) == {"listed", "new"}


def test_a_list_that_is_older_than_what_came_while_it_was_read_does_not_win():
    store = Store(Changes())
    store.put(NODE, node("changed", 3))
    store.put(NODE, node("deleted", 4))

    def page():
        store.put(NODE, node("changed", 7, {"new": "1"}))
        store.drop(NODE, node("deleted", 8))
        yield node("changed", 3, {"old": "1"})
        yield node("deleted", 4)

    assert not store.replace(NODE, page())
    assert {name: view.labels for name, view in store.world((), "").nodes.items()} == {"changed": {"new": "1"}}


def test_after_a_restore_from_a_backup_the_whole_list_is_the_world():
    """Versions go back then. By them alone, nothing would be believed until they have caught up."""
    store = Store(Changes())
    for body in (node("changed", 1000, {"lost": "1"}), node("young", 990), node("old", 10)):
        store.put(NODE, body)
    store.put(NODE, node("deleted", 300))
    store.drop(NODE, node("deleted", 995))
    store.drop(NODE, node("later", 996))
    # Even where the list's own version has passed all that was known: what counts is that of each object.
    assert store.replace(NODE, [node("changed", 400, {"restored": "1"}), node("deleted", 300), node("old", 10)])
    shown = {name: view.labels for name, view in store.world((), "").nodes.items()}
    assert shown == {"changed": {"restored": "1"}, "deleted": {}, "old": {}}

    store.put(NODE, node("changed", 410, {"watched": "1"}))
    store.put(NODE, node("later", 411))
    store.drop(NODE, node("deleted", 412))
    shown = {name: view.labels for name, view in store.world((), "").nodes.items()}
    assert shown == {"changed": {"watched": "1"}, "later": {}, "old": {}}
    assert not store.replace(NODE, [node("changed", 410, {"watched": "1"}), node("later", 411), node("old", 10)])


def test_what_a_watch_showed_of_a_restored_cluster_too_early_comes_with_the_next_list():
    store = Store(Changes())
    store.put(NODE, node("a", 1000, {"lost": "1"}))

    def page():
        store.put(NODE, node("a", 410, {"watched": "1"}))  # taken for old
        yield node("a", 400, {"restored": "1"})

    assert store.replace(NODE, page()), "it says that it is to be read once more"
    assert not store.replace(NODE, [node("a", 410, {"watched": "1"})])
    assert store.world((), "").nodes["a"].labels == {"watched": "1"}


def test_an_unreadable_profile_is_none():
    store = Store(Changes())
    store.put(PROFILE, {"metadata": {"name": "p"}, "spec": {"rows": "x"}})
    assert store.world((), "").profiles == {}


def test_policies_come_oldest_first():
    store = Store(Changes())
    for name, created in (("b", "2026-01-02T00:00:00Z"), ("a", "2026-01-03T00:00:00Z"), ("c", "2026-01-01T00:00:00Z")):
        store.put(POLICY, {"metadata": {"name": name, "namespace": "n", "creationTimestamp": created}})
    store.put(POD, {"metadata": {"name": "p"}})
    assert [view.name for view in store.world((), "").policies] == ["c", "b", "a"]
