"""The agent's life as a state machine: any faults in any order, and death before any effect.

Without WATTLOCK_MODEL_EXAMPLES 30 lives are made, always the same ones, and a failing one is shown as it is. With it
(``WATTLOCK_MODEL_EXAMPLES=1000 .venv/bin/python -m pytest tests/unit/agent/test_lifecycle_model.py``) others are made
each time, and a failing one is made short first, which takes minutes.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from lifecycle_node import FOREIGN, HOLDER_LAG_SECONDS, Cluster, Hardware, Host, HostOs, KilledError, Process, is_wanted
from wattlock_agent import journal_file
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.holders.base import PodName
from wattlock_agent.orders import NO_ORDERS, Orders
from wattlock_api.constants import STALE_ORDERS_SECONDS
from wattlock_api.nodeenergy import Order

EXAMPLES = os.environ.get("WATTLOCK_MODEL_EXAMPLES")
UUIDS = ["GPU-0", "GPU-1", "GPU-2"]
FOREIGN_GPU = "GPU-person"
#: A wanted or unwanted lock is settled within this many seconds: the start (30), a journal that had failed (30), the
#: back-off of contested locks (60) and the reopening of the driver (5) may follow each other.
SETTLE_SECONDS = 140
#: Passes of a healthy agent until it has undone what its orders do not want.
MAX_PASSES = 3
KINDS = {
    "cap 1590": {"capMHz": 1590},
    "cap 1200": {"capMHz": 1200},
    "coexist": {"capMHz": 1590, "conflictPolicy": "Coexist"},
    "observe": {"mode": "Observe", "capMHz": 1590},
    "prefill": {"role": "Prefill", "capMHz": 1590},
    "mixed": {"role": "Mixed", "capMHz": 1590},
    "mixed unseen": {"role": "Mixed", "capMHz": 1590, "maxPrefillPercent": 20, "idle": {"afterSeconds": 10}},
    "idle": {"capMHz": 1590, "idle": {"afterSeconds": 10}, "metricsURL": "http://10.0.0.1:8000/metrics"},
    "held": {"capMHz": 1590, "hold": {"reason": "NoPrefillPeer", "message": "none"}},
    "none": None,
}
LOWEST_MHZ = 345
gpus = st.sampled_from(range(len(UUIDS)))
#: How many seconds follow an event before the next one.
passes = st.sampled_from([0, 1, 1, 2, 5])


def event(**draws: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule after which some time passes."""

    def decorate(what: Callable[..., None]) -> Any:
        def happens(self: "Lifecycle", passes: int, **drawn: Any) -> None:
            what(self, **drawn)
            for _ in range(passes):
                self.second(1.0)

        happens.__name__ = what.__name__
        return rule(passes=passes, **draws)(happens)

    return decorate


class Lifecycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "journal"
        self.host = Host()
        self.patch = mock.patch.object(journal_file, "os", HostOs(self.host))
        self.patch.start()
        self.hardware = Hardware(self.host, [*UUIDS, FOREIGN_GPU], self.path)
        self.hardware.locks[FOREIGN_GPU] = FOREIGN
        self.hardware.wanted_by = self.speaks_against
        self.cluster = Cluster(pods={uuid: PodName("llm", f"pod-{number}") for number, uuid in enumerate(UUIDS)})
        self.kinds = dict.fromkeys(range(len(UUIDS)), "cap 1590")
        self.incarnations = dict.fromkeys(range(len(UUIDS)), 0)
        self.generation = 0
        self.policy_generation = 1
        self.unwanted_passes = dict.fromkeys(UUIDS, 0)
        self.acting: Process | None = None
        self.processes: list[Process] = []
        self.step_seconds = 1.0
        self.publish()
        self.start()
        for _ in range(4):
            self.second(1.0)
        assert len(self.hardware.ours) == len(UUIDS)

    # --- what is true ------------------------------------------------------------------------------------------------

    def order(self, number: int, incarnation: int | None = None) -> Order | None:
        change = KINDS[self.kinds[number]]
        if change is None:
            return None
        uid = f"uid-{number}-{self.incarnations[number] if incarnation is None else incarnation}"
        policy = {"namespace": "llm", "name": "qwen", "uid": "policy-1", "generation": self.policy_generation}
        fields = {
            "policy": policy,
            "pool": "decode",
            "role": "Decode",
            "pod": {"namespace": "llm", "name": f"pod-{number}", "uid": uid},
            "podUid": uid,
            "instance": f"pod-{number}",
            "mode": "Enforce",
        }
        return Order.model_validate(fields | change)

    def publish(self, *more: Order | None) -> None:
        self.generation += 1
        orders = [*(self.order(number) for number in self.kinds), *more]
        self.send(Orders(self.generation, tuple(each for each in orders if each is not None)))

    def send(self, orders: Orders) -> None:
        self.cluster.orders = orders
        for process in self.processes:
            process.inbox.append(orders)

    def speaks_against(self, uuid: str, cap_mhz: int) -> str:
        if self.acting is None or not self.acting.has_journal:
            return "the process that does it has no journal"
        seen = self.cluster.past_pods.get(uuid, {})
        lately = [pod for pod, at in seen.items() if self.host.now_seconds - at <= HOLDER_LAG_SECONDS]
        orders = [order for pod in lately if (order := self.acting.wants(pod)) is not None]
        if not orders:
            return f"no order wants it for any of {lately}"
        readings = self.healthy() and self.step_seconds <= 1
        coexists = any(order.conflict_policy == "Coexist" for order in orders)
        if uuid in self.hardware.stood_before and readings and not coexists:
            return "somebody else's lock stands on it and the policy says Skip"
        if cap_mhz == LOWEST_MHZ:
            resting = [order for order in orders if order.idle is not None and not self.works(order.pod.name)]
            return "" if resting else "no pod that may be capped as idle is without work"
        return "" if any(cap_mhz <= order.cap_mhz for order in orders) else f"{cap_mhz} MHz is above every order"

    def works(self, pod: str) -> bool:
        """Whether the page of a pod shows work, or cannot be read."""
        return pod not in self.cluster.resting

    def rest(self, pod: str, rests: bool) -> None:
        self.cluster.resting.discard(pod)
        if rests:
            self.cluster.resting.add(pod)

    # --- what happens ------------------------------------------------------------------------------------------------

    @event(number=gpus, kind=st.sampled_from(sorted(KINDS)))
    def order_changes(self, number: int, kind: str) -> None:
        self.kinds[number] = kind
        self.publish()

    @event(number=gpus, overlap=st.booleans())
    def pod_is_replaced(self, number: int, overlap: bool) -> None:
        """By one of the same name; for a while the operator may name both."""
        self.incarnations[number] += 1
        if overlap:
            self.publish(self.order(number, self.incarnations[number] - 1))
            self.second(1.0)
        self.publish()

    @event(first=gpus, second=gpus)
    def pods_change_gpus(self, first: int, second: int) -> None:
        pods = self.cluster.pods
        one, other = pods.pop(UUIDS[first], None), pods.pop(UUIDS[second], None)
        if other is not None:
            pods[UUIDS[first]] = other
        if one is not None:
            pods[UUIDS[second]] = one

    @event(number=gpus, rests=st.booleans())
    def requests_come_or_end(self, number: int, rests: bool) -> None:
        self.rest(f"pod-{number}", rests)

    @event(number=gpus, seconds=st.integers(12, 25), effects=st.sampled_from([None, None, 0, 1, 2, 3]))
    def an_idle_pod_gets_requests(self, number: int, seconds: int, effects: int | None) -> None:
        """And perhaps the process is killed on the way."""
        self.kinds[number] = "idle"
        self.publish()
        self.rest(f"pod-{number}", True)
        for _ in range(seconds):
            self.second(1.0)
        self.host.effects_left = effects
        self.rest(f"pod-{number}", False)

    @event(number=gpus)
    def pod_goes(self, number: int) -> None:
        self.cluster.pods.pop(UUIDS[number], None)

    @event(number=gpus, before=st.integers(0, 4))
    def order_comes_after_its_pod_has_gone(self, number: int, before: int) -> None:
        """Between two questions to the kubelet."""
        self.kinds[number] = "none"
        self.publish()
        for _ in range(5 + before):
            self.second(1.0)
        self.cluster.pods.pop(UUIDS[number], None)
        for _ in range(3):
            self.second(1.0)
        self.kinds[number] = "cap 1590"
        self.publish()

    @event()
    def node_energy_is_deleted_and_comes_back(self) -> None:
        self.send(NO_ORDERS)
        self.generation = 0
        self.publish()

    @event(what=st.sampled_from(["api_up", "operator_up", "kubelet_up"]), value=st.sampled_from([True, True, False]))
    def cluster_changes(self, what: str, value: bool) -> None:
        setattr(self.cluster, what, value)

    @event(late=st.sampled_from([False, False, True]))
    def messages_get_late_or_prompt(self, late: bool) -> None:
        self.cluster.late = late

    @event()
    def faults_end(self) -> None:
        self.faults_end_now()

    @event(number=gpus)
    def order_comes_and_goes(self, number: int) -> None:
        for kind in ("none", "cap 1590", "none"):
            self.kinds[number] = kind
            self.publish()
            for _ in range(6):
                self.second(1.0)

    @event(number=st.integers(0, 3), index=st.integers(0, 1))
    def late_message_arrives(self, number: int, index: int) -> None:
        if index < len(self.processes):
            self.processes[index].deliver(number)

    @event(index=st.integers(0, 1))
    def message_is_repeated(self, index: int) -> None:
        if index < len(self.processes) and self.processes[index].received is not None:
            self.processes[index].inbox.insert(0, self.processes[index].received)

    @event(error=st.sampled_from([None, None, errno.ENOSPC, errno.EROFS]))
    def disk_changes(self, error: int | None) -> None:
        self.host.disk_error = error

    @event(call=st.sampled_from(["open", "read", "lock", "reset"]), fault=st.sampled_from([None, None, "a", "b"]))
    def driver_changes(self, call: str, fault: str | None) -> None:
        self.hardware.faults.pop(call, None)
        if fault is not None:
            second = {"open": GpuFault.NO_DRIVER, "lock": GpuFault.NO_PERMISSION}.get(call, GpuFault.GPU_LOST)
            self.hardware.faults[call] = GpuFault.TRANSIENT if fault == "a" else second

    @event()
    def driver_is_reloaded(self) -> None:
        self.hardware.reload()

    @event(number=gpus)
    def somebody_resets_a_gpu(self, number: int) -> None:
        self.hardware.reset_by_a_person(UUIDS[number])

    @event(number=gpus)
    def somebody_locks_a_gpu(self, number: int) -> None:
        self.hardware.lock_by_a_person(UUIDS[number])

    @event(number=gpus, times=st.integers(3, 4))
    def a_program_keeps_resetting_a_gpu(self, number: int, times: int) -> None:
        for _ in range(times):
            self.hardware.reset_by_a_person(UUIDS[number])
            for _ in range(9):
                self.second(1.0)

    @event(number=gpus)
    def a_person_locks_a_released_gpu_and_then_it_is_ordered(self, number: int) -> None:
        self.kinds[number] = "none"
        self.publish()
        for _ in range(8):
            self.second(1.0)
        self.hardware.lock_by_a_person(UUIDS[number])
        self.kinds[number] = "cap 1590"
        self.publish()
        for _ in range(15):
            self.second(1.0)

    @event(read_only=st.booleans())
    def node_reboots(self, read_only: bool) -> None:
        """A disk with errors comes back read-only."""
        self.host.disk_error = errno.EROFS if read_only else None
        for process in self.processes:
            process.die()
        self.processes.clear()
        self.hardware.reload()
        self.host.boot += 1
        self.start()

    @precondition(lambda self: len(self.processes) < 2)
    @event()
    def process_starts(self) -> None:
        self.start()

    @precondition(lambda self: self.processes)
    @event(index=st.integers(0, 1))
    def process_is_killed(self, index: int) -> None:
        self.processes.pop(index % len(self.processes)).die()

    @event(effects=st.integers(0, 9))
    def process_will_be_killed(self, effects: int) -> None:
        """Before the n-th effect from now on, whoever makes it."""
        self.host.effects_left = effects

    @precondition(lambda self: self.processes)
    @event(index=st.integers(0, 1))
    def process_is_stopped(self, index: int) -> None:
        process = self.processes[index % len(self.processes)]
        process.agent.stopping = True
        had_journal = process.has_journal
        healthy = self.healthy()
        for _ in range(20):
            if process in self.processes:
                self.act(process, process._pass)
        if process in self.processes:
            if had_journal and healthy:
                assert not self.hardware.ours, "an agent that was stopped in an orderly way left a lock"
            self.processes.remove(process)
            process.die()

    @rule(passes=st.sampled_from([1, 2, 6, 35]))
    def time_passes(self, passes: int) -> None:
        for _ in range(passes):
            self.second(1.0)

    @rule(without=st.sampled_from([None, "api_up", "operator_up"]))
    def ten_minutes_pass(self, without: str | None) -> None:
        if without is not None:
            setattr(self.cluster, without, False)
        for _ in range(STALE_ORDERS_SECONDS // 10 + MAX_PASSES + 8):
            self.second(10.0)
        if without is not None:
            setattr(self.cluster, without, True)

    # --- the machinery -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.processes.append(Process(self.host, self.hardware, self.cluster, self.path))

    def faults_end_now(self) -> None:
        self.host.disk_error = self.host.effects_left = None
        self.hardware.faults.clear()
        self.cluster.api_up = self.cluster.operator_up = self.cluster.kubelet_up = True
        self.cluster.late = False
        if not self.processes:
            self.start()

    def healthy(self) -> bool:
        return self.host.disk_error is None and not self.hardware.faults and self.host.effects_left is None

    def act(self, process: Process, what) -> None:
        self.acting = process
        try:
            what()
        except KilledError:
            self.host.effects_left = None
            self.processes.remove(process)
            process.die()
        finally:
            self.acting = None

    def second(self, seconds: float) -> None:
        self.step_seconds = seconds
        self.host.now_seconds += seconds
        self.cluster.pass_time(self.host.now_seconds)
        for process in list(self.processes):
            self.act(process, process.step)
        self.every_lock_has_its_record()
        self.unwanted_locks_go()

    def unwanted_locks_go(self) -> None:
        """Counted from when a healthy agent with the journal is over its start and knows the orders."""
        now_seconds = self.host.now_seconds
        holder = next((process for process in self.processes if process.has_journal), None)
        for uuid in UUIDS:
            seen = self.cluster.past_pods.get(uuid, {})
            lately = [pod for pod, at in seen.items() if now_seconds - at <= 60]
            ready = holder is not None and self.healthy() and now_seconds - holder.started_seconds > 40
            fresh = now_seconds - self.cluster.renewal_read_at_seconds <= STALE_ORDERS_SECONDS
            wanted = fresh and holder is not None and any(holder.wants(pod) for pod in lately)
            low = uuid in self.hardware.ours and self.hardware.locks[uuid][1] == LOWEST_MHZ
            wakes = low and all(self.works(pod.name) for pod in lately)
            counts = ready and (not wanted or wakes) and uuid in self.hardware.ours
            self.unwanted_passes[uuid] = self.unwanted_passes[uuid] + 1 if counts else 0
            # A release that failed before is tried again after two seconds, a driver is opened after five.
            assert self.unwanted_passes[uuid] <= MAX_PASSES + 6, f"{uuid} stays locked although no order wants it"

    @invariant()
    def every_lock_has_its_record(self) -> None:
        assert self.hardware.ours <= set(self.hardware.recorded()), "a lock of ours without a record on the disk"

    @invariant()
    def only_one_process_acts(self) -> None:
        assert sum(process.has_journal for process in self.processes) <= 1

    @invariant()
    def a_persons_lock_stays(self) -> None:
        if FOREIGN_GPU in self.hardware.locks:
            assert self.hardware.locks[FOREIGN_GPU] == FOREIGN
        assert FOREIGN_GPU not in self.hardware.recorded()

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            for process in self.processes:
                process.die()
            self.patch.stop()
            self.directory.cleanup()

    def settle(self) -> None:
        """All faults end; then everything is as it should be."""
        self.faults_end_now()
        for uuid in UUIDS:
            if self.hardware.locks.get(uuid) == FOREIGN:
                self.hardware.reset_by_a_person(uuid)
        self.cluster.resting.clear()
        for _ in range(20):  # a lock that was undone a moment ago is missed, perhaps for the third time
            self.second(1.0)
        self.policy_generation += 1  # what a person does about a conflict or a refusal
        self.publish()
        wanted = {}
        for uuid, pod in self.cluster.pods.items():
            order = self.order(int(pod.name.removeprefix("pod-")))
            if order is not None and is_wanted(order):
                wanted[uuid] = order
        for _ in range(SETTLE_SECONDS):
            self.second(1.0)
            if self.hardware.ours == wanted.keys() == self.hardware.recorded().keys():
                break
        for _ in range(15):  # and it stays so; a pod that was replaced gets a record of its own
            self.second(1.0)
        assert self.hardware.ours == wanted.keys(), "locks after the faults have ended"
        records = self.hardware.recorded()
        assert records.keys() == wanted.keys(), "records after the faults have ended"
        for uuid, order in wanted.items():
            assert self.hardware.locks[uuid] == (345, order.cap_mhz)
            assert records[uuid].pod_uid == order.pod_uid, "the record is about a pod that is gone"
        assert {each.name for each in self.path.iterdir()} == {f"{uuid}.json" for uuid in wanted}


@pytest.mark.timeout(1800 if EXAMPLES else 60)
def test_the_promises_hold_through_any_life():
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=int(EXAMPLES or 30),
            stateful_step_count=40,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
