"""The background task: looks at the whole world after a change, decides, writes the differences."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import yaml
from wattlock_api.boottime import now_seconds
from wattlock_api.constants import GROUP, LEASE_RENEW_SECONDS

from wattlock_operator import kube as api
from wattlock_operator.apply import Applier, NotLeadingError, ensure_published_profile, read_daemon_sets
from wattlock_operator.decide import STATES_SECONDS, Decision, Memory, decide
from wattlock_operator.kube import Kube, KubeError, TooLongError
from wattlock_operator.lease import LEADING_SECONDS, Lease
from wattlock_operator.metrics import Metrics
from wattlock_operator.settings import Settings
from wattlock_operator.store import NODE, NODE_ENERGY, POD, POLICY, PROFILE, Store
from wattlock_operator.world import DaemonSetView, World

log = logging.getLogger(__name__)

#: Changes that come within this time are looked at together.
DEBOUNCE_SECONDS = 0.25
#: The least time between two passes.
PAUSE_SECONDS = 0.5
#: The world is looked at so often even when nothing changed.
PERIOD_SECONDS = 15.0
#: After a failed pass; twice as long after each further one.
RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 15.0
#: A stopping operator waits so long for the pass in progress, which ends with the write in progress.
LAST_WRITE_SECONDS = 10.0
#: Whole lists are read so often: a watch may miss a deletion while it reconnects.
RESYNC_SECONDS = 300.0
#: The same after a watch has begun anew from a list of its own: it does not tell what was deleted meanwhile.
LISTED_RESYNC_SECONDS = 5.0
#: After our kinds changed the watches tell nothing for a while (of a kind that is being deleted, nothing at all): whole
#: lists are read more often, for so long.
CLOSE_LOOK_SECONDS = 600.0
CLOSE_RESYNC_SECONDS = 10.0
#: After whole lists that could not be read; twice as long after each further time. Passes are made meanwhile.
RESYNC_RETRY_SECONDS = 5.0
MAX_RESYNC_RETRY_SECONDS = 60.0
#: Without a sign of life for so long the operator is to be restarted. Longer than a pass that meets time-outs.
HUNG_SECONDS = 180.0

_LISTS = ((POLICY, api.POLICIES), (POD, api.PODS), (NODE, api.NODES), (NODE_ENERGY, api.NODE_ENERGIES))
_ALL_LISTS = (*_LISTS, (PROFILE, api.PROFILES))


def read_template(settings: Settings) -> Mapping[str, Any] | None:
    """Return the agents' template as it is now; None where the operator makes no DaemonSets.

    An unreadable template comes back empty: the decision then says what is wrong with it.
    """
    if settings.agent_template is None:
        return None
    try:
        template = yaml.safe_load(settings.agent_template.read_text())
    except (OSError, yaml.YAMLError) as error:
        log.error("the agent template %s is unreadable: %s", settings.agent_template, error)
        return {}
    return template if isinstance(template, dict) else {}


class _KindsAreNewError(Exception):
    """The process had better start anew."""


class Reconciler:
    """Owns the store, the memory of decisions and the lease."""

    def __init__(self, settings: Settings, kube: Kube, metrics: Metrics) -> None:
        self._settings, self._kube, self._metrics = settings, kube, metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dirty = asyncio.Event()
        self.store = Store(self._mark)
        self._applier = Applier(
            kube, settings.agent_namespace, settings.identity, metrics, self.store, lambda: self.leading
        )
        self._lease = Lease(kube, settings.namespace, settings.identity)
        self._leading_until_seconds, self._stopping = 0.0, False
        self._memory, self._term = Memory(), 0
        self._in_pass = threading.Lock()
        self._failures = 0
        self._beat = time.monotonic()
        self._known = False
        """Whether the whole lists have been read once."""
        self._synced, self._resync_at = False, 0.0
        self._resync_failures, self._resync_not_before = 0, 0.0
        self._kind_uids: list[str] = []
        self._profile_ensured = False
        self._close_look_until = 0.0

    def _mark(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(self._dirty.set)

    @property
    def leading(self) -> bool:
        """Whether the lease is ours. Without an answer of the API server it lapses by itself."""
        return not self._stopping and now_seconds() < self._leading_until_seconds

    @property
    def alive(self) -> bool:
        """Whether the task still turns."""
        return time.monotonic() - self._beat < HUNG_SECONDS

    @property
    def ready(self) -> bool:
        """Whether the world is known: then this one leads, or can at once."""
        return self._synced

    def kinds_changed(self) -> None:
        """Note that one of our CustomResourceDefinitions was changed, deleted or installed."""
        self._close_look_until = time.monotonic() + CLOSE_LOOK_SECONDS
        self._resync_at = 0.0
        self._mark()

    def watches_began(self) -> None:
        """Note that a watch begins anew from a list: what was deleted while it was away, it does not tell."""
        self._resync_at = min(self._resync_at, time.monotonic() + LISTED_RESYNC_SECONDS)

    def _resync(self) -> bool:
        """Read the whole lists; return whether every kind is there.

        A kind that somebody deleted has no objects any more. What is left is still to be looked after: policies wait to
        be let go, agents to be stopped.

        Raises:
            KubeError: a list could not be read. The others were, unless there is no point in asking.
        """
        complete, failure = True, None
        for kind, path in _ALL_LISTS:
            try:
                if self.store.replace(kind, self._signs_of_life(self._kube.list_all(path))):
                    log.warning(
                        "versions of kind %s went back: the cluster's state was restored from a backup", kind.name
                    )
                    self.watches_began()
            except KubeError as error:
                if error.status != 404:
                    if error.ends_pass and not isinstance(error, TooLongError):
                        raise
                    failure = failure or error
                    continue
                log.warning("there is no kind %s: install the chart's CustomResourceDefinitions again", kind.name)
                self.store.replace(kind, ())
                complete = False
        if failure is not None:
            raise failure
        return complete

    def _signs_of_life(self, bodies: Iterable[api.Json]) -> Iterator[api.Json]:
        """Show that we live as long as objects come: many large ones take their time."""
        for body in bodies:
            self._beat = time.monotonic()
            yield body

    def _kinds_are_new(self) -> bool:
        """Return whether our kinds were deleted and installed again since the start.

        Kopf's watches do not always survive that: it looks a kind up when it is announced, a moment before it is
        served, and not again.
        """
        names = (path.rsplit("/", 1)[1] for path in (api.POLICIES, api.NODE_ENERGIES, api.PROFILES))
        found = [self._kube.get(f"{api.CRDS}/{name}.{GROUP}") or {} for name in names]
        uids = [str((body.get("metadata") or {}).get("uid")) for body in found]
        self._kind_uids = self._kind_uids or uids
        return uids != self._kind_uids

    async def lead(self) -> None:
        """Keep the lease, or stand by for it."""
        led: bool | None = None
        while True:
            asked_seconds = now_seconds()
            pause_seconds = RETRY_SECONDS
            try:
                if await asyncio.to_thread(self._lease.renew):
                    self._leading_until_seconds = asked_seconds + LEADING_SECONDS
                    pause_seconds = max(RETRY_SECONDS, asked_seconds + LEASE_RENEW_SECONDS - now_seconds())
                else:
                    self._leading_until_seconds = 0.0
                if self.leading is not led:
                    led = self.leading
                    if led:
                        log.info("leading as %s", self._settings.identity)
                    else:
                        log.info("another operator holds the lease: standing by")
                    self._dirty.set()
            except KubeError as error:
                log.warning("the lease could not be renewed: %s", error)
                self._metrics.failed("Lease")
                pause_seconds = max(pause_seconds, error.retry_after_seconds or 0.0)
                if not self.leading:
                    led = None
            await asyncio.sleep(pause_seconds)

    async def _read_all(self) -> None:
        self._resync_at = time.monotonic() + RESYNC_SECONDS  # before, so that a change meanwhile is not lost
        try:
            self._synced = await asyncio.to_thread(self._resync)
            if self._synced and await asyncio.to_thread(self._kinds_are_new):
                raise _KindsAreNewError
        except KubeError:
            self._resync_at = 0.0
            pause_seconds = RESYNC_RETRY_SECONDS * 2 ** min(self._resync_failures, 8)
            self._resync_not_before = time.monotonic() + min(pause_seconds, MAX_RESYNC_RETRY_SECONDS)
            self._resync_failures += 1
            raise
        self._known, self._resync_failures, self._resync_not_before = True, 0, 0.0

    async def _see_all(self, must: bool) -> None:
        """Read the whole lists when it is time to.

        Where they cannot be read, passes go on with what the watches tell, and it is tried again after a pause: what
        ails a list may last, and whoever makes it so would stop every policy in the cluster.

        Args:
            must: there is no doing without, for what is known is nothing, or of before another operator led.

        Raises:
            KubeError: they must be read and cannot, or the API server wants to be left alone.
        """
        if not must and time.monotonic() < max(self._resync_at, self._resync_not_before):
            return
        try:
            await self._read_all()
        except KubeError as error:
            if must or (error.ends_pass and error.status is not None):
                raise
            log.warning("the whole lists could not be read, the watches have to do for now: %s", error)
            self._metrics.failed("lists")
            self._beat = time.monotonic()  # the time-outs of a pass come on top of those of the lists

    async def run(self) -> None:
        """Run until cancelled, or until the process had better start anew."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._beat = time.monotonic()
            wait_seconds, hold_seconds = PERIOD_SECONDS, PAUSE_SECONDS
            self._dirty.clear()
            try:
                wait_seconds = await self._turn()
            except _KindsAreNewError:
                log.warning("our kinds were deleted and installed again: leaving, to be started with new watches")
                return
            except NotLeadingError:
                log.info("not leading any more: the rest of the pass is left to another operator")
            except KubeError as error:
                log.warning("the pass over the cluster was cut short: %s", error)
                self._metrics.failed("pass")
                hold_seconds = max(self._retry_seconds(), error.retry_after_seconds or 0.0)
                wait_seconds = 0.0
                if error.status is None:
                    self._resync_at = 0.0  # the watches may have missed deletions, too
            except Exception:
                # A bug must not stop the lease or the watches; it shows in the log and in wattlock_operator_errors.
                log.exception("the pass over the cluster failed")
                self._metrics.failed("bug")
            if time.monotonic() < self._close_look_until:
                self._resync_at = min(self._resync_at, time.monotonic() + CLOSE_RESYNC_SECONDS)
                wait_seconds = min(wait_seconds, CLOSE_RESYNC_SECONDS)
            await asyncio.sleep(hold_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dirty.wait(), wait_seconds)
                await asyncio.sleep(DEBOUNCE_SECONDS)

    def _retry_seconds(self) -> float:
        self._failures += 1
        return float(min(RETRY_SECONDS * 2 ** min(self._failures - 1, 8), MAX_RETRY_SECONDS))

    async def _turn(self) -> float:
        """Make a pass if we lead; return after how many seconds to look again without a change."""
        term = self._lease.term
        takes_over = self.leading and term != self._term
        await self._see_all(must=takes_over or not self._known)
        if takes_over:
            # Another one led meanwhile and wrote the sums on: ours are old. Go on from what it wrote.
            self._memory, self._term = Memory(), term
        if not self.leading:
            self._metrics.show((), leading=False)  # who leads shows the policies; twice would be counted twice
            return PERIOD_SECONDS
        if self._synced and not self._profile_ensured:
            await asyncio.to_thread(ensure_published_profile, self._kube)
            self._profile_ensured = True
        return await asyncio.to_thread(self._pass)

    def _world(self, daemon_sets: tuple[DaemonSetView, ...]) -> World:
        return self.store.world(
            daemon_sets,
            self._settings.agent_namespace,
            self._settings.host_network_namespaces,
            self._settings.allowed_placements,
        )

    def _pass(self) -> float:
        """Look, decide and write; return after how many seconds to look again without a change."""
        with self._in_pass, self._metrics.pass_seconds.time():
            unix_seconds = time.time()
            template = read_template(self._settings)
            daemon_sets = read_daemon_sets(self._kube, self._settings.agent_namespace) if template is not None else ()
            world = self._world(daemon_sets)
            if self._applier.claim(world.policies):
                world = self._world(daemon_sets)
            decision = decide(world, template, self._memory, unix_seconds)
            self._metrics.show(
                ((policy, decision.statuses[policy.uid]) for policy in world.policies), leading=self.leading
            )
            self._tell_failures(decision)
            if not self._carry_out(decision, unix_seconds):
                return self._retry_seconds()
            self._failures = 0
            return STATES_SECONDS if decision.again_soon else PERIOD_SECONDS

    def _tell_failures(self, decision: Decision) -> None:
        """Count the statuses that could not be made, each time, and log each of them when it begins."""
        for policy, error in decision.failures:
            self._metrics.failed("bug")
            if policy.uid not in self._memory.failed:
                log.error(
                    "the status of policy %s could not be made and stays as it was; its orders are written",
                    policy.title,
                    exc_info=error,
                )

    def _carry_out(self, decision: Decision, unix_seconds: float) -> bool:
        well, failed = False, frozenset(policy.uid for policy, _ in decision.write_statuses)
        try:
            well, failed = self._applier.apply(decision)
        finally:
            # A status that was not written is written next time, however little it changed, and told of then.
            written = {uid: entry for uid, entry in decision.memory.written.items() if uid not in failed}
            told = decision.memory.told.untold(failed, self._memory.told)
            self._memory = replace(decision.memory, written=written, told=told)
        # As they are now: their last status has just been written.
        policies = self.store.world((), self._settings.agent_namespace).policies
        well &= self._applier.let_go(policy for policy in policies if policy.uid in decision.released)
        # Last, for they are the least: nobody's release waits for an Event.
        self._applier.tell(decision.tellings, failed, unix_seconds)
        return well

    async def stop(self) -> None:
        """Write nothing more, then give the lease up for the next operator."""
        self._stopping = True
        try:
            await asyncio.wait_for(asyncio.to_thread(self._hand_over), 2 * LAST_WRITE_SECONDS)
        except (KubeError, TimeoutError) as error:
            log.warning("the lease could not be given up: %s", error)

    def _hand_over(self) -> None:
        if not self._in_pass.acquire(timeout=LAST_WRITE_SECONDS):
            log.warning("a write hangs: the lease is left to lapse by itself")
            return
        try:
            self._lease.give_up()
        finally:
            self._in_pass.release()
