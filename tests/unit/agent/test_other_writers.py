"""Other programs that set clocks: one that undoes our lock, one whose lock stood before ours, and a second agent."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay_driver import UUID, ReplayDriver, load, phases, prolonged
from wattlock_agent.foreign import BUSY_PERCENT, CONFIRM_SECONDS, ForeignWatch, FreeReading, watch_free
from wattlock_agent.gpu.base import LimiterNanoseconds
from wattlock_agent.holders.base import PodName
from wattlock_agent.journal import JournalHeldError, LockRecord
from wattlock_agent.journal_keeper import JournalKeeper
from wattlock_agent.report import build_status

COEXIST = {"conflictPolicy": "Coexist"}


def decision(node, uuid="GPU-0"):
    return node.agent.outlook.decisions[uuid]


def told(node):
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
    return status.gpus[0]


def undone_by_another(node, seconds):
    """Let time pass while another program resets the clock within a second of every lock; yields after each pass."""
    for _ in range(seconds):
        node.driver.locks.pop("GPU-0", None)
        node.run(1)
        yield


# --- a program that keeps undoing our lock ----------------------------------------------------------------------------


def test_coexist_sets_the_cap_again_at_most_once_a_minute_under_one_steady_word(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(**COEXIST))
    locks, words = [], []
    for _ in undone_by_another(node, 900):
        if node.driver.log.count(("lock", "GPU-0")) > len(locks):
            locks.append(node.now_seconds)
        words.append((told(node).state, told(node).reason, told(node).requested_mhz, told(node).message))
    third = next(at for at, word in enumerate(words) if word[1] == "Contested")
    assert third < 60
    # The third loss ends the hurry; from then on the other has a minute between two of our writes.
    gaps = [later - earlier for earlier, later in pairwise(locks[3:])]
    assert min(gaps) >= 60
    assert len(gaps) >= 10, "and it is not given up"
    assert len(set(words[third:])) == 1, "the word does not change with each write"
    assert words[-1][:3] == ("Conflict", "Contested", 1590)
    assert node.agent.outlook.settled_generation == 1


def test_coexist_is_over_ten_minutes_after_the_last_loss(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(**COEXIST))
    for _ in undone_by_another(node, 120):
        pass
    assert decision(node).reason == "Contested"
    node.run(560)
    assert decision(node).reason == "Contested"
    assert node.locked() == {"GPU-0"}
    node.run(120)
    assert decision(node).reason == "Locked"
    assert node.locked() == {"GPU-0"}


def test_a_contested_lock_is_undone_with_its_order(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(**COEXIST))
    for _ in undone_by_another(node, 120):
        pass
    node.run(90)
    assert node.locked() == {"GPU-0"}
    node.order(generation=2)
    node.run(2)
    assert node.locked() == set()
    assert node.journal.disk == {}


def test_contested_epochs_count_neither_for_the_saving_nor_for_the_guardrail(make_node, make_order, switchback):
    node = make_node(gpus=1)
    node.order(make_order(experiment=switchback, **COEXIST))
    node.run(400)
    (calm,) = [each.status(node.now_seconds, None) for each in node.agent.instances.values()]
    assert calm.pair_stats[0].pairs >= 4
    for _ in undone_by_another(node, 120):
        pass
    assert decision(node).reason == "Contested"
    node.run(25)  # the epoch that was open is closed
    (before,) = [each.status(node.now_seconds, None) for each in node.agent.instances.values()]
    writes = len(node.driver.log)
    node.run(300)
    assert decision(node).reason == "Contested", "no loss any more, but whose clock it was is not known"
    assert len(node.driver.log) > writes, "control epochs go on"
    locks = [call for call in node.driver.log[writes:] if call[0] == "lock"]
    assert len(locks) <= 300 / 60 + 1
    (after,) = [each.status(node.now_seconds, None) for each in node.agent.instances.values()]
    assert after.pair_stats == before.pair_stats
    assert after.arms == before.arms
    assert after.dropped.not_applied >= before.dropped.not_applied + 14, "of both arms"
    assert after.guardrail_trips == 0


def test_the_guardrail_still_acts_while_the_contested_lock_is_there(make_node, make_order):
    node = make_node(gpus=1)
    guardrail = {"maxThroughputLossPercent": 2, "maxInterTokenLatencyMs": 20, "cooldownSeconds": 600}
    node.order(make_order(guardrail=guardrail, **COEXIST))
    for _ in undone_by_another(node, 120):
        pass
    node.run(70)
    assert node.locked() == {"GPU-0"}
    assert decision(node).reason == "Contested"
    node.latency_seconds = 0.050
    node.run(15)
    assert decision(node).reason == "Guardrail"
    assert node.locked() == set()


def test_skip_keeps_its_hands_off(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    for _ in undone_by_another(node, 120):
        pass
    locks = node.driver.log.count(("lock", "GPU-0"))
    assert locks == 3
    node.run(1000)
    assert node.driver.log.count(("lock", "GPU-0")) == locks
    assert (decision(node).state, decision(node).reason) == ("Conflict", "OtherWriter")
    assert "Coexist" in decision(node).message
    node.order(make_order(policy={"namespace": "llm", "name": "qwen", "uid": "policy-1", "generation": 2}, **COEXIST))
    node.run(2)
    assert node.locked() == {"GPU-0"}, "a changed order is another try"


# --- a lock that stood before ours ------------------------------------------------------------------------------------


def test_a_lock_that_stood_before_ours_is_left_alone_until_it_is_gone(make_node, make_order):
    node = make_node(gpus=1)
    node.driver.locks = {"GPU-0": (345, 1200)}
    node.order(make_order())
    node.run(3)
    assert decision(node).reason == "WaitingToWrite", "watched for some seconds first"
    assert not decision(node).settled
    node.run(10)
    assert (decision(node).state, decision(node).reason) == ("Conflict", "ForeignLock")
    assert "1200 MHz" in decision(node).message
    assert "nvidia-smi -rgc" in decision(node).message
    node.driver.utilization_percent = 0
    node.run(60)
    node.driver.utilization_percent = 100
    assert decision(node).reason == "ForeignLock", "at rest nothing is learned"
    node.run(200)
    assert node.driver.log == []
    assert node.driver.locks == {"GPU-0": (345, 1200)}
    node.driver.locks = {}  # nvidia-smi -rgc
    node.run(6)
    assert decision(node).reason == "Locked"
    assert node.driver.locks == {"GPU-0": (345, 1590)}


def test_all_gpus_of_an_instance_wait_for_the_one_with_a_foreign_lock(make_node, make_order):
    node = make_node(gpus=2)
    node.pods = dict.fromkeys(node.pods, (PodName("llm", "decode-0"),))
    node.driver.locks = {"GPU-1": (345, 1200)}
    node.order(make_order())
    node.run(20)
    assert node.driver.log == []
    assert node.reasons() == {"GPU-0": "ForeignLock", "GPU-1": "ForeignLock"}
    assert decision(node).state == "Released"


def test_coexist_replaces_a_foreign_lock_at_once(make_node, make_order):
    node = make_node(gpus=1)
    node.driver.locks = {"GPU-0": (345, 1200)}
    node.order(make_order(**COEXIST))
    node.run(2)
    assert node.driver.locks == {"GPU-0": (345, 1590)}
    assert decision(node).reason == "Locked"
    node.run(30)
    assert decision(node).reason == "Locked"


@pytest.mark.parametrize("clock", [1980, 1830, 1785])
def test_a_gpu_near_its_highest_clock_is_locked_without_delay(make_node, make_order, clock):
    """1830 of 1980 MHz is where firmware clamps."""
    node = make_node(gpus=1)
    node.driver.locks = {"GPU-0": (345, clock)}
    node.order(make_order())
    node.run(1)
    assert node.driver.locks == {"GPU-0": (345, 1590)}


@pytest.mark.parametrize("utilization", [0, 50, 85])
def test_a_gpu_that_rests_is_not_suspected(make_node, make_order, utilization):
    node = make_node(gpus=1)
    node.driver.utilization_percent = utilization
    node.driver.locks = {"GPU-0": (345, 1200)}
    node.order(make_order())
    node.run(1)
    assert node.driver.locks == {"GPU-0": (345, 1590)}


def test_a_low_clock_with_a_limiter_is_no_foreign_lock(make_node, make_order):
    node = make_node(gpus=1)
    node.driver.locks = {"GPU-0": (345, 1200)}
    node.order(make_order(mode="Observe"))
    for second in range(30):
        node.driver.limiters = LimiterNanoseconds(second * 10**9, 0, 0, 0, 0)
        node.run(1)
    assert node.agent._foreign.found_mhz("GPU-0") is None
    node.run(12)
    assert node.agent._foreign.found_mhz("GPU-0") == 1200


def test_the_lock_of_an_earlier_agent_is_not_foreign(make_node, make_order):
    node = make_node(gpus=1, api_up=False)
    node.driver.locks = {"GPU-0": (345, 1200)}
    node.journal.disk = {"GPU-0": LockRecord("GPU-0", 1200, "policy-1", "uid-decode-0", "boot-1", "t")}
    node.run(25)  # it waits for the API server, longer than a foreign lock takes to be found
    assert node.agent._foreign.found_mhz("GPU-0") is None
    node.api_up = True
    node.order(make_order())
    node.run(3)
    assert node.driver.locks == {"GPU-0": (345, 1590)}
    assert ("reset", "GPU-0") not in node.driver.log


def test_no_lock_is_foreign_before_the_journal_is_read(make_node, make_order):
    """It may be that of the agent which still has the journal."""
    node = make_node(gpus=1)

    class Held:
        problems = ()

        def acquire(self):
            raise JournalHeldError("another Wattlock agent")

    node.driver.locks = {"GPU-0": (345, 1200)}
    node.order(make_order())
    keeper = JournalKeeper(Held())
    for _ in range(30):
        keeper.open(node.agent, node.now_seconds)
        node.run(1)
    assert decision(node).reason == "SecondAgent"
    assert node.agent._foreign.found_mhz("GPU-0") is None
    assert node.driver.log == []


def test_our_own_release_is_not_taken_for_a_foreign_lock(make_node, make_order):
    """The sensors show the old clock for a while."""
    node = make_node(gpus=1)
    node.order(make_order(capMHz=1200))
    node.run(20)
    node.order(make_order(hold={"reason": "NoPrefillPeer", "message": "none"}, capMHz=None), generation=2)
    node.run(1)
    node.driver.locks = {"GPU-0": (345, 1200)}  # as the sensors see it
    node.run(1.5, 0.5)
    node.driver.locks = {}
    node.order(make_order(), generation=3)
    node.run(5)
    assert node.driver.locks == {"GPU-0": (345, 1590)}


def free(at, mhz, busy=100, limited=False):
    return FreeReading(float(at), mhz, busy, limited, 1980, 15)


def watched(readings):
    watch = ForeignWatch()
    for reading in readings:
        watch = watch_free(watch, reading)
    return watch


@pytest.mark.parametrize(
    "readings",
    [
        [free(t, 1200) for t in range(8)],
        [free(t, 1200 if t % 5 else 1980) for t in range(60)],
        [free(t, 1200, busy=100 if t % 5 else 80) for t in range(60)],
        [free(t, 1200, limited=t % 5 == 0) for t in range(60)],
        [free(t, 1200, limited=None) for t in range(60)],
        [free(t, None) for t in range(60)],
        [free(t, 1200 + 45 * (t % 2)) for t in range(60)],
        [free(10 * t, 1200) for t in range(60)],
    ],
    ids=["short", "flicker", "rests", "limiter", "unknown-limiter", "no-clock", "not-flat", "gaps"],
)
def test_no_foreign_lock_from(readings):
    assert watched(readings).found_mhz is None


@given(st.integers(345, 1766), st.lists(st.sampled_from([-15, 0, 0, 15]), min_size=9, max_size=40))
def test_a_flat_low_clock_is_found_and_a_free_one_clears_it(mhz, noise):
    low = [free(t, mhz + each) for t, each in enumerate(noise)]
    assert watched(low).found_mhz is not None
    high = [free(len(noise) + t, 1980) for t in range(4)]
    assert watched([*low, *high]) == ForeignWatch()


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.5, 1.0, 3.0, 20.0]),
            st.sampled_from([None, 345, 1200, 1215, 1500, 1980]),
            st.sampled_from([0, 50, 100]),
            st.sampled_from([None, False, True]),
        ),
        max_size=40,
    )
)
def test_a_lock_waits_for_a_suspicion_no_longer_than_it_takes_to_confirm(history):
    watch, now, waits_since = ForeignWatch(), 0.0, None
    for elapsed, mhz, busy, limited in history:
        now += elapsed
        watch = watch_free(watch, FreeReading(now, mhz, busy, limited, 1980, 15))
        waits = watch.suspected_until_seconds(now) > now
        if not waits or waits_since is None or elapsed > 5:  # a gap in the readings begins anew
            waits_since = now
        assert now - waits_since <= CONFIRM_SECONDS + 1.0


# --- what real GPUs do by themselves ----------------------------------------------------------------------------------

PRODUCTS = ("h100", "h200")


@pytest.fixture(scope="module")
def recorded():
    return {product: load(product) for product in PRODUCTS}


@pytest.fixture
def foreign_clocks(make_node, make_order):
    """Returns a function that plays rows to an observing agent and returns the foreign clocks that it suspected."""

    def play(rows, offset_seconds=0.0):
        node = make_node(gpus=1)
        node.driver = ReplayDriver(rows, node.now_seconds + 5 + offset_seconds)
        node.pods = {UUID: (PodName("llm", "decode-0"),)}
        node.start()
        node.order(make_order(metricsURL=None, mode="Observe"))
        found = set()
        for _ in range(int(rows[-1].t - rows[0].t) + 5):
            node.run(1)
            found.add(node.agent._foreign.found_mhz(UUID))
        return found

    return play


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("offset", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_no_recording_of_a_real_gpu_looks_like_a_foreign_lock(foreign_clocks, recorded, product, offset):
    assert foreign_clocks(recorded[product], offset) == {None}


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_phase_of_a_real_gpu_looks_like_one_however_long_it_lasts(foreign_clocks, recorded, product):
    for phase in phases(recorded[product]):
        for offset in (0.0, 0.5):
            assert foreign_clocks(prolonged(phase, 40), offset) == {None}, phase.mark


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_same_phases_under_a_lock_do(foreign_clocks, recorded, product):
    """Otherwise the two tests above would prove little: each loaded phase, as it would be at 1200 MHz."""
    checked = 0
    for phase in phases(recorded[product]):
        rows = prolonged(phase, 40)
        if any(row.gpu_util < BUSY_PERCENT for row in rows):
            continue  # decode without CUDA graphs leaves gaps
        held = [replace(row, sm_mhz=min(row.sm_mhz, 1200), clock_event_reasons=0, capped_ns=0) for row in rows]
        assert foreign_clocks(held) == {None, 1200}, phase.mark
        checked += 1
    assert checked >= 5
