"""Builders and fakes for the agent's core."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from wattlock_agent.agent import Agent
from wattlock_agent.clock import Clock
from wattlock_agent.driver_session import DriverSession
from wattlock_agent.events import HoldersSeen, ScrapeDone
from wattlock_agent.gpu.base import (
    DriverInfo,
    GpuError,
    GpuFault,
    GpuIdentity,
    GpuReading,
    LimiterNanoseconds,
)
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.journal import JournalError, LockRecord
from wattlock_agent.kube import LeaseSeen, OrdersSeen
from wattlock_agent.orders import Orders
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters
from wattlock_api.constants import Mode
from wattlock_api.nodeenergy import Order
from wattlock_api.schedule import Experiment

# Its assertions judge every life of the model: a failing one shows its values, as in a test file.
pytest.register_assert_rewrite("lifecycle_promises")

CLOCKS = tuple(range(345, 1981, 15))
BOOT = "boot-1"
UNIX_AT_START = 1_800_000_000.0


def build_order(pod: str = "decode-0", **changes: Any) -> Order:
    """An Enforce order for a decode pod of namespace llm."""
    fields: dict[str, Any] = {
        "policy": {"namespace": "llm", "name": "qwen", "uid": "policy-1", "generation": 1},
        "pool": "decode",
        "role": "Decode",
        "pod": {"namespace": "llm", "name": pod, "uid": f"uid-{pod}"},
        "podUid": f"uid-{pod}",
        "instance": pod,
        "mode": "Enforce",
        "capMHz": 1600,
        "metricsURL": f"http://10.0.0.1:8000/{pod}",
    }
    return Order.model_validate(fields | changes)


@pytest.fixture
def make_order() -> Callable[..., Order]:
    return build_order


def build_gpu(number: int = 0, **changes: Any) -> GpuIdentity:
    fields: dict[str, Any] = {
        "uuid": f"GPU-{number}",
        "index": number,
        "minor": number,
        "product": "NVIDIA H200",
        "supported_clocks_mhz": CLOCKS,
        "mig_enabled": False,
        "virtual": False,
    }
    return GpuIdentity(**(fields | changes))


@pytest.fixture
def make_gpu() -> Callable[..., GpuIdentity]:
    return build_gpu


class KilledError(BaseException):
    """The process was killed between two effects."""


class Effects:
    """Counts the effects on the world outside, and kills the process before a chosen one."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.count = 0

    def step(self) -> None:
        if self.count == self.kill_at:
            raise KilledError
        self.count += 1


class MemoryJournal:
    """A journal whose content outlives the agent, as a disk would."""

    problems: tuple[str, ...] = ()

    def __init__(self, effects: Effects | None = None) -> None:
        self.disk: dict[str, LockRecord] = {}
        self.broken = False
        self._effects = effects or Effects()

    def acquire(self) -> None:
        pass

    def records(self) -> dict[str, LockRecord]:
        return dict(self.disk)

    def add(self, record: LockRecord) -> None:
        if self.broken:
            raise JournalError("disk full")
        self._effects.step()
        self.disk[record.gpu_uuid] = record

    def remove(self, gpu_uuid: str) -> None:
        if self.broken:
            raise JournalError("disk full")
        self._effects.step()
        self.disk.pop(gpu_uuid, None)


