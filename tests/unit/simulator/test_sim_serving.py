"""The serving engine: its pages parse, and its counts agree with the physics."""

import json
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from wattlock_simulator import physics, state
from wattlock_simulator.physics import Architecture, Phase, Product, Workload
from wattlock_simulator.serving.control import Change, ControlError, MetricsFault, parse
from wattlock_simulator.serving.engine import Engine, Role, Settings
from wattlock_simulator.serving.exposition import page
from wattlock_simulator.serving.instance import Instance
from wattlock_simulator.serving.server import Server

RECORDED = Path(__file__).parents[2] / "data" / "vllm-0.32.0-pd-nixl-decode.txt"
DECODE = Settings(Role.DECODE, Architecture.GQA, jitter=0.0)


def series(text):
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k not in ("engine", "model_name"))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def an_instance(simulated, wanted=DECODE, gpus=1, **keywords):
    return Instance(
        simulated.file.gpus[:gpus],
        wanted,
        monotonic_ns=lambda: simulated.now_ns,
        time_seconds=lambda: simulated.now_ns / 1e9,
        **keywords,
    )


def serve_for(simulated, instance, seconds):
    """Steps node and instance as they run in life: the instance ticks after every other refresh."""
    for _ in range(round(seconds / 0.2)):
        simulated.step(0.2)
        instance.tick()


def metrics(instance):
    return series(instance.page().decode())


def test_names_labels_and_buckets_are_those_of_the_recorded_vllm(simulated):
    def shape(text):
        return {
            (s.name, tuple(sorted(s.labels.items()))) for f in text_string_to_metric_families(text) for s in f.samples
        }

    recorded = shape(RECORDED.read_text().replace('model_name="tiny"', 'model_name="simulated"'))
    instance = an_instance(simulated)
    serve_for(simulated, instance, 5.0)
    mine = shape(instance.page().decode())
    assert mine - recorded == set()
    assert len(mine) > 100


@pytest.mark.parametrize("cap_mhz", [None, 1590, 600])
def test_tokens_latency_and_joules_are_those_of_the_physics(simulated, cap_mhz):
    gpu = simulated.file.gpus[0]
    gpu.request.lock_range_mhz = 345 << 32 | cap_mhz if cap_mhz else 0
    instance = an_instance(simulated)
    serve_for(simulated, instance, 2.0)
    before, energy_before = metrics(instance), gpu.sensors.energy_mj
    serve_for(simulated, instance, 60.0)
    after = metrics(instance)
    point = physics.operating_point(Product.H200, Workload(Architecture.GQA, Phase.DECODE, 32, 4096), cap_mhz)
    tokens = after["vllm:generation_tokens_total",] - before["vllm:generation_tokens_total",]
    assert tokens / 60.0 == pytest.approx(point.tokens_per_second, rel=2e-3)
    latency = [
        after[f"vllm:inter_token_latency_seconds_{k}",] - before[f"vllm:inter_token_latency_seconds_{k}",]
        for k in ("sum", "count")
    ]
    assert latency[1] == tokens
    assert latency[0] / latency[1] == pytest.approx(point.step_seconds, rel=2e-3)
    joules = (gpu.sensors.energy_mj - energy_before) / 1000
    assert joules / tokens == pytest.approx(point.joules_per_token, rel=5e-3)


def test_a_decode_instance_computes_no_prompt(simulated):
    instance = an_instance(simulated)
    serve_for(simulated, instance, 20.0)
    seen = metrics(instance)
    assert seen["vllm:prompt_tokens_by_source_total", "local_compute"] == 0
    transferred = seen["vllm:prompt_tokens_by_source_total", "external_kv_transfer"]
    assert transferred == seen["vllm:prompt_tokens_total",] > 0
    finished = seen["vllm:request_success_total", "length"]
    assert transferred == finished * DECODE.prompt_tokens
    assert seen["vllm:e2e_request_latency_seconds_count",] == finished > 0


def test_a_prefill_instance_computes_prompts_and_emits_one_token_each(simulated):
    instance = an_instance(simulated, replace(DECODE, role=Role.PREFILL, batch=1.0))
    serve_for(simulated, instance, 20.0)
    seen = metrics(instance)
    point = physics.operating_point(Product.H200, Workload(Architecture.GQA, Phase.PREFILL, 1, 4096))
    computed = seen["vllm:prompt_tokens_by_source_total", "local_compute"]
    assert computed / 20.0 == pytest.approx(point.tokens_per_second, rel=0.02)
    assert seen["vllm:generation_tokens_total",] == computed / 4096
    assert seen["vllm:inter_token_latency_seconds_count",] == 0


