"""Conditions stand still while a tuner goes from arm to arm, and no Event tells of each arm but TuningArm."""

import pytest
from operator_worlds import policy
from tuning_site import LOOK_SECONDS, Site
from wattlock_api.constants import ConditionType, Reason
from wattlock_api.policystatus import PoolReason, PoolStatus, Savings
from wattlock_api.tuningstatus import TuningStatus
from wattlock_operator.conditions import Facts, Finding, find_conditions
from wattlock_operator.decide import decide


def pool(phase: str | None, name: str = "decode", /, **gpus: int) -> PoolStatus:
    """A pool with so many GPUs in each state."""
    reasons = [PoolReason(reason=reason, gpus=count, message=f"because of {reason}") for reason, count in gpus.items()]
    verdict = Savings(method="Switchback", verdict="Inconclusive", reason="TooFewPairs", message="3 of 6")
    return PoolStatus(
        name=name,
        role="Decode",
        gpus=sum(gpus.values()),
        capped=gpus.get("Locked", 0) + gpus.get("ControlEpoch", 0),
        reasons=reasons,
        savings=verdict,
        tuning=TuningStatus(phase=phase, cap_mhz=1260) if phase else None,
    )


def found(kind: str, *pools: PoolStatus, mode: str = "Enforce", lagging: tuple[str, ...] = ()) -> Finding:
    clock = {"role": "Decode", "clock": {"maxSMClockMHz": 1590}}
    spec = [clock | {"name": each.name, "selector": {"matchLabels": {"pool": each.name}}} for each in pools]
    told = policy(spec={"mode": mode, "pools": spec, "requirePrefillPeer": False})
    facts = Facts(told, pools, lagging_nodes=lagging)
    (finding,) = [each for each in find_conditions(facts) if each.type == kind]
    return finding


ON_THE_WAY = (
    {"Locked": 4},
    {"Locked": 2, "ControlEpoch": 2},
    {"Locked": 1, "WaitingToWrite": 3},
    {"Tuning": 4},
    {"Guardrail": 2, "Tuning": 2},
    {"Guardrail": 1, "Locked": 3},
    {"Idle": 1, "Locked": 3},
)


@pytest.mark.parametrize("gpus", ON_THE_WAY)
def test_enforced_says_one_thing_whichever_arm(gpus):
    assert found("Enforced", pool("Searching", **gpus)) == found("Enforced", pool("Searching", Locked=4))
    finding = found("Enforced", pool("Searching", **gpus))
    assert (finding.status, finding.reason) == (True, "Tuning")
    assert "pool decode" in finding.message


@pytest.mark.parametrize("reason", ["OtherWriter", "NoPermission", "NoPrefillPeer", "ComputesPrompts"])
def test_what_keeps_gpus_from_the_search_is_told(reason):
    finding = found("Enforced", pool("Searching", **{"Locked": 3, "Tuning": 0, reason: 1}))
    assert (finding.status, finding.reason) == (False, reason)


def test_a_silent_agent_is_not_enforced():
    # Its GPUs count, and nobody says what they are.
    half = pool("Searching", Locked=2).model_copy(update={"gpus": 4})
    assert found("Enforced", half).status is False


@pytest.mark.parametrize(("phase", "reason"), [("Starting", "Tuning"), ("Released", "NoClockPays")])
def test_a_released_pool_is_not_enforced(phase, reason):
    finding = found("Enforced", pool(phase, **{reason: 4}))
    assert (finding.status, finding.reason) == (False, reason)


def test_without_a_search_a_pool_must_be_capped():
    assert found("Enforced", pool("Settled", Locked=4)).reason == "Capped"
    assert found("Enforced", pool("Settled", Locked=3, Guardrail=1)).reason == "Guardrail"
    assert found("Enforced", pool(None, Locked=3, WaitingToWrite=1)).reason == "WaitingToWrite"
    two = (pool("Searching", Tuning=2), pool(None, "other", Locked=1, Guardrail=1))
    assert found("Enforced", *two).reason == "Guardrail"


@pytest.mark.parametrize("phase", ["Starting", "Searching"])
def test_verified_waits_for_the_choice(phase):
    finding = found("Verified", pool(phase, Locked=4))
    assert (finding.status, finding.reason) == (None, "Tuning")
    assert found("Verified", pool("Settled", Locked=4)).reason == Reason.TOO_FEW_PAIRS


def test_a_search_is_progress_also_while_agents_take_up_an_arm():
    assert found("Progressing", pool("Searching", Locked=4), lagging=("n1",)).reason == "Tuning"
    assert found("Progressing", pool("Settled", Locked=4), lagging=("n1",)).reason == "WaitingForAgents"


def test_a_tuner_that_rests_is_no_search():
    for kind in ("Progressing", "Verified"):
        assert found(kind, pool("Searching", ObserveMode=4), mode="Observe").reason != "Tuning"


def told_conditions(site: Site) -> dict[str, tuple[str, str, str]]:
    return {each.type: (each.status, each.reason, each.message) for each in site.status.conditions}


def test_a_search_is_progress():
    site = Site()
    site.look()
    site.look(10)  # the agents have acted on the first orders, and no cap is tried yet

    def progressing():
        found = next(each for each in site.status.conditions if each.type == ConditionType.PROGRESSING)
        return found.status, found.reason

    assert progressing() == ("True", "Tuning")
    site.search()
    site.look()
    site.look()
    assert progressing() == ("False", "UpToDate")


def test_conditions_stand_still_from_the_first_arm_to_the_choice():
    site, seen = Site(), []
    for number in range(1, 400):
        # Between the looks of the search ones that see the agents at work: each change of arm is caught in the middle.
        site.look(5.0 if number % 2 else LOOK_SECONDS)
        if site.tuning.phase == "Searching":
            seen.append(told_conditions(site))
        elif seen:
            break
    assert len({cap for cap in site.caps if cap is not None}) >= 4
    steady = ("Ready", "Enforced", "Progressing", "Verified", "GuardrailTripped")
    for kind in steady:
        assert {each[kind] for each in seen[1:]} == {seen[-1][kind]}, kind
    assert [seen[-1][kind][:2] for kind in steady] == [
        ("True", "InForce"),
        ("True", "Tuning"),
        ("True", "Tuning"),
        ("Unknown", "Tuning"),
        ("False", "WithinLimits"),
    ]
    reasons = [reason for reason, _ in site.events]
    assert {reason: reasons.count(reason) for reason in set(reasons) - {"TuningArm"}} == dict.fromkeys(
        set(reasons) - {"TuningArm"}, 1
    )


def test_agents_that_do_not_act_on_an_arm_are_told_of_after_a_minute():
    site = Site()
    while len({cap for cap in site.caps if cap is not None}) < 2:
        before = site.written
        site.look()
    assert told_conditions(site)["Ready"][:2] == ("True", "InForce")
    site.written = before  # the new orders do not arrive

    def ready(seconds: float) -> tuple[str, str]:
        statuses = decide(site._world(), None, site.memory, site.now + seconds).statuses
        found = next(each for each in statuses["uid-qwen"].conditions if each.type == "Ready")
        return found.status, found.reason

    assert ready(50) == ("True", "InForce")
    assert ready(61) == ("False", "WaitingForAgents")
