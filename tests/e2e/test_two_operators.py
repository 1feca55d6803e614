"""Two operators of the chart: the leading one is killed in the middle of a rollout, the other one finishes it, once."""

import pytest
from workloads import OPERATOR_LABEL, SYSTEM, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RULES = {"steps": [1, "100%"], "holdSeconds": 20}


@pytest.fixture
def two_operators(kubectl, install):
    """Two replicas; one again afterwards."""
    install("--set", "operator.replicas=2")
    yield kubectl.within(SYSTEM)
    install()


def asked(policy, mhz):
    decode, prefill = policy["spec"]["pools"]
    pools = [decode | {"clock": {"maxSMClockMHz": mhz}}, prefill]
    return policy | {"spec": policy["spec"] | {"pools": pools, "rollout": RULES, "verification": {"method": "None"}}}


def test_the_other_operator_finishes_a_rollout(two_operators, serving_pods, simulator, good_policy):
    system = two_operators

    def leader():
        return system.get("lease", "wattlock-operator")["spec"].get("holderIdentity")

    def ready():
        pods = system.get("pods", "-l", OPERATOR_LABEL)["items"]
        return {p["metadata"]["name"] for p in pods if p["status"]["containerStatuses"][0]["ready"]}

    def caps():
        found = simulator.gpus()
        return sorted(found[uuid]["lock_mhz"] or 0 for uuid in serving_pods.gpus("decode"))

    eventually("two operators are ready, one of them leads", lambda: len(ready()) == 2 and leader() in ready(), 90)
    serving_pods.kubectl.apply(asked(good_policy, 1590))
    eventually("both are capped", lambda: caps() == [1590, 1590], 90)
    eventually("it is complete", lambda: serving_pods.pool("decode")["rollout"]["phase"] == "Complete", 60)

    writes, first = len(simulator.writes()), leader()
    serving_pods.kubectl.apply(asked(good_policy, 1200))
    eventually("the first of two has the new clock", lambda: caps() == [1200, 1590], 30)
    system.run("delete", "pod", first, "--force", "--grace-period=0")
    eventually("another one leads", lambda: leader() not in (first, "", None), 90)
    eventually("both have the new clock", lambda: caps() == [1200, 1200], 120)
    eventually("it is complete", lambda: serving_pods.pool("decode")["rollout"]["phase"] == "Complete", 60)
    assert len([write for write in simulator.writes()[writes:] if write.locks]) == 2, "each instance changed once"

    def told():
        events = serving_pods.kubectl.get("events", "--field-selector", "involvedObject.name=qwen")["items"]
        return [event["reason"] for event in events].count("RolledOut")

    eventually("it is told once for each clock", lambda: told() == 2, 30)
