"""Small worlds for tests of the operator's decisions."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from wattlock_api.base import ObjectRef, timestamp
from wattlock_api.constants import AGENT_COMPONENT, COMPONENT_LABEL, FINALIZER, PLACEMENT_LABEL, GpuState
from wattlock_api.energypolicy import EnergyPolicySpec
from wattlock_api.nodeenergy import GpuStatus, InstanceStatus, NodeEnergyStatus, Order
from wattlock_api.policystatus import EnergyPolicyStatus
from wattlock_operator.world import MetricsHint, NodeEnergyView, NodeView, PodView, PolicyView, World

NOW = 1_800_000_000.0
AGENTS = "wattlock"
DECODE, PREFILL = {"role": "decode"}, {"role": "prefill"}
GPU_NODE = {"nvidia.com/gpu.present": "true"}


def two_pools(clock: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A decode pool with this clock, and a prefill pool."""
    return [
        {"name": "decode", "role": "Decode", "selector": {"matchLabels": DECODE}, "clock": clock},
        {"name": "prefill", "role": "Prefill", "selector": {"matchLabels": PREFILL}},
    ]


def policy(name: str = "qwen", *, uid: str = "", created: str = "2026-01-01T00:00:00Z", **changes: Any) -> PolicyView:
    """A policy with a decode and a prefill pool; ``spec`` changes its spec."""
    spec = {"mode": "Enforce", "pools": two_pools({"maxSMClockMHz": 1590})} | changes.pop("spec", {})
    fields: dict[str, Any] = {
        "namespace": "llm",
        "name": name,
        "uid": uid or f"uid-{name}",
        "generation": 1,
        "created": created,
        "spec": EnergyPolicySpec.model_validate(spec),
        "status": None,
        "finalizers": (FINALIZER,) if changes.pop("finalizer", True) else (),
    }
    return PolicyView(**(fields | changes))


def pod(name: str, labels: Mapping[str, str] | None = None, node: str = "n1", **changes: Any) -> PodView:
    """A ready pod with a GPU."""
    fields: dict[str, Any] = {
        "namespace": "llm",
        "name": name,
        "uid": f"uid-{name}",
        "node": node,
        "phase": "Running",
        "ready": True,
        "terminating": False,
        "labels": dict(labels or {}),
        "ip": "10.0.0.7",
        "wants_gpu": True,
        "hint": MetricsHint(gpu_container_port=8200),
    }
    return PodView(**(fields | changes))


def agent_pod(node: str, placement: str = "00000000") -> PodView:
    """One of our agents."""
    labels = {COMPONENT_LABEL: AGENT_COMPONENT, PLACEMENT_LABEL: placement}
    return pod(f"agent-{node}", labels, node, namespace=AGENTS, wants_gpu=False)


def node_energy(
    name: str = "n1",
    orders: Iterable[Order] = (),
    *,
    generation: int = 1,
    gpus: Iterable[GpuStatus] = (),
    instances: Iterable[InstanceStatus] = (),
    age_seconds: float = 5,
    **changes: Any,
) -> NodeEnergyView:
    """A NodeEnergy whose agent has caught up; ``status`` replaces its report."""
    report = NodeEnergyStatus(
        observed_generation=generation,
        reported_at=timestamp(NOW - age_seconds),
        gpus=list(gpus),
        instances=list(instances),
    )
    sorted_orders = tuple(sorted(orders, key=lambda order: order.pod_uid))
    fields: dict[str, Any] = {
        "name": name,
        "uid": f"uid-{name}",
        "generation": generation,
        "orders": sorted_orders,
        "readable": True,
        "status": report,
    }
    return NodeEnergyView(**(fields | changes))


def gpu(index: int = 0, pod_name: str = "d0", **changes: Any) -> GpuStatus:
    """A locked GPU of a decode pod."""
    fields: dict[str, Any] = {
        "uuid": f"GPU-{index}",
        "index": index,
        "product": "NVIDIA H200",
        "state": GpuState.LOCKED,
        "reason": "Locked",
        "holder": ObjectRef(namespace="llm", name=pod_name, uid=f"uid-{pod_name}"),
        "policy_uid": "uid-qwen",
        "pool": "decode",
        "instance": pod_name,
        "requested_mhz": 1590,
    }
    return GpuStatus(**(fields | changes))


def instance(name: str = "d0", **changes: Any) -> InstanceStatus:
    """An instance of the decode pool."""
    fields: dict[str, Any] = {"key": f"uid-qwen/{name}", "policy_uid": "uid-qwen", "pool": "decode", "instance": name}
    return InstanceStatus(**(fields | changes))


def world(
    policies: Iterable[PolicyView] = (),
    pods: Iterable[PodView] = (),
    node_energies: Iterable[NodeEnergyView] = (),
    nodes: Iterable[str] = ("n1",),
    **changes: Any,
) -> World:
    """A world with GPU nodes."""
    fields: dict[str, Any] = {
        "policies": tuple(policies),
        "pods": tuple(pods),
        "nodes": {name: NodeView(name, GPU_NODE, True) for name in nodes},
        "node_energies": {entry.name: entry for entry in node_energies},
        "agent_namespace": AGENTS,
    }
    return World(**(fields | changes))


def as_kept(status: EnergyPolicyStatus) -> EnergyPolicyStatus:
    """A status as the API server keeps it: through JSON."""
    return EnergyPolicyStatus.model_validate(json.loads(json.dumps(status.to_api())))
