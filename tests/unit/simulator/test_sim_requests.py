"""The engine whose load are its requests: what clients send is what the GPU works on, and tokens match its joules."""

import http.client
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_simulator import physics, state
from wattlock_simulator.physics import Architecture, Phase, Product, Workload
from wattlock_simulator.serving.completions import Answer, parse
from wattlock_simulator.serving.control import ControlError
from wattlock_simulator.serving.engine import Role, Settings
from wattlock_simulator.serving.exposition import page
from wattlock_simulator.serving.instance import Instance
from wattlock_simulator.serving.requests import Request, RequestEngine
from wattlock_simulator.serving.server import Server

SETTINGS = Settings(Role.MIXED, Architecture.GQA, batch=64)


def an_engine(**changes):
    return RequestEngine(Settings(Role.MIXED, Architecture.GQA, **{"batch": 64, **changes}), seed=1, now_seconds=0.0)


def test_nothing_is_worked_on_without_requests():
    engine = an_engine()
    engine.account(5.0, 0.1)
    assert engine.workload is None
    assert engine.counters.generation_tokens == 0


def test_a_prompt_is_computed_first_then_its_tokens_come_one_a_step():
    engine, request = an_engine(), Request(1, 1000, 50)
    engine.submit(request)
    assert engine.workload == Workload(Architecture.GQA, Phase.PREFILL, 1.0, 1000)
    engine.account(0.5, 0.1)
    assert (request.computed, request.generated) == (500, 0)
    engine.account(0.5, 0.1)
    assert request.generated == 1  # the step that ends the prompt gives the first token
    assert engine.workload == Workload(Architecture.GQA, Phase.DECODE, 1.0, 1001)
    engine.account(20, 0.1)
    assert request.generated == 21
    assert (engine.counters.computed_prompt_tokens, engine.counters.generation_tokens) == (1000, 21)


def test_a_prompt_seen_before_is_not_computed_again():
    engine = an_engine()
    for _ in range(2):
        request = Request(7, 1000, 10)
        engine.submit(request)
        engine.account(1.0, 0.1)
    assert engine.counters.computed_prompt_tokens == 1000
    assert engine.counters.cached_prompt_tokens == 1000
    assert engine.counters.prompt_tokens == 2000
    page(engine, "simulated")  # and the page can show it


def test_what_was_done_beyond_the_end_of_a_request_goes_to_the_one_that_takes_its_place():
    engine, first, second = an_engine(), Request(1, 100, 10), Request(1, 100, 100)
    engine.submit(first)
    engine.account(1.0, 0.1)
    engine.account(30.0, 0.1)  # 21 more than it wanted
    assert first.done
    engine.submit(second)
    assert second.generated == 21


def test_a_client_may_need_a_while_to_come_back_and_its_place_is_kept():
    engine, first, second = an_engine(), Request(1, 100, 10), Request(1, 100, 100)
    engine.submit(first)
    engine.account(1.0, 0.1)
    engine.account(30.0, 0.1)  # 21 more than it wanted
    engine.account(30.0, 0.2)
    assert engine.workload.batch == 1
    engine.submit(second)
    assert second.generated == 51
    assert engine.counters.generation_tokens == 61


def test_a_place_is_not_kept_for_long():
    engine = an_engine()
    requests = [Request(1, 100, 20) for _ in range(8)]
    for request in requests:
        engine.submit(request)
    engine.account(8.0, 0.1)
    assert engine.workload.batch == 8
    engine.account(50.0, 0.1)
    assert all(request.done for request in requests)
    assert engine.workload.batch == 8
    for _ in range(6):
        engine.account(10.0, 0.1)
    assert engine.workload is None
    late = Request(1, 100, 100)
    engine.submit(late)
    assert late.generated == 0


def test_no_more_run_at_a_time_than_the_engine_takes():
    engine = an_engine(batch=4)
    for _ in range(10):
        engine.submit(Request(1, 100, 1000))
    engine.account(20.0, 0.1)
    assert (engine.running, engine.waiting) == (4, 6)
    assert engine.workload.phase is Phase.DECODE


def test_a_client_that_leaves_takes_its_request_with_it():
    engine, request = an_engine(), Request(1, 100, 1000)
    engine.submit(request)
    engine.account(1.0, 0.1)
    engine.withdraw(request)
    assert engine.running == 0
    assert engine.workload is None


def test_who_waited_behind_a_client_that_leaves_is_next():
    engine = an_engine()
    first, second, third = Request(1, 100, 1), Request(2, 100, 1), Request(1, 100, 1000)
    engine.submit(first)
    engine.account(1.0, 0.1)
    assert first.done
    engine.submit(second)
    engine.submit(third)  # its prompt is known, but it is the second in the queue
    engine.withdraw(second)
    assert (engine.running, engine.waiting) == (1, 0)
    assert engine.workload.phase is Phase.DECODE


