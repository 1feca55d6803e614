"""What Prometheus scrapes from the agent: base units, and labels whose values are bounded by the node's GPUs."""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from wattlock_api.base import DecimalString
from wattlock_api.constants import GpuState
from wattlock_api.metricspec import MetricSpec
from wattlock_api.nodeenergy import GpuStatus, InstanceStatus, NodeEnergyStatus, Order

from wattlock_agent import metric_specs as specs

_CAUSES = ("power_cap", "thermal", "power_brake", "reliability", "board_limit")
_HERTZ_PER_MHZ = 1_000_000


#: Of the time that an idle instance's lower cap outlives its last quiet page: the next one comes 0.25 s later.
RELEASE_BOUNDS_SECONDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0)


@dataclass(frozen=True)
class IdleReleases:
    """How often the lower cap of idle instances was undone because of their pages, and how long it took."""

    by_work: int = 0
    """A page showed work."""
    by_page: int = 0
    """A page failed or came too late."""
    counts: tuple[int, ...] = (0,) * (len(RELEASE_BOUNDS_SECONDS) + 1)
    """By the first bound that is not below the time; the last has no bound."""
    seconds: float = 0.0

    def plus(self, seconds: float, by_work: bool) -> "IdleReleases":
        """Return the sums with one more; ``seconds``: from the last page without work to the driver's answer."""
        place = bisect_left(RELEASE_BOUNDS_SECONDS, seconds)
        counts = tuple(count + (number == place) for number, count in enumerate(self.counts))
        return IdleReleases(self.by_work + by_work, self.by_page + (not by_work), counts, self.seconds + seconds)


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
    idle_releases: IdleReleases = IdleReleases()
    idle_seconds: Mapping[str, float] = field(default_factory=dict)
    """Time under the lower cap of idle instances, by the key of the instance."""
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


class Totals:
    """Sums over counters whose owners come and go. A counter must not fall because one of them went."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Hashable, str], int] = {}
        self._sums: dict[str, int] = {}

    def take(self, counts: Mapping[tuple[Hashable, str], int]) -> dict[str, int]:
        """Return the sums by name, after a look at what each owner has counted now."""
        for (owner, name), count in counts.items():
            before = self._seen.get((owner, name), 0)
            self._sums[name] = self._sums.get(name, 0) + (count - before if count >= before else count)
        self._seen = dict(counts)
        return dict(self._sums)


class SnapshotBoard:
    """Where the loop puts the newest snapshot for the HTTP server."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(NodeEnergyStatus())


class _Page:
    """The metrics of one scrape. All of them are named, also those without a value now."""

    def __init__(self) -> None:
        self.families = {spec: Metric(spec.family, spec.help + ".", spec.kind) for spec in specs.SPECS}

    def add(self, spec: MetricSpec, value: float | bool | DecimalString | None, *labels: str) -> None:
        """Add a sample; None is unknown, so there is none."""
        if value is not None:
            self.families[spec].add_sample(spec.name, dict(zip(spec.labels, labels, strict=True)), float(value))

    def add_histogram(self, spec: MetricSpec, bounds: Sequence[float], counts: Sequence[int], total: float) -> None:
        """Add a histogram; ``counts`` has one more than there are bounds."""
        for bound, count in zip((*map(str, bounds), "+Inf"), accumulate(counts), strict=True):
            self.families[spec].add_sample(f"{spec.name}_bucket", {"le": bound}, float(count))
        self.families[spec].add_sample(f"{spec.name}_count", {}, float(sum(counts)))
        self.families[spec].add_sample(f"{spec.name}_sum", {}, total)


class AgentCollector(Collector):
    """Turns the newest snapshot into metrics."""

    def __init__(self, board: SnapshotBoard) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        page = _Page()
        snapshot = self._board.snapshot
        _agent(page, snapshot)
        _gpus(page, snapshot)
        _instances(page, snapshot)
        yield from page.families.values()


def make_registry(board: SnapshotBoard) -> CollectorRegistry:
    """Return a registry with the agent's metrics and nothing else."""
    registry = CollectorRegistry()
    registry.register(AgentCollector(board))
    return registry


