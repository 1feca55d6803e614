"""Bad input and failures: each gives a reason and a sentence, none leaves a GPU locked, nothing crashes."""

import time

import pytest
from workloads import AGENT_LABEL, OPERATOR_LABEL, SYSTEM, api_server_paused, eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ALWAYS = {"verification": {"method": "None"}}


def edited(policy, **spec):
    return policy | {"spec": policy["spec"] | spec}


def decode_clock(policy, **clock):
    decode, prefill = policy["spec"]["pools"]
    return policy | {"spec": policy["spec"] | ALWAYS | {"pools": [decode | {"clock": clock}, prefill]}}


def test_an_unsupported_clock_locks_nothing_and_says_what_is_supported(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(decode_clock(good_policy, maxSMClockMHz=200))
    reasons = eventually(
        "it is refused", lambda: (r := serving_pods.reasons("decode")) and "UnsupportedClock" in r and r
    )
    assert "345" in reasons["UnsupportedClock"]
    assert simulator.locked() == set()


def test_an_absent_profile_locks_nothing(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(decode_clock(good_policy, profile="no-such-profile"))
    reasons = eventually(
        "it is refused", lambda: (r := serving_pods.reasons("decode")) and "ProfileNotFound" in r and r
    )
    assert "no-such-profile" in reasons["ProfileNotFound"]
    assert simulator.locked() == set()


def test_a_profile_without_a_row_locks_nothing(kubectl, serving_pods, simulator, good_policy):
    row = {"product": "NVIDIA B200", "phase": "Decode", "maxSMClockMHz": 1500}
    row["evidence"] = {"kind": "Published", "source": "a test"}
    profile = {"apiVersion": "wattlock.dev/v1alpha1", "kind": "ClockProfile", "metadata": {"name": "b200-only"}}
    kubectl.apply(profile | {"spec": {"rows": [row]}})
    try:
        serving_pods.kubectl.apply(decode_clock(good_policy, profile="b200-only"))
        reasons = eventually("it says so", lambda: (r := serving_pods.reasons("decode")) and "NoProfileRow" in r and r)
        assert "NVIDIA H200" in reasons["NoProfileRow"]
        assert simulator.locked() == set()
    finally:
        kubectl.run("delete", "clockprofile", "b200-only")


def test_a_policy_that_matches_no_pod_says_so(workload, good_policy):
    workload.kubectl.apply(good_policy)
    ready = eventually("it is not ready", lambda: (c := workload.condition("Ready")).get("status") == "False" and c)
    assert ready["reason"] == "NoMatchingPods"
    assert "llm-d.ai/role=decode" in ready["message"]


def test_pods_without_gpus_are_named(workload, simulator, good_policy):
    workload.deploy(serving("decode", 1, gpus=0), serving("prefill", 1))
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    assert eventually("it says so", lambda: (r := workload.reasons("decode")) and "NoGPUs" in r and r)
    assert simulator.locked() == set()


def test_two_policies_about_one_pod_lock_nothing_and_blame_each_other(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS) | {"metadata": {"name": "other"}})
    eventually("decode is released", lambda: not simulator.locked(), 30)
    for mine, theirs in (("qwen", "other"), ("other", "qwen")):
        found = eventually(
            "the conflict is reported",
            lambda name=mine: (c := serving_pods.condition("Conflict", name)).get("status") == "True" and c,
        )
        assert theirs in found["message"]
    events = serving_pods.kubectl.run("get", "events", "--field-selector=involvedObject.kind=EnergyPolicy").stdout
    assert "Conflict" in events
    serving_pods.kubectl.run("delete", "epol", "other", "--timeout=60s")
    eventually("decode is locked again", serving_pods.locked, 40)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("garbage", "MetricsInvalid"),
        ("nan", "MetricsInvalid"),
        ("huge", "MetricsTooLarge"),
        ("endless", "MetricsUnreachable"),  # it is cut off after 3 s
        ("slow", "MetricsUnreachable"),
        ("backwards", "CountersRestarted"),
    ],
)
def test_bad_serving_metrics_are_named_and_cost_nothing_else(serving_pods, good_policy, fault, reason):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    for pod in serving_pods.pods("decode"):
        serving_pods.simulate(pod, metricsFault=fault)
    eventually(f"status says {reason}", lambda: reason in serving_pods.reasons("decode"), 60)
    assert serving_pods.locked(), "power can be saved without metrics; only the proof is missing"
    eventually("power is measured all the same", lambda: serving_pods.pool("decode").get("powerWatts"), 40)


