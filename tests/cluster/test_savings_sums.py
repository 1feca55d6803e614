"""The sum of what was saved, through a real API server: operators restart, and another one leads for a while."""

import json
import signal
import time
from typing import Any

import pytest
from operator_site import DECODE, KWH, PREFILL, eventually, measured, placed
from wattlock_api.base import timestamp
from wattlock_api.constants import LEASE_NAME
from wattlock_operator.kube import lease_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def test_what_was_saved_outlives_operators(site, good_policy):
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    agent = site.agent(node)
    agent.extra = measured(10)
    site.kubectl.apply(placed(good_policy, site))

    def savings() -> dict[str, Any]:
        pools = site.policy().get("status", {}).get("pools", [{}])
        return dict(pools[0].get("savings", {}))

    def saved(kwh: float, seconds: float = 40) -> None:
        def told() -> bool:
            assert savings().get("savedKWh") == f"{kwh:.6f}", savings()
            return True

        eventually(told, seconds)
        low, high = map(float, savings()["savedKWhCI95"])
        assert low <= kwh <= high

    saved(0)  # what was used before is not claimed
    agent.extra = measured(11)
    saved(0.25)

    assert site.stop(signal.SIGTERM) == 0
    agent.extra = measured(13)  # it goes on while no operator watches
    eventually(lambda: f"{13 * KWH:.1f}" in json.dumps(site.node_energy(node)["status"]))
    site.start()
    saved(0.75)

    # Another operator takes the lease, counts on, and goes without a word.
    lease = lease_path(site.namespace, LEASE_NAME)
    other = {"holderIdentity": "other", "renewTime": timestamp(time.time()).replace("Z", ".000000Z")}
    site.kube.merge(lease, {"spec": other})
    eventually(lambda: "another operator holds the lease" in site.log.read_text(), 40)
    pools = site.policy()["status"]["pools"]
    pools[0]["savings"] |= {"savedKWh": "5.000000", "savedKWhCI95": ["4.900000", "5.100000"]}
    site.patch_status("energypolicy", "qwen", {"pools": pools}, site.namespace)
    site.kube.merge(lease, {"spec": {"holderIdentity": ""}})
    eventually(lambda: site.log.read_text().count("leading as") >= 3, 20)
    agent.extra = measured(14)
    saved(5.25, 60)
