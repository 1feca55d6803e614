"""Somebody deletes our kinds while policies are in force: they go, and are served again once they are back."""

import json
from pathlib import Path

import pytest
from operator_site import DECODE, PREFILL, eventually, placed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
KINDS = ("energypolicies.wattlock.dev", "nodeenergies.wattlock.dev", "clockprofiles.wattlock.dev")


@pytest.fixture
def crds_afterwards(kubectl):
    """Whatever happens, the next test finds our kinds."""

    def restore():
        # One that is still being deleted cannot be brought back: every later test would find it missing.
        for policy in json.loads(kubectl.run("get", "epol", "-A", "-o", "json", check=False).stdout or "{}").get(
            "items", []
        ):
            free = '{"metadata": {"finalizers": []}}'
            here = kubectl.within(policy["metadata"]["namespace"])
            here.run("patch", "epol", policy["metadata"]["name"], "--type=merge", "-p", free, check=False)
        eventually(
            lambda: not [crd for crd in kubectl.get("crd")["items"] if "deletionTimestamp" in crd["metadata"]], 60
        )
        kubectl.run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
        kubectl.run("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))

    yield restore
    restore()


def delete(kubectl, kinds):
    for kind in kinds:
        kubectl.run("delete", "crd", kind, "--wait=false")
    eventually(lambda: not {crd["metadata"]["name"] for crd in kubectl.get("crd")["items"]} & set(KINDS), 45)


def in_force(site, policy):
    """A node of its own each time: one without a kubelet soon counts as gone, and its pods as not ready."""
    node = site.node()
    site.pod(f"decode-{node}", node, DECODE)
    site.pod(f"prefill-{node}", node, PREFILL)
    agent = site.agent(node)
    site.kubectl.apply(policy)
    eventually(lambda: site.policy().get("status", {}).get("summary", {}).get("locked"), 60)
    return agent


@pytest.mark.parametrize("first", KINDS[:2])
def test_deleted_kinds_are_not_held_up_and_may_come_back(kubectl, crds_afterwards, site, good_policy, first):
    policy = placed(good_policy, site)
    agent = in_force(site, policy)
    delete(kubectl, sorted(KINDS, key=lambda kind: kind != first))
    agent.stop()
    assert site.operator.poll() is None, "the operator lives"

    crds_afterwards()
    # In a pod the kubelet starts it anew.
    assert site.operator.wait(60) == 0
    site.start()
    in_force(site, policy)
