"""Nodes, kubelets and serving pods."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from chaos.fault import Hold, Released, Settled, Stage, fault, some_node
from chaos.nodes import KUBELET_SOCKET, pids_of_container, signal_all
from chaos.site import NAMESPACE, Json, Site, labels, until
from chaos.truth import parse_pod
from wattlock_operator.kube import NODES


@contextmanager
def _cordoned(site: Site, node: str) -> Iterator[None]:
    site.kube.merge(f"{NODES}/{node}", {"spec": {"unschedulable": True}})
    try:
        yield
    finally:
        site.kube.merge(f"{NODES}/{node}", {"spec": {"unschedulable": None}})


@fault("node drained", "nodes pods operator")
def drained(site: Site, rng: Random) -> Iterator[Stage]:
    """A node is drained as kubectl does it (DaemonSets stay), and given back."""
    node = some_node(site, rng)
    with _cordoned(site, node):
        for body in site.kube.list_all("/api/v1/pods"):
            owners = [each["kind"] for each in body["metadata"].get("ownerReferences", [])]
            if body["spec"].get("nodeName") == node and "DaemonSet" not in owners:
                site.evict(body)
        until("no serving pod is left there", lambda: not [b for b in site.pods() if b["spec"].get("nodeName") == node])
        yield Settled()
    site.deploy()


@fault("kubelet stopped", "nodes", in_tests=False)
def kubelet_stopped(site: Site, rng: Random) -> Iterator[Stage]:
    """A kubelet is killed for some seconds; its pods go on."""
    with site.nodes[some_node(site, rng)].kubelet_down():
        yield Hold(rng.uniform(2, 15))


@fault("kubelet's socket gone", "nodes", 0.4)
def socket_gone(site: Site, rng: Random) -> Iterator[Stage]:
    """The kubelet is away with its socket, so nobody says any more who holds the GPUs: after 30 s they are released."""
    name = some_node(site, rng)
    with site.nodes[name].kubelet_down():
        site.nodes[name].path(KUBELET_SOCKET).unlink()
        yield Released(frozenset({name}))


@fault("node rebooted", "nodes agents pods operator", 0.7)
def rebooted(site: Site, rng: Random) -> Iterator[Stage]:
    """All processes of a node end at once, its GPUs are as after a boot, and the boot id is another."""
    name = some_node(site, rng)
    node = site.nodes[name]
    with node.kubelet_down():
        for body in list(site.kube.list_all("/api/v1/pods")):
            if body["spec"].get("nodeName") == name:
                site.will_restart(body)
                for container_id in site.container_ids(body):
                    signal_all(pids_of_container(container_id), signal.SIGKILL)
        node.boot()
        yield Hold(rng.uniform(0, 3))


@fault("pod deleted by force while its node is away", "nodes pods", 0.7)
def deleted_while_away(site: Site, rng: Random) -> Iterator[Stage]:
    """A decode pod is deleted by force while its kubelet is down: it goes on, but nobody wants its lock any more."""
    body = rng.choice(site.decode_pods())
    with site.nodes[body["spec"]["nodeName"]].kubelet_down():
        site.delete_pod(body, 0)
        yield Settled()


@fault("pod finished", "pods")
def finished(site: Site, rng: Random) -> Iterator[Stage]:
    """A decode pod ends well and stays as an object: its GPU is released."""
    template: Json = site.template("steady-decode")
    name = f"once-{rng.randrange(10**6)}"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels("steady", "decode")}}
    pod["spec"] = template["spec"] | {"restartPolicy": "Never"}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods"
    site.put(path, pod)

    def phase() -> str:
        return str(((site.kube.get(f"{path}/{name}") or {}).get("status") or {}).get("phase"))

    # Ready, and not only running: the first process of a container ignores SIGTERM until it has a handler.
    until("the pod serves", lambda: parse_pod(site.kube.request("GET", f"{path}/{name}")).ready)
    yield Settled()
    body = site.kube.get(f"{path}/{name}") or {}
    for container_id in site.container_ids(body):
        signal_all(pids_of_container(container_id)[:1], signal.SIGTERM)
    until("the pod has finished", lambda: phase() in ("Succeeded", "Failed"))
    yield Settled()
    site.delete_pod(body, 0)


@fault("pod replaced by one of the same name", "pods", 1.5)
def same_name(site: Site, rng: Random) -> Iterator[Stage]:
    """A pod of a StatefulSet is deleted, with or without time to stop; one of its name takes its place."""
    site.delete_pod(rng.choice(site.decode_pods("steady")), rng.choice([None, 0]))
    yield Hold(rng.uniform(0, 2))


@fault("pods change GPUs", "pods", 2)
def shuffled(site: Site, rng: Random) -> Iterator[Stage]:
    """Pods of every role are deleted at once, so that prefill pods and bystanders get GPUs that were locked."""
    everyone = site.pods()
    for body in rng.sample(everyone, rng.randint(2, len(everyone))):
        site.delete_pod(body, rng.choice([None, 0]))
    yield Hold(rng.uniform(0, 2))


@fault("serving process killed", "pods", in_tests=False)
def serving_killed(site: Site, rng: Random) -> Iterator[Stage]:
    """A serving container crashes and is started anew in its pod."""
    body = rng.choice(site.decode_pods())
    site.will_restart(body)
    for container_id in site.container_ids(body):
        signal_all(pids_of_container(container_id)[:1], signal.SIGKILL)
    yield Hold(rng.uniform(0, 2))


@fault("prefill scaled to zero", "pods")
def no_prefill(site: Site, rng: Random) -> Iterator[Stage]:
    """A policy's decode pods lose their prefill peer: they are released until it is back."""
    name = rng.choice(["steady", "measured"])
    site.scale("Deployment", f"{name}-prefill", 0)
    until("no prefill pod is left", lambda: not site.pods(selector=f"llm-d.ai/model={name},llm-d.ai/role=prefill"))
    yield Settled()
    site.deploy()
