"""The metrics pages of operator and agent: names, bounds, and what promtool says to them."""

import dataclasses
import importlib.util
import math
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from promtool import check_metrics
from wattlock_agent import metric_specs as agent_specs
from wattlock_agent.http_server import AgentServer
from wattlock_agent.metrics import IdleReleases, Snapshot, SnapshotBoard, Totals, make_registry
from wattlock_api.nodeenergy import AgentStatus, ArmTotals, DroppedEpochs, Moments, NodeEnergyStatus, PairStats
from wattlock_api.policystatus import Limiters
from wattlock_api.tuningstatus import TuningArm, TuningSearches, TuningStatus
from wattlock_operator import metric_specs as operator_specs
from wattlock_operator.decide import Memory, decide
from wattlock_operator.metrics import Metrics
from wattlock_operator.world import PolicyView

ROOT = Path(__file__).parents[2]
PODS = (pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1"))
COST = {"pricePerKWh": "0.25", "gramsCO2PerKWh": 380, "pue": "1.3"}
SEARCHING = TuningStatus(
    phase="Searching",
    cap_mhz=1260,
    arm=2,
    arms=8,
    remaining_seconds=5400,
    searches=3,
    begun=[
        TuningSearches(cause="First", searches=1),
        TuningSearches(cause="WorkChanged", searches=2),
    ],
    guardrail_arms=1,
    tried=[
        TuningArm(cap_mhz=mhz, outcome="Open", sums=PairStats(cap_mhz=mhz, pairs=pairs), seen=PairStats(cap_mhz=mhz))
        for mhz, pairs in ((1575, 40), (1260, 14))
    ],
)
LIMITERS = Limiters(power_cap_seconds="1.5", thermal_seconds="0.25")


def measured_gpus():
    numbers = {
        "power_watts": 592,
        "peak_watts": 656,
        "power_limit_watts": 700,
        "observed_mhz": 1590,
        "energy_joules": "123456.7",
        "busy_seconds": "900",
        "clamp_seconds": "0",
        "limiters": LIMITERS,
    }
    prefill = {"pool": "prefill", "reason": "PrefillPool", "state": "Observing", "requested_mhz": None}
    return [gpu(0, **numbers), gpu(1, "p0", **numbers | prefill)]


def prefill_instance():
    return instance(
        "p0",
        pool="prefill",
        prompt_tokens_per_second="9000",
        tokens_per_second="30",
        joules_per_prompt_token="0.077",
        energy_joules="7000000",
    )


def serving_instance(capped_joules: float = 3.6e6):
    mean = math.log(0.8)
    moments = Moments(total=f"{40 * mean:.9f}", squares=f"{40 * mean**2 + 0.001:.9f}")
    still = Moments(total="0.04", squares="0.004")
    return instance(
        "d0",
        tokens_per_second="4200",
        prompt_tokens_per_second="12",
        joules_per_generated_token="0.141",
        kv_cache_usage_percent="41.5",
        estimated_gigaflops="90000",
        estimated_gigabytes="3600",
        inter_token_latency_ms="7.65",
        waiting_requests=3,
        guardrail_trips=1,
        energy_joules=f"{capped_joules:.1f}",
        arms=[ArmTotals(cap_mhz=1590, joules=f"{capped_joules:.1f}")],
        pair_stats=[
            PairStats(cap_mhz=1590, pairs=40, energy=moments, throughput=still, latency_pairs=40, latency=still)
        ],
        dropped=DroppedEpochs(restart=1, no_tokens=2),
    )


def operator_metrics() -> Metrics:
    """The operator some minutes into a verified policy, with one that it cannot read beside it."""
    found = policy(spec={"cost": COST})
    orders = decide(world([found], PODS), None, Memory(), NOW).write_orders["n1"]
    memory = Memory()
    for joules in (3.6e6, 7.2e6):
        entry = node_energy(
            gpus=measured_gpus(), instances=[serving_instance(joules), prefill_instance()], orders=orders
        )
        decision = decide(world([found], PODS, [entry]), None, memory, NOW)
        memory = decision.memory
    status = decision.statuses[found.uid]
    metrics = Metrics()
    unread = dataclasses.replace(policy("other"), spec=None, problem="no such field")
    pools = [status.pools[0].model_copy(update={"tuning": SEARCHING})]
    shown = [(found, status), (unread, status.model_copy(update={"pools": []}))]
    metrics.show([*shown, (policy("tuned"), status.model_copy(update={"pools": pools}))], leading=True)
    metrics.wrote("NodeEnergy", "apply")
    metrics.failed("Event")
    with metrics.pass_seconds.time():
        pass
    return metrics


def agent_snapshot() -> Snapshot:
    orders = decide(world([policy()], PODS), None, Memory(), NOW).write_orders["n1"]
    status = NodeEnergyStatus(
        agent=AgentStatus(version="0.1.0", driver_version="580.95.05", can_write=True),
        gpus=[*measured_gpus(), gpu(2, state="Released", reason="NoOrder", policy_uid=None, pool=None)],
        instances=[
            serving_instance(),
            prefill_instance(),
            instance("unknown", policy_uid="uid-gone"),
            instance("u2", policy_uid="uid-x"),
        ],
    )
    return Snapshot(
        status,
        orders={"GPU-0": orders[0], "GPU-1": orders[1]},
        sm_mhz={"GPU-0": 1590, "GPU-1": 1980},
        clock_writes={"GPU-0": 3},
        driver_errors={("lock_clocks", "NoPermission"): 2},
        scrape_failures={"MetricsInvalid": 1},
        idle_releases=IdleReleases().plus(0.31, by_work=True).plus(0.4, by_work=True).plus(7.0, by_work=False),
        idle_seconds={serving_instance().key: 12.5},
        order_count=2,
        ready=True,
        passes=600,
        pass_seconds=1.25,
    )


def agent_page() -> str:
    board = SnapshotBoard()
    board.snapshot = agent_snapshot()
    return generate_latest(make_registry(board)).decode()


def test_the_histogram_of_idle_releases_is_cumulative():
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(agent_page())
        for sample in family.samples
    }
    name = "wattlock_agent_idle_release_seconds"
    assert [samples[f"{name}_bucket", bound] for bound in ("0.3", "0.4", "5.0", "+Inf")] == [0, 2, 2, 3]
    assert samples[f"{name}_count", None] == 3
    assert samples[f"{name}_sum", None] == pytest.approx(7.71)


