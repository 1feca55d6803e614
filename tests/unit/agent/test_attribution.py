"""Whose energy and whose tokens: GPUs that change hands, pods that come and go, roles, idle instances."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wattlock_agent.holders.base import PodName
from wattlock_agent.rates import Scrape, work_rates
from wattlock_agent.report import build_status
from wattlock_agent.roster import PARTED_SECONDS
from wattlock_agent.serving.base import ServingCounters
from wattlock_agent.serving.pages import parse_page
from wattlock_api.nodeenergy import NodeEnergyStatus

DATA = Path(__file__).parents[2] / "data"


def status_of(node):
    agent = node.agent
    return build_status(agent.outlook, agent.tracks, agent.instances, "1", "agent", False, agent.parted)


def energies(node):
    """Joules by instance."""
    return {each.instance: float(each.energy_joules or 0) for each in status_of(node).instances}


def give(node, pod):
    node.pods = {"GPU-0": (PodName("llm", pod),)} if pod else {}


def test_a_gpu_that_changes_hands_bills_each_holder_for_its_time(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order("a"), make_order("b"))
    give(node, "a")
    node.run(30)
    node.driver.watts = 100.0
    before = energies(node)
    give(node, "b")
    node.run(30)
    after = energies(node)
    # The kubelet is asked every 5 s: until it says so the GPU is a's.
    assert after["a"] - before["a"] + after["b"] == pytest.approx(30 * 100)
    assert 0 <= after["a"] - before["a"] <= 6 * 100
    gpu = status_of(node).gpus[0]
    assert (gpu.holder.name, float(gpu.energy_joules)) == ("b", pytest.approx(after["b"]))


def test_a_pod_replaced_in_the_middle_of_an_epoch_costs_that_epoch(make_node, make_order, switchback):
    node = make_node(gpus=1)
    node.order(make_order("a", experiment=switchback))
    give(node, "a")
    node.run(10 + 20 * 4)
    used = status_of(node).instances[0].arms
    node.order(make_order("b", instance="a", experiment=switchback), generation=2)
    give(node, "b")
    node.run(20 * 4)
    (entry,) = status_of(node).instances
    assert entry.dropped.restart + entry.dropped.not_applied + entry.dropped.samples >= 1
    # No epoch has energy of one pod and tokens of two: each one's joules fit its seconds.
    for arm in entry.arms:
        assert float(arm.joules) / float(arm.seconds) == pytest.approx(500, rel=0.001)
    assert sum(float(arm.seconds) for arm in entry.arms) > sum(float(arm.seconds) for arm in used)


def test_the_last_joules_of_an_instance_are_told_after_its_order_went_away(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order("a"))
    give(node, "a")
    node.run(30)
    before = energies(node)["a"]
    node.order(generation=2)
    give(node, None)
    node.run(10)
    assert energies(node)["a"] == pytest.approx(before + 500, abs=0.2)  # the second in which the order went
    told = energies(node)["a"]
    (last,) = status_of(node).instances
    assert (last.tokens_per_second, last.joules_per_generated_token, last.reason) == (None, None, "")
    node.run(20)
    assert energies(node) == {"a": told}
    node.run(60)
    assert energies(node) == {}


def sums(entry):
    """What an instance's report has summed up."""
    return (
        float(entry.energy_joules or 0),
        sum(float(arm.joules) for arm in entry.arms),
        sum(stats.pairs for stats in entry.pair_stats),
        sum(entry.dropped.model_dump().values()),
    )


def measured(make_node, order):
    """A node whose instance has measured for long, and its sums."""
    node = make_node(gpus=1)
    node.order(order)
    give(node, "a")
    node.run(400)
    (entry,) = status_of(node).instances
    assert sums(entry)[2] >= 3
    return node, sums(entry)


def replaced(node, order, away_seconds):
    """The pod is away for so long; returns what is told in its first pass after that."""
    node.order(generation=2)
    give(node, None)
    node.run(away_seconds)
    node.order(order, generation=3)
    give(node, "a")
    node.run(1)
    (entry,) = status_of(node).instances
    return entry


