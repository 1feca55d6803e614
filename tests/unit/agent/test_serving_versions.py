"""Names of metrics over the versions of the engines, several engines on a page, and restarts however they hide."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.serving.base import ServingCounters, difference, is_restart
from wattlock_agent.serving.pages import parse_page

DATA = Path(__file__).parents[2] / "data"


def counters(page: bytes | str, at_seconds: float = 0.0) -> ServingCounters:
    result = parse_page(page.encode() if isinstance(page, str) else page, at_seconds)
    assert isinstance(result, ServingCounters), result
    return result


# V0 engine: no label engine, KV use and time per token under other names, no origin of prompt tokens.
VLLM_0_5 = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 7.0
vllm:num_requests_waiting{model_name="m"} 2.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.25
vllm:cpu_cache_usage_perc{model_name="m"} 0.0
vllm:prompt_tokens_total{model_name="m"} 900.0
vllm:generation_tokens_total{model_name="m"} 4000.0
vllm:time_per_output_token_seconds_sum{model_name="m"} 40.0
vllm:time_per_output_token_seconds_count{model_name="m"} 3990.0
"""
# V1 engine, before inter_token_latency_seconds (0.11).
VLLM_0_10 = """\
vllm:num_requests_running{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.2
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 900.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.75e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 4000.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.75e+09
vllm:time_per_output_token_seconds_sum{engine="0",model_name="m"} 40.0
vllm:time_per_output_token_seconds_count{engine="0",model_name="m"} 3990.0
"""
VLLM_0_13 = VLLM_0_10.replace("time_per_output_token", "inter_token_latency").replace(
    "vllm:gpu_cache", "vllm:old_cache"
)
SGLANG_0_4 = """\
sglang:prompt_tokens_total{model_name="m"} 900
sglang:generation_tokens_total{model_name="m"} 4000
sglang:num_running_reqs{model_name="m"} 7
sglang:num_queue_reqs{model_name="m"} 2
sglang:token_usage{model_name="m"} 0.25
sglang:time_per_output_token_seconds_sum{model_name="m"} 40.0
sglang:time_per_output_token_seconds_count{model_name="m"} 3990
"""
# generation_tokens_total grows when a request ends, realtime_tokens_total while it runs.
SGLANG_0_5 = """\
sglang:prompt_tokens_total{model_name="m"} 900
sglang:generation_tokens_total{model_name="m"} 3500
sglang:realtime_tokens_total{mode="decode",model_name="m",tp_rank="0"} 4000
sglang:realtime_tokens_total{mode="decode",model_name="m",tp_rank="1"} 4000
sglang:num_running_reqs{model_name="m",tp_rank="0"} 7
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 2
sglang:token_usage{model_name="m",tp_rank="0"} 0.25
sglang:inter_token_latency_seconds_sum{model_name="m"} 40.0
sglang:inter_token_latency_seconds_count{model_name="m"} 3990
"""


@pytest.mark.parametrize("page", [VLLM_0_5, VLLM_0_10, VLLM_0_13, SGLANG_0_4, SGLANG_0_5])
def test_the_same_work_reads_the_same_under_the_names_of_every_version(page: str) -> None:
    found = counters(page)
    assert (found.generated_tokens, found.prompt_tokens) == (4000, 900)
    assert (found.inter_token_latency_sum_seconds, found.inter_token_latency_count) == (40.0, 3990)
    assert (found.running_requests, found.waiting_requests, found.kv_cache_usage) == (7, 2, 0.25)


@pytest.mark.parametrize("page", [VLLM_0_5, VLLM_0_10, VLLM_0_13, SGLANG_0_4])
def test_an_engine_that_cannot_tell_computed_prompts_apart_is_not_guessed_about(page: str) -> None:
    assert counters(page).computed_prompt_tokens is None


def test_kv_that_was_received_is_not_taken_for_computed() -> None:
    # The per-request histogram of this page says 15,676 computed tokens; the instance computed none.
    page = (DATA / "vllm-0.32.0-pd-nixl-decode.txt").read_bytes()
    assert b'vllm:request_prefill_kv_computed_tokens_sum{engine="0",model_name="tiny"} 15676.0' in page
    assert counters(page).computed_prompt_tokens == 0


@pytest.mark.parametrize("path", sorted(DATA.glob("vllm-*.txt")), ids=lambda path: path.name)
def test_every_recorded_page_is_understood(path: Path) -> None:
    found = counters(path.read_bytes())
    missing = [name for name, value in vars(found).items() if value is None]
    assert missing == []
    assert len(found.generated_by_series) == 1


