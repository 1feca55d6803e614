"""Puts the load of a real engine on simulated GPUs: what vLLM's own counters say it does, the GPUs do.

A real engine that runs on the CPU, such as vLLM's CPU build, holds simulated GPUs like any other pod, but nothing
makes them work. This reads the engine's /metrics and registers the phase that it is in. The size of the load is made up
(one workload stands for "busy"): a toy model on a CPU says nothing about a GPU.
"""

from __future__ import annotations

import logging
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prometheus_client.parser import text_string_to_metric_families

from wattlock_simulator import layout, state
from wattlock_simulator.physics import Phase, Workload

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0  # a busy engine on a small machine takes seconds to answer
_LEASE_SECONDS = 10.0  # GPUs of an engine that answers no more are left after this
_MAX_PAGE_BYTES = 4 << 20


@dataclass(frozen=True)
class Work:
    """Tokens of an engine since it started: prompt tokens that it computed itself, and generated ones."""

    computed_prompt_tokens: float
    generated_tokens: float


def work_of(page: str) -> Work | None:
    """The counters of a /metrics page of vLLM, summed over engines; None where it has none.

    Raises:
        ValueError: not a metrics page.
    """
    computed: float | None = None
    generated: float | None = None
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "vllm:generation_tokens_total":
                generated = (generated or 0.0) + sample.value
            elif sample.name == "vllm:prompt_tokens_by_source_total" and sample.labels.get("source") == "local_compute":
                computed = (computed or 0.0) + sample.value
    return None if generated is None else Work(computed or 0.0, generated)


def phase_between(before: Work | None, after: Work) -> Phase | None:
    """What the engine did most between two pages; None for nothing, also after a restart.

    A token that is computed as part of a prompt costs about what a generated one costs in a batch, so tokens are
    compared with tokens.
    """
    if before is None:
        return None
    computed = after.computed_prompt_tokens - before.computed_prompt_tokens
    generated = after.generated_tokens - before.generated_tokens
    if min(computed, generated) < 0 or computed == generated == 0:
        return None
    return Phase.PREFILL if computed > generated else Phase.DECODE


class Follower:
    """Follows one engine until told to stop."""

    def __init__(self, url: str, gpus: Sequence[layout.Gpu], busy: Workload) -> None:
        """Prepares; nothing is read yet.

        Args:
            url: address of the engine's metrics page, plain HTTP.
            gpus: the GPUs that the engine's pod holds.
            busy: the load of the engine while it decodes.

        Raises:
            ValueError: not an address that begins with http://.
        """
        if not url.startswith("http://"):
            raise ValueError(f"{url!r}: give the address of the metrics page, as in http://127.0.0.1:8000/metrics")
        self._url = url
        self._gpus = tuple(gpus)
        self._busy = busy
        self._before: Work | None = None
        self._answers = True

    def run(self, stop: threading.Event) -> None:
        """Follows until ``stop`` is set, then leaves the GPUs."""
        try:
            while not stop.is_set():
                self.poll()
                stop.wait(POLL_SECONDS)
        finally:
            for gpu in self._gpus:
                state.clear_workload(gpu)

    def poll(self) -> None:
        """Reads the page once; an engine that does not answer keeps its load until the lease ends."""
        try:
            with urllib.request.urlopen(self._url, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - http only
                work = work_of(answer.read(_MAX_PAGE_BYTES).decode())
        except (OSError, ValueError) as error:
            if self._answers:
                _log.warning("%s: %s; trying again", self._url, error)
            self._answers = False
            return
        self._answers = True
        if work is None:
            return
        self._register(phase_between(self._before, work))
        self._before = work

    def _register(self, phase: Phase | None) -> None:
        workload: Workload | None = None
        if phase is Phase.DECODE:
            workload = self._busy
        elif phase is Phase.PREFILL:
            workload = replace(self._busy, phase=Phase.PREFILL, batch=1.0)  # one prompt at a time
        lease_ns = time.monotonic_ns() + int(_LEASE_SECONDS * 1e9)
        for gpu in self._gpus:
            state.set_workload(gpu, workload, lease_until_ns=lease_ns)
