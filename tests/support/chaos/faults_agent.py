"""Agents that end, in every way in which a process ends."""

import signal
import time
from collections.abc import Iterator
from random import Random

from chaos.fault import Hold, Settled, Stage, fault, some_node
from chaos.nodes import exhaust_memory, pids_of_container, signal_all
from chaos.site import Site, journal
from wattlock_operator.kube import daemon_sets_path
from workloads import AGENT_LABEL, SYSTEM


def end_agent(site: Site, node: str, number: signal.Signals) -> None:
    """Send a signal to the agent's process on a node; the kubelet starts it anew."""
    for body in site.agents(node):
        for container_id in site.container_ids(body):
            pids = pids_of_container(container_id)
            if pids:
                site.will_restart(body)
                signal_all(pids[:1], number)


def other_cap(site: Site) -> None:
    """Change every cap, so that agents are about to write."""
    site.touch_policies()


@fault("agent SIGTERM", "agents")
def sigterm(site: Site, rng: Random) -> Iterator[Stage]:
    """The agent's process gets SIGTERM: it releases its GPUs and leaves; the next one locks them again."""
    end_agent(site, some_node(site, rng), signal.SIGTERM)
    yield Hold(rng.uniform(0, 2))


@fault("agent SIGKILL", "agents", 2, in_tests=False)
def sigkill(site: Site, rng: Random) -> Iterator[Stage]:
    """Every agent is killed at a random instant: its locks stay until the next agent has read the journal."""
    yield Hold(rng.uniform(0, 3))
    for node in site.nodes:
        end_agent(site, node, signal.SIGKILL)


@fault("agent SIGKILL at a journal or driver step", "agents policies", 3)
def sigkill_at_a_step(site: Site, rng: Random) -> Iterator[Stage]:
    """The agent is killed while it changes locks: at the moment a record appears, or a write reaches the driver, or a
    few milliseconds later."""
    name = some_node(site, rng)
    node = site.nodes[name]
    pids = [pids_of_container(each)[:1] for body in site.agents(name) for each in site.container_ids(body)]
    for body in site.agents(name):
        site.will_restart(body)
    kind, delay_seconds = rng.choice(["record", "write"]), rng.choice([0.0, 0.0, 0.001, 0.003, 0.01, 0.05])

    def seen() -> object:
        if kind == "record":
            return sorted((each.name, each.stat().st_mtime_ns) for each in journal(node).iterdir())
        return node.path(site.write_log).stat().st_size

    def look() -> object:
        try:
            return seen()
        except OSError:  # a record went while it was looked at: that is a step, too
            return None

    before = look()
    other_cap(site)
    deadline = time.monotonic() + 15
    while look() == before and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(delay_seconds)
    for each in pids:
        signal_all(each, signal.SIGKILL)
    yield Hold(0.5)
    site.apply_policies()


@fault("agent out of memory", "agents", 0.7)
def out_of_memory(site: Site, rng: Random) -> Iterator[Stage]:
    """The kernel kills the agent because its container has used up its memory."""
    (body,) = site.agents(some_node(site, rng))[:1]
    (container_id,) = site.container_ids(body)
    site.will_restart(body)
    # Not by the pod's status: a kubelet that is down at the same time cannot tell it.
    assert exhaust_memory(pids_of_container(container_id)[0]), "the kernel did not kill the agent for its memory"
    yield Hold(0)


@fault("agents rolled out anew", "agents daemonset")
def rollout(site: Site, rng: Random) -> Iterator[Stage]:
    """The DaemonSet's template changes, as with a new image: every agent is replaced."""
    stamp = {"spec": {"template": {"metadata": {"annotations": {"chaos/at": f"{rng.random()}"}}}}}
    for body in site.kube.list_all(daemon_sets_path(SYSTEM), AGENT_LABEL):
        site.kube.merge(daemon_sets_path(SYSTEM, body["metadata"]["name"]), stamp)
    yield Hold(rng.uniform(0, 3))


@fault("chart upgraded", "agents daemonset operator", 0.4, in_tests=False)
def upgrade(site: Site, rng: Random) -> Iterator[Stage]:
    """helm upgrade with another template of the agents: the operator restarts and replaces every agent."""
    site.install("--set", f"agent.podAnnotations.chaos=n{rng.randrange(10**6)}")
    yield Settled()
    site.install()


@fault("agent evicted", "agents")
def evicted(site: Site, rng: Random) -> Iterator[Stage]:
    """The agent's pod is evicted: it releases; the DaemonSet makes another."""
    for body in site.agents(some_node(site, rng)):
        site.evict(body)
    yield Hold(rng.uniform(0, 3))


@fault("agent deleted by force", "agents", in_tests=False)
def deleted_by_force(site: Site, rng: Random) -> Iterator[Stage]:
    """The agents' pods are deleted with no time to stop."""
    for body in site.agents():
        site.delete_pod(body, 0)
    yield Hold(rng.uniform(0, 2))


@fault("DaemonSet deleted by hand", "agents daemonset")
def daemonset_deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """The agents' DaemonSet is deleted: they release as they stop, and the operator makes it anew."""
    for body in site.kube.list_all(daemon_sets_path(SYSTEM), AGENT_LABEL):
        site.kube.delete(daemon_sets_path(SYSTEM, body["metadata"]["name"]))
    yield Hold(rng.uniform(1, 3))


@fault("policy deleted while its agent is dead", "agents policies nodes", 0.7, in_tests=False)
def policy_deleted_while_dead(site: Site, rng: Random) -> Iterator[Stage]:
    """The agent is killed on a node whose kubelet is down, so nobody starts it; its policy is deleted meanwhile. The
    GPU stays locked until the agent's return, and not 60 s longer."""
    name = some_node(site, rng)
    with site.nodes[name].kubelet_down():
        end_agent(site, name, signal.SIGKILL)
        site.delete_policy("steady")
        yield Hold(rng.uniform(3, 8))
    yield Settled()
    site.apply_policies()
