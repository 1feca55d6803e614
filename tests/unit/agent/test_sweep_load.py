"""The load on an endpoint: always so many requests, counted right, and ended when the endpoint is of no use."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.serving.base import ScrapeFailure, no_tokens
from wattlock_agent.sweep import load as load_module
from wattlock_agent.sweep.endpoint import (
    EndpointError,
    MetricsTokens,
    metrics_url,
    parse_endpoint,
    served_model,
    served_tokenizer,
)
from wattlock_agent.sweep.load import ClientLoad, LoadError, prompt_seed, tokens_in
from wattlock_agent.sweep.plan import Shape, Workload

DECODE = Workload(Shape.DECODE, 3, 50, 4)
PREFILL = Workload(Shape.PREFILL, 2, 50, 1)


class Handler(BaseHTTPRequestHandler):
    server: "Endpoint"

    def do_GET(self):
        self._send(200, self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            self._send(server.status, server.answer(body))
        finally:
            with server.lock:
                server.running -= 1

    def _send(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True
    handler: type[BaseHTTPRequestHandler] = Handler

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.lock = threading.Lock()
        self.bodies, self.running, self.most = [], 0, 0
        self.status = 200
        self.models = b'{"data": [{"id": "tiny"}]}'

    def answer(self, body):
        usage = body["stream_options"]["continuous_usage_stats"]
        events = [
            {"choices": [{"text": "x"}], **({"usage": {"completion_tokens": n + 1}} if usage else {})}
            for n in range(body["max_tokens"])
        ]
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"

    def handle_error(self, *_):
        """Say nothing: a load that is stopped hangs up."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_so_many_requests_are_on_the_way_and_no_more(endpoint):
    load = ClientLoad(parse_endpoint(endpoint.url), "tiny", seed=1)
    load.start(DECODE)
    until(lambda: load.ready() and len(endpoint.bodies) > 12)
    load.stop()
    assert endpoint.most <= 3
    body = endpoint.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("tiny", 4, True, True)
    assert len(body["prompt"]) == 51  # one more than a whole number of blocks of the cache
    assert load.steady()
    tokens = load.read()
    assert tokens.generated % 4 == 0
    assert tokens.prompt / 51 == pytest.approx(tokens.generated / 4, abs=3)


class SilentHandler(Handler):
    server: "Silent"

    def do_POST(self):
        tokens = (body := json.loads(self.rfile.read(int(self.headers["Content-Length"]))))["max_tokens"]
        if self.server.begins_answers:
            self.send_response(200)
            self.end_headers()
        self.server.asked.append(tokens)
        self.server.allowed[tokens].wait(20)
        self.wfile.write(self.server.answer(body))


class Silent(Endpoint):
    """Takes requests for 1 or 4 tokens, and answers none before it is allowed to."""

    handler = SilentHandler

    def __init__(self):
        super().__init__()
        self.begins_answers = True
        self.allowed = {4: threading.Event(), 1: threading.Event()}
        self.asked = []


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    for event in server.allowed.values():
        event.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("begins_answers", [True, False])
def test_requests_of_a_silent_endpoint_end_with_the_load(silent, begins_answers):
    silent.begins_answers = begins_answers
    load = ClientLoad(parse_endpoint(silent.url), "tiny", seed=1)
    load.start(DECODE)
    until(lambda: len(silent.asked) == 3)
    threads, begun = list(load._threads), time.monotonic()
    load.stop()
    assert time.monotonic() - begun < load_module._JOIN_SECONDS / 2
    assert not any(thread.is_alive() for thread in threads)
    assert load.steady()  # an end that was asked for is no problem
    assert len(silent.asked) == 3


def test_tokens_of_the_load_before_are_none_of_the_next(silent, monkeypatch):
    """Its requests may outlive it, e.g. where an address does not answer and connecting takes minutes."""
    monkeypatch.setattr(load_module, "_JOIN_SECONDS", 0.1)
    monkeypatch.setattr(load_module, "_shut", lambda _: None, raising=False)
    load = ClientLoad(parse_endpoint(silent.url), "tiny", seed=1)
    load.start(PREFILL)
    until(lambda: len(silent.asked) == 2)
    left = list(load._threads)
    load.stop()
    load.start(Workload(Shape.DECODE, 2, 50, 4))
    until(lambda: len(silent.asked) == 4)
    silent.allowed[1].set()
    until(lambda: not any(thread.is_alive() for thread in left))
    assert not load.ready()
    assert (load.read().generated, load.read().prompt) == (0.0, 0.0)
    silent.allowed[4].set()
    until(load.ready)
    load.stop()


