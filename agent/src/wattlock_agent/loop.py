"""The running agent: threads, time, signals and the order in which it starts and stops."""

import logging
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Hashable
from typing import Protocol

from wattlock_api.boottime import now_seconds
from wattlock_api.constants import Mode
from wattlock_api.nodeenergy import NodeEnergyStatus

from wattlock_agent import kube
from wattlock_agent.agent import Agent
from wattlock_agent.api_client import ApiClient
from wattlock_agent.clock import Clock
from wattlock_agent.driver_session import DriverMismatchError, DriverSession
from wattlock_agent.events import Event, HoldersSeen, ScrapeDone, ThreadFailed
from wattlock_agent.gpu.base import GpuDriver, GpuIdentity
from wattlock_agent.holders.base import Holders, KubeletError
from wattlock_agent.http_server import AgentServer
from wattlock_agent.journal import NoJournal
from wattlock_agent.journal_keeper import HostJournal, JournalKeeper
from wattlock_agent.metrics import IdleReleases, Snapshot, SnapshotBoard, Totals
from wattlock_agent.orders import NO_ORDERS, InstanceKey
from wattlock_agent.report import Reported, build_status, is_due
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters
from wattlock_agent.settings import Settings
from wattlock_agent.workers import GpuThread, Workers

_log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
SCRAPE_THREADS = 4
#: A status that the API server did not take is tried again after this, plus the shortest interval.
REFUSED_STATUS_SECONDS = 8.0
#: A stop takes this long at most, whether or not driver and API server answer.
RELEASE_TIMEOUT_SECONDS = 4.0
LAST_REPORT_TIMEOUT_SECONDS = 3.0

EXIT_OK, EXIT_FAILED, EXIT_DRIVER_MISMATCH = 0, 1, 3


class Kubelet(Protocol):
    """Knows who holds which GPU."""

    def holders(self, gpus: tuple[GpuIdentity, ...]) -> Holders:
        """Ask. Raises KubeletError."""


class PageReader(Protocol):
    """Reads serving metrics."""

    def scrape(self, url: str) -> ServingCounters | ScrapeFailure:
        """Read one page; never raises."""


