"""Status, conditions, Events and metrics of a policy."""

import dataclasses

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_api.base import Condition, timestamp
from wattlock_api.nodeenergy import Moments, PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, Limiters, PoolStatus, Savings
from wattlock_operator.conditions import Facts, find_conditions
from wattlock_operator.decide import Memory, decide
from wattlock_operator.events import BURST, REFILL_SECONDS, REPEAT_SECONDS, Told, tell
from wattlock_operator.metrics import Metrics
from wattlock_operator.settings import SettingsError, from_environment
from wattlock_operator.status import summary

PODS = (pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1"))


def status_of(
    gpus=(), instances=(), policies=(), pods=PODS, before: EnergyPolicyStatus | None = None, age_seconds: float = 5
) -> EnergyPolicyStatus:
    """The status of policy qwen once its orders are written and acted on."""
    found = list(policies) or [policy()]
    found[0] = dataclasses.replace(found[0], status=before)
    orders = decide(world(found, pods), None, Memory(), NOW).write_orders.get("n1", ())
    entry = node_energy(gpus=gpus, instances=instances, orders=orders, age_seconds=age_seconds)
    return decide(world(found, pods, [entry]), None, Memory(), NOW).statuses["uid-qwen"]


def condition(status: EnergyPolicyStatus, kind: str) -> Condition:
    (found,) = [entry for entry in status.conditions if entry.type == kind]
    return found


def state(status: EnergyPolicyStatus, kind: str) -> tuple[str, str]:
    found = condition(status, kind)
    return found.status, found.reason


def test_numbers_that_nobody_measured_are_absent():
    (decode, _) = status_of().pools
    assert decode.pods == 1
    assert decode.gpus == 0
    for name in (
        "power_watts",
        "energy_kwh",
        "tokens_per_second",
        "joules_per_generated_token",
        "requested_mhz",
        "observed_mhz",
        "inter_token_latency_ms",
        "limiters",
        "clamped_gpus",
        "clamp_seconds",
        "roofline",
    ):
        assert getattr(decode, name) is None, name
    assert decode.power_cap.verdict.value == "Unknown"
    summary = status_of().summary.model_dump(exclude_none=True)
    assert summary == {"gpus": 0, "capped": "0/0", "locked": 0, "clock": "1590MHz", "saved": "Unknown"}


def test_a_counter_that_no_gpu_has_is_absent_not_zero():
    gpus = [gpu(0, limiters=Limiters(thermal_seconds="1")), gpu(1, limiters=Limiters(thermal_seconds="0.5"))]
    limiters = status_of(gpus).pools[0].limiters
    assert (limiters.thermal_seconds, limiters.power_cap_seconds) == ("1.5", None)


def test_a_pool_adds_up():
    gpus = [
        gpu(0, power_watts=300, observed_mhz=1590, peak_watts=400, power_limit_watts=700, busy_seconds="50",
            limiters=Limiters(thermal_seconds="1.5")),
        gpu(1, power_watts=320, observed_mhz=1575, peak_watts=500, power_limit_watts=650, busy_seconds="50",
            limiters=Limiters(thermal_seconds="2")),
    ]  # fmt: skip
    serving = instance(tokens_per_second="1000", inter_token_latency_ms="12.5", energy_joules="3600000")
    status = status_of(gpus, [serving])
    decode = status.pools[0]
    assert (decode.gpus, decode.locked, decode.power_watts, decode.observed_mhz) == (2, 2, 620, 1575)
    assert (decode.tokens_per_second, decode.joules_per_generated_token, decode.inter_token_latency_ms) == (
        "1000.0",
        "0.6200",
        "12.50",
    )
    assert (decode.energy_kwh, decode.limiters.thermal_seconds) == ("1.000000", "3.5")
    assert (decode.power_cap.limit_watts, decode.power_cap.peak_watts) == (650, 500)
    assert (status.summary.clock, status.summary.power, status.summary.observed) == ("1590MHz", "620W", "1575MHz")
    assert status.summary.joules_per_token == "0.620"
    assert state(status, "Ready") == ("True", "InForce")
    assert state(status, "Enforced") == ("True", "Capped")


def test_half_of_a_pools_power_is_not_published():
    # it would look like a saving while an agent restarts
    status = status_of([gpu(0, power_watts=300), gpu(1)])
    assert status.pools[0].power_watts is None
    assert status.summary.power is None


def test_energy_that_was_not_counted_yet_is_absent_not_zero():
    assert status_of([gpu()], [instance(energy_joules="0")]).pools[0].energy_kwh is None


def test_a_part_of_a_pools_tokens_is_not_published():
    one, dark = instance("d0", tokens_per_second="1000"), instance("d1", reason="MetricsUnreachable", message="m")
    assert status_of([gpu(0), gpu(1, "d1")], [one, dark]).pools[0].tokens_per_second is None
    other = instance("d1", tokens_per_second="0")
    assert status_of([gpu(0), gpu(1, "d1")], [one, other]).pools[0].tokens_per_second == "1000.0"


def test_a_prefill_pool_at_its_power_limit_is_no_news():
    prefill = gpu(2, pool="prefill", recent_busy_seconds="900", recent_power_cap_seconds="900")
    status = status_of([gpu(0, recent_busy_seconds="900", recent_power_cap_seconds="0"), prefill])
    assert [pool.power_cap.verdict.value for pool in status.pools] == ["Inert", "Binding"]
    assert state(status, "PowerCapBinding") == ("False", "Inert")


def test_what_is_wrong_with_serving_metrics_is_told_beside_the_gpus():
    broken = instance(reason="MetricsInvalid", message="the page is no text")
    (locked, metrics) = status_of([gpu(0)], [broken]).pools[0].reasons
    assert (locked.reason, locked.gpus) == ("Locked", 1)
    assert (metrics.reason, metrics.gpus, metrics.message) == ("MetricsInvalid", 0, "instance d0: the page is no text")


def test_another_writer_is_a_conflict():
    status = status_of([gpu(0, state="Conflict", reason="OtherWriter", message="the clock was changed three times")])
    assert state(status, "Conflict") == ("True", "OtherWriter")
    assert "changed three times" in condition(status, "Conflict").message


def test_a_silent_node_speaks_of_the_past_only():
    status = status_of([gpu(power_watts=300)], age_seconds=900)
    decode = status.pools[0]
    assert (decode.gpus, decode.locked, decode.power_watts) == (1, 0, None)
    assert state(status, "Ready") == ("False", "AgentSilent")


@pytest.mark.parametrize(
    ("busy", "capped", "expected"),
    [("59", "59", "Unknown"), ("60", "0", "Inert"), ("1000", "10", "Inert"), ("1000", "11", "Binding")],
)
def test_the_power_cap_is_judged_by_its_share_of_the_busy_time(busy, capped, expected):
    status = status_of([gpu(recent_busy_seconds=busy, recent_power_cap_seconds=capped)])
    assert status.pools[0].power_cap.verdict.value == expected
    wanted = {"Unknown": "Unknown", "Inert": "False", "Binding": "True"}[expected]
    assert condition(status, "PowerCapBinding").status == wanted


@pytest.mark.parametrize(
    ("pods", "reason", "advice"),
    [
        (PODS[:2], "NoAgent", "placement"),
        ([PODS[2]], "NoMatchingPods", "--show-labels"),
        ([PODS[0], PODS[2]], "NoMatchingPods", "--show-labels"),
        ([PODS[0], dataclasses.replace(PODS[1], ready=False), PODS[2]], "NoPrefillPeer", "requirePrefillPeer"),
        ([dataclasses.replace(PODS[0], wants_gpu=False), *PODS[1:]], "NoGPUs", "selector"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(pods, reason, advice):
    age_seconds = 900 if reason == "NoAgent" else 5
    ready = condition(status_of(pods=pods, age_seconds=age_seconds), "Ready")
    assert (ready.status, ready.reason) == ("False", reason)
    assert advice in ready.message


def test_agents_of_a_new_policy_are_given_time_to_start():
    young = policy(created=timestamp(NOW - 10))
    ready = condition(status_of(policies=[young], pods=PODS[:2], age_seconds=900), "Ready")
    assert (ready.status, ready.reason) == ("False", "WaitingForAgents")
    assert "no Wattlock agent runs on node n1" in ready.message


def test_a_tripped_guardrail_names_the_instance():
    tripped = instance(guardrail_tripped=True, guardrail_message="latency 60 ms, bound 50 ms.")
    found = condition(status_of([gpu(state="Released", reason="Guardrail")], [tripped]), "GuardrailTripped")
    assert found.status == "True"
    assert "d0" in found.message
    assert "60 ms" in found.message


def test_a_cool_down_is_told_without_a_cap_as_well_but_not_in_mode_observe():
    cooling = instance(guardrail_tripped=True, guardrail_withdrawn=True, guardrail_message="latency 60 ms.")
    held = (pod("d0", DECODE), agent_pod("n1"))  # no prefill peer, so no cap
    assert state(status_of([], [cooling], pods=held), "GuardrailTripped") == ("True", "Breached")
    observing = policy(spec={"mode": "Observe"})
    assert state(status_of([], [cooling], [observing]), "GuardrailTripped") == ("False", "WithinLimits")


def test_a_clamp_is_a_condition():
    found = condition(status_of([gpu(clamped=True, observed_mhz=1755, requested_mhz=1980)]), "ClockClamped")
    assert (found.status, found.reason) == ("True", "BelowRequest")
    assert "1755 MHz for 1980 MHz" in found.message


def test_a_time_moves_only_with_its_status():
    first = status_of([gpu()])
    old = [entry.model_copy(update={"last_transition_time": "2020-01-01T00:00:00Z"}) for entry in first.conditions]
    changed = [entry.model_copy(update={"status": "Unknown"}) if entry.type == "Conflict" else entry for entry in old]
    again = status_of([gpu()], before=first.model_copy(update={"conditions": changed}))
    assert condition(again, "Ready").last_transition_time == "2020-01-01T00:00:00Z"
    assert condition(again, "Conflict").last_transition_time == timestamp(NOW)


def test_conditions_hold_no_number_that_every_report_changes():
    """Numbers move every 20 seconds; what people wait for must not."""

    def conditions(watts: int, share: str, mean: float, pairs: int) -> list[Condition]:
        moments = Moments(total=f"{pairs * mean:.9f}", squares=f"{pairs * (mean**2 + 1e-5):.9f}")
        serving = instance(
            tokens_per_second=f"{watts * 3}",
            inter_token_latency_ms=f"{watts / 50}",
            energy_joules=f"{watts * 1000}",
            pair_stats=[PairStats(cap_mhz=1590, pairs=pairs, energy=moments)],
        )
        numbers = {"power_watts": watts, "observed_mhz": 1590, "peak_watts": watts + 90, "energy_joules": f"{watts}"}
        binding = {"recent_busy_seconds": "900", "recent_power_cap_seconds": share}
        return status_of([gpu(**numbers, **binding)], [serving]).conditions

    assert conditions(500, "90", -0.15, 60) == conditions(520, "111", -0.16, 61)
    assert conditions(500, "0", 0.15, 60) == conditions(520, "1", 0.16, 61)
    assert conditions(500, "0", 0.0, 3) == conditions(520, "1", 0.1, 4)


def test_a_cap_that_costs_energy_is_said_by_the_condition():
    moments = Moments(total="6.0", squares="0.601")
    serving = instance(tokens_per_second="100", pair_stats=[PairStats(cap_mhz=1590, pairs=60, energy=moments)])
    found = condition(status_of([gpu()], [serving]), "Verified")
    assert (found.status, found.reason) == ("True", "CapCostsEnergy")
    assert "raise or remove" in found.message


def test_a_cap_that_costs_energy_is_said_wherever_it_stands():
    def pool(name: str, reason: str) -> PoolStatus:
        savings = Savings(method="Switchback", verdict="Verified", reason=reason, message="-5.1%")
        return PoolStatus(name=name, role="Decode", savings=savings)

    pools = [pool("good", "IntervalExcludesZero"), pool("bad", "CapCostsEnergy")]
    (found,) = [entry for entry in find_conditions(Facts(policy(), pools)) if entry.type == "Verified"]
    assert (found.status, found.reason) == (True, "CapCostsEnergy")
    assert "pool good" in found.message
    assert "pool bad: the cap is verified to cost energy" in found.message


@pytest.mark.parametrize(
    ("kwh", "shown"),
    [("0.000419", "0.0004"), ("1.234567", "1.23"), ("12.345", "12.3"), ("-1234.5", "-1234"), (None, None)],
)
def test_the_saving_of_all_pools_is_told_in_a_few_digits(kwh, shown):
    savings = Savings(method="Switchback", verdict="Verified", reason="r", message="m", saved_kwh=kwh)
    pools = [PoolStatus(name="a", role="Decode", savings=savings), PoolStatus(name="b", role="Prefill")]
    assert summary(policy(), pools, []).saved_kwh == shown


def test_control_epochs_do_not_move_what_people_look_at():
    capped = status_of([gpu(0), gpu(1)])
    turn = status_of([gpu(0), gpu(1, state="Released", reason="ControlEpoch")])
    assert capped.summary.capped == turn.summary.capped == "2/2"
    assert (capped.pools[0].locked, turn.pools[0].locked) == (2, 1)
    assert state(capped, "Enforced") == state(turn, "Enforced") == ("True", "Capped")
    refused = status_of([gpu(0), gpu(1, state="Released", reason="Guardrail", requested_mhz=None)])
    assert refused.summary.capped == "1/2"


def test_every_condition_says_which_generation_it_is_about():
    assert {entry.observed_generation for entry in status_of([gpu()]).conditions} == {policy().generation}


def test_observing_is_ready_and_caps_nothing():
    status = status_of([gpu(state="Observing", reason="ObserveMode")], policies=[policy(spec={"mode": "Observe"})])
    assert state(status, "Ready") == ("True", "Observing")
    assert state(status, "Enforced") == ("False", "ObserveMode")
    assert state(status, "Verified")[0] == "Unknown"


def events(before, after, told=None, now=NOW):
    made, memory = tell(policy(), before, after, told or Told(), now)
    return [(telling.reason, telling.warning) for telling in made], memory


def one(kind: str, status: str, reason: str) -> list[Condition]:
    return [Condition(type=kind, status=status, reason=reason, message="m", last_transition_time=timestamp(NOW))]


def test_events_tell_changes_once():
    good, bad = one("GuardrailTripped", "False", "WithinLimits"), one("GuardrailTripped", "True", "Breached")
    made, told = events(good, bad)
    assert made == [("Breached", True)]
    assert events(bad, bad, told)[0] == []
    made, told = events(bad, good, told, NOW + 1)
    assert made == [("WithinLimits", False)]
    assert events(good, bad, told, NOW + 2)[0] == [], "the same reason again within five minutes"
    assert events(good, bad, told, NOW + REPEAT_SECONDS)[0] == [("Breached", True)]


def test_a_flapping_policy_does_not_flood_the_events():
    told, shown = Told(), []
    for second in range(0, 3600, 2):  # a new reason every two seconds, an hour long
        before, after = (one("Ready", "False", f"Reason{second + step}") for step in (0, 1))
        made, told = events(before, after, told, NOW + second)
        shown += made
    assert BURST < len(shown) <= BURST + 3600 / REFILL_SECONDS
    assert len(told.reasons) <= len(shown)


def test_the_events_of_one_policy_leave_room_for_those_of_another():
    told = Told()
    for number in range(2 * BURST):
        _, told = tell(policy(), [], one("Ready", "False", f"Reason{number}"), told, NOW)
    assert len(tell(policy("other"), [], one("Ready", "False", "NoAgent"), told, NOW)[0]) == 1


def test_a_new_policy_tells_what_is_wrong_and_not_what_is_unknown():
    conditions = one("Ready", "False", "NoAgent") + one("Verified", "Unknown", "TooFewPairs")
    assert events([], conditions)[0] == [("NoAgent", True)]


def test_events_do_not_tell_the_steps_on_the_way():
    metrics, pairs = one("Verified", "Unknown", "NoServingMetrics"), one("Verified", "False", "TooFewPairs")
    assert events(metrics, pairs)[0] == []
    assert events(pairs, one("Verified", "True", "IntervalExcludesZero"))[0] == [("IntervalExcludesZero", False)]
    assert events(one("Verified", "True", "IntervalExcludesZero"), pairs)[0] == [("TooFewPairs", False)]
    costs = one("Verified", "True", "CapCostsEnergy")
    assert events(one("Verified", "True", "IntervalExcludesZero"), costs)[0] == [("CapCostsEnergy", True)]
    silent, waiting = one("Enforced", "False", "AgentSilent"), one("Enforced", "False", "WaitingToWrite")
    assert events(silent, waiting)[0] == []
    assert events(waiting, one("Enforced", "False", "ComputesPrompts"))[0] == [("ComputesPrompts", False)]


@pytest.mark.parametrize("kind", ["PowerCapBinding", "ClockClamped"])
def test_the_absence_of_trouble_is_no_event(kind):
    unknown, fine = one(kind, "Unknown", "NotObserved"), one(kind, "False", "Inert")
    assert events(unknown, fine)[0] == events(fine, unknown)[0] == events([], fine)[0] == []
    assert events(unknown, one(kind, "True", "Binding"))[0] == [("Binding", True)]


def test_metrics_show_the_last_decision_only():
    metrics = Metrics()
    status = status_of([gpu(power_watts=300)])
    labels = {"namespace": "llm", "policy": "qwen", "pool": "decode", "role": "Decode"}
    metrics.show([(policy(), status)], leading=True)
    metrics.wrote("NodeEnergy", "apply")
    value = metrics.registry.get_sample_value
    assert value("wattlock_pool_power_watts", labels) == 300
    assert value("wattlock_pool_locked_gpus", labels) == 1
    assert value("wattlock_policy_info", {"namespace": "llm", "policy": "qwen", "mode": "Enforce"}) == 1
    assert value("wattlock_operator_api_writes_total", {"kind": "NodeEnergy", "verb": "apply"}) == 1
    assert value("wattlock_pool_tokens_per_second", labels) is None
    metrics.show([], leading=False)
    assert value("wattlock_pool_power_watts", labels) is None


def test_settings_have_defaults():
    settings = from_environment({"WATTLOCK_NAMESPACE": "wattlock"})
    assert (settings.agent_namespace, settings.http_port, settings.agent_template) == ("wattlock", 8080, None)
    assert settings.allowed_placements == ()


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, "WATTLOCK_NAMESPACE"),
        ({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_HTTP_PORT": "70000"}, "WATTLOCK_HTTP_PORT"),
        ({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_HTTP_PORT": "http"}, "WATTLOCK_HTTP_PORT"),
        ({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_ALLOWED_PLACEMENTS": "nvidia"}, "WATTLOCK_ALLOWED_PLACEMENTS.*write"),
        ({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_ALLOWED_PLACEMENTS": '[{"nodeSelector": 1}]'}, "0.nodeSelector"),
        ({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_ALLOWED_PLACEMENTS": '[{"tolerations": [{}]}]'}, "operator: Exists"),
        ({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_RELEASE_TIMEOUT_SECONDS": "1h"}, "WATTLOCK_RELEASE_TIMEOUT_SECONDS"),
    ],
)
def test_a_bad_setting_is_named(environment, variable):
    with pytest.raises(SettingsError, match=variable):
        from_environment(environment)
