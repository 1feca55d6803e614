"""Agent DaemonSets: one for all placements that could select the same node, built from the chart's template."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wattlock_api.constants import AGENT_COMPONENT, COMPONENT_LABEL, PLACEMENT_LABEL, Mode

from wattlock_operator.release import locked_uuids
from wattlock_operator.sharing import Shared, overruled_sentence, placement_hash, refusals, share
from wattlock_operator.world import World

Manifest = dict[str, Any]

NAME_LABEL = "app.kubernetes.io/name"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "wattlock-operator"
FINGERPRINT_ANNOTATION = "wattlock.dev/applied"
AGENT_CONTAINER = "agent"


class TemplateError(ValueError):
    """The agent template cannot be used. The message says what is wrong with it."""


@dataclass(frozen=True)
class DaemonSets:
    """What is to be done about the agents' DaemonSets."""

    apply: tuple[Manifest, ...] = ()
    delete: tuple[str, ...] = ()
    """Names."""
    overruled: Mapping[str, str] = field(default_factory=dict)
    """By policy UID: a sentence for those whose agents run with the RuntimeClass of another policy."""


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return a hash of a manifest: equal means that nothing has to be applied."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _section(parent: Manifest, *path: str) -> Manifest:
    for key in path:
        child = parent.setdefault(key, {})
        if not isinstance(child, dict):
            raise TemplateError(f"{'.'.join(path)} of the agent template is not a mapping")
        parent = child
    return parent


def _agent_container(pod_spec: Manifest) -> Manifest:
    for container in pod_spec.get("containers") or []:
        if isinstance(container, dict) and container.get("name") == AGENT_CONTAINER:
            return container
    raise TemplateError(f"the agent template has no container named {AGENT_CONTAINER}")


