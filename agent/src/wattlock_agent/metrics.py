"""What Prometheus scrapes from the agent: base units, and labels whose values are bounded by the node's GPUs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from wattlock_api.constants import GpuState
from wattlock_api.nodeenergy import GpuStatus, NodeEnergyStatus, Order

_GPU_LABELS = ("gpu", "index", "product", "namespace", "pod", "policy", "pool")
#: Prometheus sets a label ``instance`` of its own.
_INSTANCE_LABELS = ("namespace", "policy", "pool", "serving_instance")
_CAUSES = ("power_cap", "thermal", "power_brake", "reliability", "board_limit")
_HERTZ_PER_MHZ = 1_000_000


@dataclass(frozen=True)
class Snapshot:
    """The agent at the end of a pass. Never changes, so any thread may read it."""

    status: NodeEnergyStatus
    orders: Mapping[str, Order] = field(default_factory=dict)
    """The order of each GPU's holder, by GPU UUID."""
    sm_mhz: Mapping[str, int] = field(default_factory=dict)
    """SM clock by GPU UUID."""
    clock_writes: Mapping[str, int] = field(default_factory=dict)
    """Locks and resets that the driver accepted, by GPU UUID."""
    driver_errors: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By (call, fault)."""
    scrape_failures: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    status_failures: int = 0
    orders_stale: bool = False
    order_count: int = 0
    ready: bool = False
    """Whether every order is in force or refused with a reason."""
    passes: int = 0
    pass_seconds: float = 0.0
    """Time spent in passes so far."""
    at_seconds: float = 0.0
    """Monotonic time of the pass."""


class SnapshotBoard:
    """Where the loop puts the newest snapshot for the HTTP server."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(NodeEnergyStatus())


class AgentCollector(Collector):
    """Turns the newest snapshot into metrics."""

    def __init__(self, board: SnapshotBoard) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        snapshot = self._board.snapshot
        yield from _agent(snapshot)
        yield from _gpus(snapshot)
        yield from _instances(snapshot)


def make_registry(board: SnapshotBoard) -> CollectorRegistry:
    """Return a registry with the agent's metrics and nothing else."""
    registry = CollectorRegistry()
    registry.register(AgentCollector(board))
    return registry


def _agent(snapshot: Snapshot) -> Iterator[Metric]:
    agent = snapshot.status.agent
    info = GaugeMetricFamily("wattlock_agent_info", "Versions; always 1.", labels=("version", "driver_version"))
    info.add_metric((agent.version, agent.driver_version), 1)
    yield info
    for name, text, value in (
        ("can_write", "1 when the agent may lock clocks.", agent.can_write),
        ("ready", "1 when every order is in force or refused with a reason.", snapshot.ready),
        ("orders", "Orders for this node.", snapshot.order_count),
        (
            "orders_stale",
            "1 when orders are not followed because API server or operator are silent.",
            snapshot.orders_stale,
        ),
    ):
        yield GaugeMetricFamily(f"wattlock_agent_{name}", text, value=float(value))
    yield CounterMetricFamily("wattlock_agent_loop_passes", "Passes of the loop.", value=snapshot.passes)
    yield CounterMetricFamily("wattlock_agent_loop_seconds", "Time spent in passes.", value=snapshot.pass_seconds)
    yield CounterMetricFamily(
        "wattlock_agent_status_write_failures",
        "Reports that the API server did not take.",
        value=snapshot.status_failures,
    )
    errors = CounterMetricFamily(
        "wattlock_agent_driver_errors", "Driver calls that failed, by call and kind.", labels=("call", "fault")
    )
    for (call, fault), count in snapshot.driver_errors.items():
        errors.add_metric((call, fault), count)
    yield errors
    failures = CounterMetricFamily(
        "wattlock_agent_scrape_failures", "Serving metrics that could not be used, by reason.", labels=("reason",)
    )
    for reason, count in snapshot.scrape_failures.items():
        failures.add_metric((reason,), count)
    yield failures


def _gpu_labels(snapshot: Snapshot, gpu: GpuStatus) -> tuple[str, ...]:
    order = snapshot.orders.get(gpu.uuid)
    place = (gpu.uuid, str(gpu.index), gpu.product)
    if order is None:
        return (*place, "", "", "", "")
    return (*place, order.pod.namespace, order.pod.name, order.policy.name, order.pool)