class FakeDriver:
    """GPUs whose locks outlive the agent; 500 W under load, 1980 MHz when not locked."""

    def __init__(self, gpus: list[GpuIdentity], effects: Effects | None = None) -> None:
        self.gpus = gpus
        self.locks: dict[str, tuple[int, int]] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: dict[str, GpuFault] = {}
        """By the name of a call ("open", "lock", "reset") or by UUID (reads)."""
        self.writable = True
        self.utilization_percent = 100
        self.watts = 500.0
        self.energy_mj = 0.0
        self.now_seconds = 0.0
        self.limiters = LimiterNanoseconds(0, 0, 0, 0, 0)
        self._effects = effects or Effects()

    def _fail(self, key: str, call: str, uuid: str | None = None) -> None:
        if key in self.faults:
            raise GpuError(self.faults[key], call, uuid, f"{call} failed")

    def advance(self, now_seconds: float) -> None:
        self.energy_mj += 1000 * self.watts * (now_seconds - self.now_seconds)
        self.now_seconds = now_seconds

    def open(self) -> DriverInfo:
        self._fail("open", "open")
        return DriverInfo("580.1", "13.580")

    def close(self) -> None:
        pass

    def list_gpus(self) -> tuple[GpuIdentity, ...]:
        return tuple(self.gpus)

    def read(self, uuid: str) -> GpuReading:
        self._fail(uuid, "read", uuid)
        sm_mhz = self.locks[uuid][1] if uuid in self.locks else 1980
        return GpuReading(
            uuid=uuid,
            at_seconds=self.now_seconds,
            energy_mj=int(self.energy_mj),
            power_instant_mw=int(self.watts * 1000),
            power_limit_mw=700_000,
            sm_mhz=sm_mhz,
            memory_mhz=3201,
            temperature_c=50,
            utilization_percent=self.utilization_percent,
            event_reasons=0,
            limiters=self.limiters,
        )

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        self._fail("lock", "lock", uuid)
        self._effects.step()
        self.locks[uuid] = (low_mhz, high_mhz)
        self.log.append(("lock", uuid))

    def reset(self, uuid: str) -> None:
        self._fail("reset", "reset", uuid)
        self._effects.step()
        self.locks.pop(uuid, None)
        self.log.append(("reset", uuid))

    def may_write(self) -> bool:
        return self.writable


