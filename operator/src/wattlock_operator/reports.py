"""The agents' reports, sorted by policy and pool."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from wattlock_api.base import DecimalString
from wattlock_api.nodeenergy import GpuStatus, InstanceStatus

from wattlock_operator.release import is_silent
from wattlock_operator.world import World

PoolKey = tuple[str, str]
"""Policy UID and pool."""


@dataclass(frozen=True)
class NodeGpu:
    """A GPU of a report."""

    node: str
    gpu: GpuStatus
    silent: bool
    """Whether the report is too old to speak of the present."""


@dataclass(frozen=True)
class NodeInstance:
    """What an instance does on one node."""

    node: str
    instance: InstanceStatus
    silent: bool


@dataclass(frozen=True)
class PoolReport:
    """All that was reported about a pool."""

    gpus: tuple[NodeGpu, ...] = ()
    instances: tuple[NodeInstance, ...] = ()
    measured_at: str | None = None
    """Time of the newest report."""


def number(text: DecimalString | None) -> float:
    """Return the number in a decimal string of the API; absent is zero."""
    return float(text) if text else 0.0


def collect(world: World, now_seconds: float) -> Mapping[PoolKey, PoolReport]:
    """Return what is reported, by policy UID and pool. GPUs without a policy are left out."""
    gpus: dict[PoolKey, list[NodeGpu]] = defaultdict(list)
    found: dict[PoolKey, list[tuple[str, InstanceStatus, bool]]] = defaultdict(list)
    times: dict[PoolKey, str] = {}
    for name, node_energy in sorted(world.node_energies.items()):
        report = node_energy.status
        if report is None or name not in world.nodes:
            continue
        silent = is_silent(report, now_seconds)
        for gpu in report.gpus:
            if gpu.policy_uid is not None and gpu.pool is not None:
                gpus[gpu.policy_uid, gpu.pool].append(NodeGpu(name, gpu, silent))
                times[gpu.policy_uid, gpu.pool] = max(
                    times.get((gpu.policy_uid, gpu.pool), ""), report.reported_at or ""
                )
        for instance in report.instances:
            found[instance.policy_uid, instance.pool].append((name, instance, silent))
    return {
        key: PoolReport(
            gpus=tuple(gpus[key]),
            instances=tuple(NodeInstance(*entry) for entry in found.get(key, ())),
            measured_at=times.get(key) or None,
        )
        for key in {*gpus, *found}
    }
