"""Instances without requests: the lower cap comes late and goes at once; in virtual time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wattlock_agent import idle
from wattlock_agent.agent import Agent
from wattlock_agent.driver_session import DriverSession
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.idle import LATE_SECONDS, Stillness, is_idle
from wattlock_agent.journal_file import decode, encode
from wattlock_agent.report import build_status
from wattlock_agent.serving.base import ServingCounters
from wattlock_api.constants import Mode
from wattlock_api.schedule import Arm, arm_of, epoch_at

IDLE = {"idle": {"afterSeconds": 10}}
LOW = {"GPU-0": (345, 345)}
ORDINARY = {"GPU-0": (345, 1590)}


def page(at_seconds, running=0.0, waiting=0.0, generated=100.0):
    return ServingCounters(at_seconds, generated, 50.0, 0.0, None, None, running, waiting, None, None)


# --- stillness -----------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.25, 0.25, 0.3, 1.0, 5.0]),
            st.sampled_from(["still"] * 8 + ["running", "waiting", "tokens", "failure", "restart", "dumb"]),
            st.sampled_from([0.0, 0.1, 0.8]),
        ),
        max_size=120,
    )
)
def test_the_lower_cap_is_never_on_while_a_page_shows_a_request(steps):
    stillness, now, generated = Stillness(), 0.0, 100.0
    pages: list[tuple[float, bool | None]] = []  # asked at, without work; None: there was no page to compare with
    for seconds, kind, delay in steps:
        now += seconds
        asked = now - min(delay, seconds)
        if kind in ("failure", "restart"):
            stillness = idle.broken(stillness)
            pages.append((asked, None))
        else:
            generated += kind == "tokens"
            gauges = {"running": (1.0, 0.0), "waiting": (0.0, 1.0), "dumb": (0.0, None)}.get(kind, (0.0, 0.0))
            first = not pages or pages[-1][1] is None
            stillness = idle.see(stillness, page(asked, *gauges, generated))
            pages.append((asked, kind == "still" or (kind == "tokens" and first)))
        for later in (0.0, 0.5, 0.8):
            if is_idle(stillness, 10.0, now + later):
                assert now + later - pages[-1][0] <= LATE_SECONDS
                run = []
                for at, quiet in reversed(pages):
                    if not quiet:
                        break
                    run.append(at)
                assert run[0] - run[-1] >= 10.0


@pytest.mark.parametrize(
    "woken",
    [page(20.0, running=1.0), page(20.0, waiting=1.0), page(20.0, generated=101.0), page(20.0, running=None)],
)
def test_any_sign_of_work_ends_it(woken):
    stillness = Stillness()
    for second in range(20):
        stillness = idle.see(stillness, page(float(second)))
    assert is_idle(stillness, 10.0, 19.5)
    assert not is_idle(stillness, 10.0, 19.0 + LATE_SECONDS + 0.01), "a page of then says nothing about now"
    assert not is_idle(idle.see(stillness, woken), 10.0, 20.0)
    assert not is_idle(idle.broken(stillness), 10.0, 19.5)


# --- the agent -----------------------------------------------------------------------------------------------------


def idle_node(make_node, make_order, gpus=1, **changes):
    """A node whose instance has been capped as idle."""
    node = make_node(gpus=gpus)
    node.order(make_order(**(IDLE | changes)))
    node.run(8)
    node.rest()
    for _ in range(120):
        node.run(0.25, 0.25)
        if node.driver.locks == LOW:
            return node
    raise AssertionError(f"not capped as idle: {node.reasons()}")


def test_an_instance_without_requests_gets_the_lowest_clock_after_its_time(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(**IDLE))
    node.run(8)
    assert node.driver.locks == ORDINARY
    node.rest()
    began = node.now_seconds
    while node.driver.locks != LOW:
        node.run(0.25, 0.25)
    assert 10 <= node.now_seconds - began <= 22
    assert node.reasons()["GPU-0"] == "Idle"
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "v", "pod", False)
    assert status.gpus[0].state == "Locked"
    assert status.gpus[0].requested_mhz == 1590
    assert status.capped == "1/1"


def test_while_idle_a_page_is_read_four_times_a_second_and_before_that_is_not(make_node, make_order):
    node = idle_node(make_node, make_order)
    node.scrapes.clear()
    node.run(10, 0.05)
    assert 33 <= len(node.scrapes) <= 41  # passes of this test are 0.05 s apart
    node.work()
    node.run(1, 0.05)
    node.scrapes.clear()
    node.run(20, 0.25)
    assert len(node.scrapes) <= 5


def test_the_first_request_releases_in_the_pass_of_its_page_and_the_ordinary_cap_follows(make_node, make_order):
    node = idle_node(make_node, make_order)
    node.run(30, 0.25)
    assert node.driver.locks == LOW
    node.work()
    began = node.now_seconds
    while node.driver.locks:
        node.run(0.05, 0.05)
    assert node.now_seconds - began <= idle.WATCH_SECONDS + 0.1
    assert node.reasons()["GPU-0"] == "WaitingToWrite"
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "v", "pod", False)
    assert (status.gpus[0].state, status.gpus[0].reason) == ("Released", "Idle"), "no news: requests come all day"
    assert status.capped == "1/1"
    assert status.locked == 0
    released = node.now_seconds
    while not node.driver.locks:
        node.run(0.25, 0.25)
    assert node.driver.locks == ORDINARY
    assert 5 <= node.now_seconds - released <= 7
    node.run(60)
    assert node.driver.locks == ORDINARY


@pytest.mark.parametrize("trouble", [{"page_fails": "MetricsUnreachable"}, {"page_delay_seconds": 0.8}])
def test_a_page_that_fails_or_is_late_releases_and_idleness_begins_anew(make_node, make_order, trouble):
    node = idle_node(make_node, make_order)
    for name, value in trouble.items():
        setattr(node, name, value)
    node.run(0.3, 0.05)
    assert not node.driver.locks
    node.page_fails, node.page_delay_seconds = "", 0.0
    node.run(9, 0.25)
    assert node.driver.locks == ORDINARY
    node.run(15, 0.25)
    assert node.driver.locks == LOW


def test_a_page_that_does_not_come_releases_at_its_time(make_node, make_order):
    """The loop asks for this time and makes a pass then, whatever else it waits for."""
    node = idle_node(make_node, make_order)
    due = node.agent.roster.seconds_to_late_page(node.clock)
    assert 0 < due <= LATE_SECONDS
    assert node.agent.roster.scrapes_wanted(node.clock) == [] or due == LATE_SECONDS
    node.now_seconds += due + 0.01
    assert node.agent.roster.seconds_to_late_page(node.clock) == 0
    node.pass_()
    assert not node.driver.locks
    assert node.agent.roster.seconds_to_late_page(node.clock) == float("inf")


def test_a_wake_waits_for_no_reading_of_gpus(make_node, make_order, monkeypatch):
    node = idle_node(make_node, make_order)
    reads = []
    monkeypatch.setattr(node.driver, "read", lambda uuid, read=node.driver.read: reads.append(uuid) or read(uuid))
    node.work()
    node.now_seconds += 0.9  # a reading is due as well
    (key,) = node.agent.instances
    url = node.orders.orders[0].metrics_url
    assert node.agent.instances[key].scraped(url, node.page(), 0.01, node.clock)
    node.pass_()
    assert not node.driver.locks
    assert reads == []
    assert [wake.by_work for wake in node.agent.wakes] == [True]
    node.now_seconds += 0.5
    node.pass_()
    assert reads == ["GPU-0"]
    assert node.agent.wakes == []


def test_all_gpus_are_reset_before_the_disk_is_asked(make_node, make_order):
    node = make_node(gpus=2)
    node.pods = dict.fromkeys(node.pods, node.pods["GPU-0"])
    node.order(make_order(**IDLE))
    node.run(8)
    node.rest()
    node.run(30, 0.25)
    assert set(node.driver.locks.values()) == {(345, 345)}
    order = []
    reset, remove = node.driver.reset, node.journal.remove
    node.driver.reset = lambda uuid: order.append("reset") or reset(uuid)
    node.journal.remove = lambda uuid: order.append("disk") or remove(uuid)
    node.work()
    node.run(0.3, 0.05)
    assert order == ["reset", "reset", "disk", "disk"]
    assert len(node.agent.wakes) <= 1, "one instance woke, not two GPUs"


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "Observe"},
        {"idle": None},
        {"role": "Prefill"},
        {"role": "Mixed"},
        {"span": {"nodes": ["n1", "n2"]}},
        {"hold": {"reason": "NoPrefillPeer", "message": "none"}, "capMHz": None},
    ],
)
def test_never_where_it_was_not_asked_for_or_cannot_be_seen(make_node, make_order, changes):
    node = make_node(gpus=1)
    node.order(make_order(**(IDLE | changes)))
    node.run(8)
    node.rest()
    node.run(60, 0.25)
    assert node.driver.locks in ({}, ORDINARY)
    assert "Idle" not in node.reasons().values()
    assert not any(mhz == 345 for _, mhz in node.driver.locks.values())


def test_an_engine_that_does_not_tell_its_requests_keeps_the_pools_clock_and_says_so(make_node, make_order):
    node = make_node(gpus=1, running_requests=None)
    node.order(make_order(**IDLE))
    node.tokens_per_second = 0.0
    node.run(60)
    assert node.driver.locks == ORDINARY
    (instance,) = node.agent.instances.values()
    status = instance.status(node.now_seconds, None)
    assert status.reason == "IdleNotTold"
    assert "vllm:num_requests_running" in status.message


def test_not_in_the_cool_down_of_the_guardrail(make_node, make_order):
    node = make_node(gpus=1, latency_seconds=0.080)
    node.order(make_order(**IDLE, guardrail={"maxInterTokenLatencyMs": 50, "cooldownSeconds": 60}))
    node.run(4)
    while node.reasons()["GPU-0"] != "Guardrail":
        node.run(1)
    tripped = node.now_seconds
    node.rest()
    while node.now_seconds < tripped + 55:
        node.run(0.5, 0.5)
        assert not node.driver.locks
    node.run(30, 0.25)
    assert node.driver.locks == LOW


def test_recovery_after_the_lower_cap_trips_no_guardrail_and_no_alarm(make_node, make_order):
    node = idle_node(make_node, make_order, guardrail={"maxInterTokenLatencyMs": 50, "cooldownSeconds": 60})
    for _ in range(3):
        node.latency_seconds = 0.500  # the first tokens came under the lower cap
        node.work()
        node.run(1, 0.25)
        (instance,) = node.agent.instances.values()
        assert not instance._guardrail.suspicious, "judged by what the lower cap did to it"
        node.latency_seconds = 0.010
        node.run(20)
        assert node.driver.locks == ORDINARY
        assert instance.guardrail_trips == 0
        node.rest()
        node.run(25, 0.25)
        assert node.driver.locks == LOW
    assert node.agent.tracks["GPU-0"].watch.losses == ()
    assert node.agent.tracks["GPU-0"].observed_mhz == 1590, "what was seen under the pool's clock stands"


def test_a_mixed_instance_that_wakes_is_judged_by_its_prompts(make_node, make_order):
    node = idle_node(make_node, make_order, role="Mixed", maxPrefillPercent=20)
    node.prompt_share = 5.0
    node.work()
    node.run(12, 0.25)
    assert not node.driver.locks
    assert node.reasons()["GPU-0"] == "PrefillShare"


def test_idleness_drops_epochs_of_both_arms_alike(make_node, make_order, switchback, schedule):
    node = make_node(gpus=1)
    node.order(make_order(**IDLE, experiment=switchback))
    node.run(8)
    node.rest()
    node.run(30, 0.25)
    seen = set()
    for _ in range(200):
        node.run(1, 0.25)
        arm = arm_of(schedule, "decode-0", epoch_at(schedule, node.clock.unix_seconds))
        seen.add((arm, node.reasons()["GPU-0"], node.driver.locks == LOW))
    assert seen == {(Arm.CAP, "Idle", True), (Arm.CONTROL, "Idle", True)}
    (instance,) = node.agent.instances.values()
    assert sum(len(each.samples) for each in instance.switchback._open.values()) <= 2, "an hour of them is a lot"
    pairs = sum(stats.pairs for stats in instance.switchback.pair_stats())
    assert pairs == 0


@pytest.mark.parametrize("wait", range(0, 40, 3))
def test_what_follows_a_wake_drops_no_epoch_for_its_arm(make_node, make_order, switchback, schedule, wait):
    """A wake near the end of an epoch: the ordinary cap is late in the next one, where a released one is on time."""
    node = make_node(gpus=1)
    node.order(make_order(**IDLE, experiment=switchback))
    node.run(8)
    node.rest()
    node.run(40, 0.25)
    node.run(wait, 0.25)
    node.work()
    woken_unix = node.clock.unix_seconds
    before = sum(node.agent.instances[key].switchback.dropped().not_applied for key in node.agent.instances)
    node.run(80, 0.25)
    after = sum(node.agent.instances[key].switchback.dropped().not_applied for key in node.agent.instances)
    # The epochs of the first ten seconds after the wake, and those before it that were still open.
    spoilt = {epoch_at(schedule, woken_unix + seconds) for seconds in range(11)}
    late = [epoch for epoch in spoilt if woken_unix + 10 - (epoch * 20) > 3]
    assert after - before >= len(late)
    assert after - before <= len(spoilt) + 2


# --- a life that ends ----------------------------------------------------------------------------------------------


def test_a_new_agent_undoes_what_a_killed_one_left_on_an_idle_gpu_before_it_knows_anything(make_node, make_order):
    node = idle_node(make_node, make_order)
    assert node.journal.disk["GPU-0"].idle
    node.agent = Agent(Mode.ENFORCE, DriverSession(node.driver), node.journal, "boot-1", node.clock)
    node.agent.open_journal(node.journal)
    node.pass_()
    assert not node.driver.locks
    assert not node.journal.disk


def test_records_tell_the_lower_cap_and_older_ones_are_still_read(make_node, make_order):
    node = idle_node(make_node, make_order)
    record = node.journal.disk["GPU-0"]
    assert decode(encode(record), "GPU-0") == record
    node.work()
    node.run(12, 0.25)
    assert not node.journal.disk["GPU-0"].idle


def test_a_release_that_the_driver_refuses_is_tried_again(make_node, make_order):
    node = idle_node(make_node, make_order)
    node.driver.faults["reset"] = GpuFault.TRANSIENT
    node.work()
    node.run(1, 0.25)
    assert node.driver.locks == LOW
    del node.driver.faults["reset"]
    node.run(2.5, 0.25)
    assert node.driver.locks in ({}, ORDINARY)
