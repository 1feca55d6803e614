"""Other controllers and other programs: who is recognised, what is held back, whom the Conflict condition suspects."""

from dataclasses import replace

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, node_energy, pod, policy, world
from wattlock_api.nodeenergy import AgentStatus
from wattlock_operator.decide import Memory, decide
from wattlock_operator.orders import give_orders
from wattlock_operator.parse import parse_pod
from wattlock_operator.release import locked_uuids
from wattlock_operator.writers import CONTROLLERS, claims_of, controller_of, suspects_sentence, writer_of

LIMIT = "dynamo.nvidia.com/gpu-power-limit"
CLAIMED = pod("d0", DECODE, claims=(LIMIT,))
PEERS = (pod("p0", PREFILL), agent_pod("n1"))


def status_of(pods, gpus=(), agent=None, **spec):
    found = [policy(spec=spec)]
    orders = decide(world(found, pods), None, Memory(), NOW).write_orders.get("n1", ())
    entry = node_energy(gpus=gpus, orders=orders)
    if agent is not None:
        entry = replace(entry, status=entry.status.model_copy(update={"agent": agent}))
    return decide(world(found, pods, [entry]), None, Memory(), NOW).statuses["uid-qwen"]


def condition(status, kind):
    (found,) = [entry for entry in status.conditions if entry.type == kind]
    return found


def order_of(pods, name="d0", **spec):
    given = give_orders(world([policy(spec=spec)], pods))
    return next(order for orders in given.by_node.values() for order in orders if order.pod.name == name)


# --- annotations -----------------------------------------------------------------------------------------------------


def test_the_annotations_of_a_pod_are_read():
    for each in CONTROLLERS:
        body = {"metadata": {"name": "d0", "annotations": {"other": "x", each.annotation: "450"}}}
        assert parse_pod(body).claims == (each.annotation,)
        assert controller_of(each.annotation) is each
    assert parse_pod({"metadata": {"annotations": {"prometheus.io/port": "8000"}}}).claims == ()
    assert claims_of({}) == ()


def test_a_claimed_pod_is_skipped_unless_the_policy_coexists():
    held = order_of([CLAIMED, *PEERS])
    assert held.cap_mhz is None
    assert held.hold.reason == "OtherController"
    for word in ("d0", LIMIT, "Dynamo", "Coexist"):
        assert word in held.hold.message
    assert held.conflict_policy == "Skip"
    capped = order_of([CLAIMED, *PEERS], conflictPolicy="Coexist")
    assert (capped.cap_mhz, capped.hold, capped.conflict_policy) == (1590, None, "Coexist")


def test_an_annotation_on_a_prefill_pod_holds_nothing_back():
    pods = [pod("d0", DECODE), pod("p0", PREFILL, claims=(LIMIT,)), agent_pod("n1")]
    assert order_of(pods).cap_mhz == 1590
    assert condition(status_of(pods), "Conflict").status == "False"


def test_the_condition_names_annotation_controller_and_pods_and_is_bounded():
    pods = [*(pod(f"d{number}", DECODE, claims=(LIMIT,)) for number in range(8)), *PEERS]
    found = condition(status_of(pods), "Conflict")
    assert (found.status, found.reason) == ("True", "OtherController")
    for word in ("8 pod(s)", LIMIT, "Dynamo's Power Agent", "d0, d1, d2, d3, d4 and more", "conflictPolicy: Coexist"):
        assert word in found.message
    assert "d5" not in found.message
    assert condition(status_of(pods), "Ready").reason == "OtherController"
    assert condition(status_of(pods), "Enforced").reason == "OtherController"


def test_with_coexist_it_is_said_and_no_alarm():
    status = status_of([CLAIMED, *PEERS], conflictPolicy="Coexist")
    found = condition(status, "Conflict")
    assert (found.status, found.reason) == ("False", "OtherController")
    assert "capped all the same" in found.message
    assert condition(status, "Ready").status == "True"


def test_in_observe_mode_it_is_said_before_anybody_enforces():
    found = condition(status_of([CLAIMED, *PEERS], mode="Observe"), "Conflict")
    assert (found.status, found.reason) == ("False", "OtherController")
    assert "mode Enforce would leave them alone" in found.message


