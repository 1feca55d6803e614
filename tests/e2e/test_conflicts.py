"""Others who set clocks and power of the same GPUs: what Skip and Coexist do about them, by the driver's own log."""

from itertools import pairwise

import pytest
from workloads import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

ANNOTATION = "dynamo.nvidia.com/gpu-power-limit"


def enforced(policy, conflict_policy):
    spec = {"verification": {"method": "None"}, "conflictPolicy": conflict_policy}
    return policy | {"spec": policy["spec"] | spec}


def conflict(workload):
    found = workload.condition("Conflict")
    return found.get("status"), found.get("reason")


def locks_of(simulator, uuid, since):
    """When Wattlock locked a GPU, by the driver's log."""
    writes = simulator.writes()[since:]
    return [write.at_seconds for write in writes if write.locks and write.uuid == uuid and write.arguments[1] == 1590]


def test_an_annotated_pod_is_skipped_and_with_coexist_capped(serving_pods, simulator, good_policy):
    workload = serving_pods
    claimed, other = workload.pods("decode")
    name = claimed["metadata"]["name"]
    workload.kubectl.run("annotate", "pod", name, f"{ANNOTATION}=450")
    try:
        since = len(simulator.writes())
        workload.kubectl.apply(enforced(good_policy, "Skip"))
        eventually("the other pod is capped", lambda: simulator.locked() == workload.gpus_of(other), 40)
        eventually("the conflict is told", lambda: conflict(workload) == ("True", "OtherController"), 30)
        message = workload.condition("Conflict")["message"]
        for word in (ANNOTATION, name, "Dynamo", "conflictPolicy: Coexist"):
            assert word in message
        (gpu,) = workload.gpus_of(claimed)
        assert [write for write in simulator.writes()[since:] if write.uuid == gpu] == []
        workload.kubectl.run("patch", "epol", "qwen", "--type=merge", "-p", '{"spec":{"conflictPolicy":"Coexist"}}')
        eventually("both are capped", workload.locked, 40)
        eventually("it is no alarm", lambda: conflict(workload) == ("False", "OtherController"), 30)
        workload.kubectl.run("patch", "epol", "qwen", "--type=merge", "-p", '{"spec":{"conflictPolicy":"Skip"}}')
        eventually("it is released again", lambda: simulator.locked() == workload.gpus_of(other), 40)
    finally:
        workload.kubectl.run("annotate", "pod", name, f"{ANNOTATION}-")
    eventually("without the annotation both are capped", workload.locked, 40)


def test_a_program_that_keeps_undoing_the_cap_wins_or_is_answered_once_a_minute(serving_pods, simulator, good_policy):
    workload = serving_pods
    pod = workload.pods("decode")[0]
    node = pod["spec"]["nodeName"]
    (gpu,) = workload.gpus_of(pod)
    # It looks like the hand-written DaemonSets that people run; the writes themselves are made on the driver directly.
    script = "while :; do sleep 1; done; nvidia-smi -rgc"
    fighter = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "fighter"},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "smi",
                    "image": "localhost/wattlock-simulator:dev",
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", script],
                }
            ],
        },
    }
    workload.kubectl.apply(fighter)
    since = len(simulator.writes())

    def undo():
        """Undo the lock as ``nvidia-smi -rgc`` does, if there is one."""
        if gpu in simulator.locked():
            simulator.control(node, "unlock", "--gpu", gpu)

    def undone_until(what, condition, seconds):
        eventually(what, lambda: (undo(), condition())[1], seconds)

    try:
        workload.kubectl.apply(enforced(good_policy, "Skip"))
        undone_until("Wattlock gives up", lambda: conflict(workload) == ("True", "OtherWriter"), 120)
        message = workload.condition("Conflict")["message"]
        assert f"pod {workload.namespace}/fighter" in message
        assert len(locks_of(simulator, gpu, since)) == 3
        assert gpu not in simulator.locked()
        since = len(simulator.writes())
        workload.kubectl.run("patch", "epol", "qwen", "--type=merge", "-p", '{"spec":{"conflictPolicy":"Coexist"}}')
        undone_until("it is contested", lambda: conflict(workload) == ("False", "Contested"), 120)
        seen = len(locks_of(simulator, gpu, since))
        assert seen == 3
        undone_until("the cap is set again twice", lambda: len(locks_of(simulator, gpu, since)) >= seen + 2, 200)
        gaps = [later - earlier for earlier, later in pairwise(locks_of(simulator, gpu, since)[2:])]
        assert min(gaps) >= 59, gaps
        assert conflict(workload) == ("False", "Contested")
    finally:
        workload.kubectl.run("delete", "pod", "fighter", "--wait=false")
    workload.delete_policies()


def test_a_lock_that_stood_before_ours_is_left_alone_until_somebody_undoes_it(serving_pods, simulator, good_policy):
    workload = serving_pods
    pod, other = workload.pods("decode")
    node = pod["spec"]["nodeName"]
    (gpu,) = workload.gpus_of(pod)
    simulator.control(node, "lock", "--gpu", gpu, "--min", "345", "--max", "1200")
    try:
        since = len(simulator.writes())
        workload.kubectl.apply(enforced(good_policy, "Skip"))
        eventually("the conflict is told", lambda: conflict(workload) == ("True", "ForeignLock"), 60)
        message = workload.condition("Conflict")["message"]
        for word in ("1200 MHz", "nvidia-smi -rgc", "a person with nvidia-smi"):
            assert word in message
        eventually("the other pod is capped", lambda: workload.gpus_of(other) <= simulator.locked(), 40)
        assert [write for write in simulator.writes()[since:] if write.uuid == gpu] == []
    finally:
        simulator.control(node, "unlock", "--gpu", gpu)
    eventually("it is capped once it is free", lambda: locks_of(simulator, gpu, since), 40)
    eventually("the conflict is over", lambda: conflict(workload) == ("False", "NoConflict"), 40)


def test_coexist_replaces_a_lock_that_stood_before(serving_pods, simulator, good_policy):
    workload = serving_pods
    pod = workload.pods("decode")[0]
    (gpu,) = workload.gpus_of(pod)
    since = len(simulator.writes())
    simulator.control(pod["spec"]["nodeName"], "lock", "--gpu", gpu, "--min", "345", "--max", "1200")
    workload.kubectl.apply(enforced(good_policy, "Coexist"))
    eventually("it is capped", lambda: locks_of(simulator, gpu, since), 40)
    eventually("it is capped", lambda: workload.pool("decode").get("capped") == 2, 40)
