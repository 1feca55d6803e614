"""The background task: looks at the whole world after a change, decides, writes the differences."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml
from wattlock_api.constants import LEASE_RENEW_SECONDS

from wattlock_operator import kube as api
from wattlock_operator.apply import Applier, ensure_published_profile, read_daemon_sets
from wattlock_operator.decide import STATES_SECONDS, Decision, Memory, decide
from wattlock_operator.kube import Kube, KubeError
from wattlock_operator.lease import DURATION_SECONDS, Lease
from wattlock_operator.metrics import Metrics
from wattlock_operator.settings import Settings
from wattlock_operator.store import NODE, NODE_ENERGY, POD, POLICY, PROFILE, Store

log = logging.getLogger(__name__)

#: Changes that come within this time are looked at together.
DEBOUNCE_SECONDS = 0.25
#: The least time between two passes.
PAUSE_SECONDS = 0.5
#: The world is looked at so often even when nothing changed.
PERIOD_SECONDS = 15.0
#: After a failed pass.
RETRY_SECONDS = 2.0
#: Whole lists are read so often: a watch may miss a deletion while it reconnects.
RESYNC_SECONDS = 300.0
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


class Reconciler:
    """Owns the store, the memory of decisions and the lease."""

    def __init__(self, settings: Settings, kube: Kube, metrics: Metrics) -> None:
        self._settings, self._kube, self._metrics = settings, kube, metrics
        self._applier = Applier(kube, settings.agent_namespace, settings.identity, metrics)
        self._lease = Lease(kube, settings.namespace, settings.identity)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dirty = asyncio.Event()
        self.store = Store(self._mark)
        self._memory = Memory()
        self._released: frozenset[str] = frozenset()
        self._leading_until, self._deposed = 0.0, False
        self._beat = time.monotonic()
        self._synced, self._resync_at = False, 0.0

    def _mark(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(self._dirty.set)

    @property
    def leading(self) -> bool:
        """Whether the lease is ours. Without an answer of the API server it lapses by itself."""
        return time.monotonic() < self._leading_until

    @property
    def alive(self) -> bool:
        """Whether the task still turns."""
        return time.monotonic() - self._beat < HUNG_SECONDS

    @property
    def ready(self) -> bool:
        """Whether the world is known."""
        return self._synced

    def is_released(self, uid: str) -> bool:
        """Return whether a deleted policy may go, by the last decision."""
        return self.leading and uid in self._released

    def _resync(self) -> bool:
        """Read the whole lists; return whether every kind is there.

        A kind that somebody deleted has no objects any more. What is left is still to be looked after: policies wait to
        be let go, agents to be stopped.
        """
        complete = True
        for kind, path in _ALL_LISTS:
            try:
                self.store.replace(kind, self._kube.list_all(path))
            except KubeError as error:
                if error.status != 404:
                    raise
                log.warning("there is no kind %s: install the chart's CustomResourceDefinitions again", kind.name)
                self.store.replace(kind, ())
                complete = False
        return complete

    async def lead(self) -> None:
        """Keep the lease."""
        while True:
            try:
                asked_at = time.monotonic()
                was_leading = self.leading
                if await asyncio.to_thread(self._lease.renew, time.time()):
                    self._leading_until = asked_at + DURATION_SECONDS
                    if not was_leading:
                        log.info("leading as %s", self._settings.identity)
                        self._dirty.set()
                else:
                    self._leading_until, self._deposed = 0.0, True
                    log.info("another operator holds the lease: standing by")
            except KubeError as error:
                log.warning("the lease could not be renewed: %s", error)
                self._metrics.failed("Lease")
            await asyncio.sleep(LEASE_RENEW_SECONDS if self.leading else RETRY_SECONDS)

    async def run(self) -> None:
        """Run until cancelled."""
        self._loop = asyncio.get_running_loop()
        profile_ensured = False
        while True:
            self._beat = time.monotonic()
            wait = PERIOD_SECONDS
            try:
                if time.monotonic() >= self._resync_at:
                    self._synced = await asyncio.to_thread(self._resync)
                    self._resync_at = time.monotonic() + (RESYNC_SECONDS if self._synced else PERIOD_SECONDS)
                self._dirty.clear()
                if self.leading and self._deposed:
                    # Another one led meanwhile and wrote the sums on: ours are old. Go on from what it wrote.
                    await asyncio.to_thread(self._resync)
                    self._memory, self._deposed = Memory(), False
                if self.leading:
                    if not profile_ensured:
                        await asyncio.to_thread(ensure_published_profile, self._kube)
                        profile_ensured = True
                    wait = await asyncio.to_thread(self._pass)
            except KubeError as error:
                log.warning("the pass over the cluster was cut short: %s", error)
                self._metrics.failed("pass")
                wait = RETRY_SECONDS
                if error.status is None:
                    self._resync_at = 0.0  # the watches may have missed deletions, too
            except Exception:
                # A bug must not stop the lease or the watches; it shows in the log and in wattlock_operator_errors.
                log.exception("the pass over the cluster failed")
                self._metrics.failed("bug")
                wait = PERIOD_SECONDS
            await asyncio.sleep(PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dirty.wait(), wait)
                await asyncio.sleep(DEBOUNCE_SECONDS)

    def _pass(self) -> float:
        """Look, decide and write; return after how many seconds to look again without a change."""
        with self._metrics.pass_seconds.time():
            now_seconds = time.time()
            template = read_template(self._settings)
            daemon_sets = read_daemon_sets(self._kube, self._settings.agent_namespace) if template is not None else ()
            world = self.store.world(daemon_sets, self._settings.agent_namespace)
            decision = decide(world, template, self._memory, now_seconds)
            self._metrics.show(
                ((policy, decision.statuses[policy.uid]) for policy in world.policies), leading=self.leading
            )
            self._released = decision.released
            if not self._carry_out(decision, now_seconds):
                return RETRY_SECONDS
            return STATES_SECONDS if decision.again_soon else PERIOD_SECONDS

    def _carry_out(self, decision: Decision, now_seconds: float) -> bool:
        well, failed = False, frozenset(policy.uid for policy, _ in decision.write_statuses)
        try:
            well, failed = self._applier.apply(decision, now_seconds)
        finally:
            # A status that was not written is written next time, however little it changed.
            written = {uid: entry for uid, entry in decision.memory.written.items() if uid not in failed}
            self._memory = replace(decision.memory, written=written)
        return well

    async def stop(self) -> None:
        """Give the lease up for the next operator."""
        try:
            await asyncio.wait_for(asyncio.to_thread(self._lease.give_up), 10)
        except (KubeError, TimeoutError) as error:
            log.warning("the lease could not be given up: %s", error)
