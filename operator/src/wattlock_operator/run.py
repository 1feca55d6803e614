"""Runs the operator: Kopf's watches, the reconcile task, the lease and the HTTP server."""

import asyncio
import contextlib
import logging
import os
import signal
import threading

import kopf
from wattlock_api.boottime import now_seconds

from wattlock_operator import handlers, http
from wattlock_operator.kube import connect
from wattlock_operator.metrics import Metrics
from wattlock_operator.reconcile import Reconciler
from wattlock_operator.settings import Settings

log = logging.getLogger(__name__)

#: After watches that failed; twice as long after each further time.
WATCH_RETRY_SECONDS = 1.0
MAX_WATCH_RETRY_SECONDS = 30.0
#: Watches that held for so long had worked.
WORKED_SECONDS = 60.0
#: The tasks of watches that ended have so long to follow, and their thread when the process leaves.
ABANDON_SECONDS = 5.0
EXIT_SECONDS = 15.0


class _Watches:
    """Kopf's watches, in a thread and with an event loop of their own.

    Kopf ends when the API server answers a watch with anything that it does not expect. That is no reason for the
    process to end: the watches begin anew, from a whole list. But when Kopf ends, it cancels every task of its event
    loop that is younger than itself and waits for them (kopf, running.run_tasks), so none of ours may live there.
    """

    def __init__(self, reconciler: Reconciler, metrics: Metrics) -> None:
        self._reconciler, self._metrics = reconciler, metrics
        self._settings = kopf.OperatorSettings()
        handlers.configure(self._settings)
        self._stopped = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flag = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="watches", daemon=True)
        self._thread.start()

    def end(self) -> bool:
        """End them; return whether they did, in time. Blocking."""
        self._stopped.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._flag.set)
        self._thread.join(EXIT_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause_seconds = WATCH_RETRY_SECONDS
        while not self._stopped.is_set():
            began_seconds = now_seconds()
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(self._watch())
            except Exception as error:
                log.warning("the watches ended, they begin anew in %.0f s: %r", pause_seconds, error)
                self._metrics.failed("watch")
            finally:
                _abandon(loop)
            if now_seconds() - began_seconds > WORKED_SECONDS:
                pause_seconds = WATCH_RETRY_SECONDS
            self._stopped.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, MAX_WATCH_RETRY_SECONDS)

    async def _watch(self) -> None:
        self._flag, self._loop = asyncio.Event(), asyncio.get_running_loop()
        if self._stopped.is_set():
            return
        # Not kopf.operator: it waits until all its tasks have ended, which after a failure was seen to take for ever.
        tasks = await kopf.spawn_tasks(
            registry=handlers.register(
                self._reconciler.store, self._reconciler.kinds_changed, self._reconciler.watches_began
            ),
            settings=self._settings,
            standalone=True,
            clusterwide=True,
            stop_flag=self._flag,
        )
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


def _abandon(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left in a loop, wait for it a little, and close the loop."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        ended, hung = loop.run_until_complete(asyncio.wait(left, timeout=ABANDON_SECONDS))
        for task in ended:
            if not task.cancelled():
                task.exception()  # looked at, so that asyncio does not complain: the first failure is told
        if hung:
            log.warning("%d task(s) of the watches did not end", len(hung))
    loop.close()


async def run(settings: Settings) -> int:
    """Run until a signal, or the end of one of the tasks; return the exit status."""
    metrics = Metrics()
    reconciler = Reconciler(settings, connect(), metrics)
    probes = http.Probes(metrics.registry, lambda: reconciler.alive, lambda: reconciler.ready)
    server = http.serve(settings.http_port, probes)
    log.info("serving metrics and probes on port %d", server.server_address[1])
    # Else Kopf looks for the name of the user, whom a container without a passwd entry does not have.
    os.environ.setdefault("POD_ID", settings.identity)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tasks = {
        asyncio.create_task(stop.wait(), name="signal"),
        asyncio.create_task(reconciler.run(), name="reconcile"),
        asyncio.create_task(reconciler.lead(), name="lease"),
    }
    watches = _Watches(reconciler, metrics)
    status = 0
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                log.error("%s ended: %r", task.get_name(), error)
                status = 1
    finally:
        await reconciler.stop()  # first, so that the next operator begins at once
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        ended = await asyncio.to_thread(watches.end)
    if not ended:
        log.warning("the watches do not end: leaving without them")
        logging.shutdown()
        os._exit(status)
    return status
