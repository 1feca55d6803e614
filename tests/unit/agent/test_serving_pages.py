"""The parser of serving pages: recorded pages of real engines, hostile pages, and pages of any bytes at all."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters, difference, is_restart
from wattlock_agent.serving.pages import MAX_LINES, MAX_PAGE_BYTES, MAX_SERIES, parse_page
from wattlock_api.constants import Reason

DATA = Path(__file__).parents[2] / "data"


def recorded(name: str, at_seconds: float = 0.0) -> ServingCounters:
    return counters((DATA / name).read_bytes(), at_seconds)


def counters(page: bytes | str, at_seconds: float = 0.0) -> ServingCounters:
    result = parse_page(page.encode() if isinstance(page, str) else page, at_seconds)
    assert isinstance(result, ServingCounters), result
    return result


def failure(page: bytes | str) -> ScrapeFailure:
    result = parse_page(page.encode() if isinstance(page, str) else page, 7.0)
    assert isinstance(result, ScrapeFailure), result
    assert result.at_seconds == 7.0
    return result


def test_work_between_two_recorded_pages() -> None:
    # Figures: tests/data/README.md and the worked example of the recorded load.
    before = recorded("vllm-0.32.0-metrics-t0.txt")
    after = recorded("vllm-0.32.0-metrics-t1.txt", 5.0217)
    work = difference(before, after)
    assert not is_restart(before, after)
    assert work.seconds == 5.0217
    assert work.generated_tokens == 10_463
    assert (before.running_requests, after.running_requests) == (12, 0)
    assert work.inter_token_latency_sum_seconds is not None
    assert work.inter_token_latency_count is not None
    assert work.inter_token_latency_sum_seconds / work.inter_token_latency_count == pytest.approx(0.001874, abs=1e-6)
    assert work.inter_token_latency_buckets[-1] == (math.inf, work.inter_token_latency_count)
    assert work.inter_token_latency_buckets[0] == (0.01, 10_463)
    assert len(work.inter_token_latency_buckets) == 20
    assert work.preemptions == 0
    assert work.computed_prompt_tokens == 0
    assert before.born_seconds == after.born_seconds == 1795377235.5608912


@pytest.mark.parametrize(
    ("page", "prompts", "computed", "generated"),
    [
        ("vllm-0.32.0-pd-nixl-prefill.txt", 15_676, 15_676, 43),
        ("vllm-0.32.0-pd-nixl-decode.txt", 15_676, 0, 688),
        ("vllm-0.32.0-pd-example-decode.txt", 11_698, 11_186, 3_459),
        ("vllm-0.32.0-pd-example-prefill.txt", 25_057, 25_057, 2_094),
        ("vllm-0.32.0-overload.txt", 10_834, 10_834, 34_894),
    ],
)
def test_pages_of_real_instances_tell_computed_prompts_from_received_ones(
    page: str, prompts: float, computed: float, generated: float
) -> None:
    result = recorded(page)
    assert (result.prompt_tokens, result.computed_prompt_tokens, result.generated_tokens) == (
        prompts,
        computed,
        generated,
    )


def test_the_overload_page_tells_of_waiting_and_preempted_requests() -> None:
    result = recorded("vllm-0.32.0-overload.txt")
    assert (result.running_requests, result.waiting_requests, result.preemptions) == (5, 10, 126)


def test_values_are_summed_over_engines_and_the_newest_birth_counts() -> None:
    result = counters(
        'vllm:generation_tokens_total{engine="0",model_name="m"} 10\n'
        'vllm:generation_tokens_total{engine="1",model_name="m"} 32.0\n'
        'vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09\n'
        'vllm:generation_tokens_created{engine="1",model_name="m"} 1.8e+09\n'
        'vllm:num_requests_running{engine="0",model_name="m"} 3\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 4\n'
    )
    assert result.generated_tokens == 42
    assert result.running_requests == 7
    assert result.born_seconds == 1.8e9


def test_what_the_page_does_not_have_is_unknown_and_not_zero() -> None:
    result = counters("vllm:generation_tokens_total 5\n")
    assert replace(result, generated_by_series=()) == ServingCounters(
        0.0, 5.0, None, None, None, None, None, None, None, None
    )


def test_old_names_of_vllm_serve_until_new_ones_appear() -> None:
    old = "vllm:time_per_output_token_seconds_sum 2\nvllm:time_per_output_token_seconds_count 100\n"
    assert counters(old).inter_token_latency_count == 100
    both = old + "vllm:inter_token_latency_seconds_sum 3\nvllm:inter_token_latency_seconds_count 150\n"
    assert counters(both).inter_token_latency_sum_seconds == 3
    assert counters(both).inter_token_latency_count == 150


SGLANG = """\
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="m"} 7.557572e+06
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
sglang:num_running_reqs{dp_rank="0",model_name="m",tp_rank="0"} 161.0
sglang:num_running_reqs{dp_rank="0",model_name="m",tp_rank="1"} 161.0
sglang:num_running_reqs{dp_rank="1",model_name="m",tp_rank="2"} 9.0
sglang:num_queue_reqs{model_name="m"} 2826.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m",tp_rank="0"} 100
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m",tp_rank="1"} 90
sglang:realtime_tokens_total{mode="prefill_cache",model_name="m",tp_rank="0"} 500
sglang:inter_token_latency_seconds_sum{model_name="m"} 12.5
sglang:inter_token_latency_seconds_count{model_name="m"} 1000
"""


def test_sglang_pages_are_understood_and_ranks_of_one_replica_count_once() -> None:
    assert replace(counters(SGLANG), generated_by_series=()) == ServingCounters(
        0.0, 7557572.0, 8128902.0, 100.0, 12.5, 1000.0, 161.0 + 9.0, 2826.0, None, None
    )


def test_a_decode_engine_that_never_computed_a_prompt_has_computed_none() -> None:
    assert counters('sglang:realtime_tokens_total{mode="decode"} 9\n').computed_prompt_tokens == 0


def test_label_values_may_hold_anything_that_the_format_allows() -> None:
    tricky = (
        r'vllm:prompt_tokens_by_source_total{model_name="a}b\"c,source=\"local_compute\"",source="local_cache_hit"} 4'
    )
    assert counters(tricky + "\n").computed_prompt_tokens == 0
    assert counters('vllm:generation_tokens_total{a="{}#",} 4 1700000000000\n').generated_tokens == 4
    assert counters('vllm:generation_tokens_total 4 # {id="x"} 1\n# EOF').generated_tokens == 4


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        pytest.param("", Reason.NO_SERVING_METRICS, id="empty"),
        pytest.param("# HELP up x\nup 1\n", Reason.NO_SERVING_METRICS, id="another program"),
        pytest.param("vllm:unheard_of_total 3\n", Reason.NO_SERVING_METRICS, id="nothing that we know"),
        pytest.param(" \n<!doctype html><title>x</title>\n", Reason.METRICS_INVALID, id="HTML"),
        pytest.param('{"detail": "Not Found"}\n', Reason.METRICS_INVALID, id="JSON"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\n", Reason.METRICS_INVALID, id="TLS"),
        pytest.param(b"vllm:generation_tokens_total 1\n\xff\xfe\n", Reason.METRICS_INVALID, id="not UTF-8"),
        pytest.param("vllm:generation_tokens_total 1\nvllm:generation_tok", Reason.METRICS_INVALID, id="cut off"),
        pytest.param("vllm:generation_tokens_total 180", Reason.METRICS_INVALID, id="cut in a number"),
        pytest.param("vllm:generation_tokens_total NaN\n", Reason.METRICS_INVALID, id="NaN"),
        pytest.param("vllm:generation_tokens_total +Inf\n", Reason.METRICS_INVALID, id="infinite"),
        pytest.param("vllm:generation_tokens_total 1e999\n", Reason.METRICS_INVALID, id="too large a number"),
        pytest.param("vllm:generation_tokens_total -1\n", Reason.METRICS_INVALID, id="negative"),
        pytest.param("vllm:generation_tokens_total 1_000\n", Reason.METRICS_INVALID, id="Python's own number format"),
        pytest.param("vllm:generation_tokens_total{engine=0} 1\n", Reason.METRICS_INVALID, id="label not quoted"),
        pytest.param('vllm:generation_tokens_total{engine="0" 1\n', Reason.METRICS_INVALID, id="labels not closed"),
        pytest.param("vllm:generation_tokens_total\n", Reason.METRICS_INVALID, id="no value"),
        pytest.param("vllm:generation_tokens_total 1\n" * 2, Reason.METRICS_INVALID, id="twice"),
        pytest.param(
            'vllm:generation_tokens_total{a="1",b="2"} 1\nvllm:generation_tokens_total{b="2",a="1"} 1\n',
            Reason.METRICS_INVALID,
            id="twice in another order",
        ),
        pytest.param(
            "".join(
                f'vllm:preempt{{e="{n}"}} 1e308\nvllm:generation_tokens_total{{e="{n}"}} 1e308\n' for n in range(9)
            ),
            Reason.METRICS_INVALID,
            id="sum overflows",
        ),
        pytest.param("\n" * (MAX_LINES + 1), Reason.METRICS_TOO_LARGE, id="too many lines"),
        pytest.param(b" " * (MAX_PAGE_BYTES + 1), Reason.METRICS_TOO_LARGE, id="too many bytes"),
        pytest.param(
            "".join(f'vllm:num_requests_running{{e="{n}"}} 1\n' for n in range(MAX_SERIES + 1)),
            Reason.METRICS_TOO_LARGE,
            id="too many series",
        ),
    ],
)
def test_unusable_pages_are_refused_with_a_reason_and_a_short_sentence(page: bytes | str, reason: Reason) -> None:
    result = failure(page)
    assert result.reason == reason
    assert 10 < len(result.message) < 300


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "1e999"])
def test_a_gauge_without_sense_is_unknown_and_spoils_nothing_else(value: str) -> None:
    result = counters(f"vllm:generation_tokens_total 1\nvllm:num_requests_running {value}\n")
    assert result.running_requests is None
    assert result.generated_tokens == 1


def test_opposite_infinities_of_a_gauge_are_unknown() -> None:
    page = 'vllm:num_requests_running{e="0"} +Inf\nvllm:num_requests_running{e="1"} -Inf\n'
    assert counters("vllm:generation_tokens_total 1\n" + page).running_requests is None


@pytest.mark.parametrize("tail", ['"', "\\", "{", '{a="', '{a="\\', " ", "#", ","])
def test_hostile_repetitions_are_refused_fast(tail: str) -> None:
    page = "".join(f"vllm:generation_tokens_total{tail * 15_000}\n" for _ in range(250))
    started = time.perf_counter()
    failure(page)
    assert time.perf_counter() - started < 0.5


def test_a_recorded_page_cut_anywhere_never_shows_smaller_counters() -> None:
    # A value cut short would look like a restart, or like work when the next page is whole.
    page = (DATA / "vllm-0.32.0-metrics-t1.txt").read_bytes()
    whole = counters(page)
    start = page.index(b"\nvllm:generation_tokens_total")
    for end in range(start, start + 200):
        result = parse_page(page[:end], 0.0)
        if isinstance(result, ServingCounters):
            assert result.generated_tokens in (None, whole.generated_tokens)


PIECES = st.sampled_from(
    [
        b"vllm:generation_tokens_total",
        b"vllm:prompt_tokens_by_source_total",
        b"sglang:num_running_reqs",
        b"vllm:estimated_read_bytes_per_gpu_total",
        b"vllm:estimated_write_bytes_per_gpu_total",
        b"process_start_time_seconds",
        b"vllm:",
        b"{",
        b"}",
        b'engine="0"',
        b'source="local_compute"',
        b'"',
        b"\\",
        b",",
        b"=",
        b" ",
        b"\t",
        b"\r",
        b"\n",
        b"#",
        b"1",
        b"1e5",
        b"1e308",
        b"NaN",
        b"-Inf",
        b".",
        b"\xc3\xa9",
        b"\xff",
        b"\0",
    ]
)


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=400), st.lists(PIECES, max_size=60).map(b"".join)))
def test_any_bytes_give_counters_or_a_failure(page: bytes) -> None:
    result = parse_page(page, 1.0)
    if isinstance(result, ServingCounters):
        values = [value for value in vars(result).values() if isinstance(value, float)]
        values += [value for _, value in result.generated_by_series]
        assert all(0 <= value < float("inf") for value in values)
    else:
        assert result.message


@settings(max_examples=50)
@given(st.lists(st.floats(min_value=0, max_value=1e14), min_size=1, max_size=8))
def test_the_sum_over_engines_is_exact_whatever_their_order(values: list[float]) -> None:
    lines = [f'vllm:generation_tokens_total{{engine="{n}"}} {value!r}\n' for n, value in enumerate(values)]
    assert counters("".join(lines)).generated_tokens == pytest.approx(sum(values))
    assert counters("".join(reversed(lines))).generated_tokens == pytest.approx(sum(values))


@pytest.mark.parametrize("value", ["3e16", "1e300"])
def test_a_count_that_no_engine_reaches_is_no_count(value: str) -> None:
    result = parse_page(f"vllm:generation_tokens_total {value}\n".encode(), 1.0)
    assert isinstance(result, ScrapeFailure)
    assert result.reason == "MetricsInvalid"
    assert "no engine ever counts so far" in result.message


def test_a_gauge_beyond_all_bounds_is_left_out() -> None:
    found = counters("vllm:generation_tokens_total 7\nvllm:num_requests_waiting 1e300\n")
    assert (found.generated_tokens, found.waiting_requests) == (7, None)
