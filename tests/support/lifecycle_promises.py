"""What a node promises at each second of the agent's life, whatever happens, and once all faults have ended."""

import tempfile
from pathlib import Path
from unittest import mock

from hypothesis.stateful import RuleBasedStateMachine, invariant
from lifecycle_node import FOREIGN, HOLDER_LAG_SECONDS, Cluster, Hardware, Host, HostOs, KilledError, Process, is_wanted
from wattlock_agent import journal_file
from wattlock_agent.holders.base import PodName
from wattlock_agent.orders import Orders
from wattlock_api.constants import STALE_ORDERS_SECONDS
from wattlock_api.nodeenergy import Order

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


class WatchedLife(RuleBasedStateMachine):
    """A life in which nothing happens yet but the agent's start, and every promise is checked each second."""

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
        # A crash on a disk that then refuses may leave a half-written file: no record, and overwritten by the next one.
        left = {each.name for each in self.path.iterdir() if each.suffix != ".tmp"}
        assert left == {f"{uuid}.json" for uuid in wanted}
