"""Reports, metrics, probes and settings."""

import threading
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from wattlock_agent.clock import Clock
from wattlock_agent.clocks import snap_down_mhz, step_mhz, to_ranges
from wattlock_agent.holders.base import PodName
from wattlock_agent.http_server import AgentServer
from wattlock_agent.metrics import Snapshot, SnapshotBoard
from wattlock_agent.report import Reported, build_status, is_due
from wattlock_agent.settings import SettingsError, read_settings
from wattlock_api.constants import STALE_ORDERS_SECONDS, GpuState, Reason
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_api.schedule import Arm, arm_of, epoch_at, epoch_start_seconds

ENVIRONMENT = {
    "NODE_NAME": "node-1",
    "POD_NAME": "wattlock-agent-x",
    "WATTLOCK_NAMESPACE": "wattlock",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}


def status_of(node, stopping=False):
    agent = node.agent
    return build_status(agent.outlook, agent.tracks, agent.instances, "1.2.3", "agent-x", stopping)


def test_the_status_says_what_was_measured(make_node, make_order):
    node = make_node()
    node.order(make_order(), generation=4)
    node.run(30)
    status = status_of(node)
    assert (status.observed_generation, status.locked, status.phase) == (4, 1, "Running")
    assert status.agent.can_write
    assert status.agent.products[0].ranges[0].model_dump() == {"min_mhz": 345, "max_mhz": 1980, "step_mhz": 15}
    gpu, other = status.gpus
    assert (gpu.state, gpu.requested_mhz, gpu.observed_mhz, gpu.power_watts) == ("Locked", 1590, 1590, 500)
    assert gpu.holder.uid == "uid-decode-0"
    assert 13_000 < float(gpu.energy_joules) < 15_000
    assert (other.state, other.reason, other.holder) == ("Released", "NoOrder", None)
    (instance,) = status.instances
    assert float(instance.tokens_per_second) == pytest.approx(1000)
    assert float(instance.joules_per_generated_token) == pytest.approx(0.5, rel=0.01)
    assert float(instance.inter_token_latency_ms) == pytest.approx(10)
    assert NodeEnergyStatus.model_validate(status.to_api()) == status


def test_unknown_measurements_are_absent_not_zero(make_node, make_order):
    node = make_node()
    node.order(make_order(metricsURL=None))
    node.run(10)
    (instance,) = status_of(node).instances
    assert instance.reason == "NoServingMetrics"
    assert instance.tokens_per_second is None
    assert instance.joules_per_generated_token is None
    released = status_of(node).gpus[1]
    assert (released.requested_mhz, released.observed_mhz) == (None, 1980)
    node.driver.utilization_percent = 0
    node.run(30)
    assert status_of(node).gpus[1].observed_mhz is None


def test_a_pod_without_a_gpu_is_told(make_node, make_order):
    node = make_node()
    node.order(make_order("elsewhere"))
    node.run(10)
    (instance,) = status_of(node).instances
    assert instance.reason == "PodNotOnNode"