@pytest.mark.parametrize("wanted", [replace(DECODE, role=Role.MIXED), replace(DECODE, computes_prompts=True)])
def test_an_instance_that_computes_its_prompts_spends_gpu_time_on_them(simulated, wanted):
    instance = an_instance(simulated, wanted)
    serve_for(simulated, instance, 60.0)
    seen = metrics(instance)
    computed = seen["vllm:prompt_tokens_by_source_total", "local_compute"]
    generated = seen["vllm:generation_tokens_total",]
    assert seen["vllm:prompt_tokens_by_source_total", "external_kv_transfer"] == 0
    assert computed / generated == pytest.approx(wanted.prompt_tokens / wanted.output_tokens, rel=0.1)
    alone = physics.operating_point(Product.H200, Workload(Architecture.GQA, Phase.DECODE, 32, 4096))
    assert generated / 60.0 < 0.8 * alone.tokens_per_second


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.8])
def test_a_mixed_instance_computes_the_share_of_prompts_that_it_is_told(simulated, share):
    instance = an_instance(simulated, replace(DECODE, role=Role.MIXED))
    instance.apply(parse(json.dumps({"promptShare": share}).encode(), instance.settings))
    serve_for(simulated, instance, 240.0)
    seen = metrics(instance)
    computed = seen["vllm:prompt_tokens_by_source_total", "local_compute"]
    assert computed / (computed + seen["vllm:generation_tokens_total",]) == pytest.approx(share, rel=0.1)
    assert seen["vllm:prompt_tokens_by_source_total", "local_cache_hit"] > 0


def test_a_clock_that_decode_does_not_feel_slows_a_mixed_instance_by_its_prompts(simulated):
    def tokens(share, cap_mhz):
        simulated.file.gpus[0].request.lock_range_mhz = 345 << 32 | cap_mhz
        instance = an_instance(simulated, replace(DECODE, role=Role.MIXED, prompt_share=share))
        serve_for(simulated, instance, 60.0)
        return metrics(instance)["vllm:generation_tokens_total",]

    few, many = (1 - tokens(share, 1200) / tokens(share, 1980) for share in (0.05, 0.9))
    assert few < 0.01
    assert many > 0.03


def test_the_slowest_gpu_sets_the_pace(simulated):
    simulated.file.gpus[1].request.lock_range_mhz = 345 << 32 | 345
    instance = an_instance(simulated, gpus=2)
    serve_for(simulated, instance, 10.0)
    slow = physics.operating_point(Product.H200, Workload(Architecture.GQA, Phase.DECODE, 32, 4096), 345)
    assert metrics(instance)["vllm:generation_tokens_total",] / 10 == pytest.approx(slow.tokens_per_second, rel=0.01)


def test_load_jitters_by_seed_around_its_mean(simulated):
    def batches(seed):
        engine = Engine(replace(DECODE, jitter=0.03), seed=seed, now_seconds=0.0)
        drawn = []
        for _ in range(500):
            engine.draw_load()
            drawn.append(engine.running)
        return drawn

    one = batches(1)
    assert one == batches(1) != batches(2)
    average = sum(one) / len(one)
    assert average == pytest.approx(32, rel=0.01)
    assert (sum((b - average) ** 2 for b in one) / len(one)) ** 0.5 == pytest.approx(0.03 * 32, rel=0.2)


def test_idle_latency_restart_and_leaving(simulated):
    instance = an_instance(simulated)
    gpu = simulated.file.gpus[0]
    serve_for(simulated, instance, 2.0)
    created = metrics(instance)["vllm:generation_tokens_created",]
    instance.apply(Change(replace(DECODE, extra_step_seconds=0.02), None, restart=True))
    serve_for(simulated, instance, 2.0)
    seen = metrics(instance)
    assert seen["vllm:generation_tokens_created",] > created
    mean = seen["vllm:inter_token_latency_seconds_sum",] / seen["vllm:inter_token_latency_seconds_count",]
    assert mean == pytest.approx(0.0276, rel=0.01)
    instance.apply(Change(replace(DECODE, idle=True), None, restart=False))
    before = metrics(instance)["vllm:generation_tokens_total",]
    serve_for(simulated, instance, 2.0)
    assert metrics(instance)["vllm:generation_tokens_total",] == before
    assert metrics(instance)["vllm:num_requests_running",] == 0
    assert (gpu.sensors.sm_mhz, gpu.sensors.power_average_mw) == (1980, pytest.approx(127_000, rel=0.05))
    instance.leave()
    simulated.step(0.1)
    assert gpu.sensors.sm_mhz == 345


