"""A node for the model check: GPUs, disk, kubelet and API server that outlive the agents, and agents that may die.

Agent, plan, actuator, driver session, journal keeper and journal are the real ones, on real files. Played are the
hardware, what the API server and the kubelet say, time, and death before any single effect: each call to the disk
and each write to a GPU is one. The promises are checked by the hardware itself, at each write.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wattlock_agent.agent import Agent
from wattlock_agent.clock import Clock
from wattlock_agent.driver_session import DriverSession
from wattlock_agent.events import HoldersSeen, ScrapeDone
from wattlock_agent.gpu.base import DriverInfo, GpuError, GpuFault, GpuIdentity, GpuReading, LimiterNanoseconds
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.journal import LockRecord
from wattlock_agent.journal_file import FileJournal, decode
from wattlock_agent.journal_keeper import JournalKeeper
from wattlock_agent.kube import LeaseSeen, OrdersSeen
from wattlock_agent.orders import NO_ORDERS, Orders
from wattlock_agent.serving.base import ServingCounters
from wattlock_api.constants import Mode
from wattlock_api.nodeenergy import Order

CLOCKS = tuple(range(345, 1981, 15))
FOREIGN = (1200, 1200)
#: No lock is written by an older answer of the kubelet.
HOLDER_LAG_SECONDS = 2.0


class KilledError(BaseException):
    """The process was killed before an effect."""


class Host:
    """What all processes of the node share: its disk, its death, its clock."""

    def __init__(self) -> None:
        self.now_seconds = 1000.0
        self.boot = 1
        self.effects_left: int | None = None
        """Effects until the process that makes them is killed; ``None``: it lives."""
        self.disk_error: int | None = None

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    def effect(self) -> None:
        if self.effects_left is not None:
            if self.effects_left == 0:
                raise KilledError
            self.effects_left -= 1


class HostOs:
    """The os module as the journal sees it: each call that changes the disk is an effect, and may fail."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "fsync", "replace", "unlink"):
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            writes = name != "open" or arguments[1] & os.O_CREAT
            full_only = self._host.disk_error == errno.ENOSPC and name in ("unlink", "fsync")
            if writes and self._host.disk_error is not None and not full_only:
                raise OSError(self._host.disk_error, os.strerror(self._host.disk_error))
            if writes:
                self._host.effect()
            return real(*arguments, **named)

        return call


class Hardware:
    """The GPUs. Locks outlive processes; a driver reload or a reboot undoes them."""

    def __init__(self, host: Host, uuids: list[str], directory: Path) -> None:
        self.host, self.uuids, self._directory = host, uuids, directory
        self.locks: dict[str, tuple[int, int]] = {}
        self.ours: set[str] = set()
        self.stood_before: set[str] = set()
        """GPUs that a person has locked while we had neither a lock on them nor a record."""
        self.loaded_at_seconds = host.now_seconds
        self.faults: dict[str, GpuFault] = {}
        self.wanted_by: Callable[[str, int], str] = lambda uuid, cap_mhz: ""
        """Returns what speaks against a lock that is being written."""

    def reload(self) -> None:
        self.locks.clear()
        self.ours.clear()
        self.stood_before.clear()
        self.loaded_at_seconds = self.host.now_seconds

    def recorded(self) -> dict[str, LockRecord]:
        """The records of this boot on the disk, as another program would read them."""
        found = {}
        for path in self._directory.glob("*.json"):
            record = decode(path.read_bytes(), path.stem)
            if record.boot_id == self.host.boot_id:
                found[path.stem] = record
        return found

    def lock(self, uuid: str, cap: tuple[int, int]) -> None:
        assert uuid in self.recorded(), f"{uuid} is locked without a record on the disk"
        against = self.wanted_by(uuid, cap[1])
        assert not against, f"{uuid} is locked although {against}"
        self.locks[uuid] = cap
        self.ours.add(uuid)
        self.stood_before.discard(uuid)

    def lock_by_a_person(self, uuid: str) -> None:
        self.locks[uuid] = FOREIGN
        self.ours.discard(uuid)
        if uuid not in self.recorded():
            self.stood_before.add(uuid)

    def reset_by_a_person(self, uuid: str) -> None:
        self.locks.pop(uuid, None)
        self.ours.discard(uuid)
        self.stood_before.discard(uuid)

    def reset(self, uuid: str) -> None:
        assert uuid in self.recorded(), f"{uuid} is reset without a record on the disk"
        self.locks.pop(uuid, None)
        self.ours.discard(uuid)
        self.stood_before.discard(uuid)


