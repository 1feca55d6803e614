"""Agent DaemonSets: one for each distinct placement of the policies, built from the chart's template."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wattlock_api.constants import AGENT_COMPONENT, COMPONENT_LABEL, PLACEMENT_LABEL, Mode
from wattlock_api.energypolicy import Placement

from wattlock_operator.release import locked_uuids
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


def placement_hash(placement: Placement) -> str:
    """Return sixteen hexadecimal digits that tell placements apart; the order of tolerations does not matter.

    A placement is a tenant's to write. Of eight digits a laptop finds one with the hash of another tenant's in an hour,
    and both would be one DaemonSet, placed as the newer policy says.
    """
    canonical = placement.to_api()
    canonical["tolerations"] = sorted(
        canonical.get("tolerations", []), key=lambda entry: json.dumps(entry, sort_keys=True)
    )
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]


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


def _one_agent_per_node(pod_spec: Manifest) -> None:
    """Keep the agents of overlapping placements apart: two on one node would fight over its GPUs."""
    required = _section(pod_spec, "affinity", "podAntiAffinity").setdefault(
        "requiredDuringSchedulingIgnoredDuringExecution", []
    )
    required.append(
        {
            "labelSelector": {"matchLabels": {NAME_LABEL: "wattlock", COMPONENT_LABEL: AGENT_COMPONENT}},
            "topologyKey": "kubernetes.io/hostname",
        }
    )


def daemon_set(template: Mapping[str, Any], placement: Placement, mode: Mode, namespace: str) -> Manifest:
    """Return the DaemonSet of a placement.

    The template brings image, probes, mounts and resources; this sets what depends on the policies: name, labels,
    where it runs, WATTLOCK_MODE, and capabilities: none, but SYS_ADMIN where a policy enforces.

    Raises:
        TemplateError: the template is no DaemonSet with a container named agent.
    """
    if template.get("kind") != "DaemonSet":
        raise TemplateError(f"the agent template is a {template.get('kind')!r}, expected a DaemonSet")
    manifest: Manifest = copy.deepcopy(dict(template))
    placed = placement_hash(placement)
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
    pod_spec["nodeSelector"] = {**(pod_spec.get("nodeSelector") or {}), **placement.node_selector}
    pod_spec["tolerations"] = [
        *(pod_spec.get("tolerations") or []),
        *(toleration.to_api() for toleration in placement.tolerations),
    ]
    if placement.runtime_class_name is not None:
        pod_spec["runtimeClassName"] = placement.runtime_class_name
    _one_agent_per_node(pod_spec)
    container = _agent_container(pod_spec)
    kept = [entry for entry in container.get("env") or [] if entry.get("name") != "WATTLOCK_MODE"]
    container["env"] = [*kept, {"name": "WATTLOCK_MODE", "value": mode.value}]
    capabilities: dict[str, list[str]] = {"drop": ["ALL"]}
    if mode is Mode.ENFORCE:
        capabilities["add"] = ["SYS_ADMIN"]
    _section(container, "securityContext")["capabilities"] = capabilities
    _section(metadata, "annotations")[FINGERPRINT_ANNOTATION] = fingerprint(manifest)
    return manifest


def _lock_owners(world: World, placed: str) -> set[str]:
    """Return the UIDs of the policies whose locks the agents of a placement report."""
    owners: set[str] = set()
    for pod in world.agent_pods():
        node_energy = world.node_energies.get(pod.node)
        if pod.agent_placement == placed and pod.node in world.nodes and node_energy and node_energy.status:
            locked = locked_uuids(node_energy.status)
            owners |= {gpu.policy_uid or "" for gpu in node_energy.status.gpus if gpu.uuid in locked}
    return owners


def plan_daemon_sets(world: World, template: Mapping[str, Any], releasing: Iterable[str]) -> DaemonSets:
    """Return the DaemonSets to write and to delete.

    ``releasing`` are UIDs of deleted policies that still wait for GPUs. A DaemonSet outlives them and any lock on
    its nodes; for as long it also keeps the capability to release.

    Raises:
        TemplateError: see daemon_set.
    """
    waiting = set(releasing)
    wanted: dict[str, tuple[Placement, Mode]] = {}
    for policy in sorted(world.policies, key=lambda policy: policy.age_key):
        if policy.spec is None or (policy.deleting and policy.uid not in waiting):
            continue
        placed = placement_hash(policy.spec.placement)
        enforce = policy.spec.mode is Mode.ENFORCE or wanted.get(placed, (None, Mode.OBSERVE))[1] is Mode.ENFORCE
        wanted[placed] = (policy.spec.placement, Mode.ENFORCE if enforce else Mode.OBSERVE)
    locking = {placed: _lock_owners(world, placed) for placed in {entry.placement for entry in world.daemon_sets}}
    # Locks of a policy that lives on elsewhere do not keep a DaemonSet: its agents release them as they stop.
    alive = {policy.uid for policy in world.policies if policy.spec is not None and not policy.deleting}
    existing = {entry.placement: entry for entry in world.daemon_sets}
    apply: list[Manifest] = []
    for placed, (placement, mode) in sorted(wanted.items()):
        present = existing.get(placed)
        if mode is Mode.OBSERVE and locking.get(placed):
            mode = Mode.ENFORCE  # its agents, or killed ones before them, left a lock that has to be undone
        manifest = daemon_set(template, placement, mode, world.agent_namespace)
        if present is None or present.fingerprint != manifest["metadata"]["annotations"][FINGERPRINT_ANNOTATION]:
            apply.append(manifest)
    unclear = any(policy.spec is None for policy in world.policies)
    delete = (
        ()
        if unclear
        else tuple(
            entry.name
            for entry in world.daemon_sets
            if entry.placement not in wanted and locking[entry.placement] <= alive
        )
    )
    return DaemonSets(tuple(apply), delete)