def test_a_page_with_nan_parses_and_backwards_goes_backwards_without_a_new_birth(simulated):
    instance = an_instance(simulated)
    serve_for(simulated, instance, 5.0)
    instance.apply(Change(DECODE, MetricsFault.NAN, restart=False))
    value = metrics(instance)["vllm:generation_tokens_total",]
    assert value != value
    instance.apply(Change(DECODE, MetricsFault.BACKWARDS, restart=False))
    first, second = metrics(instance), metrics(instance)
    assert first["vllm:generation_tokens_total",] > second["vllm:generation_tokens_total",] > 0
    assert first["vllm:generation_tokens_created",] == second["vllm:generation_tokens_created",]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), max_size=30), st.sampled_from(Role))
def test_counters_never_fall_and_histograms_stay_consistent(work, role):
    engine = Engine(Settings(role, Architecture.GQA), seed=0, now_seconds=0.0)
    tokens = 0
    for steps, seconds in work:
        engine.account(steps, seconds)
        assert engine.counters.generation_tokens >= tokens
        tokens = engine.counters.generation_tokens
    text = page(engine, "m").decode()
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
            assert buckets == sorted(buckets)
            assert buckets[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"batchSize": 1}', "unknown key batchSize"),
        (b'{"batch": "many"}', "batch must be a number from 0.1 to 4096"),
        (b'{"batch": 1e9}', "batch must be a number"),
        (b'{"batch": NaN}', "batch must be a number"),
        (b'{"batch": true}', "batch must be a number"),
        (b'{"phase": "Decode"}', "phase must be one of decode, prefill, mixed"),
        (b'{"idle": 1}', "idle must be true or false"),
        (b'{"metricsFault": "fire"}', "metricsFault must be one of none, garbage"),
    ],
)
def test_control_requests_that_make_no_sense_are_refused_with_a_sentence(body, sentence):
    with pytest.raises(ControlError, match=sentence):
        parse(body, DECODE)


def test_control_requests_change_only_what_they_name():
    change = parse(b'{"batch": 8, "extraLatencyMs": 5, "phase": "prefill", "metricsFault": "huge"}', DECODE)
    assert change.settings == replace(DECODE, batch=8.0, extra_step_seconds=0.005, role=Role.PREFILL)
    assert (change.metrics_fault, change.restart) == (MetricsFault.HUGE, False)


@pytest.fixture
def url(simulated):
    instance = an_instance(simulated)
    server = Server(("127.0.0.1", 0), instance)
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert simulated.file.gpus[0].workload.architecture == 0


def get(url, limit=None):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read(limit)


def post(url, **request):
    message = urllib.request.Request(f"{url}/simulate", json.dumps(request).encode(), method="POST")
    with urllib.request.urlopen(message, timeout=5) as answer:
        return json.load(answer)


def test_the_server_serves_metrics_health_and_control(url, simulated):
    assert get(f"{url}/healthz") == b"ok\n"
    assert ("vllm:generation_tokens_total",) in series(get(f"{url}/metrics").decode())
    answer = post(url, batch=8, context=1024)
    assert (answer["batch"], answer["context"]) == (8, 1024)
    assert simulated.file.gpus[0].workload.batch == 8
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        post(url, batch=-1)
    with refused.value:
        assert "batch must be a number" in json.load(refused.value)["error"]
    with pytest.raises(urllib.error.HTTPError, match="404") as absent:
        get(f"{url}/nothing")
    absent.value.close()


@pytest.mark.parametrize("fault", ["garbage", "huge", "endless", "slow"])
def test_broken_pages_are_broken_and_end_with_the_server(url, fault):
    post(url, metricsFault=fault)
    if fault == "garbage":
        with pytest.raises((ValueError, UnicodeDecodeError)):
            series(get(f"{url}/metrics").decode())
    elif fault == "slow":
        with pytest.raises(TimeoutError), urllib.request.urlopen(f"{url}/metrics", timeout=0.2):
            pass
    else:
        with suppress(ConnectionError):
            assert len(get(f"{url}/metrics", 200_000)) == 200_000
    assert get(f"{url}/healthz") == b"ok\n"


def test_the_workload_of_a_state_slot_is_taken_from_the_engine(simulated):
    an_instance(simulated, replace(DECODE, architecture=Architecture.MAMBA2))
    slot = simulated.file.gpus[0].workload
    assert state.ARCHITECTURES[slot.architecture] is Architecture.MAMBA2
    assert slot.lease_until_ns > simulated.now_ns
