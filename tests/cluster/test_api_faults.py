"""Operator and agent while the API server misbehaves: neither ends, neither hammers it, both go on afterwards.

A proxy in between misbehaves; behind it is the real API server. It is changed behind the proxy's back meanwhile, and
once the fault is over that must have come through.
"""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from faulty_proxy import (
    Fault,
    FaultyProxy,
    Request,
    answer,
    expired_watch,
    no_answer,
    no_http,
    refusal,
    silence,
    slow,
    truncated,
)
from operator_site import DECODE, PREFILL, Site, eventually, placed
from wattlock_agent.api_client import ApiClient
from wattlock_agent.kube import Event, LeaseSeen, OrdersSeen, OrderWatch, StatusLink, StatusWritten
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_operator.kube import node_energy_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

#: How long a fault lasts.
FAULT_SECONDS = 8.0

FAULTS = [
    pytest.param(refusal(429, "TooManyRequests", Retry_After="3"), id="throttled"),
    pytest.param(refusal(500, "InternalError"), id="internal-error"),
    pytest.param(refusal(503, "ServiceUnavailable"), id="unavailable"),
    pytest.param(refusal(409, "Conflict"), id="conflict"),
    pytest.param(refusal(410, "Expired"), id="gone"),
    pytest.param(expired_watch, id="watches-expire"),
    pytest.param(answer(200, b"<html>not what was asked for</html>", Content_Type="text/html"), id="a-page"),
    pytest.param(answer(200, b'{"kind": "Li', Content_Type="application/json"), id="half-an-object"),
    pytest.param(answer(200, b"{}", Content_Type="application/json"), id="an-empty-object"),
    pytest.param(truncated, id="truncated"),
    pytest.param(no_http, id="no-http"),
    pytest.param(no_answer, id="no-answer"),
]


def pause(seconds: float) -> None:
    """Let a fault last."""
    threading.Event().wait(seconds)


def caps(site: Site, node: str) -> set[Any]:
    return {order.get("capMHz") for order in site.orders(node) if order["role"] == "Decode"}


def recap(site: Site, mhz: int) -> None:
    """Give the policy another clock, behind the proxy's back."""
    patch = f'[{{"op": "replace", "path": "/spec/pools/0/clock", "value": {{"maxSMClockMHz": {mhz}}}}}]'
    site.kubectl.within(site.namespace).run("patch", "energypolicy", "qwen", "--type=json", "-p", patch)


@pytest.fixture
def behind(site: Site, proxy: FaultyProxy, good_policy: dict[str, Any]) -> Iterator[tuple[Site, str]]:
    """An operator behind the proxy that has capped a pod on a node."""
    site.stop()
    site.settings = {"KUBECONFIG": proxy.kubeconfig(site.tmp_path / "proxied")}
    site.start()
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    site.agent(node)
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: caps(site, node) == {1590}, 60)
    eventually(lambda: site.condition("Ready")[0] == "True", 60)
    process = site.operator
    yield site, node
    assert process is site.operator
    assert process is not None
    assert process.poll() is None, "the operator ended"
    assert site.http("/healthz") == "ok\n"
    page = site.http("/metrics")
    assert 'wattlock_operator_errors_total{where="bug"}' not in page, site.log.read_text()
    assert "the pass over the cluster failed" not in site.log.read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_operator_gets_over(behind: tuple[Site, str], proxy: FaultyProxy, fault: Fault) -> None:
    site, node = behind
    locks = site.orders(node)
    before = len(proxy.requests)
    with proxy.faulty(fault):
        recap(site, 1200)
        pause(FAULT_SECONDS)
        assert site.orders(node) or fault is expired_watch, "an answer that is none must not pass for an empty cluster"
    during = proxy.requests[before:]
    # Five watches, CRDs and namespaces, the lease and the passes: each tried again with pauses.
    assert len(during) < 20 * FAULT_SECONDS, [f"{request.method} {request.path}" for request in during]
    eventually(lambda: caps(site, node) == {1200}, 60)
    assert {order["podUid"] for order in site.orders(node)} == {order["podUid"] for order in locks}
    eventually(lambda: "wattlock_operator_leading 1.0" in site.http("/metrics"), 40)
    before = len(proxy.requests)
    pause(3)
    assert len(proxy.requests) - before < 60, "it has not calmed down"


def test_the_operator_waits_as_long_as_it_is_told_to(behind: tuple[Site, str], proxy: FaultyProxy) -> None:
    site, node = behind
    told: list[float] = []

    def throttle(handler: Any, request: Request, sent: bytes) -> None:
        told.append(time.monotonic())
        refusal(429, "TooManyRequests", Retry_After="6")(handler, request, sent)

    with proxy.faulty(throttle, lambda request: request.method == "PATCH" and "nodeenergies" in request.path):
        recap(site, 1200)
        eventually(lambda: len(told) >= 2, 30)
    assert told[1] - told[0] >= 6
    eventually(lambda: caps(site, node) == {1200}, 40)


def test_the_operator_leads_on_while_answers_are_slow(behind: tuple[Site, str], proxy: FaultyProxy) -> None:
    """Twenty seconds for each answer: slower than its own renewals, and yet everything comes through."""
    site, node = behind
    seconds, led = 20.0, site.log.read_text().count("leading as")
    with proxy.faulty(slow(seconds), lambda request: request.writes):
        recap(site, 1200)
        # Orders, status and its Events of the pass in progress come first, one after the other.
        eventually(lambda: caps(site, node) == {1200}, 8 * seconds)
        pause(60.0)  # longer than the lease
        assert "wattlock_operator_leading 1.0" in site.http("/metrics")
        assert site.log.read_text().count("leading as") == led, "it led on without a break"


