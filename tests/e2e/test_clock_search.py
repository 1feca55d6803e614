"""A pool that is told no clock finds one, through killed operators and agents; and again when its work changes."""

from typing import Any

import pytest
import yaml
from workloads import AGENT_LABEL, OPERATOR_LABEL, SYSTEM, Simulator, Workload, eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

#: The simulated decode's batch at first, and when the load has fallen.
BATCH, QUIET_BATCH = 32, 12
BOUNDS = {"maxThroughputLossPercent": 2, "maxInterTokenLatencyIncreasePercent": 3}
#: The tuner goes down in steps of a fifth, and of caps that differ by half a point it takes the highest.
STEP = 0.8
SEARCH_SECONDS = 20 * 60


def tuned(policy: dict[str, Any]) -> dict[str, Any]:
    decode, prefill = policy["spec"]["pools"]
    tune = {"reopenAfterSeconds": 60, "restSeconds": 0}
    spec = {
        "pools": [decode | {"clock": {"tune": tune}}, prefill],
        "guardrail": BOUNDS,
        "verification": {"epochSeconds": 20},
    }
    return policy | {"spec": policy["spec"] | spec}


def best(simulator: Simulator) -> tuple[int, float]:
    """Return the cap that really saves most within the bounds, and what it saves, in percent."""
    found = {mhz: simulator.truth(mhz, batch=BATCH) for mhz in range(510, 1200, 15)}
    within = {
        mhz: truth["energy_percent"]
        for mhz, truth in found.items()
        if truth["throughput_change_percent"] >= -BOUNDS["maxThroughputLossPercent"]
        and truth["capped"]["step_seconds"]
        <= truth["control"]["step_seconds"] * (1 + BOUNDS["maxInterTokenLatencyIncreasePercent"] / 100)
    }
    mhz = max(within, key=lambda each: within[each])
    return mhz, within[mhz]


def kill(workload: Workload, label: str) -> None:
    workload.kubectl.within(SYSTEM).run("delete", "pods", "-l", label, "--force", "--grace-period=0")


def written_down(workload: Workload) -> dict[str, Any]:
    """Have the operator print what it found, and apply it as anybody would."""
    words = ("wattlock-operator", "profile", f"{workload.namespace}/qwen")
    printed = workload.kubectl.within(SYSTEM).run("exec", "deploy/wattlock-operator", "--", *words).stdout
    profile: dict[str, Any] = yaml.safe_load(printed)
    workload.kubectl.apply(profile)
    found: dict[str, Any] = workload.kubectl.get("clockprofile", profile["metadata"]["name"])
    workload.kubectl.run("delete", "clockprofile", profile["metadata"]["name"])
    return found


def test_a_pool_finds_its_clock_and_looks_again(workload: Workload, simulator: Simulator, good_policy):
    workload.deploy(serving("decode", 7, batch=BATCH), serving("prefill", 1))
    gpus = workload.gpus("decode")
    workload.kubectl.apply(tuned(good_policy))

    def tuning() -> dict[str, Any]:
        return workload.pool("decode").get("tuning", {})

    def tried() -> list[int]:
        return [arm["capMHz"] for arm in tuning().get("tried", [])]

    eventually("the second arm is measured", lambda: len(tried()) >= 2, 300)
    assert f"arm {tuning()['arm']} of at most" in tuning()["message"]
    before = tried()
    kill(workload, OPERATOR_LABEL)
    eventually("the search goes on with an arm of its own", lambda: len(tried()) > len(before), 300)
    assert tried()[: len(before)] == before
    kill(workload, AGENT_LABEL)

    eventually("it has chosen", lambda: tuning().get("phase") == "Settled", SEARCH_SECONDS, 2)
    chosen, (oracle, most) = tuning()["capMHz"], best(simulator)
    saving = simulator.truth(chosen, batch=BATCH)["energy_percent"]
    print(
        f"{tuning()['message']}; tried {tried()}; best {oracle} MHz, {most:.1f} %; chosen {chosen} MHz, {saving:.1f} %"
    )
    assert tuning()["searches"] == 1, "a killed operator or agent begins no second search"
    assert len(tried()) == len(set(tried())), "no arm was measured twice"
    assert oracle * STEP <= chosen <= oracle / STEP
    assert saving >= 0.95 * most
    eventually("it is in force", lambda: {simulator.gpus()[uuid]["lock_mhz"] for uuid in gpus} >= {chosen}, 90)

    profile = written_down(workload)
    assert [row["maxSMClockMHz"] for row in profile["spec"]["rows"]] == [chosen]
    assert profile["spec"]["rows"][0]["evidence"]["kind"] == "Measured"

    for pod in workload.pods("decode"):
        workload.simulate(pod, batch=QUIET_BATCH)
    eventually("it looks again", lambda: tuning().get("phase") == "Starting", 240)
    eventually("nothing is locked while it looks at the released pool", lambda: not simulator.locked(), 30)
    eventually("it searches again", lambda: tuning().get("phase") == "Searching", 300)
    assert tuning()["searches"] == 2
    events = workload.kubectl.get("events", "--field-selector", "involvedObject.name=qwen")["items"]
    told = [event["reason"] for event in sorted(events, key=lambda event: int(event["metadata"]["resourceVersion"]))]
    assert told.index("TuningArm") < told.index("Tuned") < told.index("TuningAnew"), told
    anew = [event["message"] for event in events if event["reason"] == "TuningAnew"]
    assert any("sequences at once" in message for message in anew), anew
