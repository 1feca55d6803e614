"""The running loop: real threads and time, fake GPUs; no API server answers."""

import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from wattlock_agent.__main__ import main
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.holders.base import Holders, KubeletError, PodName
from wattlock_agent.http_server import AgentServer
from wattlock_agent.journal import JournalHeldError
from wattlock_agent.kube import LeaseSeen, OrdersSeen
from wattlock_agent.loop import EXIT_DRIVER_MISMATCH, EXIT_FAILED, EXIT_OK, Loop
from wattlock_agent.orders import Orders
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters
from wattlock_agent.settings import Settings
from wattlock_api.boottime import now_seconds
from wattlock_api.constants import Mode
from wattlock_api.nodeenergy import OrderIdle


class FakeKubelet:
    def __init__(self):
        self.error = None

    def holders(self, gpus):
        if self.error is not None:
            raise self.error
        return Holders({gpu.uuid: (PodName("llm", f"decode-{gpu.index}"),) for gpu in gpus}, frozenset(), {})


class FakeScraper:
    def scrape(self, url):
        return ScrapeFailure(time.monotonic(), "MetricsUnreachable", f"{url}: nobody there")


@pytest.fixture
def make_loop(make_node, tmp_path, monkeypatch):
    # Signal handlers can only be set in the main thread; these loops run in others.
    monkeypatch.setattr("wattlock_agent.loop.signal.signal", lambda *_: None)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "ca.crt").write_text("")

    def make(mode=Mode.ENFORCE):
        node = make_node()
        settings = Settings(
            node_name="node-1",
            pod_name="agent-x",
            operator_namespace="wattlock",
            state_directory=tmp_path,
            kubelet_socket=tmp_path / "kubelet.sock",
            http_port=0,
            mode=mode,
            api_server="http://127.0.0.1:1",
            service_account_directory=tmp_path,
        )
        kubelet = FakeKubelet()
        return Loop(settings, node.driver, kubelet, FakeScraper(), node.journal, "boot-1", "1.2.3"), node, kubelet

    return make


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for ten seconds"
        time.sleep(0.005)


