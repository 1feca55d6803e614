"""Mixed pools follow their prompts, idle instances wake within a second: seen in the driver's log of writes."""

import json
import random
import time

import pytest
from workloads import SERVING_PORT, eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

IDLE_SECONDS = 10
ROUNDS = 8
#: What the request asks for is of no matter; it must be short enough for the next round to begin soon.
ASK = f"""
import json, time, urllib.request as u
body = json.dumps({{"model": "simulated", "prompt": "Hello", "max_tokens": 400}}).encode()
request = u.Request("http://127.0.0.1:{SERVING_PORT}/v1/completions", body, {{"Content-Type": "application/json"}})
arrived = time.time()
u.urlopen(request, timeout=30).read()
print(json.dumps([arrived, time.time()]))
"""


def only(pool):
    spec = {"mode": "Enforce", "pools": [pool], "requirePrefillPeer": False, "verification": {"method": "None"}}
    metadata = {"name": "qwen"}
    return {"apiVersion": "wattlock.dev/v1alpha1", "kind": "EnergyPolicy", "metadata": metadata, "spec": spec}


def pool(name, role, **more):
    selector = {"matchLabels": {"llm-d.ai/role": name}}
    return {"name": name, "role": role, "selector": selector, "clock": {"maxSMClockMHz": 1590}} | more


def lock_of(simulator, uuid):
    return simulator.gpus()[uuid]["lock_mhz"]


def writes_since(simulator, uuid, at_seconds):
    return [write for write in simulator.writes() if write.uuid == uuid and write.at_seconds >= at_seconds]


def wake(workload, simulator, pod, uuid):
    """Send a request; return after how many seconds the driver had released the GPU, and after how many it is answered.

    The request is sent from within the pod, and its time taken there just before: all clocks are the machine's.
    """
    shown = workload.kubectl.run("exec", pod["metadata"]["name"], "--", "python", "-c", ASK)
    arrived, answered = json.loads(shown.stdout)
    eventually(
        "the pool's clock is back", lambda: any(write.locks for write in writes_since(simulator, uuid, arrived)), 30
    )
    reset, lock, *_ = writes_since(simulator, uuid, arrived)
    assert reset.resets
    assert lock.locks
    assert lock.arguments == (345, 1590)
    assert 4.5 <= lock.at_seconds - reset.at_seconds <= 10
    return reset.at_seconds - arrived, answered - arrived


def test_a_mixed_pool_is_capped_while_it_computes_few_prompts(workload, simulator):
    workload.deploy(serving("mixed", 1))
    (pod,) = workload.pods("mixed")
    (uuid,) = workload.gpus_of(pod)
    before = time.time()
    workload.simulate(pod, promptShare=0.9)
    workload.kubectl.apply(only(pool("mixed", "Mixed")))
    eventually("prefill is seen", lambda: "PrefillShare" in workload.reasons("mixed"), 60)
    assert not writes_since(simulator, uuid, before), "locked although most of the work is prefill"

    workload.simulate(pod, promptShare=0.05)
    few = time.time()
    eventually("it is capped", lambda: lock_of(simulator, uuid) == 1590, 130)
    locks = [write for write in writes_since(simulator, uuid, few) if write.locks]
    assert locks[0].at_seconds - few >= 60
    eventually("status says so", lambda: workload.pool("mixed").get("capped") == 1, 30)
    assert workload.condition("Enforced")["status"] == "True"
    assert workload.status()["summary"]["capped"] == "1/1"

    workload.simulate(pod, promptShare=0.8)
    many = time.time()
    eventually("it is released", lambda: not lock_of(simulator, uuid), 30)
    reset = next(write for write in writes_since(simulator, uuid, few) if write.resets)
    print(f"\nprompts grew, released after {reset.at_seconds - many:.1f} s")
    assert reset.at_seconds - many <= 2 * 5 + 3, "two pages are read every five seconds"
    eventually("status says why", lambda: "PrefillShare" in workload.reasons("mixed"), 30)

    workload.simulate(pod, promptShare=0.05)
    fell = time.time()
    eventually("it is capped again", lambda: lock_of(simulator, uuid) == 1590, 150)
    again = next(write for write in writes_since(simulator, uuid, fell) if write.locks)
    print(f"prompts fell, capped again after {again.at_seconds - fell:.0f} s")
    assert again.at_seconds - fell >= 60


def test_the_first_request_of_an_idle_instance_is_seen_within_a_second(workload, simulator):
    deployment = serving("decode", 1)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["args"].append("--requests")  # its load are the requests that it gets: none so far
    workload.deploy(deployment)
    (pod,) = workload.pods("decode")
    (uuid,) = workload.gpus_of(pod)
    # From now on the prompt is in the engine's prefix cache: an instance that computes prompts would not be capped.
    workload.kubectl.run("exec", pod["metadata"]["name"], "--", "python", "-c", ASK)
    workload.kubectl.apply(only(pool("decode", "Decode", idle={"afterSeconds": IDLE_SECONDS})))
    times = []
    for number in range(ROUNDS):
        eventually("the lowest clock is on", lambda: lock_of(simulator, uuid) == 345, 60, every_seconds=0.2)
        if not number:
            eventually("status says so", lambda: "Idle" in workload.reasons("decode"), 30)
            assert workload.pool("decode")["capped"] == workload.pool("decode")["locked"] == 1
            assert workload.pool("decode")["requestedMHz"] == 1590
            assert workload.condition("Enforced")["status"] == "True"
        time.sleep(random.Random(number).uniform(0, 1))  # at any point between two pages
        reset_seconds, answer_seconds = wake(workload, simulator, pod, uuid)
        times.append(reset_seconds)
        print(
            f"\nround {number}: released {reset_seconds:.3f} s after the request, answered after {answer_seconds:.3f} s"
        )
    print(f"released after {min(times):.3f} to {max(times):.3f} s, mean {sum(times) / len(times):.3f} s")
    assert max(times) < 1.0
    assert min(times) > 0, "released before anybody asked"