def test_the_operator_notices_that_its_watches_fell_silent(behind: tuple[Site, str], proxy: FaultyProxy) -> None:
    """Connections that stand and say nothing, as behind a load balancer that forgot them."""
    site, node = behind
    with proxy.faulty(silence):
        eventually(lambda: any(request.watches for request in proxy.requests[-5:]))
    # The proxy is honest again, but these watches stay silent until somebody ends them.
    with proxy.faulty(silence, lambda request: "energypolicies" in request.path):
        pause(1)
        recap(site, 1200)
        eventually(lambda: caps(site, node) == {1200}, 100)


def test_the_operator_notices_what_was_deleted_while_its_watches_were_away(
    behind: tuple[Site, str], proxy: FaultyProxy
) -> None:
    """A watch that begins anew from a whole list tells of no deletion, and nothing else may change for minutes."""
    site, node = behind
    with proxy.faulty(expired_watch):
        before = len(proxy.requests)
        eventually(lambda: any(request.watches for request in proxy.requests[before:]))
        site.kubectl.run("delete", "nodeenergy", node)
        pause(3)
    eventually(lambda: caps(site, node) == {1590}, 60)


class Agent:
    """The agent's two threads behind the proxy."""

    def __init__(self, site: Site, proxy: FaultyProxy, node: str) -> None:
        directory = site.tmp_path / "account"
        directory.mkdir()
        (directory / "token").write_text("none")
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.seen: list[Event] = []
        self.watch = OrderWatch(ApiClient(proxy.url, directory), node, self.events.put)
        self.status = StatusLink(ApiClient(proxy.url, directory), node, site.namespace, self.events.put)
        self.ended: list[BaseException] = []
        self._threads = [threading.Thread(target=self._guard(run)) for run in (self.watch.run, self.status.run)]
        for thread in self._threads:
            thread.start()

    def _guard(self, run: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                run()
            except BaseException as error:
                self.ended.append(error)

        return guarded

    def news(self) -> list[Event]:
        """All that was heard."""
        while not self.events.empty():
            self.seen.append(self.events.get())
        return self.seen

    def generation(self) -> int:
        """Of the orders that were heard last."""
        return max((event.orders.generation for event in self.news() if isinstance(event, OrdersSeen)), default=0)

    def close(self, proxy: FaultyProxy) -> None:
        self.watch.close()
        self.status.close()

        def ended() -> bool:
            proxy.break_watches()  # one may just have begun
            return not any(thread.is_alive() for thread in self._threads)

        eventually(ended, 40)


@pytest.fixture
def ordered(site: Site, proxy: FaultyProxy) -> Iterator[tuple[Agent, str]]:
    """The agent's client, and its node's NodeEnergy with an order."""
    node = site.node()
    eventually(lambda: "leading as" in site.log.read_text(), 60)
    eventually(lambda: site.kube.get(node_energy_path(node)) is None)
    site.stop(signal.SIGTERM)  # the test gives the orders
    order_cap(site, node, 1590)
    agent = Agent(site, proxy, node)
    eventually(lambda: agent.generation() == generation(site, node))
    yield agent, node
    agent.close(proxy)
    assert not agent.ended


def order_cap(site: Site, node: str, mhz: int) -> None:
    reference = {"namespace": "llm", "name": "qwen", "uid": "u"}
    order = {
        "policy": reference | {"generation": 1},
        "pool": "decode",
        "role": "Decode",
        "pod": reference,
        "podUid": "u",
        "instance": "qwen",
        "mode": "Enforce",
        "capMHz": mhz,
    }
    body = {"apiVersion": "wattlock.dev/v1alpha1", "kind": "NodeEnergy", "metadata": {"name": node}}
    site.kube.apply(node_energy_path(node), body | {"spec": {"orders": [order]}})


def generation(site: Site, node: str) -> int:
    return int(site.node_energy(node)["metadata"]["generation"])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_agents_client_gets_over(site: Site, ordered: tuple[Agent, str], proxy: FaultyProxy, fault: Fault) -> None:
    agent, node = ordered
    before = len(proxy.requests)
    known = len(agent.news())
    with proxy.faulty(fault):
        order_cap(site, node, 1200)
        begun = time.monotonic()
        while time.monotonic() - begun < FAULT_SECONDS:
            agent.status.put(NodeEnergyStatus(locked=1))  # as often as an agent ever would
            pause(2)
    during = proxy.requests[before:]
    assert len(during) <= 4 * FAULT_SECONDS, [f"{request.method} {request.path}" for request in during]
    heard = [event for event in agent.news()[known:] if isinstance(event, OrdersSeen)]
    assert all(event.orders.orders for event in heard), "an answer that is none must not pass for no orders"
    eventually(lambda: agent.generation() == generation(site, node), 60)
    agent.status.put(NodeEnergyStatus(locked=7))
    eventually(lambda: site.node_energy(node).get("status", {}).get("locked") == 7, 40)
    assert StatusWritten("") in agent.news()
    assert any(isinstance(event, LeaseSeen) for event in agent.news())


def test_the_agents_client_notices_that_its_watch_fell_silent(
    site: Site, ordered: tuple[Agent, str], proxy: FaultyProxy
) -> None:
    agent, node = ordered
    with proxy.faulty(silence):
        pause(2)
        order_cap(site, node, 1200)
        eventually(lambda: agent.generation() == generation(site, node), 130)


def test_the_agents_client_bears_slow_answers(site: Site, ordered: tuple[Agent, str], proxy: FaultyProxy) -> None:
    agent, node = ordered
    with proxy.faulty(slow(20.0)):
        order_cap(site, node, 1200)
        agent.status.put(NodeEnergyStatus(locked=3))
        eventually(lambda: agent.generation() == generation(site, node), 60)
        eventually(lambda: site.node_energy(node).get("status", {}).get("locked") == 3, 60)