def test_an_instance_that_returns_while_its_sums_are_still_told_goes_on_with_them(make_node, make_order, switchback):
    order = make_order("a", experiment=switchback)
    node, before = measured(make_node, order)
    after = replaced(node, order, PARTED_SECONDS)
    assert sums(after) >= before
    assert sums(after)[2] == before[2]


def test_an_instance_whose_sums_are_told_no_more_begins_at_zero(make_node, make_order, switchback):
    """The operator has put them with those of the pods that are gone, and may know it from its status alone."""
    order = make_order("a", experiment=switchback)
    node, _ = measured(make_node, order)
    assert sums(replaced(node, order, PARTED_SECONDS + 2)) == (0, 0, 0, 0)
    node.run(400)
    (entry,) = status_of(node).instances
    assert 0 < sums(entry)[0] <= 402 * 500
    assert sums(entry)[2] >= 3


def test_what_held_an_instance_released_holds_it_when_it_returns_however_late(make_node, make_order):
    order = make_order("a", guardrail={"maxInterTokenLatencyMs": 5})
    node = make_node(gpus=1)
    node.order(order)
    give(node, "a")
    node.run(60)
    (before,) = status_of(node).instances
    assert before.guardrail_tripped
    after = replaced(node, order, PARTED_SECONDS + 2)
    assert (after.guardrail_tripped, after.guardrail_trips) == (True, before.guardrail_trips)


@pytest.mark.parametrize("away_seconds", [5, PARTED_SECONDS + 2])
def test_what_an_earlier_agent_told_goes_on_at_once_or_while_it_is_told(
    make_node, make_order, switchback, away_seconds
):
    order = make_order("a", experiment=switchback)
    node, before = measured(make_node, order)
    told = status_of(node).to_api()
    # Its pod is being replaced while the agent starts.
    node.order(generation=2)
    node.start(told)
    node.run(1)
    (kept,) = status_of(node).instances
    assert sums(kept) == before
    after = replaced(node, order, away_seconds)
    assert (sums(after)[2] == before[2]) == (away_seconds < PARTED_SECONDS)
    assert (sums(after)[0] >= before[0]) == (away_seconds < PARTED_SECONDS)


def test_what_an_earlier_agent_told_goes_on_once(make_node, make_order, switchback):
    order = make_order("a", experiment=switchback)
    node, before = measured(make_node, order)
    node.start(status_of(node).to_api())
    node.run(1)
    (entry,) = status_of(node).instances
    assert sums(entry)[2] == before[2]
    # So many others come and go that this one's last words are over before their time.
    node.order(generation=2)
    node.run(1)
    for number in range(70):
        node.order(make_order(f"other-{number}"), generation=3 + 2 * number)
        node.run(0.1, 0.1)
        node.order(generation=4 + 2 * number)
        node.run(0.1, 0.1)
    assert "a" not in energies(node)
    node.order(order, generation=200)
    node.run(1)
    assert sums(next(each for each in status_of(node).instances if each.instance == "a"))[2] == 0


def test_a_silent_kubelet_costs_a_gap_that_is_told(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order("a"))
    give(node, "a")
    node.run(30)
    before = float(status_of(node).gpus[0].energy_joules)
    node.kubelet_up = False
    node.run(60)
    node.kubelet_up = True
    node.run(20)
    gpu = status_of(node).gpus[0]
    assert gpu.holder.name == "a"
    assert float(gpu.energy_joules) > before  # goes on where it was, not from what an earlier agent had told
    assert gpu.energy_gaps >= 1


HANDS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 25)), min_size=1, max_size=8)