class Loop:
    """One process of the agent."""

    def __init__(
        self,
        settings: Settings,
        driver: GpuDriver,
        kubelet: Kubelet,
        scraper: PageReader,
        journal: HostJournal,
        boot_id: str,
        version: str,
    ) -> None:
        self._settings = settings
        self._version = version
        self._kubelet = kubelet
        self._scraper = scraper
        self._journal = JournalKeeper(journal)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._session = DriverSession(driver)
        self._gpus = GpuThread(self._session)
        self._agent = Agent(
            settings.mode,
            self._gpus,
            NoJournal("the journal is not open yet"),
            boot_id,
            self._clock(),
            settings.stale_orders_seconds,
        )
        self._kubelet_workers = Workers("kubelet")
        self._scrape_workers = Workers("scrape", SCRAPE_THREADS)
        self._status = kube.StatusLink(
            ApiClient(settings.api_server, settings.service_account_directory),
            settings.node_name,
            settings.operator_namespace,
            self._events.put,
            settings.stale_orders_seconds,
        )
        self._watch = kube.OrderWatch(
            ApiClient(settings.api_server, settings.service_account_directory), settings.node_name, self._events.put
        )
        self.board = SnapshotBoard()
        self._reported = Reported()
        self._jitter = random.uniform(-1, 1)  # noqa: S311 - spreads load, guards nothing
        self._passes = 0
        self._pass_seconds = 0.0
        self._status_failures = 0
        self._scrape_failures = Totals()
        self._idle_releases = IdleReleases()

    def run(self) -> int:
        """Work until told to stop; returns the exit status.

        Whatever ends it, GPUs under a lock of ours are released first.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._events.put(None))
        server: AgentServer | None = None
        try:
            server = AgentServer(("", self._settings.http_port), self.board)
            server.start()
            for name, target in (("watch", self._watch.run), ("status", self._status.run)):
                threading.Thread(target=self._guard(target), name=name, daemon=True).start()
            self._serve()
            return self._stop()
        except DriverMismatchError as error:
            _log.error("leaving to be started with the new library: %s", error)
            return self._fail(EXIT_DRIVER_MISMATCH)
        except Exception:
            _log.exception("unexpected failure, releasing all GPUs")
            return self._fail(EXIT_FAILED)
        finally:
            for each in (self._watch, self._status, self._kubelet_workers, self._scrape_workers):
                each.close()
            if server is not None:
                server.shutdown()
                server.server_close()

    def stop(self) -> None:
        """Make ``run`` release all GPUs and return; may be called from any thread and from a signal handler."""
        self._events.put(None)

    @staticmethod
    def _clock() -> Clock:
        return Clock(now_seconds(), time.time())

    def _guard(self, target: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                target()
            except BaseException as error:
                self._events.put(ThreadFailed(error))

        return guarded

    def _serve(self) -> None:
        next_tick_seconds = now_seconds()
        while True:
            clock = self._clock()
            wait_seconds = min(
                next_tick_seconds - clock.now_seconds,
                self._agent.roster.seconds_to_next_scrape(clock),
                self._agent.roster.seconds_to_late_page(clock),
                TICK_SECONDS,
            )
            wake = False
            try:
                event = self._events.get(timeout=max(0.0, wait_seconds))
                while True:
                    if event is None:
                        return
                    wake = self._take(event) or wake
                    event = self._events.get_nowait()
            except queue.Empty:
                pass
            clock = self._clock()
            late = self._agent.roster.seconds_to_late_page(clock) <= 0
            if wake or late or clock.now_seconds >= next_tick_seconds:
                self._pass(clock)
                next_tick_seconds = max(next_tick_seconds + TICK_SECONDS, clock.now_seconds + TICK_SECONDS / 2)
            self._start_jobs(self._clock())

    def _take(self, event: Event) -> bool:
        if isinstance(event, kube.StatusWritten) and event.problem:
            self._status_failures += not event.missing
            pause_seconds = 0.0 if event.missing else REFUSED_STATUS_SECONDS
            self._reported = Reported(at_seconds=now_seconds() + pause_seconds)  # not written: due again
        return self._agent.handle(event, self._clock())

    def _pass(self, clock: Clock) -> None:
        self._journal.open(self._agent, clock.now_seconds)
        self._agent.tick(clock)
        done_seconds = now_seconds()
        for woken in self._agent.wakes:
            self._idle_releases = self._idle_releases.plus(done_seconds - woken.quiet_seconds, woken.by_work)
        status = self._build_status()
        done_seconds = now_seconds()
        if self._may_report() and is_due(self._reported, status, done_seconds, self._jitter):
            self._reported = Reported(done_seconds, status)
            self._status.put(status)
        self._passes += 1
        self._pass_seconds += done_seconds - clock.now_seconds
        self.board.snapshot = self._snapshot(status)

    def _may_report(self) -> bool:
        """Whether there is a NodeEnergy of this node and it is this agent's to report to.

        A second agent must not: it would report GPUs released that the first has locked, and a policy's deletion would
        take its word. Its log and /readyz say why it waits.
        """
        world = self._agent.outlook.world if self._agent.outlook else None
        return world is not None and world.orders not in (None, NO_ORDERS) and not world.other_agent

    def _start_jobs(self, clock: Clock) -> None:
        if self._agent.holders_wanted(clock) and self._agent.outlook is not None:
            gpus = self._agent.outlook.scan.gpus
            self._kubelet_workers.submit(self._guard(lambda: self._ask_holders(gpus)))
        for key, url in self._agent.roster.scrapes_wanted(clock):
            self._scrape_workers.submit(self._guard(lambda key=key, url=url: self._scrape(key, url)))  # type: ignore[misc]

    def _ask_holders(self, gpus: tuple[GpuIdentity, ...]) -> None:
        asked_seconds = now_seconds()
        try:
            self._events.put(HoldersSeen(asked_seconds, self._kubelet.holders(gpus)))
        except KubeletError as error:
            self._events.put(HoldersSeen(asked_seconds, None, str(error)))

    def _scrape(self, key: InstanceKey, url: str) -> None:
        started_seconds = now_seconds()
        result = self._scraper.scrape(url)
        self._events.put(ScrapeDone(key, url, result, now_seconds() - started_seconds))

    def _build_status(self) -> NodeEnergyStatus:
        agent = self._agent
        assert agent.outlook is not None  # noqa: S101 - a pass has been made
        return build_status(
            agent.outlook,
            agent.tracks,
            agent.instances,
            self._version,
            self._settings.pod_name,
            agent.stopping,
            agent.parted,
        )

    def _snapshot(self, status: NodeEnergyStatus) -> Snapshot:
        agent, outlook = self._agent, self._agent.outlook
        assert outlook is not None  # noqa: S101 - a pass has been made
        failures: dict[tuple[Hashable, str], int] = {
            (key, reason): count
            for key, instance in agent.instances.items()
            for reason, count in instance.scrape_failures.items()
        }
        orders = outlook.world.orders
        return Snapshot(
            status=status,
            orders={uuid: each.order for uuid, each in outlook.decisions.items() if each.order is not None},
            sm_mhz={uuid: each.sm_mhz for uuid, each in outlook.scan.readings.items() if each.sm_mhz is not None},
            clock_writes={gpu.uuid: agent.actuator.writes(gpu.uuid) for gpu in outlook.scan.gpus},
            driver_errors=dict(self._session.errors),
            scrape_failures=self._scrape_failures.take(failures),
            idle_releases=self._idle_releases,
            idle_seconds={key.text: instance.idle.capped_seconds for key, instance in agent.instances.items()},
            status_failures=self._status_failures,
            orders_stale=bool(outlook.world.stale),
            order_count=len(orders.orders) if orders else 0,
            ready=orders is not None and outlook.settled_generation == orders.generation,
            passes=self._passes,
            pass_seconds=self._pass_seconds,
            at_seconds=outlook.clock.now_seconds,
        )

    def _stop(self) -> int:
        """Release, report, leave."""
        _log.info("stopping: releasing all GPUs")
        self._agent.stopping = True
        deadline_seconds = now_seconds() + RELEASE_TIMEOUT_SECONDS
        while True:
            self._agent.tick(self._clock())
            writes = self._settings.mode is Mode.ENFORCE and bool(self._agent.actuator.records())
            if not writes or now_seconds() >= deadline_seconds:
                break
            time.sleep(0.2)
        left = list(self._agent.actuator.records()) if self._settings.mode is Mode.ENFORCE else []
        if left:
            _log.error("still locked: %s; the next agent on this node resets them", ", ".join(left))
        self._report_last()
        self._gpus.close()
        return EXIT_OK if not left else EXIT_FAILED

    def _fail(self, status: int) -> int:
        """Release what can be released after a failure, by the shortest way."""
        self._agent.stopping = True
        if self._settings.mode is Mode.ENFORCE:
            try:
                self._agent.actuator.release_all()
            except Exception:
                _log.exception("could not release all GPUs; the next agent on this node resets them")
        try:
            self._agent.tick(self._clock())
            self._report_last()
        except Exception:
            _log.exception("no last report")
        return status

    def _report_last(self) -> None:
        if not self._may_report():
            return
        self._status.put(self._build_status())
        if not self._status.drain(LAST_REPORT_TIMEOUT_SECONDS):
            _log.warning("the API server did not take the last report in time")