def test_a_restart_ends_all_requests():
    engine, request = an_engine(), Request(1, 100, 1000)
    engine.submit(request)
    engine.restart(5.0)
    assert request.done
    assert (engine.waiting, engine.workload, engine.counters.prompt_tokens) == (0, None, 0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 5), st.integers(1, 300), st.integers(1, 60)),
            st.tuples(st.just("account"), st.floats(0, 40), st.floats(0, 0.3)),
            st.tuples(st.just("withdraw"), st.integers(0, 50)),
        ),
        max_size=60,
    )
)
def test_no_request_ever_gets_more_than_it_asked_for_and_none_is_lost(events):
    engine = an_engine(batch=8)
    requests = []
    for event in events:
        if event[0] == "submit":
            requests.append(Request(*event[1:]))
            engine.submit(requests[-1])
        elif event[0] == "account":
            engine.account(*event[1:])
        elif requests:
            engine.withdraw(requests.pop(event[1] % len(requests)))
        open_requests = [request for request in requests if not request.done]
        assert engine.running + engine.waiting == len(open_requests)
        assert engine.running <= 8
        assert all(0 <= each.generated <= each.output_tokens for each in requests)
        assert all(0 <= each.computed <= each.prompt_tokens for each in requests)
        if open_requests:
            assert engine.workload is not None
    for _ in range(400):
        engine.account(40.0, 0.1)
    assert all(request.done for request in requests)


def test_tokens_and_joules_are_those_of_the_physics_with_clients_that_come_back(simulated):
    now = {"monotonic_ns": lambda: simulated.now_ns, "time_seconds": lambda: simulated.now_ns / 1e9}
    gpu = simulated.file.gpus[0]
    instance = Instance((gpu,), SETTINGS, by_requests=True, **now)
    requests = [Request(slot, 2048, 256) for slot in range(16)]
    for request in requests:
        instance.submit(request)

    def run(seconds):
        for _ in range(round(seconds / 0.2)):
            simulated.step(0.2)
            instance.tick()
            for slot, request in enumerate(requests):
                if request.done:
                    requests[slot] = Request(slot, 2048, 256)
                    instance.submit(requests[slot])

    def counts():
        return state.read_sensors(gpu).energy_mj / 1000, instance._engine.counters.generation_tokens

    run(10.0)
    joules, tokens = counts()
    run(60.0)
    joules, tokens = counts()[0] - joules, counts()[1] - tokens
    truth = physics.operating_point(Product.H200, Workload(Architecture.GQA, Phase.DECODE, 16, 2048 + 128))
    assert joules / tokens == pytest.approx(truth.joules_per_token, rel=0.01)
    assert tokens / 60.0 == pytest.approx(truth.tokens_per_second, rel=0.01)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"prompt": ""}', "prompt must be"),
        ('{"prompt": ["a"]}', "prompt must be"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens must be"),
        ('{"prompt": "a", "stream_options": 1}', "stream_options must be"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(body, sentence):
    with pytest.raises(ControlError, match=sentence):
        parse(body.encode())


def test_a_prompt_is_text_or_token_numbers():
    assert parse(b'{"prompt": "twelve chars"}').request.prompt_tokens == 3
    assert parse(json.dumps({"prompt": [5] * 77, "max_tokens": 9}).encode()).request.prompt_tokens == 77


def test_events_carry_what_is_new_and_the_engines_own_count():
    asked = parse(
        b'{"prompt": "a", "max_tokens": 9, "stream": true, '
        b'"stream_options": {"include_usage": true, "continuous_usage_stats": true}}'
    )
    answer = Answer(asked, "m")
    first = json.loads(answer.events(4, done=False).decode().removeprefix("data: "))
    assert first["usage"]["completion_tokens"] == 4
    assert first["choices"][0]["text"].count("watt") == 4
    assert answer.events(4, done=False).startswith(b":")
    last = answer.events(9, done=True).decode().split("\n\n")
    assert json.loads(last[0].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert json.loads(last[1].removeprefix("data: "))["usage"]["completion_tokens"] == 9
    assert last[2] == "data: [DONE]"


@pytest.fixture
def live(simulated):
    """An instance by requests behind HTTP; the caller's thread moves time."""

    def start(by_requests=True):
        now = {"monotonic_ns": lambda: simulated.now_ns, "time_seconds": lambda: simulated.now_ns / 1e9}
        instance = Instance((simulated.file.gpus[0],), SETTINGS, by_requests=by_requests, **now)
        server = Server(("127.0.0.1", 0), instance)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return instance, http.client.HTTPConnection(*server.server_address, timeout=20)

    servers = []
    yield start
    for server in servers:
        server.instance.leave()
        server.shutdown()
        server.server_close()


def test_a_streamed_completion_has_all_its_tokens(simulated, live):
    instance, connection = live()
    body = {"prompt": [1] * 500, "max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/completions", json.dumps(body))
    done = threading.Event()

    def time_passes():
        while not done.is_set():
            simulated.step(0.2)
            instance.tick()
            done.wait(0.01)

    clock = threading.Thread(target=time_passes)
    clock.start()
    try:
        lines = connection.getresponse().read().decode().split("\n\n")
    finally:
        done.set()
        clock.join()
    assert sum(line.count("watt") for line in lines) == 60
    assert lines[-2] == "data: [DONE]"


def test_models_are_listed_and_an_engine_without_requests_says_how_to_start_it(live):
    _, connection = live(by_requests=False)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "simulated"
    connection.request("POST", "/v1/completions", '{"prompt": "a"}')
    answer = connection.getresponse()
    assert (answer.status, "--requests" in answer.read().decode()) == (503, True)