def _agent(page: _Page, snapshot: Snapshot) -> None:
    agent = snapshot.status.agent
    page.add(specs.AGENT_INFO, 1, agent.version, agent.driver_version)
    page.add(specs.AGENT_CAN_WRITE, agent.can_write)
    page.add(specs.AGENT_READY, snapshot.ready)
    page.add(specs.AGENT_ORDERS, snapshot.order_count)
    page.add(specs.AGENT_ORDERS_STALE, snapshot.orders_stale)
    page.add(specs.AGENT_LOOP_PASSES, snapshot.passes)
    page.add(specs.AGENT_LOOP_SECONDS, snapshot.pass_seconds)
    page.add(specs.AGENT_STATUS_WRITE_FAILURES, snapshot.status_failures)
    for (call, fault), count in snapshot.driver_errors.items():
        page.add(specs.AGENT_DRIVER_ERRORS, count, call, fault)
    for reason, count in snapshot.scrape_failures.items():
        page.add(specs.AGENT_SCRAPE_FAILURES, count, reason)
    releases = snapshot.idle_releases
    page.add(specs.AGENT_IDLE_RELEASES, releases.by_work, "work")
    page.add(specs.AGENT_IDLE_RELEASES, releases.by_page, "page")
    page.add_histogram(specs.AGENT_IDLE_RELEASE_SECONDS, RELEASE_BOUNDS_SECONDS, releases.counts, releases.seconds)


def _gpu_labels(snapshot: Snapshot, gpu: GpuStatus) -> tuple[str, ...]:
    order = snapshot.orders.get(gpu.uuid)
    place = (gpu.uuid, str(gpu.index), gpu.product)
    if order is None:
        return (*place, "", "", "", "")
    return (*place, order.pod.namespace, order.pod.name, order.policy.name, order.pool)


def _hertz(mhz: int | None) -> float | None:
    return None if mhz is None else mhz * _HERTZ_PER_MHZ


def _gpus(page: _Page, snapshot: Snapshot) -> None:
    for gpu in snapshot.status.gpus:
        labels = _gpu_labels(snapshot, gpu)
        page.add(specs.GPU_POWER, gpu.power_watts, *labels)
        page.add(specs.GPU_PEAK_POWER, gpu.peak_watts, *labels)
        page.add(specs.GPU_POWER_LIMIT, gpu.power_limit_watts, *labels)
        page.add(specs.GPU_SM_CLOCK, _hertz(snapshot.sm_mhz.get(gpu.uuid)), *labels)
        page.add(specs.GPU_REQUESTED_CLOCK, _hertz(gpu.requested_mhz), *labels)
        page.add(specs.GPU_OBSERVED_CLOCK, _hertz(gpu.observed_mhz), *labels)
        page.add(specs.GPU_CLAMPED, gpu.clamped, *labels)
        for each in GpuState:
            page.add(specs.GPU_STATE, gpu.state is each, *labels, each.value)
        page.add(specs.GPU_ENERGY, gpu.energy_joules, *labels)
        page.add(specs.GPU_ENERGY_GAPS, gpu.energy_gaps, *labels)
        page.add(specs.GPU_BUSY, gpu.busy_seconds, *labels)
        page.add(specs.GPU_CLAMP, gpu.clamp_seconds, *labels)
        for cause in _CAUSES:
            page.add(specs.GPU_LIMITER, getattr(gpu.limiters, f"{cause}_seconds"), *labels, cause)
        page.add(specs.GPU_CLOCK_WRITES, snapshot.clock_writes.get(gpu.uuid, 0), *labels)


def _milliseconds(text: DecimalString | None) -> float | None:
    return None if text is None else float(text) / 1000


def _instances(page: _Page, snapshot: Snapshot) -> None:
    names = {order.policy.uid: (order.policy.namespace, order.policy.name) for order in snapshot.orders.values()}
    for each in snapshot.status.instances:
        # Without a policy's name two instances could share their labels, and Prometheus would refuse the whole page.
        if (name := names.get(each.policy_uid)) is not None:
            labels = (*name, each.pool, each.instance)
            _instance(page, each, labels)
            page.add(specs.INSTANCE_IDLE_CAPPED, snapshot.idle_seconds.get(each.key), *labels)


def _instance(page: _Page, each: InstanceStatus, labels: tuple[str, ...]) -> None:
    page.add(specs.INSTANCE_ENERGY, each.energy_joules, *labels)
    page.add(specs.INSTANCE_TOKENS, each.tokens_per_second, *labels)
    page.add(specs.INSTANCE_PROMPT_TOKENS, each.prompt_tokens_per_second, *labels)
    page.add(specs.INSTANCE_JOULES_PER_GENERATED_TOKEN, each.joules_per_generated_token, *labels)
    page.add(specs.INSTANCE_JOULES_PER_PROMPT_TOKEN, each.joules_per_prompt_token, *labels)
    page.add(specs.INSTANCE_LATENCY, _milliseconds(each.inter_token_latency_ms), *labels)
    page.add(specs.INSTANCE_WAITING, each.waiting_requests, *labels)
    page.add(specs.GUARDRAIL_TRIPS, each.guardrail_trips, *labels)
    page.add(specs.GUARDRAIL_TRIPPED, each.guardrail_tripped, *labels)
    page.add(specs.EXPERIMENT_PAIRS, sum(stats.pairs for stats in each.pair_stats), *labels)
    for cause, count in each.dropped.model_dump().items():
        page.add(specs.EXPERIMENT_DROPPED, count, *labels, cause)
