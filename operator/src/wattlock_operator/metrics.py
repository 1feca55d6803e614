"""Prometheus metrics: read from the last decision at each scrape, so no label set outlives its policy."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from wattlock_api.constants import ConditionType
from wattlock_api.energypolicy import EnergyPolicyStatus, PoolStatus

from wattlock_operator.world import PolicyView

Snapshot = Iterable[tuple[PolicyView, EnergyPolicyStatus]]

_POOL_LABELS = ("namespace", "policy", "pool", "role")


class Metrics:
    """The operator's metrics in a registry of their own. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._snapshot: tuple[tuple[PolicyView, EnergyPolicyStatus], ...] = ()
        self._writes: Counter[tuple[str, str]] = Counter()
        self._errors: Counter[str] = Counter()
        self._leading = False
        self.reconcile_seconds = Histogram(
            "wattlock_reconcile_duration_seconds",
            "Time that one pass over the cluster took, decision and writes.",
            registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.registry.register(self)

    def show(self, snapshot: Snapshot, leading: bool) -> None:
        """Replace what is shown."""
        with self._lock:
            self._snapshot, self._leading = tuple(snapshot), leading

    def wrote(self, kind: str, verb: str) -> None:
        """Count a write to the API server."""
        with self._lock:
            self._writes[kind, verb] += 1

    def failed(self, where: str) -> None:
        """Count an error."""
        with self._lock:
            self._errors[where] += 1

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance: the registry need not collect when we register."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        with self._lock:
            snapshot, leading = self._snapshot, self._leading
            writes, errors = dict(self._writes), dict(self._errors)
        yield GaugeMetricFamily("wattlock_operator_leading", "Whether this operator holds the lease.", float(leading))
        yield _counter("wattlock_api_writes", "Writes to the API server.", ("kind", "verb"), writes)
        yield _counter(
            "wattlock_operator_errors",
            "Failures, by what failed.",
            ("where",),
            {(key,): n for key, n in errors.items()},
        )
        yield from _policies(snapshot)
        yield from _pools(snapshot)


def _counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _policies(snapshot: Snapshot) -> Iterator[Metric]:
    info = InfoMetricFamily("wattlock_policy", "Policies and their mode.", labels=("namespace", "policy"))
    conditions = GaugeMetricFamily(
        "wattlock_policy_condition",
        "Conditions of a policy: 1 true, 0 false; Unknown is absent.",
        labels=("namespace", "policy", "condition"),
    )
    for policy, status in snapshot:
        mode = policy.spec.mode.value if policy.spec else "Invalid"
        info.add_metric((policy.namespace, policy.name), {"mode": mode})
        known = {condition.type: condition.status for condition in status.conditions}
        for kind in ConditionType:
            if known.get(kind.value) in ("True", "False"):
                conditions.add_metric((policy.namespace, policy.name, kind.value), float(known[kind.value] == "True"))
    yield info
    yield conditions


def _pool_values(pool: PoolStatus) -> dict[str, float]:
    values: dict[str, float] = {"gpus": pool.gpus, "locked_gpus": pool.locked, "clamped_gpus": pool.clamped_gpus}
    optional = {
        "power_watts": pool.power_watts,
        "requested_sm_clock_mhz": pool.requested_mhz,
        "observed_sm_clock_mhz": pool.observed_mhz,
        "tokens_per_second": pool.tokens_per_second,
        "joules_per_generated_token": pool.joules_per_generated_token,
        "joules_per_prompt_token": pool.joules_per_prompt_token,
        "energy_kwh": pool.energy_kwh,
    }
    savings = pool.savings
    if savings is not None and savings.energy_percent is not None and savings.ci95 is not None:
        percents = {
            "saving_ratio": savings.energy_percent,
            "saving_ratio_low": savings.ci95[0],
            "saving_ratio_high": savings.ci95[1],
        }
        values |= {name: float(percent) / 100 for name, percent in percents.items()}
    return values | {name: float(value) for name, value in optional.items() if value is not None}


_POOL_HELP = {
    "gpus": "GPUs that the pool's pods hold.",
    "locked_gpus": "GPUs under a cap now.",
    "clamped_gpus": "GPUs below their cap under load while no limiter acts.",
    "power_watts": "Power of the pool's GPU boards.",
    "requested_sm_clock_mhz": "Cap in force.",
    "observed_sm_clock_mhz": "SM clock of capped GPUs under load.",
    "tokens_per_second": "Generated tokens per second.",
    "joules_per_generated_token": "GPU-board energy for each generated token; not of Prefill pools.",
    "joules_per_prompt_token": "GPU-board energy for each computed prompt token; of Prefill pools.",
    "energy_kwh": "GPU-board energy so far.",
    "saving_ratio": "Measured saving of energy for each token, 0 to 1.",
    "saving_ratio_low": "Lower end of the 95 % interval of the saving.",
    "saving_ratio_high": "Upper end of the 95 % interval of the saving.",
}


def _pools(snapshot: Snapshot) -> Iterator[Metric]:
    families = {
        name: GaugeMetricFamily(f"wattlock_pool_{name}", text, labels=_POOL_LABELS) for name, text in _POOL_HELP.items()
    }
    for policy, status in snapshot:
        for pool in status.pools:
            for name, value in _pool_values(pool).items():
                families[name].add_metric((policy.namespace, policy.name, pool.name, pool.role.value), value)
    yield from families.values()