def test_flops_and_bytes_between_the_two_recorded_pages() -> None:
    before = counters((DATA / "vllm-0.32.0-metrics-t0.txt").read_bytes())
    after = counters((DATA / "vllm-0.32.0-metrics-t1.txt").read_bytes(), 5.0217)
    work = difference(before, after)
    assert work.estimated_flops_per_gpu == 18_426_040_320
    assert work.estimated_bytes_per_gpu == 6_555_702_016 + 61_606_144


def test_without_the_estimate_flops_are_zero_on_the_page_and_not_made_up() -> None:
    found = counters((DATA / "vllm-0.32.0-overload.txt").read_bytes())
    assert (found.estimated_flops_per_gpu, found.estimated_bytes_per_gpu) == (0, 0)
    assert counters(VLLM_0_13).estimated_flops_per_gpu is None


def engine(number: int, tokens: float, born: float | None = None) -> str:
    labels = f'{{engine="{number}",model_name="m"}}'
    created = "" if born is None else f"vllm:generation_tokens_created{labels} {born!r}\n"
    return f"vllm:generation_tokens_total{labels} {tokens!r}\n{created}"


def test_a_counter_that_comes_back_higher_is_known_by_its_birth() -> None:
    before, after = counters(engine(0, 100, 1.7e9)), counters(engine(0, 90_000, 1.7e9 + 60))
    assert is_restart(before, after)
    assert not is_restart(after, counters(engine(0, 90_500, 1.7e9 + 60)))


def test_two_restarts_between_two_scrapes_are_one() -> None:
    # The engine in between was never seen; the last one's birth is not the first one's.
    assert is_restart(counters(engine(0, 100, 1.7e9)), counters(engine(0, 100, 1.7e9 + 120)))


def test_a_birth_is_not_needed_where_the_process_tells_its_start() -> None:
    before = counters("process_start_time_seconds 1.7e+09\n" + engine(0, 100))
    after = counters("process_start_time_seconds 1.7000001e+09\n" + engine(0, 90_000))
    assert is_restart(before, after)


@pytest.mark.parametrize("line", ["process_start_time_seconds soon", "process_start_time_seconds 1\n" * 2])
def test_an_odd_start_of_the_process_spoils_no_page(line: str) -> None:
    assert counters(f"{line.rstrip()}\n" + engine(0, 5)).generated_tokens == 5


def test_one_restarted_engine_of_several_does_not_hide_in_the_sum() -> None:
    before = counters(engine(0, 1000) + engine(1, 1000))
    after = counters(engine(0, 5) + engine(1, 9000))
    assert after.generated_tokens is not None
    assert before.generated_tokens is not None
    assert after.generated_tokens > before.generated_tokens
    assert is_restart(before, after)


def test_an_engine_that_went_away_is_a_restart_and_a_new_one_is_not() -> None:
    one, two = counters(engine(0, 1000)), counters(engine(0, 2000) + engine(1, 50))
    assert not is_restart(one, two)
    assert difference(one, two).generated_tokens == 1050
    assert is_restart(two, counters(engine(0, 9000)))


def test_a_counter_under_another_name_is_not_compared_with_the_old_one() -> None:
    # An SGLang of before and after the upgrade, the new one already ahead.
    assert is_restart(counters(SGLANG_0_4), counters(SGLANG_0_5.replace("4000", "5000")))


def test_labels_that_multiply_are_bounded() -> None:
    page = "".join(engine(number, 10) for number in range(200))
    found = counters(page)
    assert found.generated_tokens == 2000
    assert found.generated_by_series == ()


ENGINES = st.lists(st.integers(0, 10**9), min_size=1, max_size=8)


@given(ENGINES, st.lists(st.integers(0, 10**6), min_size=8, max_size=8))
def test_engines_that_only_grow_are_no_restart_and_all_their_tokens_count(start: list[int], more: list[int]) -> None:
    before = counters("".join(engine(n, float(tokens), 1.7e9 + n) for n, tokens in enumerate(start)))
    after = counters("".join(engine(n, float(t + more[n]), 1.7e9 + n) for n, t in enumerate(start)))
    assert not is_restart(before, after)
    assert difference(before, after).generated_tokens == sum(more[: len(start)])


@given(ENGINES.filter(lambda values: max(values) > 0), st.integers(0, 10**9))
def test_no_engine_restarts_unseen_without_births(start: list[int], growth: int) -> None:
    busiest = start.index(max(start))
    before = counters("".join(engine(n, float(tokens)) for n, tokens in enumerate(start)))
    page = "".join(engine(n, 0.0 if n == busiest else float(tokens + growth)) for n, tokens in enumerate(start))
    assert is_restart(before, counters(page))
