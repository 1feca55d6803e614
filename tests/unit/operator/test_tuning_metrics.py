"""What /metrics says of a tuner, and that its series go with the pool."""

import dataclasses

import pytest
from operator_worlds import policy
from wattlock_api.pairs import PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus
from wattlock_api.tuningstatus import TuningArm, TuningSearches, TuningStatus
from wattlock_operator.metrics import TUNING_STATES, Metrics

POOL = {"namespace": "llm", "policy": "qwen", "pool": "decode", "role": "Decode"}
SEARCHING = TuningStatus(
    phase="Searching",
    cap_mhz=1260,
    arm=2,
    arms=8,
    remaining_seconds=5400,
    begun=[TuningSearches(cause="First", searches=1), TuningSearches(cause="WorkChanged", searches=2)],
    guardrail_arms=1,
    tried=[
        TuningArm(cap_mhz=mhz, outcome="Open", sums=PairStats(cap_mhz=mhz, pairs=pairs), seen=PairStats(cap_mhz=mhz))
        for mhz, pairs in ((1575, 40), (1260, 14))
    ],
)


def page(tuning: TuningStatus | None, mode: str = "Enforce") -> dict[str, float]:
    """The series of tuners, by name and the label of their own."""
    metrics = Metrics()
    status = EnergyPolicyStatus(pools=[PoolStatus(name="decode", role="Decode", tuning=tuning)])
    metrics.show([(policy(spec={"mode": mode}), status)], leading=True)
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name.startswith("wattlock_pool_tuning_"):
                assert {name: sample.labels[name] for name in POOL} == POOL
                own = "".join(value for name, value in sample.labels.items() if name not in POOL)
                found[sample.name.removeprefix("wattlock_pool_tuning_") + (f" {own}" if own else "")] = sample.value
    return found


def states(found: dict[str, float]) -> list[str]:
    told = [name.removeprefix("state ") for name in found if name.startswith("state ")]
    assert told == list(TUNING_STATES)
    return [name for name in told if found[f"state {name}"] == 1]


def test_a_search_is_shown_in_base_units():
    found = page(SEARCHING)
    assert states(found) == ["Searching"]
    assert {name: value for name, value in found.items() if not name.startswith("state ")} == {
        "arm": 2,
        "most_arms": 8,
        "cap_hertz": 1.26e9,
        "pairs": 54,
        "remaining_seconds": 5400,
        "searches_total First": 1,
        "searches_total WorkChanged": 2,
        "searches_total CostsEnergy": 0,
        "searches_total BrokeBound": 0,
        "guardrail_arms_total": 1,
    }


@pytest.mark.parametrize(
    ("change", "mode", "state"),
    [
        ({}, "Enforce", "Searching"),
        ({"confirming": True}, "Enforce", "Confirming"),
        ({"cap_mhz": None}, "Enforce", "CoolingDown"),
        ({"phase": "Starting"}, "Enforce", "Starting"),
        ({"phase": "Settled"}, "Enforce", "Settled"),
        ({"phase": "Released"}, "Enforce", "Released"),
        ({"confirming": True}, "Observe", "Resting"),
    ],
)
def test_it_is_in_one_state(change, mode, state):
    assert states(page(SEARCHING.model_copy(update=change), mode)) == [state]


def test_a_cap_that_is_not_in_force_is_not_shown():
    assert "cap_hertz" not in page(SEARCHING.model_copy(update={"phase": "Starting"}))
    resting = page(SEARCHING, "Observe")
    assert {"cap_hertz", "arm", "most_arms", "remaining_seconds"} & set(resting) == set()
    assert resting["searches_total First"] == 1


def test_what_is_not_known_has_no_series():
    assert "remaining_seconds" not in page(SEARCHING.model_copy(update={"remaining_seconds": None}))
    assert page(None) == {}


def test_series_go_with_the_pool():
    metrics = Metrics()
    status = EnergyPolicyStatus(pools=[PoolStatus(name="decode", role="Decode", tuning=SEARCHING)])
    metrics.show([(policy(), status)], leading=True)
    assert metrics.registry.get_sample_value("wattlock_pool_tuning_arm", POOL) == 2
    for gone in ([(policy(), EnergyPolicyStatus())], []):
        metrics.show(gone, leading=True)
        assert metrics.registry.get_sample_value("wattlock_pool_tuning_arm", POOL) is None
    unread = dataclasses.replace(policy(), spec=None, problem="no such field")
    metrics.show([(unread, status)], leading=True)
    assert metrics.registry.get_sample_value("wattlock_pool_tuning_state", {**POOL, "state": "Resting"}) == 1
