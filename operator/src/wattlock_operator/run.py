"""Runs the operator: Kopf's watches, the reconcile task, the lease and the HTTP server."""

import asyncio
import contextlib
import logging
import os
import signal

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
#: A task that was cancelled has so long to end.
EXIT_SECONDS = 15.0


async def _watch(reconciler: Reconciler, metrics: Metrics, stop: asyncio.Event) -> None:
    """Run Kopf's watches until a signal or ``stop``.

    Kopf ends when the API server answers a watch with anything that it does not expect. That is no reason for the
    process to end: the watches begin anew, from a whole list.
    """
    kopf_settings = kopf.OperatorSettings()
    handlers.configure(kopf_settings)
    loop = asyncio.get_running_loop()
    pause_seconds = WATCH_RETRY_SECONDS
    while not stop.is_set():
        began_seconds = now_seconds()
        try:
            await kopf.operator(
                registry=handlers.register(reconciler.store, reconciler.kinds_changed),
                settings=kopf_settings,
                standalone=True,
                clusterwide=True,
                stop_flag=stop,
            )
        except Exception as error:
            log.warning("the watches ended, they begin anew in %.0f s: %r", pause_seconds, error)
            metrics.failed("watch")
        else:
            return
        # Kopf, which had set its own, heeds no signal while it does not run.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if now_seconds() - began_seconds > WORKED_SECONDS:
            pause_seconds = WATCH_RETRY_SECONDS
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause_seconds)
        pause_seconds = min(2 * pause_seconds, MAX_WATCH_RETRY_SECONDS)


async def run(settings: Settings, stop: asyncio.Event | None = None) -> int:
    """Run until a signal, ``stop``, or the end of one of the tasks; return the exit status."""
    metrics = Metrics()
    reconciler = Reconciler(settings, connect(), metrics)
    probes = http.Probes(metrics.registry, lambda: reconciler.alive, lambda: reconciler.ready)
    server = http.serve(settings.http_port, probes)
    log.info("serving metrics and probes on port %d", server.server_address[1])
    # Else Kopf looks for the name of the user, whom a container without a passwd entry does not have.
    os.environ.setdefault("POD_ID", settings.identity)
    watches = _watch(reconciler, metrics, stop or asyncio.Event())
    tasks = {
        asyncio.create_task(watches, name="watches"),
        asyncio.create_task(reconciler.run(), name="reconcile"),
        asyncio.create_task(reconciler.lead(), name="lease"),
    }
    status = 0
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                log.error("%s ended: %r", task.get_name(), error)
                status = 1
    finally:
        for task in tasks:
            task.cancel()
        ended, hung = await asyncio.wait(tasks, timeout=EXIT_SECONDS)
        await asyncio.gather(*ended, return_exceptions=True)
        await reconciler.stop()
        await asyncio.to_thread(server.shutdown)
        server.server_close()
    if hung:
        # Kopf's watches, cancelled while they were ending after a failure, were seen to wait for ever; the end of the
        # event loop would wait for them, too.
        log.error("%s did not end: leaving without", " and ".join(sorted(task.get_name() for task in hung)))
        logging.shutdown()
        os._exit(1)
    return status