def test_the_generation_is_observed_only_when_nothing_is_left_to_do(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(3)
    node.order(make_order(capMHz=1200), generation=2)
    node.run(1)
    assert status_of(node).gpus[0].reason == "WaitingToWrite"
    assert status_of(node).observed_generation == 1
    node.run(5)
    assert status_of(node).observed_generation == 2


@pytest.mark.parametrize(
    ("arm_before", "into_seconds", "expected"),
    [(Arm.CONTROL, 1, "ControlEpoch"), (Arm.CONTROL, 11, "WaitingToWrite"), (Arm.CAP, 1, "WaitingToWrite")],
)
def test_a_turn_between_the_arms_is_no_other_state(
    make_node, make_order, switchback, schedule, arm_before, into_seconds, expected
):
    # Locks are written beside the pass, so a report may fall between the end of a control epoch and the lock.
    node = make_node(gpus=1)
    node.order(make_order(experiment=switchback))
    node.run(4)
    agent, outlook = node.agent, node.agent.outlook
    start = epoch_at(schedule, node.clock.unix_seconds)
    epoch = next(each for each in range(start, start + 50) if arm_of(schedule, "decode-0", each - 1) is arm_before)
    waiting = replace(outlook.decisions["GPU-0"], reason=Reason.WAITING_TO_WRITE, state=GpuState.RELEASED)
    clock = Clock(node.clock.now_seconds, epoch_start_seconds(schedule, epoch) + into_seconds)
    outlook = replace(outlook, decisions={"GPU-0": waiting}, clock=clock)
    status = build_status(outlook, agent.tracks, agent.instances, "1.2.3", "agent-x", stopping=False)
    assert status.gpus[0].reason == expected
    assert status.capped == ("1/1" if expected == "ControlEpoch" else "0/1")


def test_reports_at_once_what_changed_and_measurements_every_20_seconds(make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(10)
    status = status_of(node)
    assert is_due(Reported(), status, 0.0, 0.0)
    reported = Reported(100.0, status)
    measured = status.model_copy(
        update={"reported_at": None, "gpus": [status.gpus[0].model_copy(update={"power_watts": 1})]}
    )
    assert is_due(reported, status.model_copy(update={"locked": 0}), 102.1, 0.0)
    assert not is_due(reported, status.model_copy(update={"locked": 0}), 101.0, 0.0)
    measured = status.model_copy(update={"gpus": [gpu.model_copy(update={"power_watts": 1}) for gpu in status.gpus]})
    assert not is_due(reported, measured, 118.0, 0.0)
    assert is_due(reported, measured, 120.1, 0.0)
    assert not is_due(reported, measured, 120.1, 1.0)
    assert not is_due(reported, status, 130.0, 0.0)
    assert is_due(reported, status, 161.0, 0.0)


def test_the_status_of_a_full_node_is_bounded(make_node, make_order):
    node = make_node(gpus=40)
    node.pods = {f"GPU-{n}": (PodName("llm", f"decode-{n}"),) for n in range(40)}
    node.order(*[make_order(f"decode-{n}") for n in range(40)])
    node.run(2)
    assert len(status_of(node).gpus) == 32


@pytest.fixture
def board():
    return SnapshotBoard()


@pytest.fixture
def get(board):
    server = AgentServer(("127.0.0.1", 0), board, now_seconds=lambda: 1000.0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def get(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    yield get
    server.shutdown()
    thread.join()
    server.server_close()


def test_probes_follow_the_loop(get, board):
    board.snapshot = Snapshot(NodeEnergyStatus(), at_seconds=990.0)
    assert get("/healthz")[0] == 200
    assert get("/readyz")[0] == 503
    board.snapshot = replace(board.snapshot, ready=True)
    assert get("/readyz")[0] == 200
    board.snapshot = Snapshot(NodeEnergyStatus(), at_seconds=980.0)
    assert get("/healthz")[0] == 503
    assert get("/else")[0] == 404


def test_metrics_are_well_formed_and_bounded(get, board, make_node, make_order):
    node = make_node()
    node.order(make_order())
    node.run(20)
    order = node.agent.outlook.decisions["GPU-0"].order
    board.snapshot = Snapshot(
        status_of(node),
        orders={"GPU-0": order},
        sm_mhz={"GPU-0": 1590},
        clock_writes={"GPU-0": 1},
        driver_errors={("read", "Transient"): 2},
        scrape_failures={"MetricsInvalid": 1},
    )
    status, body = get("/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(body)}
    assert all(name.startswith("wattlock_") for name in families)
    (clock,) = families["wattlock_gpu_sm_clock_hertz"].samples
    assert clock.value == 1.59e9
    assert clock.labels["pod"] == "decode-0"
    assert clock.labels["policy"] == "qwen"
    assert families["wattlock_gpu_energy_joules"].type == "counter"
    state = {s.labels["state"]: s.value for s in families["wattlock_gpu_state"].samples if s.labels["gpu"] == "GPU-0"}
    assert state["Locked"] == 1
    assert sum(state.values()) == 1


def test_settings_have_defaults():
    settings = read_settings(ENVIRONMENT)
    assert settings.mode == "Observe"
    assert settings.http_port == 9400
    assert settings.stale_orders_seconds == STALE_ORDERS_SECONDS == 600
    assert read_settings(ENVIRONMENT | {"WATTLOCK_STALE_ORDERS_SECONDS": "60"}).stale_orders_seconds == 60
    assert settings.api_server == "https://10.0.0.1:443"
    assert read_settings(ENVIRONMENT | {"KUBERNETES_SERVICE_HOST": "fd00::1"}).api_server == "https://[fd00::1]:443"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"NODE_NAME": ""}, "NODE_NAME"),
        ({"WATTLOCK_MODE": "enforce"}, "WATTLOCK_MODE"),
        ({"WATTLOCK_HTTP_PORT": "http"}, "WATTLOCK_HTTP_PORT"),
        ({"WATTLOCK_HTTP_PORT": "0"}, "WATTLOCK_HTTP_PORT"),
        ({"WATTLOCK_STATE_DIR": "state"}, "WATTLOCK_STATE_DIR"),
        ({"WATTLOCK_BOOT_ID_FILE": "boot_id"}, "WATTLOCK_BOOT_ID_FILE"),
        ({"WATTLOCK_STALE_ORDERS_SECONDS": "59"}, "WATTLOCK_STALE_ORDERS_SECONDS"),
        ({"WATTLOCK_STALE_ORDERS_SECONDS": "86401"}, "WATTLOCK_STALE_ORDERS_SECONDS"),
        ({"WATTLOCK_STALE_ORDERS_SECONDS": "10m"}, "WATTLOCK_STALE_ORDERS_SECONDS"),
        ({"KUBERNETES_SERVICE_HOST": "a/b"}, "KUBERNETES_SERVICE_HOST"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(SettingsError, match=named):
        read_settings(ENVIRONMENT | change)


def test_clock_arithmetic():
    clocks = tuple(range(345, 1981, 15))
    assert snap_down_mhz(clocks, 1600) == 1590
    assert snap_down_mhz(clocks, 1590) == 1590
    assert snap_down_mhz(clocks, 5000) == 1980
    assert snap_down_mhz(clocks, 344) is None
    assert snap_down_mhz((), 1590) is None
    assert step_mhz(clocks, 1590) == 15
    assert step_mhz((1590,), 1590) == 1
    ranges = to_ranges((210, 225, 240, 1000, 1002, 2032))
    assert [(r.min_mhz, r.max_mhz, r.step_mhz) for r in ranges] == [(210, 240, 15), (1000, 1002, 2), (2032, 2032, 1)]
