"""Placements against a real API server, with Kubernetes' own DaemonSet controller: one agent on a node, and limits."""

import json
import signal
from typing import Any

import pytest
from operator_site import DECODE, NODE_LABEL, PREFILL, TEMPLATE, Site, eventually, placed
from wattlock_api.base import Toleration
from wattlock_api.constants import COMPONENT_LABEL, PLACEMENT_LABEL, Mode
from wattlock_api.energypolicy import Placement
from wattlock_operator.kube import daemon_sets_path
from wattlock_operator.placement import daemon_set
from wattlock_operator.sharing import MAX_PLACEMENTS, Shared

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def daemon_sets(site: Site) -> list[dict[str, Any]]:
    return list(site.kubectl.within(site.namespace).get("daemonsets")["items"])


def agents_of(site: Site, node: str) -> list[str]:
    """The pods that the DaemonSet controller made for a node, by their placement label."""
    found = []
    for pod in site.kubectl.within(site.namespace).get("pods", "-l", f"{COMPONENT_LABEL}=agent")["items"]:
        required = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        if all(
            {"key": "metadata.name", "operator": "In", "values": [node]} in term.get("matchFields", [])
            for term in required["nodeSelectorTerms"]
        ):
            found.append(pod["metadata"]["labels"][PLACEMENT_LABEL])
    return found


def observer(policy: dict[str, Any], site: Site, name: str, **placement: Any) -> dict[str, Any]:
    """A policy that observes pods that there are not, with a placement."""
    made = placed(policy, site, mode="Observe", placement=placement)
    made["metadata"] = {"name": name, "namespace": site.namespace}
    for pool in made["spec"]["pools"]:
        pool["selector"] = {"matchLabels": {"app": name}}
    return made


def may_write(made: dict[str, Any]) -> bool:
    (container,) = made["spec"]["template"]["spec"]["containers"]
    return "SYS_ADMIN" in container["securityContext"]["capabilities"].get("add", [])


def test_whatever_others_place_there_is_one_agent_on_a_node_and_it_may_cap(site, good_policy):
    labelled, special = site.node(), site.node()
    site.kubectl.run("label", "node", special, f"wattlock-test={site.namespace}")
    site.kubectl.run("taint", "node", special, "team=a:NoSchedule")
    # Older, observing, broader and narrower, with other taints and an unheard-of RuntimeClass.
    broad = {"nodeSelector": {}, "tolerations": [{"key": "team", "operator": "Exists"}]}
    narrow = {"nodeSelector": {"wattlock-test": site.namespace}, "runtimeClassName": "unheard-of"}
    site.kubectl.apply(observer(good_policy, site, "narrow", **narrow))
    eventually(lambda: [may_write(made) for made in daemon_sets(site)] == [False])
    site.kubectl.apply(observer(good_policy, site, "broad", **broad))
    site.kubectl.apply(placed(good_policy, site))
    eventually(lambda: [may_write(made) for made in daemon_sets(site)] == [True])
    (made,) = daemon_sets(site)
    assert "runtimeClassName" not in made["spec"]["template"]["spec"]
    for node in (labelled, special):
        eventually(lambda node=node: agents_of(site, node) == [made["metadata"]["labels"][PLACEMENT_LABEL]])
    # Told after the DaemonSet was written.
    eventually(lambda: site.condition("Conflict", "narrow")[:2] == ("True", "PlacementOverlap"))
    assert f"{site.namespace}/qwen" in site.condition("Conflict", "narrow")[2]
    assert site.condition("Conflict")[:2] == ("False", "NoConflict")
    # One that can meet none of them has agents of its own: only after the broad one is gone.
    apart = {"nodeSelector": {"nvidia.com/gpu.present": "false", "wattlock-test": "other"}}
    site.kubectl.within(site.namespace).run("delete", "energypolicy", "broad", "--timeout=20s")
    site.kubectl.apply(observer(good_policy, site, "apart", **apart))
    eventually(lambda: sorted(map(may_write, daemon_sets(site))) == [False, True])


def test_the_largest_daemonset_is_one_that_the_api_server_takes(site):
    most = [
        Placement(
            node_selector={f"{'p' * 63}.example/{'k' * 61}{key:02}": f"v{index}" for key in range(index, index + 16)},
            tolerations=[Toleration(key=f"t{index}-{key}", value="v" * 63, effect="NoExecute") for key in range(16)],
            runtime_class_name="r" * 63,
        )
        for index in range(MAX_PLACEMENTS)
    ]
    made = daemon_set(TEMPLATE, Shared(tuple(most), Mode.ENFORCE, "r" * 63), site.namespace)
    terms = made["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    assert len(terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]) == MAX_PLACEMENTS
    path = daemon_sets_path(site.namespace, made["metadata"]["name"])
    site.kube.request("PATCH", path, {"fieldManager": "test", "dryRun": "All"}, made, "application/apply-patch+yaml")


def test_a_placement_beyond_the_administrators_limit_does_nothing_and_says_what_to_write(site, good_policy):
    site.stop(signal.SIGTERM)
    site.settings["WATTLOCK_ALLOWED_PLACEMENTS"] = json.dumps([{"nodeSelector": NODE_LABEL}])
    site.start()
    node = site.node()
    site.pod("decode-0", node, DECODE)
    site.pod("prefill-0", node, PREFILL)
    site.agent(node)
    everywhere = {"nodeSelector": {}, "tolerations": [{"operator": "Exists"}]}
    site.kubectl.apply(placed(good_policy, site, placement=everywhere))
    eventually(lambda: site.condition("Ready")[1] == "PlacementNotAllowed")
    assert '"nvidia.com/gpu.present": "true"' in site.condition("Ready")[2]
    assert site.condition("Enforced")[1] == "PlacementNotAllowed"
    kubectl = site.kubectl.within(site.namespace)
    (event,) = eventually(lambda: kubectl.get("events", "--field-selector", "reason=PlacementNotAllowed")["items"])
    assert event["type"] == "Warning"
    assert daemon_sets(site) == []
    assert site.orders(node) == []
    # What the sentence says helps, and what is taken back releases.
    site.kubectl.apply(placed(good_policy, site, placement={"nodeSelector": NODE_LABEL}))
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked") == 1)
    site.kubectl.apply(placed(good_policy, site, placement=everywhere))
    eventually(lambda: daemon_sets(site) == [])
    eventually(lambda: site.orders(node) == [])


def test_the_number_of_daemonsets_is_bounded(site, good_policy):
    asked = range(MAX_PLACEMENTS + 2)
    site.kubectl.apply(
        *(observer(good_policy, site, f"p{index:02}", nodeSelector={"pool": f"p{index}"}) for index in asked)
    )
    last = f"p{MAX_PLACEMENTS + 1:02}"
    eventually(lambda: site.condition("Ready", last)[1] == "TooManyPlacements")
    eventually(lambda: len(daemon_sets(site)) == MAX_PLACEMENTS)
    assert "write the same spec.placement" in site.condition("Ready", last)[2]
    assert site.condition("Ready", "p00")[1] != "TooManyPlacements"
    site.kubectl.within(site.namespace).run("delete", "energypolicy", "p00", "p01", "--timeout=20s")
    eventually(lambda: site.condition("Ready", last)[1] not in ("", "TooManyPlacements"))
    eventually(lambda: len(daemon_sets(site)) == MAX_PLACEMENTS)