def operator_page() -> str:
    return generate_latest(operator_metrics().registry).decode()


PAGES = [
    pytest.param(operator_page, operator_specs.SPECS, id="operator"),
    pytest.param(agent_page, agent_specs.SPECS, id="agent"),
]


@pytest.mark.parametrize(("page", "specs"), PAGES)
def test_promtool_finds_no_fault(page, specs):
    assert check_metrics(page()) == ""


def test_promtool_would_find_one():
    faulty = (
        "# HELP wattlock_energy_total Energy.",
        "# TYPE wattlock_energy_total gauge",
        "wattlock_energy_total 1",
        "",
    )
    assert "_total" in check_metrics("\n".join(faulty))


@pytest.mark.parametrize(("page", "specs"), PAGES)
def test_pages_hold_what_is_declared_and_nothing_else(page, specs):
    declared = {spec.family: spec for spec in specs}
    families = {family.name: family for family in text_string_to_metric_families(page())}
    assert set(families) == set(declared)
    for name, family in families.items():
        assert family.samples, f"{name}: realistic content has no sample of it"
        assert family.type == declared[name].kind
        assert family.documentation == declared[name].help + "."
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(declared[name].labels)
        if family.type == "counter":
            assert {sample.name for sample in family.samples} == {f"{name}_total"}


@pytest.mark.parametrize(("page", "specs"), PAGES)
def test_every_series_is_there_once(page, specs):
    # two samples of a series make Prometheus refuse the whole page
    series = Counter(
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(page())
        for sample in family.samples
    )
    assert {key: count for key, count in series.items() if count > 1} == {}


def test_the_operator_has_no_series_for_pods_or_gpus():
    labels = {label for spec in operator_specs.SPECS for label in spec.labels}
    assert labels & {"pod", "gpu", "uuid", "node", "instance", "serving_instance"} == set()