# The fixtures are functions: nothing of one example is left for the next.
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HANDS, st.integers(50, 700))
def test_no_joule_is_billed_twice_and_none_is_lost_while_the_holder_is_known(make_node, make_order, hands, watts):
    node = make_node(gpus=1)
    node.order(make_order("a"), make_order("b"), make_order("c"))
    node.driver.watts = float(watts)
    for pod, seconds in hands:
        give(node, pod)
        node.run(seconds)
    billed = sum(energies(node).values())
    total = node.driver.energy_mj / 1000
    assert billed <= total + 0.2
    held_seconds = sum(seconds for pod, seconds in hands if pod)
    # Lost are the times when nobody is known to hold it, and up to 7 s until the kubelet was asked.
    assert billed >= watts * (held_seconds - 7 * len(hands)) - 0.2


def test_prefill_is_billed_by_computed_prompt_tokens(make_node, make_order):
    node = make_node()
    node.prompt_share = 4.0
    node.order(make_order(role="Prefill", pool="prefill", capMHz=None))
    node.run(40)
    (entry,) = status_of(node).instances
    assert entry.joules_per_generated_token is None
    assert float(entry.joules_per_prompt_token) == pytest.approx(500 / 4000, rel=0.01)


def test_an_idle_instance_has_watts_and_no_joules_per_token_and_says_so(make_node, make_order):
    node = make_node()
    node.tokens_per_second = 0.0
    node.order(make_order())
    node.run(40)
    status = status_of(node)
    (entry,) = status.instances
    assert status.gpus[0].power_watts == 500
    assert (entry.tokens_per_second, entry.joules_per_generated_token) == ("0.0", None)
    assert (entry.token_energy_reason, entry.reason) == ("NoTokens", "")
    node.tokens_per_second = 100.0
    node.run(40)
    (entry,) = status_of(node).instances
    assert (entry.token_energy_reason, float(entry.joules_per_generated_token)) == ("", pytest.approx(5, rel=0.01))


def test_pods_of_an_instance_on_one_node_count_together_or_not_at_all(make_node, make_order):
    node = make_node()
    both = [make_order("decode-0", instance="big/0"), make_order("decode-1", instance="big/0", metricsURL=None)]
    node.order(*both)
    node.run(40)
    (entry,) = status_of(node).instances
    assert float(entry.joules_per_generated_token) == pytest.approx(1.0, rel=0.01)  # two GPUs
    node.pods.pop("GPU-1")
    node.run(40)
    (entry,) = status_of(node).instances
    assert entry.joules_per_generated_token is None
    assert entry.reason == "PodNotOnNode"


def scrape(name, at_seconds):
    return Scrape(parse_page((DATA / name).read_bytes(), at_seconds), 1.8e9 + at_seconds, 0, True)


def test_the_recorded_pages_tell_their_arithmetic_intensity():
    pages = [scrape("vllm-0.32.0-metrics-t0.txt", 0.0), scrape("vllm-0.32.0-metrics-t1.txt", 5.0217)]
    rates = work_rates(pages, 0, 6.0)
    assert float(rates["estimated_gigaflops"]) == pytest.approx(18.426040320 / 5.0217, rel=1e-6)
    assert float(rates["estimated_gigabytes"]) == pytest.approx(6.617308160 / 5.0217, rel=1e-6)
    assert float(rates["tokens_per_second"]) == pytest.approx(2083.6, abs=0.1)
    assert rates["kv_cache_usage_percent"] == "0.0"


def test_an_engine_that_estimates_nothing_has_no_intensity():
    page = "vllm-0.32.0-overload.txt"
    rates = work_rates([scrape(page, 0.0), scrape(page, 5.0)], 0, 6.0)
    assert "estimated_gigaflops" not in rates
    assert (rates["waiting_requests"], rates["kv_cache_usage_percent"]) == (10, "100.0")


