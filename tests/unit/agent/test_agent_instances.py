"""What the agent makes of serving metrics, in virtual time: pairs, the guardrail, evidence of the role, restarts."""

import math

import pytest
from wattlock_agent.evidence import PromptEvidence, Work, add_work, computes_prompts
from wattlock_agent.report import build_status
from wattlock_api.schedule import Arm, arm_of, epoch_at


def test_follows_the_arms_and_measures_pairs(make_node, make_order, switchback, schedule):
    node = make_node(gpus=1)
    node.order(make_order(experiment=switchback))
    node.run(4)
    for _ in range(400):
        node.run(0.5, 0.5)
        epoch = epoch_at(schedule, node.clock.unix_seconds)
        assert (node.locked() == {"GPU-0"}) == (arm_of(schedule, "decode-0", epoch) is Arm.CAP)
        node.driver.watts = 400.0 if node.locked() else 500.0
    (instance,) = node.agent.instances.values()
    (stats,) = instance.switchback.pair_stats()
    assert stats.cap_mhz == 1590
    assert stats.pairs >= 4
    assert float(stats.energy.total) / stats.pairs == pytest.approx(math.log(400 / 500), abs=0.01)
    assert float(stats.throughput.total) == pytest.approx(0, abs=1e-6)
    assert sum(instance.switchback.dropped().model_dump().values()) <= 1


def test_latency_over_the_bound_releases_within_ten_seconds(make_node, make_order):
    node = make_node(gpus=1)
    guardrail = {"maxInterTokenLatencyMs": 50, "cooldownSeconds": 60}
    node.order(make_order(guardrail=guardrail))
    node.run(21)
    assert node.locked() == {"GPU-0"}
    node.latency_seconds = 0.080
    began = node.now_seconds
    while node.locked() and node.now_seconds < began + 30:
        node.run(1)
    assert node.now_seconds - began < 10
    assert node.reasons()["GPU-0"] == "Guardrail"
    node.latency_seconds = 0.010
    node.run(50)
    assert node.locked() == set()
    node.run(15)
    assert node.locked() == {"GPU-0"}


@pytest.mark.parametrize(
    ("bounds", "trouble", "words"),
    [
        ({"maxInterTokenLatencyP99Ms": 30}, {"late_share": 0.02}, "2.0 % of the tokens came more than 50 ms after"),
        ({"maxWaitingRequests": 10}, {"waiting_requests": 11.0}, "11 requests waited"),
        ({"maxPreemptionsPerMinute": 30}, {"preemptions_per_second": 1.0}, "60 preemptions a minute"),
    ],
)
def test_every_bound_on_a_window_releases_within_ten_seconds(make_node, make_order, bounds, trouble, words):
    node = make_node(gpus=1)
    node.order(make_order(guardrail=bounds | {"cooldownSeconds": 60}))
    node.run(40)
    assert node.locked() == {"GPU-0"}, "what is within its bound releases nothing"
    for name, value in trouble.items():
        setattr(node, name, value)
    began = node.now_seconds
    while node.locked() and node.now_seconds < began + 30:
        node.run(1)
    assert node.now_seconds - began < 10
    (instance,) = node.agent.instances.values()
    assert words in instance.status(node.now_seconds, None).guardrail_message


@pytest.mark.parametrize("arm", list(Arm))
def test_both_arms_lose_the_epochs_in_which_serving_was_bad(make_node, make_order, switchback, schedule, arm):
    """Else the released epochs of bad times would be kept and the capped ones dropped: that is no fair comparison."""
    node = make_node(gpus=1)
    guardrail = {"maxInterTokenLatencyMs": 50, "cooldownSeconds": 10}
    node.order(make_order(experiment=switchback, guardrail=guardrail))
    node.run(4)
    (instance,) = node.agent.instances.values()

    def early_in_the_arm() -> bool:
        seconds = node.clock.unix_seconds
        return arm_of(schedule, "decode-0", epoch_at(schedule, seconds)) is arm and 4 <= seconds % 20 < 5

    node.run(60, 0.5)  # whatever the first epochs were dropped for is told by now
    while not early_in_the_arm():
        node.run(0.5, 0.5)
    before = instance.switchback.dropped().not_applied
    node.latency_seconds = 0.080
    node.run(9, 0.5)
    node.latency_seconds = 0.010
    node.run(24, 0.5)
    assert instance.switchback.dropped().not_applied > before
    assert instance.guardrail_trips == (1 if arm is Arm.CAP else 0)