def test_units_and_values():
    value = operator_metrics().registry.get_sample_value
    pool = {"namespace": "llm", "policy": "qwen", "pool": "decode", "role": "Decode"}
    assert value("wattlock_pool_energy_joules_total", pool) == pytest.approx(7.2e6)
    assert value("wattlock_pool_observed_sm_clock_hertz", pool) == 1.59e9
    assert value("wattlock_pool_inter_token_latency_seconds", pool) == pytest.approx(0.00765)
    assert value("wattlock_pool_saving_ratio", pool) == pytest.approx(0.2)
    saved = value("wattlock_pool_saved_joules", pool)
    assert saved == pytest.approx(3.6e6 * 0.25, rel=0.01)
    assert value("wattlock_pool_saved_joules_low", pool) < saved < value("wattlock_pool_saved_joules_high", pool)
    assert value("wattlock_pool_saved_cost", pool) == pytest.approx(0.25 * 0.25 * 1.3, abs=1e-3)
    assert value("wattlock_pool_saved_co2_grams", pool) == pytest.approx(0.25 * 380 * 1.3, rel=0.01)
    assert value("wattlock_pool_saving_verdict", {**pool, "verdict": "Verified"}) == 1
    assert value("wattlock_policy_condition", {"namespace": "llm", "policy": "qwen", "condition": "Verified"}) == 1


def test_what_goes_takes_its_series_with_it():
    board = SnapshotBoard()
    registry = make_registry(board)
    board.snapshot = agent_snapshot()
    assert 'pod="d0"' in generate_latest(registry).decode()
    board.snapshot = dataclasses.replace(agent_snapshot(), status=NodeEnergyStatus(), orders={})
    assert 'pod="d0"' not in generate_latest(registry).decode()


def test_a_counter_does_not_fall_when_what_it_counts_goes():
    totals = Totals()
    assert totals.take({("d0", "MetricsInvalid"): 5, ("d1", "MetricsInvalid"): 2}) == {"MetricsInvalid": 7}
    assert totals.take({("d1", "MetricsInvalid"): 3}) == {"MetricsInvalid": 8}
    assert totals.take({("d0", "MetricsInvalid"): 1, ("d1", "MetricsInvalid"): 3}) == {"MetricsInvalid": 9}


def test_the_operators_page_is_bounded(monkeypatch):
    monkeypatch.setattr("wattlock_operator.metrics.MAX_POLICIES", 20)
    metrics = Metrics()
    status = decide(world([policy()], PODS), None, Memory(), NOW).statuses["uid-qwen"]
    policies: list[PolicyView] = [policy(f"p{number}") for number in range(25)]
    metrics.show([(each, status) for each in policies], leading=True)
    families = {
        family.name: family for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
    }
    assert len(families["wattlock_policy_info"].samples) == 20
    assert families["wattlock_operator_policies"].samples[0].value == 25


def test_the_agent_serves_the_page_that_promtool_checks():
    board = SnapshotBoard()
    board.snapshot = agent_snapshot()
    server = AgentServer(("127.0.0.1", 0), board)
    try:
        status, content_type, body = server.answer("/metrics")
    finally:
        server.server_close()
    assert (status, content_type.startswith("text/plain; version=0.0.4")) == (200, True)
    assert body.decode() == agent_page()


def load_generator():
    spec = importlib.util.spec_from_file_location("wattlock_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_metrics_is_up_to_date(tmp_path, capsys):
    generator = load_generator()
    assert generator.main(["--check"]) == 0
    stale = tmp_path / "metrics.md"
    stale.write_text(generator.page().replace("wattlock_gpu_power_watts", "wattlock_gpu_power"))
    assert generator.main(["--check"], stale) == 1
    assert "make generate" in capsys.readouterr().err
    assert generator.main([], stale) == 0
    assert stale.read_text() == (ROOT / "docs" / "metrics.md").read_text()


def test_promtool_is_prepared_by_make_setup():
    assert "dev/promtool" in (ROOT / "dev" / "setup").read_text()
    assert subprocess.run([ROOT / "dev" / "promtool", "--path"], capture_output=True, timeout=20).returncode == 0
