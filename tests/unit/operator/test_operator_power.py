"""The pool's verdict on the power cap, and GPUs whose energy nobody counts."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_operator.decide import Memory, decide
from wattlock_operator.poolstatus import power_cap
from wattlock_operator.reports import NodeGpu

PODS = (pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1"))


def entry(busy=None, capped=None, silent=False, **fields):
    status = gpu(recent_busy_seconds=busy, recent_power_cap_seconds=capped, **fields)
    return NodeGpu("n1", status, silent)


def decode_pool(gpus, instances=()):
    found = [dataclasses.replace(policy(), status=None)]
    orders = decide(world(found, PODS), None, Memory(), NOW).write_orders.get("n1", ())
    reported = node_energy(gpus=gpus, instances=instances, orders=orders)
    return decide(world(found, PODS, [reported]), None, Memory(), NOW).statuses["uid-qwen"].pools[0]


def test_eight_gpus_that_just_began_make_no_verdict_together():
    """What the load before left behind, 0.4 s for each of them, would be 5 % of a minute."""
    just_begun = [entry("8", "0.4") for _ in range(8)]
    assert power_cap(just_begun).verdict.value == "Unknown"
    assert power_cap([*just_begun, entry("600", "0")]).verdict.value == "Inert"
    assert power_cap([*just_begun, entry("600", "0")]).time_at_cap_percent == "0.0"


def test_gpus_without_the_counter_do_not_count_as_inert():
    assert power_cap([entry("600", None)]).verdict.value == "Unknown"
    assert power_cap([entry("600", None), entry("100", "50")]).time_at_cap_percent == "50.0"


def test_peaks_of_silent_gpus_are_of_the_past():
    found = power_cap([entry(silent=True, peak_watts=900), entry(peak_watts=500, power_limit_watts=700)])
    assert (found.peak_watts, found.limit_watts) == (500, 700)


@given(st.lists(st.tuples(st.floats(0, 963), st.floats(0, 1)), max_size=8))
def test_a_verdict_needs_a_busy_minute_and_its_share_lies_within_its_gpus(gpus):
    found = power_cap([entry(f"{busy:.1f}", f"{busy * share:.3f}") for busy, share in gpus])
    judged = [share for busy, share in gpus if float(f"{busy:.1f}") >= 60]
    assert (found.verdict.value == "Unknown") == (not judged)
    if judged:
        assert min(judged) * 100 - 0.2 <= float(found.time_at_cap_percent) <= max(judged) * 100 + 0.2


def test_energy_that_nobody_counts_is_absent_with_its_reason():
    """Half a pool's energy would look like all of it."""
    counted = gpu(0, power_watts=300, energy_joules="100")
    uncounted = gpu(1, "d1", energy_joules=None, energy_reason="NoEnergyCounter", message="at most 1590 MHz")
    serving = {"tokens_per_second": "100"}
    instances = [instance(energy_joules="3600000", **serving), instance("d1", energy_joules=None, **serving)]
    assert decode_pool([counted], instances[:1]).energy_kwh == "1.000000"
    pool = decode_pool([counted, uncounted], instances)
    assert (pool.energy_kwh, pool.power_watts) == (None, None)
    (reason,) = [each for each in pool.reasons if each.reason == "NoEnergyCounter"]
    assert reason.gpus == 1
    assert "GPU-1" in reason.message


def test_a_saving_on_gpus_that_do_not_count_energy_is_unknown():
    uncounted = gpu(0, energy_joules=None, energy_reason="NoEnergyCounter")
    pool = decode_pool([uncounted], [instance(energy_joules=None, tokens_per_second="100")])
    assert (pool.savings.verdict.value, pool.savings.reason) == ("Unknown", "NoEnergyCounter")


@pytest.mark.parametrize("capped", ["0", "9.0"])
def test_at_most_one_percent_is_inert(capped):
    assert power_cap([entry("900", capped)]).verdict.value == "Inert"
