"""Threads for calls that may block: the loop itself never waits for a driver, the kubelet or a pod without a limit.

They are daemon threads, so a call that hangs in the driver cannot keep the process from ending.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from wattlock_agent.driver_session import DriverSession, Scan

Result = TypeVar("Result")

#: A write takes milliseconds; one that takes so long hangs.
WRITE_TIMEOUT_SECONDS = 5.0
#: Opening a driver whose GPUs sleep takes seconds for each of them.
SCAN_TIMEOUT_SECONDS = 30.0


class DriverHangsError(Exception):
    """The driver did not answer in time."""


class Workers:
    """A few threads that take one job after the other."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    def submit(self, job: Callable[[], Result]) -> "Future[Result]":
        """Run the job in one of the threads, after those that wait already."""
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """End the threads after the jobs that wait."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _serve(self) -> None:
        while (work := self._jobs.get()) is not None:
            future, job = work
            try:
                future.set_result(job())
            except BaseException as error:  # handed to whoever waits for it
                future.set_exception(error)


class GpuThread:
    """All driver calls, from one thread as the driver wants it; each bounded in time."""

    def __init__(self, session: DriverSession) -> None:
        self._session = session
        self._workers = Workers("gpu")

    def scan(self, now_seconds: float) -> Scan:
        """As DriverSession.scan."""
        return self._call(lambda: self._session.scan(now_seconds), SCAN_TIMEOUT_SECONDS)

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        """As GpuDriver.lock."""
        self._call(lambda: self._session.lock(uuid, low_mhz, high_mhz))

    def reset(self, uuid: str) -> None:
        """As GpuDriver.reset."""
        self._call(lambda: self._session.reset(uuid))

    def close(self) -> None:
        """Let go of the driver and end the thread."""
        self._call(self._session.close)
        self._workers.close()

    def _call(self, job: Callable[[], Result], timeout_seconds: float = WRITE_TIMEOUT_SECONDS) -> Result:
        try:
            return self._workers.submit(job).result(timeout_seconds)
        except TimeoutError:
            raise DriverHangsError(
                f"the NVIDIA driver has not answered for {timeout_seconds:.0f} s: see the node's kernel log (Xid)"
            ) from None
