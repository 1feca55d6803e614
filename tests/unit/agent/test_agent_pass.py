"""The agent in virtual time, with GPUs, journal, kubelet and API server as fakes."""

import itertools

import pytest
from wattlock_agent.driver_session import DriverMismatchError
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.holders.base import PodName
from wattlock_agent.journal import LockRecord
from wattlock_agent.report import build_status
from wattlock_api.constants import Mode


def record(uuid, boot="boot-1", pod_uid="uid-decode-0"):
    return LockRecord(uuid, 1590, "policy-1", pod_uid, boot, "2026-01-01T00:00:00Z")


def test_locks_within_a_pass_of_the_order_and_releases_with_it(make_node, make_order):
    node = make_node().run(3)
    node.order(make_order())
    node.run(1)
    assert node.driver.locks == {"GPU-0": (345, 1590)}
    assert node.reasons() == {"GPU-0": "Locked", "GPU-1": "NoOrder"}
    node.order(generation=2)
    node.run(1)
    assert node.locked() == set()
    assert node.journal.disk == {}


def test_releases_when_the_pod_has_gone_from_the_node(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(3)
    assert node.locked() == {"GPU-0"}
    del node.pods["GPU-0"]
    node.run(6)
    assert node.locked() == set()
    assert [refusal.reason for refusal in node.agent.outlook.pods_without_gpu.values()] == ["PodNotOnNode"]


def test_asks_the_kubelet_before_it_locks(make_node, make_order):
    node = make_node().run(4)
    node.pods["GPU-0"] = (PodName("llm", "prefill-0"),)  # a moment ago, not yet noticed
    node.order(make_order())
    node.run(10)
    assert node.driver.log == []


@pytest.mark.parametrize("outage", ["kubelet", "api", "operator"])
def test_outages_end_in_release(make_node, make_order, outage):
    node = make_node()
    node.order(make_order())
    node.run(5)
    assert node.locked() == {"GPU-0"}
    setattr(node, f"{outage}_up", False)
    patience = 25 if outage == "kubelet" else 590
    node.run(patience)
    assert node.locked() == {"GPU-0"}
    node.run(20)
    assert node.locked() == set()
    assert node.reasons()["GPU-0"] == ("KubeletUnreachable" if outage == "kubelet" else "StaleOrders")
    setattr(node, f"{outage}_up", True)
    node.run(6)
    assert node.locked() == {"GPU-0"}


def test_a_lease_that_nobody_renews_is_never_trusted(make_node, make_order):
    node = make_node(operator_up=False)
    node._first_lease = False
    node.order(make_order())
    node.run(60)
    assert node.driver.log == []
    assert node.reasons()["GPU-0"] == "StaleOrders"


def test_start_resets_what_has_no_order_and_keeps_what_has(make_node, make_order):
    node = make_node()
    node.driver.locks = {"GPU-0": (345, 1590), "GPU-1": (345, 1590)}
    node.journal.disk = {"GPU-0": record("GPU-0"), "GPU-1": record("GPU-1")}
    node.order(make_order())
    node.run(3)
    assert node.locked() == {"GPU-0"}
    assert set(node.journal.disk) == {"GPU-0"}
    assert ("reset", "GPU-0") not in node.driver.log


def test_start_without_api_server_resets_after_half_a_minute(make_node):
    node = make_node(api_up=False)
    node.driver.locks = {"GPU-0": (345, 1590)}
    node.journal.disk = {"GPU-0": record("GPU-0")}
    node.run(25)
    assert node.locked() == {"GPU-0"}
    node.run(10)
    assert node.locked() == set()


def test_records_of_another_boot_are_dropped_without_a_reset(make_node):
    node = make_node()
    node.journal.disk = {"GPU-0": record("GPU-0", boot="boot-0")}
    node.start()
    node.run(40)
    assert node.driver.log == []
    assert node.journal.disk == {}


def test_a_foreign_lock_is_never_reset(make_node, make_order):
    node = make_node()
    node.driver.locks = {"GPU-1": (1200, 1200)}
    node.order(make_order())
    node.run(20)
    node.agent.stopping = True
    node.run(1)
    assert node.driver.locks == {"GPU-1": (1200, 1200)}


def test_every_kill_leaves_a_record_for_every_lock(make_node, make_order, make_effects, killed, switchback):
    """Kill the agent before its n-th effect, for every n: whatever is locked then is recorded."""

    def life(kill_at):
        effects = make_effects(kill_at)
        node = make_node(effects=effects)
        try:
            node.order(make_order(experiment=switchback), make_order("decode-1"))
            node.run(45)
            node.order(make_order(capMHz=1200), generation=2)
            node.run(10)
            node.order(generation=3)
            node.run(3)
        except killed:
            pass
        return node, effects

    _, effects = life(None)
    assert effects.count > 10
    for kill_at in range(effects.count):
        node, effects = life(kill_at)
        assert node.locked() <= set(node.journal.disk), f"killed before effect {kill_at}"
        effects.kill_at = None  # the next agent on the node, without any order
        node.order(generation=4)
        node.start()
        node.run(3)
        assert node.locked() == set()
        assert node.journal.disk == {}


def test_a_new_lock_on_a_gpu_comes_at_most_every_five_seconds_and_releases_at_once(make_node, make_order):
    node = make_node(gpus=1)
    node.run(3)
    times = []
    for number in range(1, 12):
        node.order(make_order(capMHz=1200 + 15 * number), generation=number)
        before = len(node.driver.log)
        node.run(1)
        times += [node.now_seconds] * (len(node.driver.log) - before)
    assert len(times) >= 2
    assert all(later - earlier >= 5 for earlier, later in itertools.pairwise(times))
    node.order(generation=99)
    node.run(1)
    assert node.locked() == set()


def test_observe_mode_of_the_process_writes_nothing_whatever_it_is_told(make_node, make_order):
    node = make_node(mode=Mode.OBSERVE)
    node.journal.disk = {"GPU-1": record("GPU-1")}
    node.order(make_order())
    node.run(40)
    assert node.driver.log == []
    assert node.reasons() == {"GPU-0": "ObserveMode", "GPU-1": "NoPermission"}


def test_a_journal_that_cannot_be_written_locks_nothing(make_node, make_order):
    node = make_node()
    node.journal.broken = True
    node.order(make_order())
    node.run(10)
    assert node.driver.log == []
    assert node.reasons()["GPU-0"] == "JournalUnwritable"
    node.journal.broken = False
    node.run(31)
    assert node.locked() == {"GPU-0"}


def test_one_gpu_that_refuses_keeps_its_instance_released(make_node, make_order):
    node = make_node()
    node.pods["GPU-1"] = (PodName("llm", "decode-0"),)
    node.order(make_order())
    node.driver.gpus[1] = node.driver.gpus[1].__class__(**{**vars(node.driver.gpus[1]), "mig_enabled": True})
    node.run(10)
    assert node.driver.log == []
    assert node.reasons() == {"GPU-0": "MIGEnabled", "GPU-1": "MIGEnabled"}


@pytest.mark.parametrize(
    ("fault", "reason"), [(GpuFault.NO_PERMISSION, "NoPermission"), (GpuFault.INVALID_ARGUMENT, "NVMLError")]
)
def test_a_refused_lock_is_not_tried_again_until_the_order_changes(make_node, make_order, fault, reason):
    node = make_node()
    node.driver.faults["lock"] = fault
    node.order(make_order())
    node.run(30)
    errors = sum(node.agent._gpus.errors.values())
    assert errors == 1
    assert node.reasons()["GPU-0"] == reason
    assert node.journal.disk == {}
    del node.driver.faults["lock"]
    node.run(10)
    assert node.locked() == set()
    node.order(make_order(capMHz=1500), generation=2)
    node.run(10)
    assert node.driver.locks == {"GPU-0": (345, 1500)}


def test_what_was_settled_of_a_node_energy_is_not_of_the_one_that_is_made_anew(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(), generation=7)
    node.run(2)
    assert node.agent.outlook.settled_generation == 7
    node.order(make_order(capMHz=1200), generation=1)
    node.run(1)
    assert node.reasons() == {"GPU-0": "WaitingToWrite"}
    assert node.agent.outlook.settled_generation < 1
    node.run(10)
    assert node.agent.outlook.settled_generation == 1


def test_another_clock_that_is_refused_leaves_the_record_of_the_lock_before_and_it_is_undone(make_node, make_order):
    node = make_node()
    node.order(make_order(capMHz=1590))
    node.run(3)
    node.driver.faults |= {"lock": GpuFault.INVALID_ARGUMENT, "reset": GpuFault.TRANSIENT}
    node.order(make_order(capMHz=1500), generation=2)
    node.run(10)
    assert node.driver.locks == {"GPU-0": (345, 1590)}, "the driver did nothing"
    assert set(node.journal.disk) == {"GPU-0"}
    del node.driver.faults["reset"]
    node.run(5)
    assert node.locked() == set()
    assert node.journal.disk == {}


@pytest.mark.parametrize(("fault", "reason"), [(GpuFault.TRANSIENT, "NVMLError"), (GpuFault.GPU_LOST, "GPULost")])
def test_a_lock_of_unknown_outcome_keeps_its_record_and_is_undone(make_node, make_order, fault, reason):
    node = make_node()
    node.driver.faults["lock"] = fault
    node.order(make_order())
    node.run(3)
    assert set(node.journal.disk) == {"GPU-0"}
    node.run(20)
    assert node.reasons()["GPU-0"] == reason
    assert ("reset", "GPU-0") in node.driver.log
    assert node.journal.disk == {}


def test_a_failing_reset_is_tried_until_it_succeeds(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(3)
    node.driver.faults["reset"] = GpuFault.TRANSIENT
    node.order(generation=2)
    node.run(10)
    assert node.agent.outlook.settled_generation == 1
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
    assert status.locked == 1
    assert "reset failed" in status.gpus[0].message
    del node.driver.faults["reset"]
    node.run(3)
    assert node.locked() == set()
    assert node.agent.outlook.settled_generation == 2


def test_a_lost_gpu_is_left_alone_and_its_instance_released(make_node, make_order):
    node = make_node()
    node.pods["GPU-1"] = (PodName("llm", "decode-0"),)
    node.order(make_order())
    node.run(3)
    assert node.locked() == {"GPU-0", "GPU-1"}
    node.driver.faults["GPU-1"] = GpuFault.GPU_LOST
    log = len(node.driver.log)
    node.run(10)
    assert node.driver.log[log:] == [("reset", "GPU-0")]
    assert node.reasons()["GPU-1"] == "GPULost"
    assert set(node.journal.disk) == {"GPU-1"}
    del node.driver.faults["GPU-1"]
    node.run(10)
    assert node.locked() == {"GPU-0", "GPU-1"}


def test_a_lost_gpu_that_is_back_is_found_within_seconds(make_node, make_order):
    """A list shows it no more while it is away (as NVML's does), so only the next list can show it again."""
    node = make_node()
    node.pods["GPU-1"] = (PodName("llm", "decode-0"),)
    node.order(make_order())
    node.run(3)
    all_of_them = node.driver.gpus
    node.driver.gpus = [gpu for gpu in all_of_them if gpu.uuid != "GPU-1"]
    node.driver.faults["GPU-1"] = GpuFault.GPU_LOST
    node.run(70)
    node.driver.gpus = all_of_them
    del node.driver.faults["GPU-1"]
    node.run(20)
    assert node.reasons()["GPU-1"] == "Locked"


def test_a_session_in_which_every_gpu_is_lost_is_opened_anew_at_once(make_node, make_order, monkeypatch):
    """As after a reload of the driver: whoever had it open hears GPU_IS_LOST until he opens it anew."""
    node = make_node()
    node.order(make_order())
    node.run(3)
    opened = node.driver.open

    def open_anew():
        node.driver.faults.clear()
        return opened()

    monkeypatch.setattr(node.driver, "open", open_anew)
    for _ in range(2):
        node.driver.locks.clear()
        node.driver.faults |= {gpu.uuid: GpuFault.GPU_LOST for gpu in node.driver.gpus}
        node.run(8)
        assert node.locked() == {"GPU-0"}


def test_gpus_that_stay_lost_are_asked_for_ever_more_seldom(make_node, make_order, monkeypatch):
    node = make_node()
    node.order(make_order())
    node.run(3)
    times, opened = [], node.driver.open
    monkeypatch.setattr(node.driver, "open", lambda: times.append(node.now_seconds) or opened())
    node.driver.faults |= {gpu.uuid: GpuFault.GPU_LOST for gpu in node.driver.gpus}
    node.run(600)
    assert 8 <= len(times) <= 16
    assert 59 <= times[-1] - times[-2] <= 62
    assert node.reasons()["GPU-0"] == "GPULost"


def test_a_single_failed_reading_changes_nothing(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(3)
    node.driver.faults["GPU-0"] = GpuFault.TRANSIENT
    node.run(2)
    del node.driver.faults["GPU-0"]
    node.run(5)
    assert node.driver.log == [("lock", "GPU-0")]


def test_without_a_driver_it_waits_and_says_so(make_node, make_order):
    node = make_node()
    node.driver.faults["open"] = GpuFault.NO_DRIVER
    node.order(make_order())
    node.run(10)
    status = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)
    assert status.agent.reason == "NVMLNotFound"
    assert status.observed_generation == 1
    del node.driver.faults["open"]
    node.run(10)
    assert node.locked() == {"GPU-0"}


def test_a_driver_of_another_version_ends_the_process(make_node):
    node = make_node()
    node.driver.faults["open"] = GpuFault.DRIVER_MISMATCH
    with pytest.raises(DriverMismatchError):
        node.run(1)


def test_a_driver_reload_is_noticed_and_locked_again(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(20)
    node.driver.locks.clear()
    node.driver.energy_mj = 0.0
    node.run(3)
    assert node.locked() == {"GPU-0"}
    assert node.reasons()["GPU-0"] == "Locked"


def test_locks_are_written_again_after_the_driver_was_opened_anew(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(10)
    node.driver.faults["GPU-1"] = GpuFault.TRANSIENT
    node.driver.utilization_percent = 0  # nothing is to be seen of the lost lock
    node.run(3)
    node.driver.locks.clear()
    del node.driver.faults["GPU-1"]
    node.run(8)
    assert node.locked() == {"GPU-0"}


def test_another_writer_wins_after_three_losses_and_its_lock_stays(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    node.run(5)
    for _ in range(120):
        node.driver.locks["GPU-0"] = (345, 1980)
        node.run(1)
    assert node.reasons()["GPU-0"] == "OtherWriter"
    assert node.driver.log == [("lock", "GPU-0")] * 3
    assert node.journal.disk == {}
    node.driver.locks["GPU-0"] = (345, 1980)
    node.order(generation=2)
    node.run(5)
    assert node.driver.locks == {"GPU-0": (345, 1980)}


def test_a_gpu_without_load_is_no_sign_of_a_lost_lock(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    node.run(5)
    node.driver.locks.clear()
    node.driver.utilization_percent = 0
    node.run(60)
    assert node.driver.log == [("lock", "GPU-0")]