# --- suspects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "container", "expected"),
    [
        ({"app": "nvidia-dcgm"}, {}, "DCGM host engine"),
        ({}, {"image": "nvcr.io/nvidia/cloud-native/dcgm:4.2.3-1-ubuntu22.04"}, "DCGM host engine"),
        ({}, {"image": "x", "command": ["nv-hostengine", "-n"]}, "DCGM host engine"),
        ({"app": "nvidia-dcgm-exporter"}, {"image": "nvcr.io/nvidia/k8s/dcgm-exporter:4.2"}, ""),
        ({"app.kubernetes.io/component": "power-agent"}, {}, "NVIDIA Dynamo's Power Agent"),
        ({}, {"command": ["python", "/app/power_agent.py"]}, "NVIDIA Dynamo's Power Agent"),
        ({}, {"image": "registry:5000/team/zeusd@sha256:00"}, "zeusd"),
        ({}, {"args": ["zeusd serve --allow-unprivileged"]}, "zeusd"),
        ({}, {"command": ["nvidia-smi", "-lgc", "345,1200"]}, "nvidia-smi in a pod"),
        (
            {},
            {"command": ["sh", "-c"], "args": ["while :; do nvidia-smi -i 0 -pl 290; sleep 9; done"]},
            "nvidia-smi in a pod",
        ),
        ({}, {"args": ["nvidia-smi --reset-gpu-clocks"]}, "nvidia-smi in a pod"),
        ({}, {"args": ["nvidia-smi -q; ls -pl"]}, ""),
        ({}, {"args": ["nvidia-smi -L"]}, ""),
        ({}, {"image": None, "command": "text", "args": [7, None]}, ""),
        ({}, {"args": ["x" * 100_000 + " nvidia-smi -lgc 1"]}, ""),
    ],
)
def test_known_writers_are_recognised(labels, container, expected):
    body = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    assert parse_pod(body).writer == expected


OTHER_WRITER = gpu(0, state="Conflict", reason="OtherWriter", message="the clock was changed three times")
DCGM = pod("nvidia-dcgm-x", node="n1", namespace="gpu-operator", wants_gpu=False, writer="DCGM host engine")


@pytest.mark.parametrize("reason", ["OtherWriter", "ForeignLock"])
def test_the_conflict_names_whom_it_suspects_on_that_node(reason):
    entry = OTHER_WRITER.model_copy(update={"reason": reason})
    elsewhere = pod("zeusd-y", node="n2", wants_gpu=False, writer="zeusd")
    status = status_of([pod("d0", DECODE), *PEERS, DCGM, elsewhere], [entry])
    found = condition(status, "Conflict")
    assert (found.status, found.reason) == ("True", reason)
    assert "changed three times" in found.message
    assert "Suspected on n1: DCGM host engine (pod gpu-operator/nvidia-dcgm-x)" in found.message
    assert "zeusd" not in found.message
    assert condition(status, "Ready").reason == reason


def test_without_a_known_writer_a_person_is_suspected():
    finished = pod("job", node="n1", wants_gpu=False, writer="nvidia-smi in a pod", phase="Succeeded")
    found = condition(status_of([pod("d0", DECODE), *PEERS, finished], [OTHER_WRITER]), "Conflict")
    assert "a person with nvidia-smi or a program outside Kubernetes" in found.message
    assert "job" not in found.message


def test_suspects_are_bounded():
    text = suspects_sentence(
        [f"zeusd (pod a/b{number})" for number in range(50)], [f"n{number}" for number in range(9)]
    )
    assert "and 47 more" in text
    assert "n0, n1, n2 and more" in text
    assert len(text) < 200


def test_a_contested_gpu_is_told_without_alarm_and_counts_as_locked_for_a_deletion():
    contested = gpu(0, state="Conflict", reason="Contested", message="another program sets its clock")
    status = status_of([pod("d0", DECODE), *PEERS, DCGM], [contested], conflictPolicy="Coexist")
    found = condition(status, "Conflict")
    assert (found.status, found.reason) == ("False", "Contested")
    assert "DCGM" in found.message
    assert condition(status, "Ready").status == "True"
    assert condition(status, "Enforced").reason == "Contested"
    assert status.summary.capped == "0/1"
    assert locked_uuids(node_energy(gpus=[contested]).status, "uid-qwen") == ("GPU-0",)
    assert locked_uuids(node_energy(gpus=[OTHER_WRITER]).status) == ()


# --- damage of the journal -------------------------------------------------------------------------------------------


def test_a_damaged_journal_reaches_the_policies_with_orders_on_that_node():
    damage = AgentStatus(reason="JournalDamaged", message="/state/GPU-0.json: damaged (no JSON)")
    status = status_of([pod("d0", DECODE), *PEERS], [gpu(0)], damage)
    reasons = {each.reason: each for each in status.pools[0].reasons}
    assert reasons["JournalDamaged"].gpus == 0
    assert "node n1: /state/GPU-0.json" in reasons["JournalDamaged"].message
    assert "docs/runbooks/ready.md" in reasons["JournalDamaged"].message
    ready = condition(status, "Ready")
    assert (ready.status, ready.reason) == ("True", "JournalDamaged")
    assert "GPU-0.json" in ready.message
    assert condition(status_of([pod("d0", DECODE), *PEERS], [gpu(0)]), "Ready").reason == "InForce"


def test_of_a_pod_with_hundreds_of_containers_the_first_ones_are_looked_at():
    commands = iter(["sleep 1"] * 340)
    assert writer_of({}, [], commands) == ""
    assert len(list(commands)) >= 300


def test_an_option_far_from_its_program_is_not_its_option():
    assert writer_of({}, [], ["nvidia-smi " + "x" * 300 + " -lgc 1"]) == ""
