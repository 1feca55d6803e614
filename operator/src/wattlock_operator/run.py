"""Runs the operator: Kopf's watches, the reconcile task, the lease and the HTTP server."""

import asyncio
import contextlib
import logging
import os

import kopf

from wattlock_operator import handlers, http
from wattlock_operator.kube import connect
from wattlock_operator.metrics import Metrics
from wattlock_operator.reconcile import Reconciler
from wattlock_operator.settings import Settings

log = logging.getLogger(__name__)


async def run(settings: Settings, stop: asyncio.Event | None = None) -> int:
    """Run until a signal, ``stop``, or the end of one of the tasks; return the exit status."""
    metrics = Metrics()
    reconciler = Reconciler(settings, connect(), metrics)
    probes = http.Probes(metrics.registry, lambda: reconciler.alive, lambda: reconciler.ready)
    server = http.serve(settings.http_port, probes)
    log.info("serving metrics and probes on port %d", server.server_address[1])
    kopf_settings = kopf.OperatorSettings()
    handlers.configure(kopf_settings)
    # Else Kopf looks for the name of the user, whom a container without a passwd entry does not have.
    os.environ.setdefault("POD_ID", settings.identity)
    watches = kopf.operator(
        registry=handlers.register(reconciler.store, reconciler.is_released),
        settings=kopf_settings,
        standalone=True,
        clusterwide=True,
        stop_flag=stop,
    )
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
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await reconciler.stop()
        await asyncio.to_thread(server.shutdown)
        server.server_close()
    return status
