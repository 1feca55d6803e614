"""Prometheus metrics: read from the last decision at each scrape, so no label set outlives its policy."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.core import Metric
from wattlock_api.base import DecimalString
from wattlock_api.constants import ConditionType, Mode, PowerCapVerdict, RooflineVerdict, SavingsVerdict
from wattlock_api.metricspec import MetricSpec
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus, Savings
from wattlock_api.tuningstatus import SearchCause, TuningStatus

from wattlock_operator import metric_specs as specs
from wattlock_operator.world import PolicyView

Snapshot = Iterable[tuple[PolicyView, EnergyPolicyStatus]]

#: Policies with series of their own: a page must stay readable by Prometheus, whatever people create.
MAX_POLICIES = 1000
_HERTZ_PER_MHZ = 1e6
_JOULES_PER_KWH = 3.6e6


class _Page:
    """The metrics of one scrape. All of them are named, also those without a value now."""

    def __init__(self) -> None:
        self.families = {
            spec: Metric(spec.family, spec.help + ".", spec.kind) for spec in specs.SPECS if spec.kind != "histogram"
        }

    def add(
        self, spec: MetricSpec, value: float | bool | DecimalString | None, *labels: str, times: float = 1.0
    ) -> None:
        """Add a sample; None is unknown, so there is none."""
        if value is not None:
            self.families[spec].add_sample(spec.name, dict(zip(spec.labels, labels, strict=True)), float(value) * times)


class Metrics:
    """The operator's metrics in a registry of their own. Safe to use from several threads."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series without a purpose here
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._snapshot: tuple[tuple[PolicyView, EnergyPolicyStatus], ...] = ()
        self._writes: Counter[tuple[str, str]] = Counter()
        self._errors: Counter[str] = Counter()
        self._leading = False
        self.pass_seconds = PrometheusHistogram(
            specs.OPERATOR_PASS.name,
            specs.OPERATOR_PASS.help + ".",
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
        page = _Page()
        page.add(specs.OPERATOR_INFO, 1, version("wattlock-operator"))
        page.add(specs.OPERATOR_LEADING, leading)
        page.add(specs.OPERATOR_POLICIES, len(snapshot))
        for (kind, verb), count in sorted(writes.items()):
            page.add(specs.OPERATOR_API_WRITES, count, kind, verb)
        for where, count in sorted(errors.items()):
            page.add(specs.OPERATOR_ERRORS, count, where)
        for policy, status in islice(snapshot, MAX_POLICIES):
            _policy(page, policy, status)
            for pool in status.pools:
                labels = (policy.namespace, policy.name, pool.name, pool.role.value)
                _pool(page, pool, labels)
                if pool.tuning is not None:
                    _tuning(page, pool.tuning, policy.spec.mode if policy.spec else None, labels)
        yield from page.families.values()


def _policy(page: _Page, policy: PolicyView, status: EnergyPolicyStatus) -> None:
    name = (policy.namespace, policy.name)
    page.add(specs.POLICY_INFO, 1, *name, policy.spec.mode.value if policy.spec else "Invalid")
    known = {condition.type: condition.status for condition in status.conditions}
    for kind in ConditionType:
        if known.get(kind.value) in ("True", "False"):
            page.add(specs.POLICY_CONDITION, known[kind.value] == "True", *name, kind.value)


def _pool(page: _Page, pool: PoolStatus, labels: tuple[str, ...]) -> None:
    page.add(specs.POOL_GPUS, pool.gpus, *labels)
    page.add(specs.POOL_CAPPED, pool.capped, *labels)
    page.add(specs.POOL_LOCKED, pool.locked, *labels)
    page.add(specs.POOL_CLAMPED, pool.clamped_gpus, *labels)
    page.add(specs.POOL_INSTANCES, pool.instances, *labels)
    page.add(specs.POOL_POWER, pool.power_watts, *labels)
    page.add(specs.POOL_REQUESTED_CLOCK, pool.requested_mhz, *labels, times=_HERTZ_PER_MHZ)
    page.add(specs.POOL_OBSERVED_CLOCK, pool.observed_mhz, *labels, times=_HERTZ_PER_MHZ)
    page.add(specs.POOL_TOKENS, pool.tokens_per_second, *labels)
    page.add(specs.POOL_PROMPT_TOKENS, pool.prompt_tokens_per_second, *labels)
    page.add(specs.POOL_JOULES_PER_GENERATED_TOKEN, pool.joules_per_generated_token, *labels)
    page.add(specs.POOL_JOULES_PER_PROMPT_TOKEN, pool.joules_per_prompt_token, *labels)
    page.add(specs.POOL_LATENCY, pool.inter_token_latency_ms, *labels, times=1e-3)
    page.add(specs.POOL_ENERGY, pool.energy_kwh, *labels, times=_JOULES_PER_KWH)
    for verdict in PowerCapVerdict:
        page.add(specs.POOL_POWER_CAP, pool.power_cap.verdict is verdict, *labels, verdict.value)
    if pool.roofline is not None:
        page.add(specs.POOL_ARITHMETIC_INTENSITY, pool.roofline.arithmetic_intensity, *labels)
        for limit in RooflineVerdict:
            page.add(specs.POOL_ROOFLINE, pool.roofline.verdict is limit, *labels, limit.value)
    if pool.savings is not None:
        _savings(page, pool.savings, labels)


#: What a tuner does, by the word on the page.
TUNING_STATES = ("Starting", "Searching", "Confirming", "CoolingDown", "Settled", "Released", "Resting")


def _tuning_state(tuning: TuningStatus, mode: Mode | None) -> str:
    if mode is not Mode.ENFORCE:
        return "Resting"
    if tuning.phase != "Searching":
        return tuning.phase
    if tuning.cap_mhz is None:
        return "CoolingDown"
    return "Confirming" if tuning.confirming else "Searching"


def _tuning(page: _Page, tuning: TuningStatus, mode: Mode | None, labels: tuple[str, ...]) -> None:
    now = _tuning_state(tuning, mode)
    for state in TUNING_STATES:
        page.add(specs.TUNING_STATE, state == now, *labels, state)
    if now != "Resting":
        page.add(specs.TUNING_ARM, tuning.arm, *labels)
        page.add(specs.TUNING_ARMS, tuning.arms, *labels)
        page.add(specs.TUNING_REMAINING, tuning.remaining_seconds, *labels)
        cap_mhz = None if tuning.phase == "Starting" else tuning.cap_mhz
        page.add(specs.TUNING_CAP, cap_mhz, *labels, times=_HERTZ_PER_MHZ)
    page.add(specs.TUNING_PAIRS, sum(arm.sums.pairs for arm in tuning.tried), *labels)
    counts = {each.cause: each.searches for each in tuning.begun}
    for cause in SearchCause:
        page.add(specs.TUNING_SEARCHES, counts.get(cause, 0), *labels, cause.value)
    page.add(specs.TUNING_GUARDRAIL_ARMS, tuning.guardrail_arms, *labels)


def _savings(page: _Page, savings: Savings, labels: tuple[str, ...]) -> None:
    for verdict in SavingsVerdict:
        page.add(specs.POOL_VERDICT, savings.verdict is verdict, *labels, verdict.value)

    def interval(
        declared: Sequence[MetricSpec], value: DecimalString | None, ends: Sequence[DecimalString] | None, times: float
    ) -> None:
        if value is not None and ends is not None and len(ends) == 2:  # never a number without its interval
            for spec, text in zip(declared, (value, *ends), strict=True):
                page.add(spec, text, *labels, times=times)

    interval(
        (specs.SAVING_RATIO, specs.SAVING_RATIO_LOW, specs.SAVING_RATIO_HIGH),
        savings.energy_percent,
        savings.ci95,
        0.01,
    )
    if savings.ci95_every_look is not None and len(savings.ci95_every_look) == 2:
        low, high = savings.ci95_every_look
        page.add(specs.SAVING_RATIO_EVERY_LOOK_LOW, low, *labels, times=0.01)
        page.add(specs.SAVING_RATIO_EVERY_LOOK_HIGH, high, *labels, times=0.01)
    page.add(specs.EVIDENCE, savings.evidence, *labels)
    page.add(specs.THROUGHPUT_CHANGE, savings.throughput_change_percent, *labels, times=0.01)
    page.add(specs.LATENCY_CHANGE, savings.inter_token_latency_change_percent, *labels, times=0.01)
    page.add(specs.PAIRS, savings.pairs, *labels)
    page.add(specs.EXPERIMENT_INSTANCES, savings.instances, *labels)
    page.add(specs.DROPPED, savings.dropped_epochs, *labels)
    interval(
        (specs.SAVED, specs.SAVED_LOW, specs.SAVED_HIGH), savings.saved_kwh, savings.saved_kwh_ci95, _JOULES_PER_KWH
    )
    interval(
        (specs.SAVED_COST, specs.SAVED_COST_LOW, specs.SAVED_COST_HIGH), savings.saved_cost, savings.saved_cost_ci95, 1
    )
    interval(
        (specs.SAVED_CO2, specs.SAVED_CO2_LOW, specs.SAVED_CO2_HIGH),
        savings.saved_kg_co2,
        savings.saved_kg_co2_ci95,
        1000,
    )