@dataclass
class Node:
    """An agent on a node with fake GPUs, in virtual time: each pass takes a second."""

    driver: FakeDriver
    journal: MemoryJournal
    pods: dict[str, tuple[PodName, ...]]
    mode: Mode = Mode.ENFORCE
    now_seconds: float = 1000.0
    kubelet_up: bool = True
    api_up: bool = True
    operator_up: bool = True
    orders: Orders | None = None
    shared: frozenset[str] = frozenset()
    unknown: dict[PodName, tuple[str, ...]] = field(default_factory=dict)
    tokens_per_second: float = 1000.0
    latency_seconds: float = 0.010
    late_share: float = 0.0
    """Share of the tokens that come more than 50 ms after the one before."""
    waiting_requests: float = 0.0
    preemptions_per_second: float = 0.0
    prompt_share: float = 0.0
    """Computed prompt tokens for each generated one."""
    tells_prompts: bool = True
    running_requests: float | None = 8.0
    page_fails: str = ""
    """Reason for which pages cannot be read; empty: they can."""
    page_delay_seconds: float = 0.0
    """How long ago a page was asked for when it arrives."""
    scrapes: list[float] = field(default_factory=list)
    _tokens: float = 0.0
    _prompts: float = 0.0
    _late: float = 0.0
    _preemptions: float = 0.0
    _sent: Orders | None = None

    def __post_init__(self) -> None:
        self.start()

    @property
    def clock(self) -> Clock:
        return Clock(self.now_seconds, UNIX_AT_START + self.now_seconds)

    def start(self, status: dict[str, Any] | None = None) -> None:
        """Start an agent; what an earlier one had in memory is gone."""
        self.driver.now_seconds = self.now_seconds
        self.agent = Agent(self.mode, DriverSession(self.driver), self.journal, BOOT, self.clock)
        self.agent.open_journal(self.journal)
        self._sent = None
        self._status = status
        self._first_lease = True

    def order(self, *orders: Order, generation: int = 1) -> None:
        self.orders = Orders(generation, tuple(orders))

    def run(self, seconds: float, step_seconds: float = 1.0) -> "Node":
        """Let time pass."""
        end = self.now_seconds + seconds
        while self.now_seconds < end - 1e-9:
            self.now_seconds += step_seconds
            self._tokens += self.tokens_per_second * step_seconds
            self._prompts += self.prompt_share * self.tokens_per_second * step_seconds
            self._late += self.late_share * self.tokens_per_second * step_seconds
            self._preemptions += self.preemptions_per_second * step_seconds
            self.step()
        return self

    def step(self) -> None:
        """Make one pass, after the events that are due."""
        self.driver.advance(self.now_seconds)
        if self.api_up:
            if self.orders is not None and self.orders != self._sent:
                self.agent.handle(OrdersSeen(self.orders, self._status), self.clock)
                self._sent, self._status = self.orders, None
            if self.operator_up or self._first_lease:
                self.agent.handle(LeaseSeen(f"renewed at {self.now_seconds}", 1.0), self.clock)
                self._first_lease = False
            else:
                self.agent.handle(LeaseSeen("renewed long ago", 5000.0), self.clock)
        self.pass_()
        for _ in range(3):
            woken = False
            if self.agent.holders_wanted(self.clock):
                holders = Holders(dict(self.pods), self.shared, dict(self.unknown)) if self.kubelet_up else None
                event = HoldersSeen(self.now_seconds, holders, "" if self.kubelet_up else "kubelet down")
                woken = self.agent.handle(event, self.clock)
            for key, url in self.agent.roster.scrapes_wanted(self.clock):
                self.scrapes.append(self.now_seconds)
                done = ScrapeDone(key, url, self.page(), 0.01)
                woken = self.agent.handle(done, self.clock) or woken
            if not woken:
                return
            self.pass_()

    def pass_(self) -> None:
        self.agent.tick(self.clock)

    def page(self) -> ServingCounters | ScrapeFailure:
        asked_seconds = self.now_seconds - self.page_delay_seconds
        if self.page_fails:
            return ScrapeFailure(asked_seconds, self.page_fails, "the page cannot be read")
        return replace(self.counters(), at_seconds=asked_seconds)

    def rest(self) -> None:
        """No requests from now on."""
        self.tokens_per_second, self.running_requests = 0.0, 0.0

    def work(self) -> None:
        """Requests from now on."""
        self.tokens_per_second, self.running_requests = 1000.0, 8.0

    def counters(self) -> ServingCounters:
        return ServingCounters(
            at_seconds=self.now_seconds,
            generated_tokens=self._tokens,
            prompt_tokens=self._tokens,
            computed_prompt_tokens=self._prompts if self.tells_prompts else None,
            inter_token_latency_sum_seconds=self._latency_sum(),
            inter_token_latency_count=self._tokens,
            running_requests=self.running_requests,
            waiting_requests=self.waiting_requests,
            preemptions=self._preemptions,
            born_seconds=1.0,
            inter_token_latency_buckets=(
                (0.025, self._tokens - self._late),
                (0.05, self._tokens - self._late),
                (math.inf, self._tokens),
            ),
        )

    _last: tuple[float, float] = (0.0, 0.0)

    def _latency_sum(self) -> float:
        tokens, total = self._last
        total += (self._tokens - tokens) * self.latency_seconds
        self._last = (self._tokens, total)
        return total

    def reasons(self) -> dict[str, str]:
        assert self.agent.outlook is not None
        return {uuid: decision.reason for uuid, decision in self.agent.outlook.decisions.items()}

    def locked(self) -> set[str]:
        return set(self.driver.locks)


def build_node(gpus: int = 2, effects: Effects | None = None, **changes: Any) -> Node:
    """A node whose pod decode-N holds GPU-N."""
    identities = [build_gpu(number) for number in range(gpus)]
    pods = {gpu.uuid: (PodName("llm", f"decode-{gpu.index}"),) for gpu in identities}
    node = Node(FakeDriver(identities, effects), MemoryJournal(effects), pods)
    for name, value in changes.items():
        setattr(node, name, value)
    if "mode" in changes:
        node.start()
    return node


@pytest.fixture
def make_node() -> Callable[..., Node]:
    return build_node


@pytest.fixture
def make_effects() -> Callable[..., Effects]:
    return Effects


@pytest.fixture
def killed() -> type[BaseException]:
    return KilledError


def experiment_fields(epoch_seconds: int = 20, control_share: float = 0.5) -> dict[str, Any]:
    return {"seed": "policy-1", "epochSeconds": epoch_seconds, "controlShare": control_share}


@pytest.fixture
def switchback() -> dict[str, Any]:
    """An experiment with epochs of 20 s, half of them released."""
    return experiment_fields()


@pytest.fixture
def schedule() -> Experiment:
    return Experiment("policy-1", 20, 0.5)
