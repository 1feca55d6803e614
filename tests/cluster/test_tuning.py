"""A tuner through a real API server: its state in status, progress in kubectl, Events, and operators that die."""

import math
import random
import signal
from typing import Any

import pytest
import yaml
from operator_site import DECODE, PREFILL, eventually, placed
from tuning_world import memory_bound

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PAIRS_IN_A_REPORT = 12


class Measurements:
    """What instances measure under the caps that they are ordered: pairs come in as fast as reports do."""

    def __init__(self) -> None:
        self.chance = random.Random(11)
        self.sums: dict[str, dict[int, list[float]]] = {}
        self.caps: list[int] = []

    def __call__(self, order: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if order["role"] != "Decode":
            return {}, {}
        sums = self.sums.setdefault(order["instance"], {})
        cap = order.get("capMHz")
        if cap is not None:
            if self.caps[-1:] != [cap]:
                self.caps.append(cap)
            row = sums.setdefault(cap, [0.0] * 7)
            for _ in range(PAIRS_IN_A_REPORT):
                saving, loss = memory_bound(cap)
                energy = math.log1p(-saving) + self.chance.gauss(0, 0.01)
                speed = math.log1p(-loss) + self.chance.gauss(0, 0.01)
                row[0] += 1
                for at, value in enumerate((energy, speed, -speed)):
                    row[1 + 2 * at] += value
                    row[2 + 2 * at] += value * value
        stats = [
            {
                "capMHz": mhz,
                "pairs": int(row[0]),
                "latencyPairs": int(row[0]),
                **{
                    name: {"total": f"{row[at]:.9f}", "squares": f"{row[at + 1]:.9f}"}
                    for name, at in (("energy", 1), ("throughput", 3), ("latency", 5))
                },
            }
            for mhz, row in sums.items()
        ]
        rate = 4000 + 40 * self.chance.random()  # each report is news: one that stays the same is not sent again
        of_instance = {"tokensPerSecond": f"{rate:.1f}", "interTokenLatencyMs": "8.00", "pairStats": stats}
        return {"observedMHz": cap or 1980}, of_instance


def test_a_search_ends_through_dead_operators(site, good_policy):
    node = site.node()
    for name in ("decode-0", "decode-1"):
        site.pod(name, node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    agent = site.agent(node)
    measured = agent.measures = Measurements()
    clocks = {"product": "NVIDIA H200", "ranges": [{"minMHz": 345, "maxMHz": 1980, "stepMHz": 15}]}
    agent.about = {"driverVersion": "580.159.04", "products": [clocks]}
    pools = [{**pool, **({"clock": {"tune": {}}} if pool["role"] == "Decode" else {})} for pool in spec_of(good_policy)]
    # The search outlasts the grace of a node without a kubelet: then its pods, the prefill peer too, are not ready.
    site.kubectl.apply(placed(good_policy, site, pools=pools, requirePrefillPeer=False))

    def tuning() -> dict[str, Any]:
        return site.policy().get("status", {}).get("pools", [{}])[0].get("tuning", {})

    eventually(lambda: tuning().get("phase") == "Starting", 90)
    assert all("capMHz" not in order for order in site.orders(node))
    eventually(lambda: len(tuning().get("tried", [])) >= 2, 120)
    shown = site.kubectl.within(site.namespace).run("get", "epol", "qwen").stdout
    assert f"MHz({tuning()['arm']}/" in shown or len(tuning()["tried"]) > 2
    assert "arm" in tuning()["message"]
    share = {order["experiment"]["controlShare"] for order in site.orders(node) if "experiment" in order}
    assert share == {0.5}

    site.stop(signal.SIGKILL)
    tried = tuning()["tried"]
    at = {order["capMHz"] for order in site.orders(node) if "capMHz" in order}
    site.start()
    eventually(lambda: len(tuning()["tried"]) > len(tried), 90)
    assert [arm["capMHz"] for arm in tuning()["tried"]][: len(tried)] == [arm["capMHz"] for arm in tried]
    assert at <= {arm["capMHz"] for arm in tuning()["tried"]}

    eventually(lambda: tuning()["phase"] == "Settled", 120)
    saving, loss = memory_bound(tuning()["capMHz"])
    assert loss <= 0.02
    assert saving > 0.25
    eventually(lambda: {o["capMHz"] for o in site.orders(node) if "capMHz" in o} == {tuning()["capMHz"]})
    # Through both operators each arm was begun once.
    assert len(measured.caps) <= len(tuning()["tried"]) + 2
    events = site.kubectl.within(site.namespace).get("events")["items"]
    told = {event["reason"] for event in events if event["involvedObject"]["name"] == "qwen"}
    assert {"TuningArm", "Tuned"} <= told

    written = site.command("profile", f"{site.namespace}/qwen")
    assert (written.returncode, written.stderr) == (0, "")
    site.kubectl.run("apply", "--dry-run=server", "-f", "-", stdin=written.stdout)
    (row,) = yaml.safe_load(written.stdout)["spec"]["rows"]
    assert (row["product"], row["maxSMClockMHz"]) == ("NVIDIA H200", tuning()["capMHz"])
    assert row["evidence"]["driverVersion"] == "580.159.04"
    assert row["regime"]["minBatch"] < 4000 * 0.008 < row["regime"]["maxBatch"]


def spec_of(policy: dict[str, Any]) -> list[dict[str, Any]]:
    return list(policy["spec"]["pools"])