def test_decode_prompts_are_repeated_and_prefill_prompts_never(endpoint):
    def prompts_for(tokens):  # the endpoint may read the last requests of a load after its end
        with endpoint.lock:
            return [tuple(body["prompt"]) for body in endpoint.bodies if body["max_tokens"] == tokens]

    load = ClientLoad(parse_endpoint(endpoint.url), "tiny", seed=1)
    load.start(DECODE)
    until(lambda: len(endpoint.bodies) > 12)
    load.stop()
    load.start(PREFILL)
    until(lambda: len(prompts_for(1)) > 12)
    load.stop()
    assert len(set(prompts_for(4))) == 3
    prompts = prompts_for(1)
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {50}
    # vLLM 0.32.0 answers "Token id 999 is out of vocabulary" where there are 512, inside an answer with status 200.
    assert max(token for body in endpoint.bodies for token in body["prompt"]) < 512


def test_no_two_sweeps_send_the_same_prompts():
    """A second sweep with the same --seed on the same engine would find the first one's prompts in its cache."""
    assert len({prompt_seed() for _ in range(20)}) == 20


def test_an_endpoint_that_refuses_ends_the_load_with_its_words(endpoint, monkeypatch):
    monkeypatch.setattr(load_module, "_RETRY_SECONDS", 0.01)
    endpoint.status, endpoint.answer = 400, lambda _: b'{"message": "context too long"}'
    load = ClientLoad(parse_endpoint(endpoint.url), "tiny", seed=1)
    load.start(DECODE)
    with pytest.raises(LoadError, match="context too long"):
        until(load.ready)
    load.stop()


def test_an_answer_without_tokens_is_a_failure(endpoint, monkeypatch):
    monkeypatch.setattr(load_module, "_RETRY_SECONDS", 0.01)
    endpoint.answer = lambda _: b"data: [DONE]\n\n"
    load = ClientLoad(parse_endpoint(endpoint.url), "tiny", seed=1)
    load.start(DECODE)
    with pytest.raises(LoadError, match="without tokens"):
        until(load.ready)
    load.stop()


def test_tokens_of_a_line():
    assert tokens_in(b"", 3) == tokens_in(b": comment", 3) == tokens_in(b"data: [DONE]", 3) == 3
    assert tokens_in(b'data: {"choices": [{"text": " a"}]}', 3) == 4
    assert tokens_in(b'data: {"choices": [{"text": ""}]}', 3) == 3
    assert tokens_in(b'data: {"choices": [], "usage": {"completion_tokens": 9}}', 3) == 9
    with pytest.raises(ValueError, match="too busy"):
        tokens_in(b'data: {"error": {"message": "too busy"}}', 3)


#: vLLM 0.32.0 to a prompt of four tokens and max_tokens 6, without fields that are null. The second and third token
#: are parts of a character, so they have no text; one event with the fifth is left out, as if two had come at a time.
REAL_STREAM = """\
data: {"id":"cmpl-9da6","object":"text_completion","model":"tiny","choices":[{"index":0,"text":"at","logprobs":null,\
"finish_reason":null}],"usage":{"prompt_tokens":4,"total_tokens":5,"completion_tokens":1}}

data: {"id":"cmpl-9da6","object":"text_completion","model":"tiny","choices":[{"index":0,"text":"","logprobs":null,\
"finish_reason":null}],"usage":{"prompt_tokens":4,"total_tokens":6,"completion_tokens":2}}

data: {"id":"cmpl-9da6","object":"text_completion","model":"tiny","choices":[{"index":0,"text":"","logprobs":null,\
"finish_reason":null}],"usage":{"prompt_tokens":4,"total_tokens":7,"completion_tokens":3}}

data: {"id":"cmpl-9da6","object":"text_completion","model":"tiny","choices":[{"index":0,"text":\
"\N{REPLACEMENT CHARACTER}at","logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":4,\
"total_tokens":8,"completion_tokens":4}}

data: {"id":"cmpl-9da6","object":"text_completion","model":"tiny","choices":[{"index":0,"text":"","logprobs":null,\
"finish_reason":"length"}],"usage":{"prompt_tokens":4,"total_tokens":10,"completion_tokens":6}}

data: {"id":"cmpl-9da6","object":"text_completion","model":"tiny","choices":[],"usage":{"prompt_tokens":4,\
"total_tokens":10,"completion_tokens":6},"system_fingerprint":"vllm-0.32.0-e7faff42"}

data: [DONE]

"""
REAL_REFUSAL = (
    b'data: {"error": {"message": "Token id 999 is out of vocabulary", "type": "BadRequestError", "param": null, '
    b'"code": 400}}'
)


