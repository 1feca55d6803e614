"""The main job: decode GPUs are capped, prefill GPUs are not, everything is measured and undone."""

import time

import pytest
from workloads import eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: Capped in every epoch: for tests that are not about the saving.
ALWAYS = {"verification": {"method": "None"}}


def edited(policy, **spec):
    return policy | {"spec": policy["spec"] | spec}


def test_decode_is_capped_prefill_left_alone_and_both_are_measured(serving_pods, simulator, good_policy):
    workload = serving_pods
    decode, prefill = workload.gpus("decode"), workload.gpus("prefill")
    assert len(decode) == 2
    before = len(simulator.writes())
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("the driver has a lock on every decode GPU", lambda: simulator.locked() == decode, 30)
    status = eventually(
        "the pools are measured",
        lambda: (
            {"joulesPerGeneratedToken", "observedMHz", "powerWatts"} <= (pool := workload.pool("decode")).keys()
            and pool
        ),
        60,
    )
    assert status["gpus"] == status["locked"] == status["instances"] == 2
    assert status["requestedMHz"] == status["observedMHz"] == 1590
    assert 400 < status["powerWatts"] < 1400
    assert float(status["tokensPerSecond"]) > 1000
    assert status["savings"]["reason"] == "VerificationOff"
    left_alone = eventually("prefill is measured", lambda: (p := workload.pool("prefill")).get("powerWatts") and p, 60)
    assert left_alone["locked"] == 0
    assert "requestedMHz" not in left_alone
    assert workload.condition("Ready")["status"] == "True"
    assert workload.condition("Enforced")["status"] == "True"
    writes = simulator.writes()[before:]
    assert not [write for write in writes if write.uuid in prefill], "a prefill GPU was written to"
    assert {write.arguments for write in writes if write.locks and write.uuid in decode} == {(345, 1590)}


def test_observe_writes_to_no_gpu(serving_pods, simulator, good_policy):
    workload = serving_pods
    before = simulator.writes()
    workload.kubectl.apply(edited(good_policy, mode="Observe"))
    eventually("decode is measured", lambda: workload.pool("decode").get("joulesPerGeneratedToken"), 60)
    assert workload.pool("decode")["locked"] == 0
    assert simulator.writes() == before
    assert workload.condition("Enforced")["status"] == "False"


def test_a_deleted_decode_pod_releases_its_gpu(serving_pods, simulator, good_policy):
    workload = serving_pods
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", workload.locked, 30)
    workload.kubectl.run("scale", "deployment/decode", "--replicas=1")
    eventually("one pod is left", lambda: len(workload.pods("decode")) == 1, 30)
    kept = workload.gpus("decode")
    eventually("only its GPU is locked", lambda: simulator.locked() == kept, 30)


def test_a_replaced_pod_is_capped_again(serving_pods, simulator, good_policy):
    workload = serving_pods
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", workload.locked, 30)
    victim = workload.pods("decode")[0]["metadata"]["name"]
    workload.kubectl.run("delete", "pod", victim)
    workload.kubectl.run("rollout", "status", "deployment/decode", "--timeout=60s")
    eventually("the new pod's GPU is locked too", lambda: simulator.locked() == workload.gpus("decode"), 40)


def test_without_prefill_decode_is_released_and_capped_again_when_it_is_back(serving_pods, simulator, good_policy):
    workload = serving_pods
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", workload.locked, 30)
    workload.kubectl.run("scale", "deployment/prefill", "--replicas=0")
    eventually("decode is released", lambda: not simulator.locked(), 30)
    reasons = eventually("status says why", lambda: "NoPrefillPeer" in (r := workload.reasons("decode")) and r, 30)
    assert "requirePrefillPeer" in reasons["NoPrefillPeer"]
    workload.kubectl.run("scale", "deployment/prefill", "--replicas=1")
    eventually("decode is locked again", workload.locked, 60)


def test_delete_returns_only_when_the_gpus_are_released(serving_pods, simulator, good_policy):
    workload = serving_pods
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", workload.locked, 30)
    workload.kubectl.run("delete", "epol", "qwen", "--timeout=60s", timeout_seconds=70)
    assert simulator.locked() == set()


