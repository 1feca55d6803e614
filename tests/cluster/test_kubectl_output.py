"""What people see: the columns of kubectl get fit a screen, and kubectl describe can be read."""

import json
import re
from typing import Any

import pytest
from wattlock_api.base import Condition
from wattlock_api.nodeenergy import AgentStatus, NodeEnergyStatus
from wattlock_api.policystatus import (
    CountedEnergy,
    EnergyPolicyStatus,
    Limiters,
    PoolReason,
    PoolStatus,
    PowerCap,
    Savings,
    Summary,
)

pytestmark = [pytest.mark.cluster]

AT = "2026-11-23T12:00:00Z"
#: As long as such names get where teams name things after a model and a stage.
NAMESPACE, POLICY = "llm-inference-prod-1", "qwen3-235b-a22b-pd-1"
#: Ages start at "0s", as wide as their header, and get as wide as "3y200d".
LONG_AGE = 3
NODE = "gke-h200-pool-1-8f3c2b1d-x7kq"

#: The widest that is realistic: two products with caps of their own, a thousand GPUs, no verdict yet, not ready.
WIDEST = Summary(
    gpus=1024,
    capped="896/960",
    locked=860,
    clock="1410-1590MHz",
    power="614400W",
    saved="Inconclusive",
    saved_kwh="123456",
    observed="1410-1590MHz",
    joules_per_token="0.141",
)
USUAL = WIDEST.model_copy(
    update={
        "gpus": 8,
        "capped": "6/6",
        "clock": "1590MHz",
        "power": "4944W",
        "saved": "14.1%±0.4",
        "observed": "1590MHz",
    }
)


def condition(kind: str, status: str, reason: str, message: str) -> Condition:
    return Condition(
        type=kind, status=status, reason=reason, message=message, last_transition_time=AT, observed_generation=1
    )


def status(summary: Summary, ready: str = "True", reason: str = "InForce") -> dict[str, Any]:
    """A status as the operator writes it, some minutes into a verified saving."""
    decode = PoolStatus(
        name="decode",
        role="Decode",
        instances=6,
        pods=6,
        gpus=6,
        capped=6,
        locked=5,
        requested_mhz=1590,
        observed_mhz=1590,
        power_watts=3556,
        energy_kwh="12.810000",
        counted_joules="46116000.0",
        counted_capped_joules=[CountedEnergy(cap_mhz=1590, joules="40100000.0")],
        tokens_per_second="25221.0",
        joules_per_generated_token="0.1410",
        inter_token_latency_ms="7.65",
        limiters=Limiters(power_cap_seconds="0.0", thermal_seconds="0.0"),
        clamped_gpus=0,
        clamp_seconds="0.0",
        power_cap=PowerCap(limit_watts=700, peak_watts=656, time_at_cap_percent="0.0", verdict="Inert"),
        savings=Savings(
            method="Switchback",
            verdict="Verified",
            reason="IntervalExcludesZero",
            message="saving 14.1% (95% interval 13.7 to 14.5) for each token",
            energy_percent="14.10",
            ci95=["13.70", "14.50"],
            ci95_every_look=["13.11", "15.07"],
            evidence="1000000000.00",
            pairs=312,
            instances=6,
            saved_kwh="1.620000",
            saved_kwh_ci95=["1.510000", "1.730000"],
        ),
        reasons=[
            PoolReason(reason="Locked", gpus=5, message="at most 1590 MHz"),
            PoolReason(reason="ControlEpoch", gpus=1, message="released for comparison in this epoch"),
        ],
    )
    found = EnergyPolicyStatus(
        observed_generation=1,
        conditions=[
            condition("Ready", ready, reason, "the agents have acted on every order"),
            condition("Verified", "True", "IntervalExcludesZero", "pool decode: the saving of energy is verified"),
        ],
        summary=summary,
        pools=[decode],
        measured_at=AT,
    )
    return found.to_api()


