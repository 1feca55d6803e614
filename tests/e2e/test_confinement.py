"""What a running agent and operator may do on their node, asked of the kernel; and namespaces that enforce it."""

import json
import subprocess
from typing import Any

import pytest
from workloads import AGENT_LABEL, OPERATOR_LABEL, SYSTEM, Simulator, Workload, eventually, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ALWAYS = {"verification": {"method": "None"}}
AGENTS = "wattlock-agents"
LEVEL = "pod-security.kubernetes.io/enforce"
SYS_ADMIN = 1 << 21

#: Reads the state of the container's first process, and tries to write.
LOOK = """
import json, os
found = dict(line.split(":", 1) for line in open("/proc/1/status"))
state = {key: found[key].split()[0] for key in ("Uid", "NoNewPrivs", "Seccomp")}
state |= {key: int(found[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
state["written"] = []
for folder in ("/", "/etc", "/usr/local", "/app", os.path.dirname(os.__file__)):
    try:
        open(os.path.join(folder, "intruder"), "w")
        state["written"].append(folder)
    except OSError:
        pass
state["hostProcesses"] = sorted(name for name in os.listdir("/proc") if name.isdigit() and name != "1")
state["interfaces"] = sorted(os.listdir("/sys/class/net"))
state["mine"] = str(os.getpid())
print(json.dumps(state))
"""


def look(kubectl: Any, namespace: str, pod: str) -> dict[str, Any]:
    """Return what the kernel says of the first process of a pod."""
    shown = kubectl.within(namespace).run("exec", pod, "--", "python", "-c", LOOK).stdout
    found: dict[str, Any] = json.loads(shown)
    return found


def confined(state: dict[str, Any], capabilities: int) -> None:
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        assert state[kind] == capabilities, (kind, hex(state[kind]))
    assert (state["CapInh"], state["CapAmb"]) == (0, 0)
    assert state["Seccomp"] == "2", "a filter is in force"
    assert state["NoNewPrivs"] == "1"
    assert state["written"] == [], "the root is read-only"
    assert set(state["hostProcesses"]) <= {state["mine"]}, "it sees no process of its node"
    assert set(state["interfaces"]) <= {"lo", "eth0"}, "it has a network of its own"


def agents(kubectl: Any, namespace: str = SYSTEM) -> list[str]:
    """Return the names of the agents that are ready."""
    found = kubectl.within(namespace).get("pods", "-l", AGENT_LABEL)["items"]
    return [
        pod["metadata"]["name"]
        for pod in found
        if "deletionTimestamp" not in pod["metadata"]
        if {"type": "Ready", "status": "True"}.items()
        <= next((c for c in pod["status"].get("conditions", []) if c["type"] == "Ready"), {}).items()
    ]


@pytest.mark.parametrize(("mode", "capabilities"), [("Observe", 0), ("Enforce", SYS_ADMIN)])
def test_a_running_agent_has_no_capability_but_the_one_to_lock(kubectl, serving_pods, good_policy, mode, capabilities):
    serving_pods.kubectl.apply(good_policy | {"spec": good_policy["spec"] | ALWAYS | {"mode": mode}})
    found = eventually("both agents are ready", lambda: len(names := agents(kubectl)) == 2 and names, 60)
    for name in found:
        state = look(kubectl, SYSTEM, name)
        confined(state, capabilities)
        assert state["Uid"] == "0"


def test_the_running_operator_has_no_capability(kubectl, wattlock):
    (pod,) = kubectl.within(SYSTEM).get("pods", "-l", OPERATOR_LABEL)["items"]
    state = look(kubectl, SYSTEM, pod["metadata"]["name"])
    confined(state, 0)
    assert state["Uid"] == "65532"


def helm(*words: str) -> None:
    result = subprocess.run(["helm", *words], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def apart(kubectl, wattlock, install):
    """Wattlock with its agents in a namespace of their own; afterwards in one again."""
    helm("uninstall", "wattlock", "--namespace", SYSTEM, "--wait", "--timeout", "3m")
    try:
        kubectl.run("create", "namespace", AGENTS)
        kubectl.run("label", "namespace", AGENTS, f"{LEVEL}=privileged")
        kubectl.run("label", "namespace", SYSTEM, f"{LEVEL}=restricted")
        install("--set", f"agent.namespace={AGENTS}")
        yield
    finally:
        helm("uninstall", "wattlock", "--namespace", SYSTEM, "--wait", "--timeout", "3m")
        kubectl.run("label", "namespace", SYSTEM, f"{LEVEL}-")
        kubectl.run("delete", "namespace", AGENTS, "--timeout=60s", timeout_seconds=70)
        install()


def test_the_operator_lives_under_restricted_and_the_agents_in_a_namespace_of_their_own(kubectl, apart, good_policy):
    simulator = Simulator(kubectl, AGENTS)
    name = "llm-apart"
    kubectl.run("create", "namespace", name)
    workload = Workload(kubectl, name, simulator)
    try:
        workload.deploy(serving("decode", 2), serving("prefill", 1))
        workload.kubectl.apply(good_policy | {"spec": good_policy["spec"] | ALWAYS})
        eventually("decode is locked", workload.locked, 60)
        eventually("both agents are ready", lambda: len(agents(kubectl, AGENTS)) == 2, 60)
        assert agents(kubectl) == []
        # Without the room that they need agents are refused, and the reason is where status sends people to look.
        kubectl.run("label", "namespace", AGENTS, f"{LEVEL}=restricted", "--overwrite")
        kubectl.within(AGENTS).run("delete", "pods", "-l", AGENT_LABEL, "--timeout=60s", timeout_seconds=70)
        assert simulator.locked() == set(), "who goes releases"
        refused = eventually(
            "the refusal is told",
            lambda: [
                event["message"]
                for event in kubectl.within(AGENTS).get("events", "--field-selector=reason=FailedCreate")["items"]
                if "wattlock-agent-" in event["involvedObject"]["name"]
            ],
            60,
        )
        assert 'violates PodSecurity "restricted' in refused[-1]
        assert "hostPath" in refused[-1]
        kubectl.run("label", "namespace", AGENTS, f"{LEVEL}=privileged", "--overwrite")
        kubectl.within(AGENTS).run("delete", "daemonset", "-l", AGENT_LABEL)  # now, and not when its back-off ends
        eventually("decode is locked again", workload.locked, 90)
        workload.delete_policies()
    finally:
        kubectl.run("delete", "namespace", name, "--wait=false")