@contextmanager
def running(loop):
    """Run the loop in a thread; its exit status is appended to the list."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(loop.run()))
    thread.start()
    try:
        yield statuses
    finally:
        loop.stop()
        thread.join(20)
    assert not thread.is_alive()


def give_orders(loop, *orders, generation=1):
    loop._events.put(LeaseSeen("now", 0.5))
    loop._events.put(OrdersSeen(Orders(generation, orders)))


def test_locks_soon_and_releases_at_the_stop_without_an_api_server(make_loop, make_order):
    loop, node, _ = make_loop()
    with running(loop) as statuses:
        wait_for(lambda: loop.board.snapshot.status.gpus)
        began = time.monotonic()
        give_orders(loop, make_order())
        wait_for(lambda: node.locked() == {"GPU-0"})
        assert time.monotonic() - began < 2
        wait_for(lambda: loop.board.snapshot.ready)
        assert set(node.journal.disk) == {"GPU-0"}
        loop.stop()
        wait_for(lambda: statuses)
    assert statuses == [EXIT_OK]
    assert node.locked() == set()
    assert node.journal.disk == {}


def test_serves_its_probes(make_loop, monkeypatch):
    servers = []

    class RememberedServer(AgentServer):
        def start(self):
            servers.append(self)
            super().start()

    monkeypatch.setattr("wattlock_agent.loop.AgentServer", RememberedServer)
    loop, _, _ = make_loop()
    with running(loop):
        wait_for(lambda: loop.board.snapshot.status.gpus)
        with urllib.request.urlopen(f"http://127.0.0.1:{servers[0].server_port}/healthz", timeout=5) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("fault", "status"), [(RuntimeError("bug"), EXIT_FAILED), (GpuFault.DRIVER_MISMATCH, EXIT_DRIVER_MISMATCH)]
)
def test_an_unexpected_end_releases_everything_and_says_so(make_loop, make_order, fault, status):
    loop, node, kubelet = make_loop()
    with running(loop) as statuses:
        give_orders(loop, make_order(), make_order("decode-1"))
        wait_for(lambda: node.locked() == {"GPU-0", "GPU-1"})
        if isinstance(fault, RuntimeError):
            kubelet.error = fault
            give_orders(loop, make_order(), make_order("decode-1"), generation=2)
        else:
            node.driver.faults["GPU-0"] = fault
        wait_for(lambda: statuses)
    assert statuses == [status]
    assert node.locked() == set()
    assert node.journal.disk == {}


def test_a_kubelet_that_does_not_answer_is_no_failure(make_loop, make_order):
    loop, node, kubelet = make_loop()
    kubelet.error = KubeletError("no socket")
    with running(loop) as statuses:
        give_orders(loop, make_order())
        wait_for(lambda: loop.board.snapshot.status.agent.message == "no socket")
        assert not statuses
    assert node.driver.log == []


def test_a_second_agent_is_not_ready_says_why_and_reports_nothing(make_loop, make_order, monkeypatch, caplog):
    """Its report would say that GPUs are released which the first agent has locked."""
    loop, node, _ = make_loop()
    held, written = [JournalHeldError("another Wattlock agent on this node holds the journal")], []

    def acquire():
        if held:
            raise held[0]

    monkeypatch.setattr(node.journal, "acquire", acquire)
    monkeypatch.setattr(loop._status, "put", written.append)
    node.driver.locks = {"GPU-0": (345, 1590)}
    with running(loop) as statuses:
        give_orders(loop, make_order())
        wait_for(lambda: loop.board.snapshot.status.agent.reason == "SecondAgent")
        wait_for(lambda: loop.board.snapshot.passes >= 4)
        assert not loop.board.snapshot.ready
        assert "another Wattlock agent" in loop.board.snapshot.status.agent.message
        assert loop.board.snapshot.status.gpus[0].reason == "SecondAgent"
        loop.stop()
        wait_for(lambda: statuses)
    assert written == [], "neither while it waits nor when it stops"
    assert node.driver.log == []
    assert any("another Wattlock agent" in message for message in caplog.messages)


def test_observe_mode_stops_without_a_write(make_loop, make_order):
    loop, node, _ = make_loop(Mode.OBSERVE)
    with running(loop) as statuses:
        give_orders(loop, make_order())
        wait_for(lambda: loop.board.snapshot.ready)
        assert loop.board.snapshot.status.gpus[0].reason == "ObserveMode"
        loop.stop()
        wait_for(lambda: statuses)
    assert statuses == [EXIT_OK]
    assert node.driver.log == []


def test_bad_settings_end_the_command_with_a_sentence(capsys, monkeypatch):
    monkeypatch.delenv("NODE_NAME", raising=False)
    assert main(["run"]) == 2
    assert "NODE_NAME" in capsys.readouterr().err


def test_reset_without_records_needs_no_driver(capsys, tmp_path):
    assert main(["reset", "--state-dir", str(tmp_path)]) == 0
    assert f"no lock of Wattlock is recorded in {tmp_path}" in capsys.readouterr().out


def test_reset_of_a_folder_that_is_not_there_reassures_nobody(capsys, tmp_path):
    missing = tmp_path / "state"
    assert main(["reset", "--state-dir", str(missing)]) == 2
    assert f"there is no folder {missing} here" in capsys.readouterr().err
    assert not missing.exists()


class PageOnRequest:
    """A page without work until ``requested`` is set; remembers when it first showed some."""

    def __init__(self):
        self.requested = threading.Event()
        self.shown_seconds = 0.0

    def scrape(self, url):
        running = 1.0 if self.requested.is_set() else 0.0
        if running and not self.shown_seconds:
            self.shown_seconds = time.monotonic()
        return ServingCounters(now_seconds(), 0.0, 0.0, 0.0, None, None, running, 0.0, None, None)


def test_an_idle_instance_of_eight_slow_gpus_wakes_in_a_moment(make_loop, make_order, make_gpu):
    """Reading all GPUs takes 50 ms and the disk as long; from page to the last reset it must not take both."""
    loop, node, kubelet = make_loop()
    node.driver.gpus[:] = [make_gpu(number) for number in range(8)]
    pod = (PodName("llm", "decode-0"),)
    kubelet.holders = lambda gpus: Holders({gpu.uuid: pod for gpu in gpus}, frozenset(), {})
    loop._scraper = scraper = PageOnRequest()
    reset_seconds = []

    def slow(call, seconds, note=None):
        def slowly(*arguments):
            time.sleep(seconds)
            result = call(*arguments)
            if note is not None:
                note.append(time.monotonic())
            return result

        return slowly

    node.driver.read = slow(node.driver.read, 0.006)
    node.driver.reset = slow(node.driver.reset, 0.001, reset_seconds)
    node.journal.remove = slow(node.journal.remove, 0.006)
    order = make_order().model_copy(update={"idle": OrderIdle.model_construct(cap_mhz=None, after_seconds=1)})
    with running(loop):
        wait_for(lambda: loop.board.snapshot.status.gpus)
        give_orders(loop, order)
        wait_for(lambda: set(node.driver.locks.values()) == {(345, 345)})
        asked = time.monotonic()
        scraper.requested.set()
        wait_for(lambda: not node.driver.locks)
        wait_for(lambda: loop.board.snapshot.idle_releases.by_work == 1)
        seconds = loop.board.snapshot.idle_releases.seconds
    print(f"\npage to the last reset: {1000 * (reset_seconds[-1] - scraper.shown_seconds):.0f} ms")
    assert len(reset_seconds) == 8
    assert reset_seconds[-1] - scraper.shown_seconds < 0.15, "a reading that is under way, and the resets"
    assert reset_seconds[-1] - asked < 0.5
    assert reset_seconds[-1] - asked < seconds < 1.0, "what is told is an upper bound"