def test_a_decode_pod_that_computes_prompts_is_released(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    liar = serving_pods.pods("decode")[0]
    serving_pods.simulate(liar, computesPrompts=True)
    gpus = serving_pods.gpus_of(liar)
    eventually("its GPU is released", lambda: not gpus & simulator.locked(), 120)
    eventually("status says why", lambda: "ComputesPrompts" in serving_pods.reasons("decode"))
    assert simulator.locked(), "the honest one stays capped"


def test_the_guardrail_releases_a_slow_pod(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(
        edited(good_policy, guardrail={"maxInterTokenLatencyMs": 40, "cooldownSeconds": 60}, **ALWAYS)
    )
    eventually("decode is locked", serving_pods.locked, 30)
    slow = serving_pods.pods("decode")[0]
    gpus = serving_pods.gpus_of(slow)
    serving_pods.simulate(slow, extraLatencyMs=100)
    eventually("its GPU is released", lambda: not gpus & simulator.locked(), 20)
    tripped = eventually(
        "status says so",
        lambda: (c := serving_pods.condition("GuardrailTripped")).get("status") == "True" and c,
    )
    assert "ms" in tripped["message"]


def test_a_lost_lock_is_found_and_put_back(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    nodes = {pod["spec"]["nodeName"] for pod in serving_pods.pods("decode")}
    for node in nodes:
        simulator.control(node, "reload")
    eventually("the locks are back", serving_pods.locked, 60)


@pytest.mark.parametrize(("code", "reason"), [(999, "NVMLError"), (15, "GPULost"), (4, "NoPermission")])
def test_a_driver_that_refuses_to_lock_is_reported(serving_pods, simulator, good_policy, code, reason):
    nodes = {pod["spec"]["nodeName"] for pod in serving_pods.pods("decode")}
    for node in nodes:
        simulator.control(node, "fault", "--function", "nvmlDeviceSetGpuLockedClocks", "--code", str(code))
    try:
        serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
        eventually(f"status says {reason}", lambda: reason in serving_pods.reasons("decode"), 60)
        assert simulator.locked() == set()
    finally:
        for node in nodes:
            simulator.control(node, "clear-faults")
    # What the driver refused is not tried for ever: a changed order is worth another try.
    serving_pods.kubectl.apply(decode_clock(good_policy, maxSMClockMHz=1500))
    eventually("decode is locked when the driver is well again", serving_pods.locked, 60)


def test_a_killed_agent_comes_back_and_keeps_the_promise(kubectl, serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    kubectl.within(SYSTEM).run("delete", "pods", "-l", AGENT_LABEL, "--force", "--grace-period=0")
    serving_pods.kubectl.run("delete", "epol", "qwen", "--timeout=90s", timeout_seconds=100)
    assert simulator.locked() == set()


def test_a_restarted_operator_goes_on(kubectl, serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    writes = len(simulator.writes())
    system = kubectl.within(SYSTEM)
    system.run("delete", "pods", "-l", OPERATOR_LABEL)
    system.run("rollout", "status", "deployment", "-l", OPERATOR_LABEL, "--timeout=60s")
    serving_pods.kubectl.run("scale", "deployment/decode", "--replicas=1")
    eventually("it acts again", lambda: len(simulator.locked()) == 1, 40)
    locks = [write for write in simulator.writes()[writes:] if write.locks]
    assert not locks, "no GPU was locked anew by the restart"


def test_locks_outlive_a_short_outage_of_the_api_server(serving_pods, simulator, good_policy):
    serving_pods.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", serving_pods.locked, 30)
    gpus = serving_pods.gpus("decode")
    writes = len(simulator.writes())
    with api_server_paused():
        time.sleep(25)  # longer than the time-outs of single requests; nothing can be asked meanwhile
    eventually("the API server answers again", lambda: simulator.locked() == gpus, 60)
    assert simulator.writes()[writes:] == [], "nothing was released or locked anew"
    serving_pods.kubectl.run("scale", "deployment/decode", "--replicas=1")
    eventually("orders come through again", lambda: len(simulator.locked()) == 1, 60)
