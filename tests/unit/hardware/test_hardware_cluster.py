"""The stand-ins of the hardware tier answer the agent's own clients."""

import queue
import threading
import time

import pytest
from cluster import ApiServer, Kubelet
from wattlock_agent.api_client import ApiClient
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import PodName
from wattlock_agent.holders.podresources import PodResources
from wattlock_agent.kube import OrdersSeen, OrderWatch, StatusLink
from wattlock_api.base import ObjectRef
from wattlock_api.constants import Mode, Role
from wattlock_api.nodeenergy import NodeEnergyStatus, Order, PolicyRef

UID = "00000000-0000-0000-0000-000000000001"
ORDER = Order(
    policy=PolicyRef(namespace="llm", name="qwen", uid=UID),
    pool="decode",
    role=Role.DECODE,
    pod=ObjectRef(namespace="llm", name="decode-0", uid=UID),
    pod_uid=UID,
    instance="llm/decode-0",
    mode=Mode.OBSERVE,
)
GPU = GpuIdentity("GPU-0", 0, 0, "NVIDIA H200", (345, 1980), mig_enabled=False, virtual=False)


@pytest.fixture
def api():
    server = ApiServer("node-1")
    yield server
    server.close()


@pytest.fixture
def client(api, tmp_path):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "ca.crt").write_text("")
    return lambda: ApiClient(api.url, tmp_path)


def test_new_orders_reach_the_agent_at_once(api, client):
    post = queue.SimpleQueue()
    watch = OrderWatch(client(), "node-1", post.put)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    assert post.get(timeout=5).orders.orders == ()
    api.give([ORDER])
    began = time.monotonic()
    while not (isinstance(event := post.get(timeout=5), OrdersSeen) and event.orders.orders):
        assert time.monotonic() - began < 5
    assert event.orders.generation == api.generation
    watch.close()
    api.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_agents_report_and_its_look_at_the_lease_arrive(api, client):
    post = queue.SimpleQueue()
    link = StatusLink(client(), "node-1", "wattlock", post.put)
    link.write(NodeEnergyStatus(observed_generation=7))
    assert post.get(timeout=5).problem == ""
    assert api.wait_for_report(7, 5)
    assert not api.wait_for_report(8, 0.01)
    link.read_lease()
    assert abs(post.get(timeout=5).age_seconds) < 5


def test_the_holder_is_told_as_the_kubelet_tells_it(tmp_path):
    kubelet = Kubelet(tmp_path / "kubelet.sock")
    try:
        client = PodResources(tmp_path / "kubelet.sock")
        kubelet.say(("llm", "decode-0"), "GPU-0")
        assert client.holders((GPU,)).pods["GPU-0"] == (PodName("llm", "decode-0"),)
        kubelet.say(None, "GPU-0")
        assert not client.holders((GPU,)).pods.get("GPU-0")
    finally:
        kubelet.close()