def put_status(kubectl: Any, kind: str, name: str, body: dict[str, Any]) -> None:
    kubectl.run("patch", kind, name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": body}))


@pytest.fixture
def policy(kubectl: Any, crds: None, good_policy: dict[str, Any]):
    """A policy with a long name in a namespace with a long name; its columns are asked of the API server."""
    kubectl.run("create", "namespace", NAMESPACE)
    good_policy["metadata"] = {"name": POLICY, "namespace": NAMESPACE}
    kubectl.apply(good_policy)
    yield kubectl.within(NAMESPACE)
    kubectl.run("delete", "namespace", NAMESPACE, "--wait=true", timeout_seconds=60)


def table(kubectl: Any, *arguments: str) -> tuple[list[str], int]:
    """The header's words and the width of the widest line."""
    lines = kubectl.run("get", *arguments).stdout.rstrip("\n").splitlines()
    assert len(lines) >= 2
    return lines[0].split(), max(len(line.rstrip()) for line in lines)


def test_policies_fit_a_screen(policy):
    put_status(policy, "energypolicy", POLICY, status(WIDEST, "False", "WaitingForAgents"))
    header, width = table(policy, "epol")
    assert header == ["NAME", "MODE", "GPUS", "CAPPED", "CLOCK", "POWER", "SAVED", "READY", "AGE"]
    assert width + LONG_AGE <= 120
    header, width = table(policy, "epol", "-o", "wide")
    assert header == [
        "NAME", "MODE", "GPUS", "CAPPED", "CLOCK", "POWER", "SAVED", "READY",
        "OBSERVED", "J/TOKEN", "SAVED-KWH", "REASON", "AGE",
    ]  # fmt: skip
    assert width + LONG_AGE <= 160


def test_the_usual_policy_fits_with_its_namespace_too(policy):
    put_status(policy, "energypolicy", POLICY, status(USUAL))
    assert table(policy, "epol", "--all-namespaces")[1] + LONG_AGE <= 120
    assert table(policy, "epol", "--all-namespaces", "-o", "wide")[1] + LONG_AGE <= 160


def test_what_is_unknown_leaves_its_column_empty(policy):
    put_status(policy, "energypolicy", POLICY, status(Summary(gpus=8, capped="0/6", clock="1590MHz", saved="Unknown")))
    row = policy.run("get", "epol", POLICY, "--no-headers").stdout.split()
    assert row[:6] == [POLICY, "Enforce", "8", "0/6", "1590MHz", "Unknown"], "no power"


def test_describe_reads_well(policy):
    put_status(policy, "energypolicy", POLICY, status(USUAL))
    text = policy.run("describe", "epol", POLICY).stdout
    assert re.search(r"Reason: +InForce\n +Status: +True\n +Type: +Ready", text)
    assert re.search(r"Saved K Wh: +1.620000", text)
    assert re.search(r"Saved: +14.1%±0.4", text)
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 160


def test_nodes_fit_a_screen(kubectl, crds):
    manifest = {"apiVersion": "wattlock.dev/v1alpha1", "kind": "NodeEnergy", "metadata": {"name": NODE}, "spec": {}}
    kubectl.apply(manifest)
    try:
        agent = AgentStatus(
            version="0.1.0",
            pod="wattlock-agent-1a2b3c4d-x7kqz",
            driver_version="580.95.05",
            can_write=False,
            reason="JournalUnwritable",
        )
        found = NodeEnergyStatus(observed_generation=1, reported_at=AT, agent=agent, capped="8/8", locked=7)
        put_status(kubectl, "nodeenergy", NODE, found.to_api())
        header, width = table(kubectl, "nen")
        assert header == ["NAME", "CAPPED", "DRIVER", "WRITES", "PHASE", "REPORTED", "AGE"]
        assert width <= 120
        header, width = table(kubectl, "nen", "-o", "wide")
        assert header == [
            "NAME", "CAPPED", "DRIVER", "WRITES", "PHASE", "REPORTED", "LOCKED", "AGENT", "REASON", "AGE",
        ]  # fmt: skip
        assert width <= 160
    finally:
        kubectl.run("delete", "nodeenergy", NODE)
