"""vLLM's own pages over time, and what Wattlock reported, side by side."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubectl_tool import Kubectl
from vllm_pods import PORT, VllmPage, read_page

#: The agent measures over the last 20 s, from scrapes every 5 s, and a report may come 5 s after the newest of them.
WINDOW_SECONDS = (9.0, 22.0)
BEFORE_REPORT_SECONDS = (-2.0, 8.0)


@contextmanager
def recorded(
    address: str, port: int = PORT, every_seconds: float = 1.0, slowest_seconds: float = math.inf
) -> Iterator[list[VllmPage]]:
    """Read vLLM's page all the time, into the list; one that took longer is of no known moment, and left out."""
    pages: list[VllmPage] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            began = time.monotonic()
            with suppress(OSError):  # while it restarts, the list has a gap
                page = read_page(address, port)
                if time.monotonic() - began <= slowest_seconds:
                    pages.append(page)
            stop.wait(every_seconds)

    thread = threading.Thread(target=run, name="recorder")
    thread.start()
    try:
        yield pages
    finally:
        stop.set()
        thread.join(130)


def rate(field_name: str) -> Callable[[VllmPage, VllmPage], float | None]:
    """Return what measures the growth of a counter per second between two pages."""

    def measure(first: VllmPage, last: VllmPage) -> float | None:
        grown: float = getattr(last, field_name) - getattr(first, field_name)
        return grown / (last.unix_seconds - first.unix_seconds)

    return measure


def latency_ms(first: VllmPage, last: VllmPage) -> float | None:
    """Return the mean inter-token latency between two pages, in ms; None where no token was generated."""
    count = last.latency_count - first.latency_count
    return 1000 * (last.latency_sum_seconds - first.latency_sum_seconds) / count if count else None


def over_windows(
    pages: Iterable[VllmPage], reported_seconds: float, measure: Callable[[VllmPage, VllmPage], float | None]
) -> tuple[float, float]:
    """Return the lowest and the highest value over all windows that a report of that time may have been about."""
    earliest, latest = reported_seconds - BEFORE_REPORT_SECONDS[1], reported_seconds - BEFORE_REPORT_SECONDS[0]
    pages = list(pages)
    values = [
        value
        for last in pages
        if earliest <= last.unix_seconds <= latest
        for first in pages
        if WINDOW_SECONDS[0] <= last.unix_seconds - first.unix_seconds <= WINDOW_SECONDS[1]
        if (value := measure(first, last)) is not None
    ]
    assert values, "no pages from that time"
    return min(values), max(values)


@dataclass(frozen=True)
class Report:
    """What the node's agent reported of one instance."""

    unix_seconds: float
    instance: dict[str, Any] = field(repr=False)

    def number(self, name: str) -> float:
        """Return a figure of the instance."""
        return float(self.instance[name])


def report(kubectl: Kubectl, pod: str) -> Report | None:
    """Return the newest report about the instance that is this pod; None while there is none."""
    for node in kubectl.get("nodeenergies")["items"]:
        for instance in node.get("status", {}).get("instances", []):
            if instance["instance"] == pod:
                return Report(datetime.fromisoformat(node["status"]["reportedAt"]).timestamp(), instance)
    return None


def gpu_of(kubectl: Kubectl, pod: str) -> dict[str, Any]:
    """Return what the node's agent reported of the GPU that this pod holds; empty while there is none."""
    for node in kubectl.get("nodeenergies")["items"]:
        for gpu in node.get("status", {}).get("gpus", []):
            if gpu.get("holder", {}).get("name") == pod:
                found: dict[str, Any] = gpu
                return found
    return {}