def test_switching_to_observe_releases(serving_pods, simulator, good_policy):
    workload = serving_pods
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", workload.locked, 30)
    workload.kubectl.apply(edited(good_policy, mode="Observe", **ALWAYS))
    eventually("decode is released", lambda: not simulator.locked(), 30)


def test_raising_the_cap_is_no_clamp(serving_pods, simulator, good_policy):
    workload = serving_pods
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("the cap is observed", lambda: workload.pool("decode").get("observedMHz") == 1590, 60)
    good_policy["spec"]["pools"][0]["clock"] = {"maxSMClockMHz": 1800}
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("the new cap is observed", lambda: workload.pool("decode").get("observedMHz") == 1800, 60)
    assert workload.pool("decode")["clampedGPUs"] == 0
    assert float(workload.pool("decode")["clampSeconds"]) == 0


def test_a_clamp_is_reported(serving_pods, simulator, good_policy):
    workload = serving_pods
    good_policy["spec"]["pools"][0]["clock"] = {"maxSMClockMHz": 1900}
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("the clamp is reported", lambda: workload.condition("ClockClamped").get("status") == "True", 90)
    eventually("on both GPUs", lambda: workload.pool("decode").get("clampedGPUs") == 2, 30)
    pool = workload.pool("decode")
    assert pool["requestedMHz"] == 1890  # snapped down to a supported clock
    assert pool["observedMHz"] == 1830
    assert "1830" in workload.condition("ClockClamped")["message"]


def test_a_power_cap_that_binds_is_reported_as_such(workload, good_policy):
    workload.deploy(serving("decode", 1, batch=128, context=4096), serving("prefill", 1))
    workload.kubectl.apply(edited(good_policy, mode="Observe"))
    # Prefill sits on its power cap always; the condition is about the pools that could be capped.
    eventually(
        "the power cap is seen to bind", lambda: workload.condition("PowerCapBinding").get("status") == "True", 150
    )
    assert "pool decode" in workload.condition("PowerCapBinding")["message"]
    assert workload.pool("decode")["powerCap"]["verdict"] == "Binding"
    assert workload.pool("decode")["powerCap"]["limitWatts"] == 700


def test_the_saving_is_verified_and_holds_the_truth(workload, simulator, good_policy):
    workload.deploy(serving("decode", 4), serving("prefill", 1))  # the shared pods hold the other three GPUs
    workload.kubectl.apply(edited(good_policy, verification={"controlShare": 0.5, "epochSeconds": 20}))
    truth = simulator.truth(1590)["energy_percent"]

    def verified():
        savings = workload.pool("decode").get("savings", {})
        # Two pairs of each instance are enough for the verdict, three for a check of the number.
        return savings if savings.get("verdict") == "Verified" and savings["pairs"] >= 12 else None

    savings = eventually("the saving is verified", verified, 480, every_seconds=2)
    # Stopping when something is seen needs the interval that holds at every look: it misses in fewer than one of twenty
    # runs of any length, and in fewer than one of a hundred of these. The estimate's deviation is about 0.2 points.
    low, high = map(float, savings["ci95EveryLook"])
    assert low <= truth <= high
    assert float(savings["energyPercent"]) == pytest.approx(truth, abs=1.2)
    assert float(savings["evidence"]) >= 20
    assert savings["instances"] == 4
    assert workload.condition("Verified")["status"] == "True"
    low, high = map(float, savings["ci95"])
    assert (high - low) / 2 < 3
    shown = float(workload.status()["summary"]["saved"].split("%")[0])  # one digit after the point
    assert shown == pytest.approx(float(workload.pool("decode")["savings"]["energyPercent"]), abs=0.15)
    assert workload.status()["summary"]["capped"] == "4/4"


def test_a_published_profile_gives_the_clock(serving_pods, simulator, good_policy):
    workload = serving_pods
    good_policy["spec"]["pools"][0]["clock"] = {"profile": "published"}
    workload.kubectl.apply(edited(good_policy, **ALWAYS))
    eventually("decode is locked", workload.locked, 40)
    assert workload.pool("decode").get("requestedMHz") in (None, 1590)
    started = time.time()
    eventually("the cap is the profile's", lambda: workload.pool("decode").get("requestedMHz") == 1590, 30)
    assert time.time() >= started
