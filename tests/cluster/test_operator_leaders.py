"""Two operators beside a real API server: one leads, and what it began is finished by the other, once."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from faulty_proxy import FaultyProxy, Gate, Request
from operator_site import DECODE, PREFILL, Replica, Site, eventually, measured, placed
from wattlock_api.constants import FINALIZER
from wattlock_operator.kube import NODE_ENERGIES, POLICIES
from wattlock_operator.lease import DURATION_SECONDS, LEADING_SECONDS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NODES = 10
#: Orders of that many nodes are held up on their way; all at once, by apply.PARALLEL.
GATED = 6


class History:
    """All that happened to objects of a kind, by a watch of the test's own."""

    def __init__(self, site: Site, path: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._closed = False
        self._kube, self._path = site.kube, path
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = self._kube.client
        version = self._kube.request("GET", self._path)["metadata"]["resourceVersion"]
        arguments = client.param_serialize(
            "GET", f"{self._path}?watch=1&resourceVersion={version}&timeoutSeconds=400", auth_settings=["BearerToken"]
        )
        response = client.call_api(*arguments, _request_timeout=(5, 410)).response
        rest = b""
        for chunk in response.stream(64 * 1024):
            *lines, rest = (rest + chunk).split(b"\n")
            self.bodies += [json.loads(line)["object"] for line in lines if line.strip()]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The states of an object, oldest first."""
        return [body for body in self.bodies if body.get("metadata", {}).get("name") == name]


@pytest.fixture
def pair(site: Site, proxy: FaultyProxy) -> Iterator[tuple[Replica, Replica]]:
    """A leader behind the proxy and a standby that is not."""
    site.stop()
    site.settings = {"KUBECONFIG": proxy.kubeconfig(site.tmp_path / "proxied")}
    leader = site.replica("operator-a")
    eventually(lambda: site.leader() == "operator-a", 60)
    site.settings = {}
    standby = site.replica("operator-b")
    eventually(lambda: "standing by" in standby.log, 60)
    eventually(lambda: standby.http("/readyz") == "ok\n", 60)
    yield leader, standby
    for replica in (leader, standby):
        replica.send(signal.SIGCONT)
        assert "the pass over the cluster failed" not in replica.log
        if replica.process.poll() is None:
            assert 'errors_total{where="bug"}' not in replica.http("/metrics")


def caps(site: Site, node: str) -> set[Any]:
    return {order.get("capMHz") for order in site.orders(node) if order["role"] == "Decode"}


def recap(site: Site, mhz: int) -> None:
    patch = f'[{{"op": "replace", "path": "/spec/pools/0/clock", "value": {{"maxSMClockMHz": {mhz}}}}}]'
    site.kubectl.within(site.namespace).run("patch", "energypolicy", "qwen", "--type=json", "-p", patch)


def settle(site: Site, good_policy: dict[str, Any], count: int) -> list[str]:
    """Let the operators cap a decode pod on each of so many nodes."""
    nodes = [site.node() for _ in range(count)]
    for number, node in enumerate(nodes):
        site.pod(f"decode-{number}", node, DECODE)
    site.pod("prefill-0", nodes[0], PREFILL)
    for node in nodes:
        site.agent(node)
    tell(site, measured(10))
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: all(caps(site, node) == {1590} for node in nodes), 180)
    eventually(lambda: site.condition("Ready")[0] == "True", 180)
    return nodes


def tell(site: Site, what: dict[str, Any]) -> None:
    """Let all agents report this of their instances."""
    for agent in site.agents:
        agent.extra = what


def savings(site: Site) -> dict[str, Any]:
    pools = site.policy().get("status", {}).get("pools", [{}])
    return dict(pools[0].get("savings", {}))


def saved_kwh(site: Site) -> float:
    return float(savings(site).get("savedKWh", "0"))


def told(site: Site, reason: str) -> list[str]:
    """Who told this reason of the policy, an entry for each Event."""
    events = site.kubectl.within(site.namespace).get("events")["items"]
    ours = [event for event in events if event.get("reportingComponent") == "wattlock.dev/operator"]
    return [event["reportingInstance"] for event in ours if event["reason"] == reason]


def is_order(request: Request) -> bool:
    return request.method == "PATCH" and "/nodeenergies/" in request.path


def test_a_killed_leaders_half_written_orders_are_finished_once(
    site: Site, proxy: FaultyProxy, pair: tuple[Replica, Replica], good_policy: dict[str, Any]
) -> None:
    leader, _ = pair
    nodes = settle(site, good_policy, NODES)
    eventually(lambda: savings(site).get("verdict") == "Verified", 90, f"it says {savings(site)}")
    tell(site, measured(11))
    eventually(lambda: saved_kwh(site) == pytest.approx(NODES / 4, rel=0.01), 90, f"it says {savings(site)}")
    orders, policies = History(site, NODE_ENERGIES), History(site, POLICIES)
    known = len(told(site, "Enforced"))

    gate, let_through = Gate(), threading.Semaphore(NODES - GATED)
    with proxy.faulty(gate, lambda request: is_order(request) and not let_through.acquire(blocking=False)):
        recap(site, 1200)
        for _ in range(GATED):
            assert gate.waiting.acquire(timeout=60)

        def written_ones() -> list[str]:
            return [node for node in nodes if caps(site, node) == {1200}]

        eventually(lambda: len(written_ones()) == NODES - GATED, 60, "a part of the orders is written")
        written = written_ones()
        generations = {node: site.node_energy(node)["metadata"]["generation"] for node in written}
        leader.send(signal.SIGKILL)
        died = time.monotonic()
        tell(site, measured(12))  # the GPUs work on
        eventually(lambda: site.leader() == "operator-b", DURATION_SECONDS + 30)
        eventually(lambda: all(caps(site, node) == {1200} for node in nodes), 60)
        took = time.monotonic() - died
    assert took < 60 + DURATION_SECONDS
    for node in written:
        assert site.node_energy(node)["metadata"]["generation"] == generations[node], "what was written is left alone"

    # What the dead leader had sent, and what was held up on its way, arrives now.
    gate.opened.set()
    eventually(lambda: len(gate.passed) == GATED, 30)
    assert set(gate.passed) == {422}, "over orders that another operator has written meanwhile"
    eventually(lambda: site.condition("Ready")[0] == "True", 60)
    for node in nodes:
        seen = [
            order["capMHz"]
            for body in orders.of(node)
            for order in body["spec"].get("orders", [])
            if order["role"] == "Decode"
        ]
        assert seen == sorted(seen, reverse=True), f"{node} went back to the old cap: {seen}"
    sums = [
        float(body["status"]["pools"][0]["savings"]["savedKWh"])
        for body in policies.of("qwen")
        if "savedKWh" in body.get("status", {}).get("pools", [{}])[0].get("savings", {})
    ]
    assert sums == sorted(sums), "what was saved went down"
    assert all(FINALIZER in body["metadata"]["finalizers"] for body in policies.of("qwen"))
    assert len(told(site, "Enforced")) == known, "nothing new: it was enforced all the time"


def test_a_leader_that_slept_writes_nothing_old(
    site: Site, proxy: FaultyProxy, pair: tuple[Replica, Replica], good_policy: dict[str, Any]
) -> None:
    leader, standby = pair
    nodes = settle(site, good_policy, 2)
    gate = Gate()
    with proxy.faulty(gate, is_order):
        recap(site, 1300)
        for _ in nodes:  # all of them: one that is stopped between its check and its sending is sent later, rightly
            assert gate.waiting.acquire(timeout=60)
        leader.send(signal.SIGSTOP)
        eventually(lambda: site.leader() == "operator-b", DURATION_SECONDS + 30)
        eventually(lambda: all(caps(site, node) == {1300} for node in nodes), 60)
        recap(site, 1100)
        eventually(lambda: all(caps(site, node) == {1100} for node in nodes), 60)
    history = History(site, NODE_ENERGIES)
    before = len(proxy.requests)
    leader.send(signal.SIGCONT)
    gate.opened.set()
    eventually(lambda: gate.passed, 30)
    eventually(lambda: leader.log.count("standing by") == 1, 60)
    eventually(lambda: "wattlock_operator_leading 0.0" in leader.http("/metrics"), 30)
    assert "wattlock_pool_locked_gpus{" not in leader.http("/metrics"), "two operators would show each pool twice"
    assert "wattlock_pool_locked_gpus{" in standby.http("/metrics")
    assert set(gate.passed) == {422}
    later = [request for request in proxy.requests[before:] if request.writes and "/leases/" not in request.path]
    assert later == [], "it wrote on although it led no more"
    for node in nodes:
        spoiled = [
            body for body in history.of(node) if {o.get("capMHz") for o in body["spec"]["orders"]} - {1100, None}
        ]
        assert spoiled == []


def test_a_leader_without_an_api_server_stops_before_another_begins(
    site: Site, proxy: FaultyProxy, pair: tuple[Replica, Replica], good_policy: dict[str, Any]
) -> None:
    """Only its lease cannot be renewed; all other writes would come through."""
    nodes = settle(site, good_policy, 1)
    gate = Gate()
    with proxy.faulty(gate, lambda request: "/leases/" in request.path):
        assert gate.waiting.acquire(timeout=60)
        begun = time.monotonic()
        eventually(lambda: site.leader() == "operator-b", DURATION_SECONDS + 45)
        assert time.monotonic() - begun > LEADING_SECONDS - 25
        before = len(proxy.requests)
        recap(site, 1200)
        eventually(lambda: caps(site, nodes[0]) == {1200}, 60)
        assert not [request for request in proxy.requests[before:] if request.writes and "/leases" not in request.path]
        gate.opened.set()


def test_a_standby_leaves_everything_alone_and_is_handed_over_to_at_once(
    site: Site, proxy: FaultyProxy, good_policy: dict[str, Any]
) -> None:
    site.stop()
    site.settings = {}
    leader = site.replica("operator-a")
    eventually(lambda: site.leader() == "operator-a", 60)
    site.settings = {"KUBECONFIG": proxy.kubeconfig(site.tmp_path / "proxied")}
    standby = site.replica("operator-b")
    eventually(lambda: "standing by" in standby.log, 60)
    (node,) = settle(site, good_policy, 1)

    # A policy on its way out, whose GPUs are not released: whoever removes the finalizer too early is to blame.
    site.agents[0].obeys = False
    site.kubectl.within(site.namespace).run("delete", "energypolicy", "qwen", "--wait=false")
    eventually(lambda: site.condition("Ready")[1] == "Releasing", 60)
    assert site.orders(node) == []
    assert "wattlock_operator_leading 0.0" in standby.http("/metrics")
    threading.Event().wait(5)
    assert [request for request in proxy.requests if request.writes] == [], "a standby writes nothing"
    assert FINALIZER in site.policy()["metadata"]["finalizers"]

    asked = time.monotonic()
    assert leader.end(signal.SIGTERM) == 0
    ended = time.monotonic()
    eventually(lambda: site.leader() == "operator-b", 15)
    assert time.monotonic() - ended < 10
    assert ended - asked < 25
    threading.Event().wait(3)
    assert FINALIZER in site.policy()["metadata"]["finalizers"], "the new leader knows that nothing is released yet"
    site.agents[0].obeys = True
    eventually(lambda: site.kubectl.within(site.namespace).get("energypolicies")["items"] == [], 60)
    assert "the pass over the cluster failed" not in leader.log + standby.log