def test_the_energy_of_a_pod_is_that_of_the_policy_that_selects_it_now(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    node.run(30)
    other = {"namespace": "llm", "name": "other", "uid": "policy-2", "generation": 1}
    node.order(make_order(policy=other), generation=2)
    node.run(30)
    used = {each.policy_uid: float(each.energy_joules or 0) for each in status_of(node).instances}
    assert used["policy-2"] == pytest.approx(30 * 500, rel=0.05)
    assert used["policy-1"] == pytest.approx(30 * 500, rel=0.05)


def test_an_energy_that_is_not_known_does_not_become_a_number_in_last_words(make_node, make_order):
    node = make_node(gpus=2)
    node.pods["GPU-1"] = node.pods["GPU-0"]
    read = node.driver.read
    node.driver.read = lambda uuid: replace(read(uuid), energy_mj=None) if uuid == "GPU-1" else read(uuid)
    node.order(make_order())
    node.run(20)
    assert status_of(node).instances[0].energy_joules is None
    node.order(generation=2)
    node.run(5)
    assert all(each.energy_joules is None for each in status_of(node).instances)


def test_what_no_engine_can_do_is_unknown():
    def page(at_seconds: float, count: float, work: float) -> Scrape:
        text = f"""vllm:generation_tokens_total {count}
vllm:prompt_tokens_by_source_total{{source="local_compute"}} {count}
vllm:inter_token_latency_seconds_sum {count}
vllm:inter_token_latency_seconds_count {at_seconds + 1}
vllm:estimated_flops_per_gpu_total {work}
vllm:estimated_read_bytes_per_gpu_total {work}
vllm:estimated_write_bytes_per_gpu_total {work}
vllm:num_requests_waiting {count}
vllm:num_requests_running 1
"""
        return Scrape(parse_page(text.encode(), at_seconds), 1.8e9 + at_seconds, 0, True)

    told = {
        *("tokens_per_second", "prompt_tokens_per_second", "inter_token_latency_ms"),
        *("estimated_gigaflops", "estimated_gigabytes", "waiting_requests"),
    }
    assert set(work_rates([page(0.0, 1.0, 1.0), page(5.0, 1e6, 1e6)], 0, 6.0)) == told
    assert work_rates([page(0.0, 1.0, 1.0), page(5.0, 9e14, 4e26)], 0, 6.0) == {}


def test_energy_for_next_to_no_tokens_is_unknown(make_node, make_order):
    node = make_node(gpus=1)
    node.tokens_per_second = 1e-12
    node.order(make_order())
    node.run(40)
    (entry,) = status_of(node).instances
    assert (entry.tokens_per_second, entry.joules_per_generated_token) == ("0.0", None)


def test_a_page_that_tells_too_much_leaves_a_report_that_the_schema_takes(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(experiment={"seed": "s", "epochSeconds": 20, "controlShare": 0.5}))
    node.tokens_per_second = 1e300
    node.waiting_requests = 1e300
    node.run(200)
    status = status_of(node)
    assert NodeEnergyStatus.model_validate(status.to_api()) == status
    (entry,) = status.instances
    assert (entry.tokens_per_second, entry.waiting_requests) == (None, None)
    assert entry.arms, "its epochs are measured, however many tokens it tells"


def test_numbers_that_fit_into_no_report_cost_their_instance_and_nobody_else(make_node, make_order, switchback, caplog):
    node = make_node(gpus=2)
    node.order(make_order(experiment=switchback), make_order("decode-1", experiment=switchback))
    scraped = node.agent.instances
    node.run(1)
    for key, track in scraped.items():
        if key.instance == "decode-0":  # past the page's parser, which refuses such counts
            track.scraped = partial(odd, track.scraped)
    node.run(180)
    told = {each.instance: each for each in status_of(node).instances}
    assert told["decode-0"].reason == "MetricsInvalid"
    assert told["decode-1"].reason == ""
    assert float(told["decode-1"].energy_joules) > 0
    assert caplog.text.count("do not fit into a report") == 1
    NodeEnergyStatus.model_validate(status_of(node).to_api())


def odd(scraped, url, result, took_seconds, clock):
    page = replace(result, generated_tokens=math.nan) if isinstance(result, ServingCounters) else result
    return scraped(url, page, took_seconds, clock)
