"""The agent's state and the order in which things happen in one pass of its loop.

No threads, no clock and no network here: events and times come in as values, GPUs and journal as Protocols, wishes
(scrapes, questions to the kubelet, a status to write) go out as values. ``loop`` does the rest.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from wattlock_api.constants import STALE_ORDERS_SECONDS, ConflictPolicy, GpuState, Mode, Reason
from wattlock_api.nodeenergy import GpuStatus, InstanceStatus, NodeEnergyStatus, Order

from wattlock_agent import kube
from wattlock_agent.actuator import Actuator, Writer
from wattlock_agent.clock import Clock
from wattlock_agent.clocks import step_mhz
from wattlock_agent.driver_session import MAX_TRANSIENT, Scan
from wattlock_agent.events import Event, HoldersSeen, ScrapeDone, ThreadFailed
from wattlock_agent.foreign import ForeignLocks
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.holding import Holdings
from wattlock_agent.idle import Wake
from wattlock_agent.instance import InstanceTrack
from wattlock_agent.journal import Journal, NoJournal
from wattlock_agent.orders import InstanceKey, Orders, key_of
from wattlock_agent.plan import orders_without_gpu, plan
from wattlock_agent.roster import Roster
from wattlock_agent.staleness import Freshness, api_answered, lease_read, why_stale
from wattlock_agent.track import GpuTrack, busy_percent
from wattlock_agent.verify import LOSSES_SECONDS, Finding, LockWatch, backoff_seconds
from wattlock_agent.world import Decision, GpuView, Lock, Refusal, World

_log = logging.getLogger(__name__)

HOLDERS_SECONDS = 5.0
#: What the kubelet last said is followed for so long while it does not answer.
HOLDERS_MAX_AGE_SECONDS = 30.0
#: Before a lock is written the kubelet is asked anew, if its answer is older than this.
HOLDERS_FRESH_SECONDS = 2.0
#: At the start: how long records wait for orders and holders before their GPUs are reset.
START_SECONDS = 30.0
#: A tick on new orders uses readings that are at most so old.
SCAN_SECONDS = 0.5


class Gpus(Writer, Protocol):
    """The GPUs of the node."""

    def scan(self, now_seconds: float) -> Scan:
        """Read all of them."""


@dataclass(frozen=True)
class Outlook:
    """The agent at the end of a pass, for reports, metrics and readiness. Never changes."""

    clock: Clock
    scan: Scan
    world: World
    decisions: Mapping[str, Decision]
    pods_without_gpu: Mapping[str, Refusal]
    settled_generation: int
    """Generation whose orders are all in force or refused with a reason."""


class Agent:
    """Everything that the agent knows."""

    def __init__(
        self,
        mode: Mode,
        gpus: Gpus,
        journal: Journal,
        boot_id: str,
        clock: Clock,
        stale_seconds: int = STALE_ORDERS_SECONDS,
    ) -> None:
        self._mode = mode
        self._gpus = gpus
        self._boot_id = boot_id
        self.actuator = Actuator(gpus, journal, boot_id)
        self._started_seconds = clock.now_seconds
        self._freshness = Freshness(api_seen_seconds=clock.now_seconds, stale_seconds=stale_seconds)
        self._orders: Orders | None = None
        self._orders_at_seconds = clock.now_seconds
        self._holders = HoldersSeen(float("-inf"), None, "the kubelet has not been asked yet")
        self._holders_asked_seconds = float("-inf")
        self._holders_pending = False
        self._lock_waits = False
        self._journal_damage = ""
        self._holdings = Holdings()
        self._foreign = ForeignLocks()
        self._journal_known = False
        """Whether the journal has been read: before that any lock may be one of ours."""
        self._other_agent = ""
        self._scan = Scan(0, None)
        self._scanned_at_seconds = float("-inf")
        self._silent: dict[str, int] = defaultdict(int)
        self._unlisted: frozenset[str] | None = None
        """GPUs with a record that the driver does not list and that could not be reset; None: not looked at yet."""
        self._before: NodeEnergyStatus | None = None
        self._settled_generation = 0
        self.stopping = False
        self.wakes: list[Wake] = []
        """Of the last pass."""
        self.roster = Roster()
        self.outlook: Outlook | None = None

    @property
    def tracks(self) -> dict[str, GpuTrack]:
        """What is known of each GPU for its present holder, by UUID."""
        return self._holdings.tracks

    @property
    def instances(self) -> dict[InstanceKey, InstanceTrack]:
        """What is known of each instance that has orders."""
        return self.roster.tracks

    @property
    def parted(self) -> list[InstanceStatus]:
        """Instances whose orders went away lately: their last joules are still to be told."""
        return self.roster.parted(self.outlook.clock.now_seconds if self.outlook else 0.0)

    def handle(self, event: Event, clock: Clock) -> bool:
        """Take in an event; returns whether the next pass should come at once."""
        if isinstance(event, kube.OrdersSeen):
            return self._new_orders(event, clock)
        if isinstance(event, HoldersSeen):
            return self._new_holders(event, clock)
        if isinstance(event, ScrapeDone):
            instance = self.instances.get(event.instance)
            return instance is not None and instance.scraped(event.url, event.result, event.took_seconds, clock)
        if isinstance(event, kube.LeaseSeen):
            stale = bool(why_stale(self._freshness, clock.now_seconds))
            self._freshness = lease_read(self._freshness, clock.now_seconds, event.renewal, event.age_seconds)
            return stale
        if isinstance(event, kube.PeersSeen):
            self._freshness = api_answered(self._freshness, clock.now_seconds)
            for instance_track in self.instances.values():
                instance_track.take_peers(event.peers)
        elif isinstance(event, kube.ApiAnswered):
            self._freshness = api_answered(self._freshness, clock.now_seconds)
        elif isinstance(event, kube.StatusWritten):
            if not event.problem or event.missing:
                self._freshness = api_answered(self._freshness, clock.now_seconds)
        elif isinstance(event, ThreadFailed):
            raise RuntimeError(f"a thread of the agent failed: {event.error!r}") from event.error
        return False

    def open_journal(self, journal: Journal, damage: str = "", other_agent: str = "") -> None:
        """Use the real journal from now on.

        ``damage``: what of it could not be read. ``other_agent``: that another agent has it. Both for people.
        """
        self.actuator = Actuator(self._gpus, journal, self._boot_id)
        self._journal_damage = damage
        self._other_agent = other_agent
        self._journal_known = not isinstance(journal, NoJournal)
        self._unlisted, self._scanned_at_seconds = None, float("-inf")
        self.actuator.drop_records_of_other_boots()

    def holders_wanted(self, clock: Clock) -> bool:
        """Return whether the kubelet is to be asked now; the caller then asks it."""
        due = clock.now_seconds - self._holders_asked_seconds >= HOLDERS_SECONDS
        if self._holders_pending or not due or not self._scan.gpus:
            return False
        self._holders_pending, self._holders_asked_seconds = True, clock.now_seconds
        return True

    def tick(self, clock: Clock) -> None:
        """Read, plan, write, and note what came of it.

        Raises:
            DriverMismatchError: library and driver differ.
        """
        waking = self.roster.waking(clock.now_seconds)
        # Somebody waits for the first token: eight GPUs take a tenth of a second to read, and can be read afterwards.
        if not waking and clock.now_seconds - self._scanned_at_seconds >= SCAN_SECONDS:
            self._read(clock)
        world = self._world(clock)
        decisions = plan(world)
        self.wakes = []
        if self.actuator.apply(self._with_fresh_holders(clock, decisions), clock.now_seconds, clock.unix_seconds):
            before = {gpu.identity.uuid for gpu in world.gpus if gpu.lock is not None and gpu.lock.idle}
            world = self._world(clock)
            self._note_wakes(waking, before, world, decisions)
            decisions = plan(world)
        without_gpu = orders_without_gpu(world)
        for uuid, decision in decisions.items():
            # In the pass that reports holder and numbers together.
            if (reading := self._scan.readings.get(uuid)) is not None:
                self._holdings.follow(reading, decision.order, self.previous_gpu(uuid))
        self.roster.ticked(clock, decisions.values(), self.tracks)
        if self._orders is not None and self._is_settled(world, decisions):
            self._settled_generation = self._orders.generation
        self.outlook = Outlook(clock, self._scan, world, decisions, without_gpu, self._settled_generation)

    def _note_wakes(
        self, waking: frozenset[InstanceKey], idle_before: set[str], world: World, decisions: Mapping[str, Decision]
    ) -> None:
        """Note the instances whose lower cap this pass has undone, from all of their GPUs."""
        still = {gpu.identity.uuid for gpu in world.gpus if gpu.lock is not None and gpu.lock.idle}
        owners = {uuid: key_of(each.order) for uuid, each in decisions.items() if each.order is not None}
        undone = {owners[uuid] for uuid in idle_before - still if uuid in owners}
        for key in waking & (undone - {owners[uuid] for uuid in still if uuid in owners}):
            self.wakes.append(self.instances[key].idle.wake())

    def _with_fresh_holders(self, clock: Clock, decisions: Mapping[str, Decision]) -> Mapping[str, Decision]:
        """Put locks off until the kubelet has just said who holds the GPUs."""
        wanted = any(isinstance(decision.action, Lock) for decision in decisions.values())
        self._lock_waits = wanted and clock.now_seconds - self._holders.asked_at_seconds > HOLDERS_FRESH_SECONDS
        if not self._lock_waits:
            return decisions
        self._holders_asked_seconds = float("-inf")
        return {uuid: each for uuid, each in decisions.items() if not isinstance(each.action, Lock)}

    def previous_gpu(self, uuid: str) -> GpuStatus | None:
        """Return what an earlier agent reported about a GPU."""
        return next((gpu for gpu in self._before.gpus if gpu.uuid == uuid), None) if self._before else None

    def _new_orders(self, event: kube.OrdersSeen, clock: Clock) -> bool:
        self._freshness = api_answered(self._freshness, clock.now_seconds)
        if event.status is not None and self._before is None:
            try:
                self._before = NodeEnergyStatus.model_validate(event.status)
            except ValueError as error:
                _log.warning("the status of an earlier agent cannot be read, statistics begin anew: %.300s", error)
        if event.orders == self._orders:
            return False
        # A NodeEnergy that was deleted and made anew counts from 1: what was settled of the one before is none of its.
        self._settled_generation = min(self._settled_generation, event.orders.generation - 1)
        first, self._orders = self._orders is None, event.orders
        self._orders_at_seconds = clock.now_seconds
        self._holders_asked_seconds = float("-inf")
        self.actuator.orders_changed(event.orders.orders)
        earlier = {each.key: each for each in self._before.instances} if self._before and first else {}
        self.roster.follow(event.orders.orders, earlier, clock)
        return True

    def _new_holders(self, event: HoldersSeen, clock: Clock) -> bool:
        self._holders_pending = False
        if event.holders is None:
            if self._holders.holders is None or event.problem != self._holders.problem:
                _log.warning("holders: %s", event.problem)
            self._holders = replace(self._holders, problem=event.problem)
            return False
        before = self._holders
        too_old = clock.now_seconds - before.asked_at_seconds > HOLDERS_MAX_AGE_SECONDS
        changed = too_old or event.holders != before.holders or before.asked_at_seconds < self._orders_at_seconds
        self._holders = event
        return changed or self._lock_waits

    def _world(self, clock: Clock) -> World:
        now_seconds = clock.now_seconds
        holders_age_seconds = now_seconds - self._holders.asked_at_seconds
        return World(
            now_seconds=now_seconds,
            unix_seconds=clock.unix_seconds,
            mode=self._mode,
            may_write=self._scan.may_write,
            orders=self._orders,
            stale=why_stale(self._freshness, now_seconds),
            holders=self._holders.holders if holders_age_seconds <= HOLDERS_MAX_AGE_SECONDS else None,
            holders_problem=self._holders.problem,
            gpus=tuple(self._view(gpu.uuid, now_seconds) for gpu in self._scan.gpus),
            holds=self.roster.holds(now_seconds),
            idle=self.roster.idle(now_seconds),
            journal_problem=self.actuator.journal_problem(now_seconds),
            journal_damage=self._journal_damage,
            other_agent=self._other_agent,
            pending=now_seconds - self._started_seconds < START_SECONDS
            and (
                self._orders is None
                or self._freshness.lease_changed_seconds is None
                or (bool(self._scan.gpus) and self._holders.holders is None)
            ),
            stopping=self.stopping,
        )

    def _view(self, uuid: str, now_seconds: float) -> GpuView:
        identity = next(gpu for gpu in self._scan.gpus if gpu.uuid == uuid)
        error = self._scan.faults.get(uuid)
        fault: Refusal | None = None
        if error is not None and error.fault is GpuFault.GPU_LOST:
            fault = Refusal(GpuState.LOST, Reason.GPU_LOST, str(error))
        elif error is not None and self._silent[uuid] >= MAX_TRANSIENT:
            fault = Refusal(GpuState.LOST, Reason.NVML_ERROR, str(error))
        return replace(
            self.actuator.view(identity, fault),
            foreign_mhz=self._foreign.found_mhz(uuid),
            suspected_until_seconds=self._foreign.suspected_until_seconds(uuid, now_seconds),
        )

    def _read(self, clock: Clock) -> None:
        scan = self._gpus.scan(clock.now_seconds)
        self._scanned_at_seconds = clock.now_seconds
        reopened = scan.session != self._scan.session and scan.driver is not None
        self._scan = scan
        if reopened:
            self.actuator.driver_reopened()
            for track in self.tracks.values():
                track.interrupt()
        for gpu in scan.gpus:
            if gpu.uuid in scan.readings:
                self._silent.pop(gpu.uuid, None)
                self._track(gpu.uuid, clock)
            else:
                self._silent[gpu.uuid] += 1
                if scan.faults[gpu.uuid].fault is GpuFault.GPU_LOST:
                    self.actuator.lock_lost(gpu.uuid, clock.now_seconds)
                    if gpu.uuid in self.tracks:  # it comes back with a reset, if at all
                        self.tracks[gpu.uuid].interrupt()
        self._unlisted = frozenset()
        if scan.driver is not None and self._mode is Mode.ENFORCE and scan.may_write:
            listed = {gpu.uuid for gpu in scan.gpus}
            self._unlisted = self.actuator.release_unlisted(listed, clock.now_seconds)

    def _track(self, uuid: str, clock: Clock) -> None:
        """Add the reading to what is known of the GPU, and act on what it says about our lock."""
        decision = self.outlook.decisions.get(uuid) if self.outlook else None
        reading = self._scan.readings[uuid]
        if uuid not in self.tracks:
            self._holdings.follow(reading, decision.order if decision else None, self.previous_gpu(uuid))
        view = self._view(uuid, clock.now_seconds)
        ours = not self._journal_known or view.recorded
        found_mhz = self._foreign.add(view.identity, reading, busy_percent(reading), ours)
        if found_mhz is not None:
            _log.warning("gpu=%s sits at %d MHz under load: a lock that is not ours seems to stand", uuid, found_mhz)
        age_seconds = self.actuator.lock_age_seconds(uuid, clock.now_seconds)
        cap_mhz = view.lock.cap_mhz if view.lock else None
        step = step_mhz(view.identity.supported_clocks_mhz, cap_mhz) if cap_mhz is not None else 1
        idle = view.lock is not None and view.lock.idle
        track, read = self.tracks[uuid], self._holdings.add(reading, cap_mhz, step, age_seconds, idle)
        self.roster.credit(read.owner, read.joules)
        if read.restarted and cap_mhz is not None:
            _log.warning("gpu=%s counters went back: driver reload or GPU reset, locking again", uuid)
            self.actuator.lock_lost(uuid, clock.now_seconds)
        elif read.finding is Finding.LOST:
            wait_seconds = backoff_seconds(track.watch)
            _log.warning("gpu=%s runs above %s MHz under load: lock lost, again in %.0f s", uuid, cap_mhz, wait_seconds)
            self.actuator.lock_lost(uuid, clock.now_seconds + wait_seconds)
        elif read.finding is Finding.CONFLICT and decision is not None and decision.order is not None:
            self._contend(uuid, decision.order, cap_mhz, track, clock)
        elif view.contested and clock.now_seconds - max(track.watch.losses, default=0.0) >= LOSSES_SECONDS:
            _log.info("gpu=%s no lock was lost for ten minutes: no longer contested", uuid)
            self.actuator.uncontest(uuid)

    def _contend(self, uuid: str, order: Order, cap_mhz: int | None, track: GpuTrack, clock: Clock) -> None:
        """Leave a GPU to another writer, or go on seldom, as the policy says."""
        message = (
            f"ran above {cap_mhz} MHz under load three times within ten minutes although locked: another program "
            "sets its clock (nvidia-smi -lgc or -rgc, DCGM?)"
        )
        if order.conflict_policy is ConflictPolicy.COEXIST:
            text = f"{message}. conflictPolicy is Coexist: the cap is set again, at most once a minute"
            _log.warning("gpu=%s %s", uuid, text)
            self.actuator.contest(uuid, order, text)
            self.actuator.lock_lost(uuid, clock.now_seconds + backoff_seconds(track.watch))
            return
        text = f"{message}. Stop that one, then change the policy to try again, or write conflictPolicy: Coexist"
        _log.error("gpu=%s %s", uuid, text)
        track.watch = LockWatch()
        self.actuator.give_up(uuid, order, text)

    def _is_settled(self, world: World, decisions: Mapping[str, Decision]) -> bool:
        """Whether nothing is left to do for the present orders; needs the kubelet's word from after they came."""
        if world.other_agent:  # what it has locked is not known here
            return False
        if self._mode is Mode.ENFORCE and (not self._journal_known or self._unlisted is None or self._unlisted):
            return False  # a lock may stand that nobody has looked at
        if world.pending or not all(decision.settled for decision in decisions.values()):
            return False
        if not self._scan.gpus:  # no driver: all is refused, but a lock of before may still be there
            return not self.actuator.records()
        heard = self._holders.asked_at_seconds >= self._orders_at_seconds
        return heard or world.holders is None
