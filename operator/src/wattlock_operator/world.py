"""What the operator knows of the cluster: small frozen projections of the objects it watches (made by ``parse``)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from wattlock_api.clockprofile import ClockProfileSpec
from wattlock_api.constants import (
    AGENT_COMPONENT,
    COMPONENT_LABEL,
    FINALIZER,
    PLACEMENT_LABEL,
)
from wattlock_api.energypolicy import EnergyPolicySpec, Placement
from wattlock_api.nodeenergy import NodeEnergyStatus, Order
from wattlock_api.policystatus import EnergyPolicyStatus


@dataclass(frozen=True)
class PolicyView:
    """An EnergyPolicy."""

    namespace: str
    name: str
    uid: str
    generation: int
    created: str
    """creationTimestamp as the API server writes it: sorts by age."""
    spec: EnergyPolicySpec | None
    """Absent: not understood, see ``problem``."""
    status: EnergyPolicyStatus | None
    problem: str = ""
    deleting: bool = False
    deleted_at: str = ""
    """deletionTimestamp as the API server writes it; empty when it is not being deleted."""
    finalizers: tuple[str, ...] = ()
    force_release: bool = False
    version: str = field(default="", compare=False)
    """resourceVersion: what we write is refused when it has changed meanwhile. Empty: it is written in any case."""

    @property
    def finalizer(self) -> bool:
        """Whether deletion waits for us. No GPU may be locked before it does."""
        return FINALIZER in self.finalizers

    @property
    def title(self) -> str:
        """Namespace and name, for sentences."""
        return f"{self.namespace}/{self.name}"

    @property
    def age_key(self) -> tuple[str, str, str]:
        """Sorts policies: the oldest first, then by name."""
        return (self.created, self.namespace, self.name)


@dataclass(frozen=True)
class MetricsHint:
    """Where a pod's own manifest says that its metrics are."""

    annotated_port: int | None = None
    annotated_path: str | None = None
    named_port: int | None = None
    gpu_container_port: int | None = None


@dataclass(frozen=True)
class PodView:
    """A pod."""

    namespace: str
    name: str
    uid: str
    node: str
    """Empty until it is scheduled."""
    phase: str
    ready: bool
    terminating: bool
    labels: Mapping[str, str]
    ip: str
    wants_gpu: bool
    """Whether a container asks for a GPU, through a device plugin or a resource claim."""
    host_network: bool = False
    """Whether its address is its node's: there every process of the node listens, not this pod alone."""
    hint: MetricsHint = MetricsHint()
    group_size: int | None = None
    """Pods of the LeaderWorkerSet group that this one belongs to."""
    claims: tuple[str, ...] = ()
    """Annotations by which another controller sets the power or clock of its GPUs, see writers."""
    writer: str = ""
    """The program that it looks like, if that is known to set clocks or power of GPUs."""

    @property
    def finished(self) -> bool:
        """Whether its containers will never run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def agent_placement(self) -> str | None:
        """Hash of the placement when this is one of our agents (the caller checks the namespace)."""
        if self.labels.get(COMPONENT_LABEL) != AGENT_COMPONENT:
            return None
        return self.labels.get(PLACEMENT_LABEL)


@dataclass(frozen=True)
class NodeView:
    """A node."""

    name: str
    labels: Mapping[str, str]
    ready: bool


@dataclass(frozen=True)
class NodeEnergyView:
    """A NodeEnergy."""

    name: str
    uid: str
    generation: int
    orders: tuple[Order, ...]
    readable: bool
    """False: the orders there are not all understood; they are written anew."""
    status: NodeEnergyStatus | None
    peer_power: str = ""
    """The annotation as it is, see peerpower."""
    annotated: bool = field(default=False, compare=False)
    """Whether it has any annotation."""


@dataclass(frozen=True)
class DaemonSetView:
    """An agent DaemonSet of ours."""

    name: str
    placement: str
    fingerprint: str
    """Hash of the manifest that was applied."""


@dataclass(frozen=True)
class World:
    """Everything that a decision looks at."""

    policies: tuple[PolicyView, ...] = ()
    pods: tuple[PodView, ...] = ()
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    node_energies: Mapping[str, NodeEnergyView] = field(default_factory=dict)
    profiles: Mapping[str, ClockProfileSpec] = field(default_factory=dict)
    daemon_sets: tuple[DaemonSetView, ...] = ()
    agent_namespace: str = ""
    host_network_namespaces: frozenset[str] = frozenset()
    """Namespaces whose pods may be asked for metrics at their node's address."""
    allowed_placements: tuple[Placement, ...] = ()
    """How far the administrator lets placements go; none means any."""

    def agent_pods(self) -> tuple[PodView, ...]:
        """Agents that are on a node and not finished."""
        return tuple(
            pod
            for pod in self.pods
            if pod.namespace == self.agent_namespace and pod.agent_placement is not None and pod.node
            if not pod.finished
        )
