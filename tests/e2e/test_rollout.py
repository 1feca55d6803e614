"""A clock that decode cannot stand: released by the agent, halted and taken back by the operator, told in order."""

import pytest
from workloads import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

RULES = {"steps": [1, "100%"], "holdSeconds": 10}
#: The simulated decode makes a token in 7.6 ms when released, and in 9.7 ms at 390 MHz.
GUARD = {"maxInterTokenLatencyMs": 8.7, "cooldownSeconds": 600}


def asked(policy, mhz):
    decode, prefill = policy["spec"]["pools"]
    pools = [decode | {"clock": {"maxSMClockMHz": mhz}}, prefill]
    spec = {"pools": pools, "rollout": RULES, "guardrail": GUARD, "verification": {"method": "None"}}
    return policy | {"spec": policy["spec"] | spec}


def caps(simulator, gpus):
    found = simulator.gpus()
    return sorted(found[uuid]["lock_mhz"] or 0 for uuid in gpus)


def capped_seconds(simulator, gpus, mhz):
    """Return for how long, at most, one of the GPUs was under this cap: from the driver's own log."""
    longest, since = 0.0, {}
    for write in (each for each in simulator.writes() if each.uuid in gpus and each.result == 0):
        if write.uuid in since:
            longest = max(longest, write.at_seconds - since.pop(write.uuid))
        if write.locks and write.arguments[1] == mhz:
            since[write.uuid] = write.at_seconds
    assert not since, f"{set(since)} are still under it"
    assert longest, "no GPU ever was under it"
    print(f"longest time under {mhz} MHz: {longest:.1f} s")
    return longest


def test_a_clock_goes_out_in_steps_and_one_that_hurts_comes_back(serving_pods, simulator, good_policy):
    gpus = serving_pods.gpus("decode")
    serving_pods.kubectl.apply(asked(good_policy, 1590))
    eventually("the first of two is capped", lambda: caps(simulator, gpus) == [0, 1590], 30)
    eventually("both are", lambda: caps(simulator, gpus) == [1590, 1590], 60)
    eventually("it is complete", lambda: serving_pods.pool("decode")["rollout"]["phase"] == "Complete", 60)
    serving_pods.kubectl.apply(asked(good_policy, 400))
    eventually("the first has the new clock", lambda: caps(simulator, gpus) == [390, 1590], 30)
    eventually("every instance is back at the clock of before", lambda: caps(simulator, gpus) == [1590, 1590], 60)
    ready = eventually(
        "status says so", lambda: (c := serving_pods.condition("Ready")).get("reason") == "RolledBack" and c, 30
    )
    assert "ms" in ready["message"]
    assert serving_pods.pool("decode")["rollout"]["phase"] == "RolledBack"

    def told():
        events = serving_pods.kubectl.get("events", "--field-selector", "involvedObject.name=qwen")["items"]
        return [
            event["reason"] for event in sorted(events, key=lambda event: int(event["metadata"]["resourceVersion"]))
        ]

    eventually("it is told, which comes after the status", lambda: "RolledBack" in told(), 30)
    # One clock went out; the next began to, the agent told what it did to serving, and it was taken back.
    story = [reason for reason in told() if reason in ("RollingOut", "RolledOut", "Breached", "RolledBack")]
    assert list(dict.fromkeys(story)) == ["RollingOut", "RolledOut", "Breached", "RolledBack"], story
    assert capped_seconds(simulator, gpus, 390) < 10
