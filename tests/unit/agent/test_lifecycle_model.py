"""The agent's life as a state machine: any faults in any order, and death before any effect.

Without WATTLOCK_MODEL_EXAMPLES 100 lives are made, always the same ones, and a failing one is shown as it is. With it
(``WATTLOCK_MODEL_EXAMPLES=1000 .venv/bin/python -m pytest tests/unit/agent/test_lifecycle_model.py``) others are made
each time, and a failing one is made short first, which takes minutes.
"""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from lifecycle_promises import KINDS, MAX_PASSES, UUIDS, WatchedLife
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.orders import NO_ORDERS
from wattlock_api.constants import STALE_ORDERS_SECONDS

EXAMPLES = os.environ.get("WATTLOCK_MODEL_EXAMPLES")
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


class Lifecycle(WatchedLife):
    """What may happen to a node, in any order."""

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


@pytest.mark.timeout(1800 if EXAMPLES else 120)
def test_the_promises_hold_through_any_life():
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=int(EXAMPLES or 100),
            stateful_step_count=40,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