def _gpus(snapshot: Snapshot) -> Iterator[Metric]:
    gpus = [(gpu, _gpu_labels(snapshot, gpu)) for gpu in snapshot.status.gpus]

    def gauge(name: str, text: str, values: Mapping[str, float | None]) -> Metric:
        family = GaugeMetricFamily(f"wattlock_gpu_{name}", text, labels=_GPU_LABELS)
        for gpu, labels in gpus:
            if (value := values.get(gpu.uuid)) is not None:
                family.add_metric(labels, value)
        return family

    def counter(name: str, text: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(f"wattlock_gpu_{name}", text, labels=_GPU_LABELS)
        for gpu, labels in gpus:
            family.add_metric(labels, values.get(gpu.uuid, 0.0))
        return family

    statuses = snapshot.status.gpus
    yield gauge(
        "power_watts", "Mean power over 15 s, from the energy counter.", {g.uuid: g.power_watts for g in statuses}
    )
    yield gauge("power_limit_watts", "Enforced power limit.", {g.uuid: g.power_limit_watts for g in statuses})
    yield gauge(
        "sm_clock_hertz", "SM clock at the last reading.", {u: m * _HERTZ_PER_MHZ for u, m in snapshot.sm_mhz.items()}
    )
    yield gauge(
        "requested_sm_clock_hertz",
        "Cap that is in force, or would be but for a control epoch.",
        {g.uuid: g.requested_mhz * _HERTZ_PER_MHZ for g in statuses if g.requested_mhz is not None},
    )
    yield gauge(
        "clamped", "1 when firmware holds the clock below the cap.", {g.uuid: float(g.clamped) for g in statuses}
    )
    yield counter("energy_joules", "Energy since tracking began.", {g.uuid: float(g.energy_joules) for g in statuses})
    yield counter("busy_seconds", "Time with work.", {g.uuid: float(g.busy_seconds) for g in statuses})
    yield counter("clamp_seconds", "Time clamped by firmware.", {g.uuid: float(g.clamp_seconds) for g in statuses})
    yield counter(
        "clock_writes",
        "Locks and resets that the driver accepted.",
        {u: float(n) for u, n in snapshot.clock_writes.items()},
    )
    limited = CounterMetricFamily(
        "wattlock_gpu_limiter_seconds", "Time for which a limiter held the clock down.", labels=(*_GPU_LABELS, "cause")
    )
    state = GaugeMetricFamily(
        "wattlock_gpu_state", "1 for the state that the GPU is in.", labels=(*_GPU_LABELS, "state")
    )
    for gpu, labels in gpus:
        for cause in _CAUSES:
            limited.add_metric((*labels, cause), float(getattr(gpu.limiters, f"{cause}_seconds")))
        for each in GpuState:
            state.add_metric((*labels, each.value), float(gpu.state is each))
    yield limited
    yield state


def _instances(snapshot: Snapshot) -> Iterator[Metric]:
    names = {order.policy.uid: (order.policy.namespace, order.policy.name) for order in snapshot.orders.values()}
    trips = CounterMetricFamily("wattlock_guardrail_trips", "Breaches of the guardrail.", labels=_INSTANCE_LABELS)
    tripped = GaugeMetricFamily(
        "wattlock_guardrail_tripped", "1 while released because of a breach.", labels=_INSTANCE_LABELS
    )
    tokens = GaugeMetricFamily(
        "wattlock_instance_tokens_per_second", "Generated tokens per second over 15 s.", labels=_INSTANCE_LABELS
    )
    pairs = CounterMetricFamily(
        "wattlock_experiment_pairs", "Pairs of epochs measured at the present caps.", labels=_INSTANCE_LABELS
    )
    dropped = CounterMetricFamily(
        "wattlock_experiment_dropped_epochs", "Epochs not used, by cause.", labels=(*_INSTANCE_LABELS, "cause")
    )
    for each in snapshot.status.instances:
        labels = (*names.get(each.policy_uid, ("", "")), each.pool, each.instance)
        trips.add_metric(labels, each.guardrail_trips)
        tripped.add_metric(labels, float(each.guardrail_tripped))
        if each.tokens_per_second is not None:
            tokens.add_metric(labels, float(each.tokens_per_second))
        pairs.add_metric(labels, sum(stats.pairs for stats in each.pair_stats))
        for cause, count in each.dropped.model_dump().items():
            dropped.add_metric((*labels, cause), count)
    yield from (trips, tripped, tokens, pairs, dropped)
