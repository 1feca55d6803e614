"""The estimator against simulated truth, in small: `make bench-estimator` is the same with many more pools."""

from dataclasses import replace

import pytest
from estimator_agent_proof import compare_with_agent
from estimator_checks import coverage, coverage_at_every_look, watch
from estimator_churn import watch_churn
from estimator_scenarios import BEAT, BURSTS, BUSY, CHURN, COSTS, DIFFER, ONE, QUICK, SHARED, SICK, UNEVEN

HOURS = 4
POOLS = range(150)


@pytest.mark.parametrize(
    "scenario", [BEAT, BURSTS, ONE, SHARED, SICK, DIFFER, UNEVEN, COSTS], ids=lambda each: each.name
)
def test_the_interval_holds_the_truth(scenario):
    """150 pools: by chance alone an interval of 95 % is outside of these bounds in fewer than one of 500 runs."""
    (look,) = coverage(replace(scenario, hours=HOURS), POOLS, (float(HOURS),)).values()
    assert 89 <= look.percent <= 99.4


def test_who_looks_all_day_is_rarely_fooled_and_was_often_by_one_look():
    found = watch(replace(BUSY, effect="none", instances=2), range(80))
    assert found.verified <= 0.09 * found.pools
    assert found.one_look > 0.2 * found.pools, "else the scenario shows nothing"


def test_the_interval_for_every_look_holds_at_all_of_them():
    looks = tuple(float(hour) for hour in range(1, HOURS + 1))
    assert coverage_at_every_look(replace(BUSY, hours=HOURS), range(100), looks).percent > 95


def test_pods_that_come_and_go_fool_nobody():
    kept, _ = watch_churn(replace(CHURN, hours=6, instances=2), range(40), 3600.0)
    assert kept.verified <= 0.15 * kept.pools


@pytest.mark.parametrize(
    "scenario", [replace(BURSTS, hours=2), replace(QUICK, hours=1, instances=1)], ids=lambda s: s.name
)
def test_simulated_pairs_are_those_of_the_agent(scenario):
    assert compare_with_agent(scenario, 7) < 1e-8
