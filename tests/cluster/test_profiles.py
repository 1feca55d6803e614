"""ClockProfiles through a real API server: what it refuses, rows by work, and a tuner's result as a row."""

import json
import random
import time
from typing import Any

import pytest
import yaml
from operator_site import DECODE, PREFILL, SETTLED, Site, eventually, placed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

H200 = "NVIDIA H200"
MEASURED = {"kind": "Measured", "date": "2026-11-01T00:00:00Z", "driverVersion": "580.1", "samples": 100}
#: The operator, with less patience than its ten minutes.
HASTY = """
import sys
from wattlock_operator import work
from wattlock_operator.__main__ import main
work.MOVED_SECONDS, work.FIRST_SECONDS, work.SMOOTH_SECONDS = 12.0, 2.0, 1.0
sys.exit(main([]))
"""


def row(mhz: int, **changes: Any) -> dict[str, Any]:
    return {"product": H200, "phase": "Decode", "maxSMClockMHz": mhz, "evidence": MEASURED} | changes


def profile(name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name}
    return {"apiVersion": "wattlock.dev/v1alpha1", "kind": "ClockProfile", "metadata": metadata, "spec": {"rows": rows}}


REFUSED = {
    "no rows": ([], "spec.rows in body should have at least 1 items"),
    "too many rows": ([row(1000)] * 129, "spec.rows: Too many: 129: must have at most 128 items"),
    "phase": ([row(1000, phase="Prefill")], 'Unsupported value: "Prefill": supported values: "Decode"'),
    "measured when": ([row(1000, evidence={"kind": "Measured"})], "Measured evidence needs date, driverVersion"),
    "published where": ([row(1000, evidence={"kind": "Published"})], "Published evidence needs its source, e.g. a DOI"),
    "an empty regime": ([row(1000, regime={})], "write at least one bound, e.g. minBatch: 16, or leave regime out"),
    "batches crossed": ([row(1000, regime={"minBatch": 64, "maxBatch": 16.5})], "minBatch must not be above maxBatch"),
    "latencies crossed": (
        [row(1000, regime={"minInterTokenLatencyMs": 9.5, "maxInterTokenLatencyMs": 3})],
        "minInterTokenLatencyMs must not be above maxInterTokenLatencyMs",
    ),
    "a batch of nothing": ([row(1000, regime={"maxBatch": 0})], "must be between 0.1 and 100000"),
    "a batch beyond all": ([row(1000, regime={"minBatch": 1000000})], "must be between 0.1 and 100000"),
    "a latency in seconds": ([row(1000, regime={"maxInterTokenLatencyMs": 0.02})], "must be between 0.1 and 100000"),
    "misspelt": ([row(1000, regime={"batch": 32})], 'unknown field "spec.rows[0].regime.batch"'),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_bad_profile_is_refused_with_a_sentence(kubectl, crds, rows, sentence):
    answer = kubectl.run("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(profile("bad", *rows)), check=False)
    assert answer.returncode != 0
    assert sentence in answer.stderr


def test_the_widest_profile_is_within_the_cost_budget(kubectl, crds):
    bounds = {"minBatch": 16, "maxBatch": 64.5, "minInterTokenLatencyMs": 5, "maxInterTokenLatencyMs": 20}
    rows = [row(1000, regime=bounds, architecture="GQA", product="p" * 128)] * 128
    kubectl.run("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=json.dumps(profile("wide", *rows)))


class Serving:
    """What the instances of pools tell: as many sequences at once as the test says."""

    def __init__(self) -> None:
        self.batch = 28.0

    def __call__(self, order: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if order["role"] != "Decode":
            return {}, {}
        rate = self.batch / 0.008 * random.uniform(0.995, 1.005)  # each report is news, as in life
        return {}, {"tokensPerSecond": f"{rate:.1f}", "interTokenLatencyMs": "8.00"}


def with_profile(policy: dict[str, Any], site: Site, name: str, decode: dict[str, str] | None = None) -> dict[str, Any]:
    pools = [dict(pool) for pool in policy["spec"]["pools"]]
    for pool in pools:
        if pool["role"] == "Decode":
            pool |= {"clock": {"profile": name}} | ({"selector": {"matchLabels": decode}} if decode else {})
    return placed(policy, site, pools=pools, requirePrefillPeer=False)


def hasty(site: Site) -> None:
    site.stop()
    site.program = ("-c", HASTY)
    site.start()


def told(site: Site, name: str = "qwen") -> dict[str, Any]:
    return site.policy(name).get("status", {}).get("pools", [{}])[0].get("profile", {})


@pytest.fixture
def own_profile(kubectl, namespace):
    """The name of a profile of this test alone."""
    yield f"own-{namespace}"
    kubectl.run("delete", "clockprofile", f"own-{namespace}", "--ignore-not-found")


def test_the_clock_follows_the_work_and_not_each_whiff_of_it(site, good_policy, own_profile):
    hasty(site)
    node = site.node()
    for name in ("decode-0", "decode-1"):
        site.pod(name, node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    serving = Serving()
    site.agent(node).measures = serving
    site.kubectl.apply(profile(own_profile, row(810, regime={"maxBatch": 32}), row(1200, regime={"minBatch": 32})))
    site.kubectl.apply(with_profile(good_policy, site, own_profile))

    def caps() -> set[int | None]:
        return {order.get("capMHz") for order in site.orders(node) if order["role"] == "Decode"}

    eventually(lambda: caps() == {810}, 60)
    eventually(lambda: told(site).get("rows") == [{"product": H200, "row": 1, "capMHz": 810}])

    def stays(batch: float, mhz: int) -> None:
        """See that the pool keeps its row for longer than other work would have to last."""
        serving.batch, since = batch, told(site)["since"]
        eventually(lambda: abs(float(told(site)["work"]["batch"]) / batch - 1) < 0.02, 60)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            assert caps() == {mhz}
            time.sleep(0.5)
        assert told(site)["since"] == since

    stays(34.0, 810)  # the other row's, if it were not for the border
    serving.batch = 60.0
    eventually(lambda: caps() == {1200}, 60)
    eventually(lambda: [each["row"] for each in told(site)["rows"]] == [2])
    events = site.kubectl.within(site.namespace).get("events")["items"]
    (event,) = [each for each in events if each["reason"] == "ProfileRow"]
    assert "1200 MHz instead of 810 MHz for NVIDIA H200" in event["message"]

    stays(49.5, 1200)
    since = told(site)["since"]
    site.stop()
    site.start()
    eventually(lambda: "leading as" in site.log.read_text().rsplit("probes on port", 1)[-1], 60)
    eventually(lambda: told(site)["since"] == since)
    assert caps() == {1200}

    serving.batch = 20.0
    eventually(lambda: caps() == {810}, 60)
    site.kubectl.apply(profile(own_profile, row(1200, regime={"minBatch": 32})))
    eventually(lambda: caps() == {None}, 30)
    eventually(lambda: site.condition("Enforced")[1] == "NoProfileRow", 30)
    assert "only for batch at least 32" in site.condition("Enforced")[2]
    assert "clock.tune" in site.condition("Enforced")[2]


def test_a_tuners_result_is_applied_and_used_by_another_policy(site, good_policy, own_profile):
    site.stop()
    pools = [
        {**pool, **({"clock": {"tune": {}}} if pool["role"] == "Decode" else {})}
        for pool in good_policy["spec"]["pools"]
    ]
    site.kubectl.apply(placed(good_policy, site, pools=pools))
    pool = {"name": pools[0]["name"], "role": "Decode"}

    def write(tuning: dict[str, Any]) -> None:
        site.patch_status("energypolicy", "qwen", {"pools": [{**pool, "tuning": tuning}]}, site.namespace)

    write(SETTLED | {"phase": "Searching", "message": "arm 3 of at most 8"})
    early = site.command("profile", f"{site.namespace}/qwen")
    assert (early.returncode, early.stdout) == (1, "")
    assert "still searches: arm 3 of at most 8" in early.stderr
    assert site.command("profile", f"{site.namespace}/gone").returncode == 1

    write(SETTLED)
    published = row(1590, evidence={"kind": "Published", "source": "a paper"})
    site.kubectl.apply(profile(own_profile, published))
    written = site.command("profile", f"{site.namespace}/qwen", "--into", own_profile)
    assert (written.returncode, written.stderr) == (0, "")
    assert site.kubectl.run("apply", "-f", "-", stdin=written.stdout).stderr == ""
    kept = site.kubectl.get("clockprofile", own_profile)
    assert kept["spec"] == yaml.safe_load(written.stdout)["spec"]
    assert [each["maxSMClockMHz"] for each in kept["spec"]["rows"]] == [1590, 705]
    again = site.command("profile", f"{site.namespace}/qwen", "--into", own_profile)
    assert again.stdout == written.stdout
    assert f"replaces row(s) 2 of {own_profile}" in again.stderr

    node = site.node()
    labels = {"llm-d.ai/role": "other"}
    site.pod("other-0", node, labels)
    serving = Serving()
    site.agent(node).measures = serving
    other = with_profile(good_policy, site, own_profile, labels)
    site.kubectl.apply(other | {"metadata": {**other["metadata"], "name": "other"}})
    hasty(site)

    def caps() -> list[int | None]:
        return [order.get("capMHz") for order in site.orders(node) if order["policy"]["name"] == "other"]

    eventually(lambda: caps() == [705], 60)
    serving.batch = 90.0  # what was found says nothing of so much work; the row for any does
    eventually(lambda: caps() == [1590], 60)
