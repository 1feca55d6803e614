"""The operator's process ends when it should, whatever its watches do."""

import os
import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import asyncio, kopf, logging, time
    from wattlock_operator import run
    from wattlock_operator.reconcile import Reconciler
    from wattlock_operator.settings import from_environment

    async def watches_that_do_not_end(**_):
        time.sleep(3600)

    async def done(self):
        await asyncio.sleep(0.1)

    async def nothing(self):
        await asyncio.sleep(60)

    kopf.spawn_tasks, run.connect, run.EXIT_SECONDS = watches_that_do_not_end, lambda: None, 0.3
    Reconciler.run, Reconciler.lead, Reconciler.stop = done, nothing, done
    logging.basicConfig()
    settings = from_environment({"WATTLOCK_NAMESPACE": "w", "WATTLOCK_HTTP_PORT": "0"})
    asyncio.run(run.run(settings))
    """
)


def test_watches_that_do_not_end_do_not_keep_the_process():
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50, env=dict(os.environ)
    )
    assert ended.returncode == 0, ended.stderr
    assert "leaving without them" in ended.stderr
