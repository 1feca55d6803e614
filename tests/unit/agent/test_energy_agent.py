"""Energy and power through the whole agent when driver, GPU or machine misbehave."""

import time
from dataclasses import replace

import pytest
from wattlock_agent.gpu.base import GpuFault, LimiterNanoseconds
from wattlock_agent.gpu.nvml import NvmlDriver
from wattlock_agent.report import build_status
from wattlock_agent.serving.scrape import Scraper
from wattlock_api import boottime
from wattlock_operator.poolstatus import power_cap
from wattlock_operator.reports import NodeGpu


def status_of(node):
    return build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False)


def gpu_of(node):
    return status_of(node).gpus[0]


class WithoutCounters:
    """A driver whose GPU lacks the energy counter, as GPUs before Volta and vGPU guests do."""

    def __init__(self, driver, **absent):
        self._driver = driver
        self._absent = absent

    def __getattr__(self, name):
        return getattr(self._driver, name)

    def read(self, uuid):
        return replace(self._driver.read(uuid), **self._absent)


@pytest.fixture
def ordered(make_node, make_order):
    """A node with one GPU under an order, at 500 W, after half a minute."""

    def build(**absent):
        node = make_node(gpus=1)
        if absent:
            node.driver = WithoutCounters(node.driver, **absent)
            node.start()
        node.order(make_order())
        node.run(30)
        return node

    return build


def test_a_gpu_without_energy_counter_says_so_and_nothing_is_made_of_its_power(ordered):
    node = ordered(energy_mj=None)
    status = status_of(node)
    gpu, instance = status.gpus[0], status.instances[0]
    assert (gpu.energy_joules, gpu.power_watts, gpu.energy_reason) == (None, None, "NoEnergyCounter")
    assert (gpu.state.value, gpu.peak_watts) == ("Locked", 500), "it is locked and its peaks are readings"
    assert instance.energy_joules is None
    assert instance.joules_per_generated_token is None
    assert instance.tokens_per_second is not None
    assert "energyJoules" not in status.to_api()["gpus"][0]


def test_a_gpu_with_counter_gives_no_reason(ordered):
    gpu = gpu_of(ordered())
    assert (gpu.energy_reason, gpu.energy_gaps, gpu.power_watts) == ("", 0, 500)


def test_a_gpu_without_limiter_counters_has_no_verdict_on_its_power_cap(ordered):
    node = ordered(limiters=LimiterNanoseconds())
    node.run(120)
    gpu = gpu_of(node)
    assert gpu.recent_power_cap_seconds is None
    assert power_cap([NodeGpu("node", gpu, silent=False)]).verdict.value == "Unknown"


def test_a_lost_gpu_that_comes_back_brings_no_energy_of_the_time_between(ordered):
    """The reset restarted its counter, which had counted so little that it has passed its old value."""
    node = ordered()
    before = float(gpu_of(node).energy_joules)
    node.driver.faults["GPU-0"] = GpuFault.GPU_LOST
    node.run(20)
    node.driver.faults.clear()
    node.run(1)
    assert float(gpu_of(node).energy_joules) == pytest.approx(before, abs=0.1)
    assert gpu_of(node).energy_gaps == 1
    assert gpu_of(node).power_watts is None
    node.run(10)
    assert float(gpu_of(node).energy_joules) == pytest.approx(before + 5000, abs=0.1)
    assert gpu_of(node).power_watts == 500


def test_a_driver_that_was_opened_anew_brings_no_energy_of_the_time_between(ordered):
    node = ordered()
    before = float(gpu_of(node).energy_joules)
    node.driver.faults["GPU-0"] = GpuFault.NO_DRIVER
    node.run(2)
    node.driver.faults.clear()
    node.run(10)
    gpu = gpu_of(node)
    assert gpu.energy_gaps == 1
    assert before < float(gpu.energy_joules) < before + 12 * 500


def test_a_gpu_that_failed_to_answer_lost_no_energy(ordered):
    node = ordered()
    before = float(gpu_of(node).energy_joules)
    node.driver.faults["GPU-0"] = GpuFault.TRANSIENT
    node.run(2)
    node.driver.faults.clear()
    node.run(8)
    assert float(gpu_of(node).energy_joules) == pytest.approx(before + 10 * 500, abs=0.1)
    assert gpu_of(node).energy_gaps == 0


def test_a_machine_that_slept_an_hour_shows_energy_and_no_power_of_it(ordered):
    node = ordered()
    before = gpu_of(node)
    node.driver.advance(node.now_seconds)
    node.driver.watts = 20.0
    node.now_seconds += 3600
    node.driver.advance(node.now_seconds)
    node.driver.watts = 500.0
    powers = set()
    for _ in range(12):
        node.run(1)
        powers.add(gpu_of(node).power_watts)
    # 20 W for an hour and 500 W since have no mean that says anything of the last 20 s.
    assert powers == {None, 500}
    gpu = gpu_of(node)
    slept_joules = float(gpu.energy_joules) - float(before.energy_joules)
    assert 3600 * 20 <= slept_joules <= 3600 * 20 + 12 * 500
    assert float(gpu.busy_seconds) - float(before.busy_seconds) <= 12


def test_a_kubelet_that_is_silent_for_a_while_takes_no_energy_from_the_pod(ordered):
    """Energy of the time in which nobody knows the holder is not the pod's, and what it had used before stays."""
    node = ordered()
    node.start(status_of(node).to_api())  # so that there is an older report to fall back to, wrongly
    node.run(60)
    before = float(gpu_of(node).energy_joules)
    node.kubelet_up = False
    node.run(60)
    assert gpu_of(node).holder is None
    node.kubelet_up = True
    node.run(10)
    gpu = gpu_of(node)
    assert gpu.holder.name == "decode-0"
    assert before + 25 * 500 < float(gpu.energy_joules) < before + 45 * 500
    assert gpu.energy_gaps == 2, "the restart of the agent, and the silence"


def test_energy_goes_on_where_an_earlier_agent_stopped_and_keeps_its_reason_for_absence(ordered):
    node = ordered()
    before = status_of(node)
    node.start(before.to_api())
    node.run(10)
    gpu = gpu_of(node)
    assert float(gpu.energy_joules) > float(before.gpus[0].energy_joules) + 3000
    assert float(gpu.recent_busy_seconds) > float(before.gpus[0].recent_busy_seconds)
    assert gpu.energy_gaps == before.gpus[0].energy_gaps + 1, "what was used since the last report is not known"
    node = ordered(energy_mj=None)
    node.start(status_of(node).to_api())
    node.run(10)
    assert gpu_of(node).energy_joules is None


def test_durations_are_by_one_clock_that_goes_on_in_suspend():
    assert boottime.now_seconds() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=1)
    assert NvmlDriver()._now_seconds is boottime.now_seconds
    assert Scraper()._now_seconds is boottime.now_seconds