def test_pages_are_read_more_often_where_latency_is_bounded(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    node.run(3)
    (instance,) = node.agent.instances.values()
    assert 3 < max(instance.seconds_to_scrape(node.run(1).clock) for _ in range(6)) <= 5
    node.order(make_order(guardrail={"maxInterTokenLatencyMs": 50}), generation=2)
    node.run(6)
    assert max(instance.seconds_to_scrape(node.run(1).clock) for _ in range(6)) <= 3


def test_an_instance_that_computes_prompts_is_released_until_it_stops(make_node, make_order):
    node = make_node(gpus=1, prompt_share=0.3)
    node.order(make_order())
    node.run(70)
    assert node.reasons()["GPU-0"] == "ComputesPrompts"
    node.prompt_share = 0.0
    node.run(200)
    assert node.locked() == set()
    node.run(180)
    assert node.locked() == {"GPU-0"}


def test_in_observe_it_is_told_that_an_instance_computes_prompts(make_node, make_order):
    """Found on a real H200 (docs/hardware): who looks before enforcing must see that a label is wrong."""
    node = make_node(gpus=2, prompt_share=0.3)
    node.order(make_order(mode="Observe"), make_order("decode-1", role="Prefill", mode="Observe", cap_mhz=None))
    node.run(70)
    by_pool = {key.instance: each.status(node.now_seconds, None) for key, each in node.agent.instances.items()}
    decode, prefill = (by_pool[name] for name in sorted(by_pool))
    assert (decode.computes_prompts, decode.reason) == (True, "ComputesPrompts")
    assert "would not be capped" in decode.message
    assert (prefill.computes_prompts, prefill.reason) == (False, "")
    assert node.reasons()["GPU-0"] == "ObserveMode"


def test_counters_that_went_back_are_told_for_a_minute_and_spoil_nothing(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    node.run(20)
    (instance,) = node.agent.instances.values()
    assert instance.status(node.now_seconds, None).reason == ""
    node._tokens = 0.0
    node.run(10)
    status = instance.status(node.now_seconds, None)
    assert status.reason == "CountersRestarted"
    assert "went back" in status.message
    assert node.locked() == {"GPU-0"}
    node.run(60)
    status = instance.status(node.now_seconds, None)
    assert status.reason == ""
    assert float(status.tokens_per_second) == pytest.approx(1000)


def test_statistics_and_trips_go_on_after_a_restart_of_the_agent(make_node, make_order, switchback):
    node = make_node(gpus=1)
    guardrail = {"maxInterTokenLatencyMs": 50, "cooldownSeconds": 60}
    node.order(make_order(experiment=switchback, guardrail=guardrail))
    node.run(120, 0.5)
    node.latency_seconds = 0.080
    node.run(45, 0.5)
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
    before = status.instances[0]
    assert before.pair_stats[0].pairs > 0
    assert before.guardrail_tripped
    node.start(status.to_api())
    node.run(5)
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
    after = status.instances[0]
    assert after.pair_stats == before.pair_stats
    assert after.arms == before.arms
    assert after.guardrail_tripped
    assert node.locked() == set()
    assert float(after.energy_joules) >= float(before.energy_joules)


def test_a_pod_that_computes_prompts_in_bursts_is_seen_through_the_rests_in_which_it_is_idle(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(idle={"afterSeconds": 10}))
    node.prompt_share = 1.0
    seen = set()
    for _ in range(8):
        node.work()
        node.run(20, 0.25)
        seen.add(node.reasons()["GPU-0"])
        node.rest()
        node.run(30, 0.25)
    assert "ComputesPrompts" in seen


def test_a_group_of_pods_with_two_roles_is_watched_for_the_one_that_is_capped(make_node, make_order):
    node = make_node(gpus=2)
    group = {"instance": "lws/0"}
    node.order(
        make_order("decode-0", role="Prefill", pool="prefill", capMHz=None, metricsURL=None, **group),
        make_order("decode-1", guardrail={"maxInterTokenLatencyMs": 50, "cooldownSeconds": 600}, **group),
    )
    node.run(30)
    assert node.locked() == {"GPU-1"}
    node.latency_seconds = 0.2
    node.run(30)
    assert node.locked() == set()
    assert node.reasons()["GPU-1"] == "Guardrail"


@pytest.mark.parametrize("every_seconds", [5.0, 0.25])
def test_a_burst_of_prompts_after_a_long_rest_is_seen_at_once(every_seconds):
    seen, now = PromptEvidence(), 0.0
    while now <= 200:
        seen = add_work(seen, Work(now, 1000.0, 50_000.0))
        now += every_seconds
    for number in range(int(10 / every_seconds)):
        seen = add_work(seen, Work(now, 1000.0 + 5000 * (number + 1), 50_000.0))
        now += every_seconds
    assert computes_prompts(seen, now)
    assert len(seen.recent) <= 64