class Driver:
    """A process's handle on the hardware."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    def _fail(self, call: str, uuid: str | None = None) -> None:
        fault = self._hardware.faults.get(call)
        if fault is not None:
            raise GpuError(fault, call, uuid, f"{call} failed")

    def open(self) -> DriverInfo:
        self._fail("open")
        return DriverInfo("580.1", "13.580")

    def close(self) -> None:
        pass

    def list_gpus(self) -> tuple[GpuIdentity, ...]:
        return tuple(
            GpuIdentity(uuid, number, number, "NVIDIA H200", CLOCKS, mig_enabled=False, virtual=False)
            for number, uuid in enumerate(self._hardware.uuids)
        )

    def read(self, uuid: str) -> GpuReading:
        self._fail("read", uuid)
        age_seconds = self._hardware.host.now_seconds - self._hardware.loaded_at_seconds
        return GpuReading(
            uuid=uuid,
            at_seconds=self._hardware.host.now_seconds,
            energy_mj=int(500_000 * age_seconds),
            power_instant_mw=500_000,
            power_limit_mw=700_000,
            sm_mhz=self._hardware.locks.get(uuid, (0, 1980))[1],
            memory_mhz=3201,
            temperature_c=50,
            utilization_percent=100,
            event_reasons=0,
            limiters=LimiterNanoseconds(0, 0, 0, 0, 0),
        )

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        fault = self._hardware.faults.get("lock")
        if fault is not GpuFault.NO_PERMISSION:  # a call that failed in any other way may have been done all the same
            self._hardware.host.effect()
            self._hardware.lock(uuid, (low_mhz, high_mhz))
        self._fail("lock", uuid)

    def reset(self, uuid: str) -> None:
        self._fail("reset", uuid)
        self._hardware.host.effect()
        self._hardware.reset(uuid)

    def may_write(self) -> bool:
        return True


@dataclass
class Cluster:
    """What operator and kubelet say, in truth and over time."""

    orders: Orders = NO_ORDERS
    pods: dict[str, PodName] = field(default_factory=dict)
    """Who holds a GPU, by its UUID."""
    api_up: bool = True
    operator_up: bool = True
    kubelet_up: bool = True
    renewal: str = "never"
    """What the operator wrote into its lease last."""
    renewal_read: str = "never"
    renewal_read_at_seconds: float = 0.0
    """When the API server first showed it."""
    late: bool = False
    """Messages wait until they are asked for."""
    resting: set[str] = field(default_factory=set)
    """Names of pods whose page shows no work."""
    past_pods: dict[str, dict[PodName, float]] = field(default_factory=dict)
    """When a pod was last seen to hold a GPU, by its UUID."""

    def pass_time(self, now_seconds: float) -> None:
        if self.operator_up:
            self.renewal = f"renewed at {now_seconds}"
        if self.api_up and self.renewal != self.renewal_read:
            self.renewal_read, self.renewal_read_at_seconds = self.renewal, now_seconds
        for uuid, pod in self.pods.items():
            self.past_pods.setdefault(uuid, {})[pod] = now_seconds


class Process:
    """One agent process."""

    def __init__(self, host: Host, hardware: Hardware, cluster: Cluster, directory: Path) -> None:
        self._host, self._hardware, self._cluster = host, hardware, cluster
        self.started_seconds = host.now_seconds
        self.journal = FileJournal(directory, host.boot_id)
        self.keeper = JournalKeeper(self.journal)
        self.agent = Agent(Mode.ENFORCE, DriverSession(Driver(hardware)), _Closed(), host.boot_id, self.clock)
        self.inbox: list[Orders] = [cluster.orders]
        self.received: Orders | None = None
        self._asked: HoldersSeen | None = None

    @property
    def clock(self) -> Clock:
        return Clock(self._host.now_seconds, 1_800_000_000.0 + self._host.now_seconds)

    @property
    def has_journal(self) -> bool:
        return self.journal._directory_fd is not None

    def deliver(self, number: int) -> None:
        """Hand over one of the waiting messages, not always the oldest."""
        if self.inbox:
            self.received = self.inbox.pop(number % len(self.inbox))
            self.agent.handle(OrdersSeen(self.received), self.clock)

    def step(self) -> None:
        """Make one turn of the loop."""
        cluster, clock = self._cluster, self.clock
        if cluster.api_up:
            self.agent.handle(LeaseSeen(cluster.renewal, 1.0 if cluster.operator_up else 5000.0), clock)
            while self.inbox and not cluster.late:
                self.deliver(0)
        if self._asked is not None:  # what the kubelet said a pass ago
            self.agent.handle(self._asked, clock)
            self._asked = None
        for key, url in self.agent.roster.scrapes_wanted(clock):
            self.agent.handle(ScrapeDone(key, url, self._page(key.instance), 0.01), clock)
        self._pass()
        for _ in range(3):
            if not self.agent.holders_wanted(clock):
                return
            holders = None
            if cluster.kubelet_up:
                holders = Holders({uuid: (pod,) for uuid, pod in cluster.pods.items()}, frozenset(), {})
            answer = HoldersSeen(clock.now_seconds, holders, "" if cluster.kubelet_up else "kubelet down")
            if cluster.late:
                self._asked = answer
                return
            if not self.agent.handle(answer, clock):
                return
            self._pass()

    def _page(self, pod: str) -> ServingCounters:
        now_seconds = self._host.now_seconds
        running = 0.0 if pod in self._cluster.resting else 1.0
        return ServingCounters(now_seconds, now_seconds * running, 0.0, 0.0, None, None, running, 0.0, None, None)

    def _pass(self) -> None:
        self.keeper.open(self.agent, self._host.now_seconds)
        self.agent.tick(self.clock)

    def wants(self, pod: PodName) -> Order | None:
        """The order, of those that this process has received, by which a pod's GPU is to be locked."""
        orders = self.received.orders if self.received else ()
        named = [each for each in orders if each.pod.name == pod.name]
        return named[0] if len(named) == 1 and is_wanted(named[0]) else None

    def die(self) -> None:
        """What the kernel does when a process ends."""
        self.journal.release()


class _Closed:
    """The journal before it was opened."""

    def records(self) -> dict[str, LockRecord]:
        return {}

    def add(self, record: LockRecord) -> None:
        raise AssertionError("a lock before the journal was opened")

    def remove(self, gpu_uuid: str) -> None:
        raise AssertionError("a release before the journal was opened")


def is_wanted(order: Order) -> bool:
    """Whether an order asks for a lock."""
    return order.mode == "Enforce" and order.role == "Decode" and order.hold is None and order.cap_mhz is not None
