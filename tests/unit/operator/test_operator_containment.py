"""What goes wrong about one policy stays with it: the orders, releases and statuses of all others go on."""

import logging
import math
from typing import Any

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_api.nodeenergy import PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus
from wattlock_operator import decide as decisions
from wattlock_operator.decide import Memory, decide
from wattlock_operator.kube import Kube
from wattlock_operator.metrics import Metrics
from wattlock_operator.reconcile import Reconciler
from wattlock_operator.settings import from_environment
from wattlock_operator.store import NODE, POD, POLICY

PODS = (
    *(pod("d0", DECODE), pod("p0", PREFILL)),
    *(pod("e0", DECODE, namespace="other", uid="uid-e0"), pod("q0", PREFILL, namespace="other", uid="uid-q0")),
    agent_pod("n1"),
)
KEPT = EnergyPolicyStatus(pools=[PoolStatus(name="decode", role="Decode", energy_kwh="12")])


def odd_world(gpus=(), instances=(), status: EnergyPolicyStatus | None = KEPT):
    policies = [
        policy(status=status),
        policy("fine", namespace="other"),
        policy("leaving", namespace="other", deleting=True),
    ]
    return world(policies, PODS, [node_energy(gpus=gpus, instances=instances)])


@pytest.fixture
def broken(monkeypatch):
    """Names of the policies about whose status there is a bug."""
    names = {"qwen"}
    report = decisions.report_policy

    def report_or_fail(view, *arguments):
        if view.name in names:
            raise ArithmeticError("nobody thought of this")
        return report(view, *arguments)

    monkeypatch.setattr(decisions, "report_policy", report_or_fail)
    return names


def test_a_status_that_cannot_be_made_stays_and_all_else_is_decided(broken):
    decision = decide(odd_world(), None, Memory(), NOW)
    ordered = {order.pod.name: order.cap_mhz for order in decision.write_orders["n1"]}
    assert ordered == {"d0": 1590, "p0": None, "e0": 1590, "q0": None}
    assert decision.released == {"uid-leaving"}
    assert [view.name for view, _ in decision.write_statuses] == ["fine", "leaving"]
    assert decision.statuses["uid-qwen"] == KEPT
    assert [(view.name, str(error)) for view, error in decision.failures] == [("qwen", "nobody thought of this")]


def test_a_policy_that_never_had_a_status_gets_none(broken):
    decision = decide(odd_world(status=None), None, Memory(), NOW)
    assert "qwen" not in [view.name for view, _ in decision.write_statuses]
    assert decision.statuses["uid-qwen"] == EnergyPolicyStatus()


def test_the_sums_of_a_status_that_could_not_be_made_go_on(broken):
    """From memory, where they are by instance: each counter goes on from where it was seen last."""

    def look(joules: float, memory: Memory, at_seconds: float) -> decisions.Decision:
        told = instance(energy_joules=f"{joules:.1f}", pair_stats=[PairStats(cap_mhz=1590, pairs=int(joules))])
        return decide(odd_world([gpu()], [told]), None, memory, NOW + at_seconds)

    broken.clear()
    first = look(36_000.0, Memory(), 0)
    broken.add("qwen")
    odd = look(72_000.0, first.memory, 30)
    assert odd.statuses["uid-qwen"] == first.statuses["uid-qwen"]
    broken.clear()
    last = look(18_000.0, odd.memory, 60)  # it began anew
    assert last.failures == ()
    (pool, _) = last.statuses["uid-qwen"].pools
    assert pool.energy_kwh == "12.005000"
    assert pool.savings.departed[0].pairs == 36_000


class QuietKube(Kube):
    """Takes everything and says nothing."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def request(self, method: str, path: str, query: Any = None, body: Any = None, content_type: str = "") -> Any:
        if method != "GET":
            self.written.append(path.rsplit("/apis/wattlock.dev/v1alpha1/", 1)[-1])
        return body if isinstance(body, dict) else {"metadata": {"name": "n1", "resourceVersion": "1"}, "spec": {}}


def test_it_is_counted_each_time_and_logged_when_it_begins(broken, caplog):
    reconciler = Reconciler(from_environment({"WATTLOCK_NAMESPACE": "wattlock"}), kube := QuietKube(), Metrics())
    reconciler._leading_until_seconds = math.inf
    view = policy()
    metadata = {"name": "qwen", "namespace": "llm", "uid": view.uid, "finalizers": list(view.finalizers)}
    reconciler.store.put(POLICY, {"metadata": metadata, "spec": view.spec.to_api()})
    reconciler.store.put(NODE, {"metadata": {"name": "n1"}})
    resources = {"limits": {"nvidia.com/gpu": 1}}
    for name, labels in (("d0", DECODE), ("p0", PREFILL)):
        spec = {"nodeName": "n1", "containers": [{"resources": resources}]}
        ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        there = {"name": name, "namespace": "llm", "uid": name, "labels": labels}
        reconciler.store.put(POD, {"metadata": there, "spec": spec, "status": ready})
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            reconciler._pass()
    assert "nodeenergies" in kube.written
    assert not [path for path in kube.written if path.endswith("/status")]
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "llm/qwen" in record.message
    assert "nobody thought of this" in str(record.exc_info)
    labels = {"where": "bug"}
    assert reconciler._metrics.registry.get_sample_value("wattlock_operator_errors_total", labels) == 3
    broken.clear()
    reconciler._pass()
    assert "namespaces/llm/energypolicies/qwen/status" in kube.written
    broken.add("qwen")
    reconciler._pass()
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 2, "it began anew"