def test_tokens_of_a_real_vllm():
    counts = [0]
    for line in REAL_STREAM.encode().split(b"\n"):
        counts.append(tokens_in(line, counts[-1]))
    assert sorted(set(counts)) == [0, 1, 2, 3, 4, 6]
    assert counts == sorted(counts)
    with pytest.raises(ValueError, match="out of vocabulary"):
        tokens_in(REAL_REFUSAL, 0)


def test_the_tokenizer_is_what_the_endpoint_was_started_with(endpoint, tmp_path):
    there = parse_endpoint(endpoint.url)

    def serves(root):
        # vLLM 0.32.0 with --served-model-name tiny
        endpoint.models = json.dumps(
            {
                "object": "list",
                "data": [{"id": "tiny", "object": "model", "owned_by": "vllm", "root": root, "max_model_len": 1024}],
            }
        ).encode()
        return served_tokenizer(there, "tiny")

    assert serves(str(tmp_path)) == str(tmp_path)
    assert serves("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert serves("/models/only-in-a-container") is None
    assert served_tokenizer(there, "another") is None
    endpoint.models = b'{"data": [{"id": "tiny"}]}'
    assert served_tokenizer(there, "tiny") is None
    for answer in (b"[]", b'{"data": 1}', b'{"data": [1]}', b"no json"):
        endpoint.models = answer
        assert served_tokenizer(there, "tiny") is None
        with pytest.raises(EndpointError, match="--model"):
            served_model(there)


@given(st.binary(max_size=80), st.integers(0, 5))
def test_no_line_lowers_the_count(line, seen):
    with suppress(ValueError, RecursionError):
        assert tokens_in(b"data: " + line, seen) >= seen


def test_endpoints_are_taken_with_and_without_v1_and_bad_ones_refused(endpoint):
    assert parse_endpoint("http://h:8000/v1/").url == parse_endpoint("http://h:8000").url == "http://h:8000"
    assert parse_endpoint("https://h/llm/v1").url == "https://h:443/llm"
    for bad in ("h:8000", "ftp://h", "http://", "http://h:port"):
        with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:8000"):
            parse_endpoint(bad)
    assert served_model(parse_endpoint(endpoint.url)) == "tiny"
    endpoint.models = b"[]"
    with pytest.raises(EndpointError, match="--model"):
        served_model(parse_endpoint(endpoint.url))
    assert metrics_url(parse_endpoint("http://localhost:8000"), None).startswith(("http://127.", "http://[::1]"))


def test_a_restart_of_the_engine_ends_the_sweep():
    pages = iter([no_tokens(1.0), no_tokens(2.0)])
    tokens = MetricsTokens("http://127.0.0.1/metrics", lambda _: next(pages))
    assert tokens.read().generated == 0

    def counted(value, born):
        return type(no_tokens(1.0))(**{**vars(no_tokens(3.0)), "generated_tokens": value, "born_seconds": born})

    pages = iter([counted(10.0, 1.0), counted(20.0, 2.0)])
    tokens = MetricsTokens("http://127.0.0.1/metrics", lambda _: next(pages))
    assert tokens.read().generated == 10
    with pytest.raises(EndpointError, match="restarted"):
        tokens.read()
    failure = MetricsTokens("http://127.0.0.1/metrics", lambda _: ScrapeFailure(1.0, "MetricsUnreachable", "no page"))
    with pytest.raises(EndpointError, match="no page"):
        failure.read()
