"""Following a real engine: its recorded pages say what the GPUs do."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_simulator import state
from wattlock_simulator.physics import Architecture, Phase, Workload
from wattlock_simulator.serving.follow import Follower, Work, phase_between, work_of

DATA = Path(__file__).parents[2] / "data"
BUSY = Workload(Architecture.GQA, Phase.DECODE, 32, 4096)
counts = st.integers(0, 10**9)


@pytest.mark.parametrize(
    ("page", "work"),
    [
        ("pd-nixl-prefill", Work(15_676, 43)),
        ("pd-nixl-decode", Work(0, 688)),
        ("pd-example-decode", Work(11_186, 3_459)),
    ],
)
def test_recorded_pages(page, work):
    assert work_of((DATA / f"vllm-0.32.0-{page}.txt").read_text()) == work


def test_a_page_without_vllm_says_nothing():
    assert work_of("# TYPE up gauge\nup 1\n") is None


def test_phases():
    start = Work(0, 0)
    assert phase_between(None, Work(5, 5)) is None
    assert phase_between(start, start) is None
    assert phase_between(start, Work(258, 1)) is Phase.PREFILL
    assert phase_between(start, Work(2, 64)) is Phase.DECODE


@given(counts, counts, counts, counts)
def test_a_counter_that_went_back_is_no_work(computed, generated, later_computed, later_generated):
    phase = phase_between(Work(computed, generated), Work(later_computed, later_generated))
    if later_computed < computed or later_generated < generated:
        assert phase is None


@pytest.fixture
def engine():
    """A server with the page of a decode instance; its number of generated tokens can be set, None breaks it."""
    page = (DATA / "vllm-0.32.0-pd-nixl-decode.txt").read_text()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            tokens = self.server.tokens
            self.send_response(200 if tokens is not None else 503)
            self.end_headers()
            shown = re.sub(r"(?m)^(vllm:generation_tokens_total\{.*\}) .*$", rf"\1 {tokens}", page)
            self.wfile.write(shown.encode() if tokens is not None else b"")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.tokens = 100
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_gpu_works_while_the_engine_does(simulated, engine):
    gpu = simulated.file.gpus[0]
    follower = Follower(f"http://127.0.0.1:{engine.server_port}/metrics", [gpu], BUSY)

    def batch():
        follower.poll()
        return gpu.workload.batch

    assert batch() == 0  # a model is loaded, nothing is known of its work
    assert gpu.workload.architecture == state.ARCHITECTURE_CODES[Architecture.GQA]
    engine.tokens = 200
    assert batch() == 32
    assert state.PHASES[gpu.workload.phase] is Phase.DECODE
    lease_ns = gpu.workload.lease_until_ns
    engine.tokens = None
    assert batch() == 32
    assert gpu.workload.lease_until_ns == lease_ns, "an engine that does not answer must not renew its lease"
    engine.tokens = 200
    assert batch() == 0
    stop = threading.Event()
    stop.set()
    follower.run(stop)
    assert gpu.workload.architecture == 0


def test_an_address_that_is_no_page_is_refused(simulated):
    with pytest.raises(ValueError, match="http://127"):
        Follower("file:///etc/passwd", simulated.file.gpus, BUSY)