def _where(pod_spec: Manifest, selectors: Iterable[Mapping[str, str]]) -> None:
    """Let the agents run on the nodes that fit one of the selectors, and the template's own terms."""
    whole = [{**(pod_spec.get("nodeSelector") or {}), **selector} for selector in selectors]
    common = {key: value for key, value in whole[0].items() if all(each.get(key) == value for each in whole)}
    pod_spec["nodeSelector"] = common
    rests = [{key: value for key, value in each.items() if key not in common} for each in whole]
    if not all(rests):
        return  # one of them asks for no more than they have in common
    required = _section(pod_spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    required["nodeSelectorTerms"] = [
        {
            **term,
            "matchExpressions": [
                *(term.get("matchExpressions") or []),
                *({"key": key, "operator": "In", "values": [value]} for key, value in sorted(rest.items())),
            ],
        }
        for rest in rests
        for term in required.get("nodeSelectorTerms") or [{}]
    ]


def _one_agent_per_node(pod_spec: Manifest) -> None:
    """Keep an agent off a node that one of another DaemonSet has not left yet: two would fight over its GPUs."""
    required = _section(pod_spec, "affinity", "podAntiAffinity").setdefault(
        "requiredDuringSchedulingIgnoredDuringExecution", []
    )
    required.append(
        {
            "labelSelector": {"matchLabels": {NAME_LABEL: "wattlock", COMPONENT_LABEL: AGENT_COMPONENT}},
            "topologyKey": "kubernetes.io/hostname",
        }
    )


def daemon_set(template: Mapping[str, Any], shared: Shared, namespace: str) -> Manifest:
    """Return the DaemonSet of placements that share one.

    The template brings image, probes, mounts and resources; this sets what depends on the policies: name, labels,
    where it runs, WATTLOCK_MODE, and capabilities: none, but SYS_ADMIN where a policy enforces.

    Raises:
        TemplateError: the template is no DaemonSet with a container named agent.
    """
    if template.get("kind") != "DaemonSet":
        raise TemplateError(f"the agent template is a {template.get('kind')!r}, expected a DaemonSet")
    manifest: Manifest = copy.deepcopy(dict(template))
    placed = placement_hash(shared.placements[0])
    identity = {NAME_LABEL: "wattlock", COMPONENT_LABEL: AGENT_COMPONENT, PLACEMENT_LABEL: placed}
    manifest["apiVersion"] = "apps/v1"
    metadata = _section(manifest, "metadata")
    metadata["name"] = f"wattlock-agent-{placed}"
    metadata["namespace"] = namespace
    metadata["labels"] = {**(metadata.get("labels") or {}), **identity, MANAGED_BY_LABEL: MANAGER}
    manifest.pop("status", None)
    # The selector is immutable: nothing of the template may get into it, or a chart upgrade could change it.
    _section(manifest, "spec")["selector"] = {"matchLabels": identity}
    pod_metadata = _section(manifest, "spec", "template", "metadata")
    pod_metadata["labels"] = {**(pod_metadata.get("labels") or {}), **identity}
    pod_spec = _section(manifest, "spec", "template", "spec")
    _where(pod_spec, shared.node_selectors)
    pod_spec["tolerations"] = [
        *(pod_spec.get("tolerations") or []),
        *(toleration.to_api() for toleration in shared.tolerations),
    ]
    if shared.runtime_class_name is not None:
        pod_spec["runtimeClassName"] = shared.runtime_class_name
    _one_agent_per_node(pod_spec)
    container = _agent_container(pod_spec)
    kept = [entry for entry in container.get("env") or [] if entry.get("name") != "WATTLOCK_MODE"]
    container["env"] = [*kept, {"name": "WATTLOCK_MODE", "value": shared.mode.value}]
    capabilities: dict[str, list[str]] = {"drop": ["ALL"]}
    if shared.mode is Mode.ENFORCE:
        capabilities["add"] = ["SYS_ADMIN"]
    _section(container, "securityContext")["capabilities"] = capabilities
    _section(metadata, "annotations")[FINGERPRINT_ANNOTATION] = fingerprint(manifest)
    return manifest


def _lock_owners(world: World, placed: str) -> set[str]:
    """Return the UIDs of the policies whose locks the agents of a DaemonSet report."""
    owners: set[str] = set()
    for pod in world.agent_pods():
        node_energy = world.node_energies.get(pod.node)
        if pod.agent_placement == placed and pod.node in world.nodes and node_energy and node_energy.status:
            locked = locked_uuids(node_energy.status)
            owners |= {gpu.policy_uid or "" for gpu in node_energy.status.gpus if gpu.uuid in locked}
    return owners


def _orphaned_locks(world: World) -> set[str]:
    """Return the UIDs of the policies with reported locks on nodes where no agent is now, whoever served them."""
    served = {pod.node for pod in world.agent_pods()}
    return {
        gpu.policy_uid or ""
        for name, node_energy in world.node_energies.items()
        if name in world.nodes and name not in served and node_energy.status is not None
        for gpu in node_energy.status.gpus
        if gpu.uuid in locked_uuids(node_energy.status)
    }


def plan_daemon_sets(world: World, template: Mapping[str, Any], releasing: Iterable[str]) -> DaemonSets:
    """Return the DaemonSets to write and to delete.

    ``releasing`` are UIDs of deleted policies that still wait for GPUs. A DaemonSet outlives them and any lock on
    its nodes; for as long it also keeps the capability to release.

    Raises:
        TemplateError: see daemon_set.
    """
    waiting = set(releasing)
    refused = refusals(world.policies, world.allowed_placements)
    wanted = {
        placement_hash(shared.placements[0]): shared
        for shared in share(
            policy
            for policy in world.policies
            if policy.uid not in refused and (not policy.deleting or policy.uid in waiting)
        )
    }
    locking = {placed: _lock_owners(world, placed) for placed in {entry.placement for entry in world.daemon_sets}}
    # Locks of a policy that lives on elsewhere do not keep a DaemonSet: its agents release them as they stop.
    alive = {policy.uid for policy in world.policies if policy.spec is not None and not policy.deleting}
    existing = {entry.placement: entry for entry in world.daemon_sets}
    apply: list[Manifest] = []
    for placed, shared in sorted(wanted.items()):
        present = existing.get(placed)
        if locking.get(placed):
            # Its agents, or killed ones before them, left a lock that has to be undone.
            shared = replace(shared, mode=Mode.ENFORCE)
        manifest = daemon_set(template, shared, world.agent_namespace)
        if present is None or present.fingerprint != manifest["metadata"]["annotations"][FINGERPRINT_ANNOTATION]:
            apply.append(manifest)
    unclear = any(policy.spec is None for policy in world.policies)
    orphaned = _orphaned_locks(world)
    delete = (
        ()
        if unclear
        else tuple(
            entry.name
            for entry in world.daemon_sets
            # An agent that comes back to a node that was given up must find a way to run: it undoes what was left.
            if entry.placement not in wanted and locking[entry.placement] | orphaned <= alive
        )
    )
    overruled = {policy.uid: overruled_sentence(shared) for shared in wanted.values() for policy in shared.overruled}
    return DaemonSets(tuple(apply), delete, overruled)
