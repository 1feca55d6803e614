"""Whether an instance has no work: then its clock may be capped lower still, until the first request. Pure.

What is known of an instance is its page, and a page is about the past: work may have come since. So an instance counts
as idle only while the newest page was asked for less than ``LATE_SECONDS`` ago, and while the lower cap is on, a page
is asked for every ``WATCH_SECONDS``. A request that comes just after a page was made is on the next one.
"""

import math
from dataclasses import dataclass, replace

from wattlock_api.nodeenergy import Order

from wattlock_agent.serving.base import ServingCounters

#: While the lower cap is on, pages are read so often.
WATCH_SECONDS = 0.25
#: A page that was asked for longer ago says nothing about now. Two readings may fail to come back in time.
LATE_SECONDS = 0.75
#: So long after the lower cap nothing is measured, in both arms: what follows it is written up to this much later.
RECOVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Stillness:
    """What the pages so far say. Times are monotonic seconds at which a page was asked for."""

    since_seconds: float | None = None
    """The first of the unbroken row of pages without work; ``None``: the newest page shows work, or there is none."""
    last_seconds: float = float("-inf")
    """The newest page."""
    work: tuple[float | None, ...] | None = None
    """Its counters of tokens; ``None``: there is no page to compare with."""
    told: bool = True
    """Whether it tells running and waiting requests."""


def see(stillness: Stillness, page: ServingCounters) -> Stillness:
    """Return what is known after a page of the same life of the engine."""
    work = (page.generated_tokens, page.prompt_tokens, page.computed_prompt_tokens)
    told = page.running_requests is not None and page.waiting_requests is not None
    still = (
        page.running_requests == 0 and page.waiting_requests == 0 and (stillness.work is None or work == stillness.work)
    )
    since = stillness.since_seconds if stillness.since_seconds is not None else page.at_seconds
    return Stillness(since if still else None, page.at_seconds, work, told)


def broken(stillness: Stillness) -> Stillness:
    """Return what is known after a page that could not be read or came too late, or a restart: it begins anew."""
    return replace(stillness, since_seconds=None, work=None)


def is_idle(stillness: Stillness, after_seconds: float, now_seconds: float) -> bool:
    """Return whether every page of the last ``after_seconds`` showed no work, and the newest one is of now."""
    since = stillness.since_seconds
    fresh = now_seconds - stillness.last_seconds <= LATE_SECONDS
    return since is not None and fresh and stillness.last_seconds - since >= after_seconds


def why_never(order: Order, stillness: Stillness) -> str:
    """Return why an instance can never be seen to be idle although its order has a cap for that; empty: it can."""
    if order.idle is None:
        return ""
    if order.span is not None:
        return "it has pods that are not seen here, so it is never capped as idle: it keeps the pool's clock"
    if stillness.told:
        return ""
    return (
        "its metrics do not tell running and waiting requests, so it is never capped as idle: use a version of the "
        "engine that tells (vllm:num_requests_running, sglang:num_running_reqs), or remove idle from the pool"
    )


@dataclass(frozen=True)
class Wake:
    """The lower cap of an idle instance was undone because of its page."""

    quiet_seconds: float
    """When the last page that still showed no work was asked for: a request can only have come later."""
    by_work: bool
    """The page showed work; else it failed or came too late."""


class IdleWatch:
    """What an instance's pages say about its work, and the lower cap that follows from it."""

    def __init__(self, now_seconds: float) -> None:
        self.stillness = Stillness()
        self.wanted = False
        """Whether the last pass wanted the lower cap."""
        self.capped_seconds = 0.0
        """Time under it so far."""
        self._in_force = False
        self._quiet_seconds = float("-inf")
        self._noted_seconds = now_seconds
        self._ended_seconds = float("-inf")

    def see(self, page: ServingCounters) -> None:
        """Take in a page of the same life of the engine."""
        self.stillness = see(self.stillness, page)
        if self.stillness.since_seconds is not None:
            self._quiet_seconds = page.at_seconds

    def break_off(self) -> None:
        """A page could not be read, or the engine restarted: stillness begins anew."""
        self.stillness = broken(self.stillness)

    def note(self, now_seconds: float, wanted: bool, in_force: bool) -> None:
        """Note what a pass made of it: whether the lower cap is wanted, and on all GPUs of the instance."""
        if self._in_force:
            self.capped_seconds += now_seconds - self._noted_seconds
        if self.wanted and not wanted:
            self._ended_seconds = now_seconds
            if now_seconds - self.stillness.last_seconds > LATE_SECONDS:
                self.break_off()  # pages come too slowly to go on at once
        self.wanted, self._in_force, self._noted_seconds = wanted, in_force, now_seconds

    def recovers(self, now_seconds: float) -> bool:
        """Return whether the lower cap ended so lately that nothing is to be measured yet.

        The ordinary cap comes back some seconds after the lower one, a released epoch at once: what is dropped must not
        depend on the arm.
        """
        return now_seconds - self._ended_seconds < RECOVERY_SECONDS

    def wake(self) -> Wake:
        """Return why the lower cap goes now, and when the last page that showed no work was asked for."""
        return Wake(self._quiet_seconds, self.stillness.since_seconds is None and self.stillness.work is not None)

    def seconds_to_late_page(self, now_seconds: float) -> float:
        """Return how long the newest page is still good enough for the lower cap; infinite without that cap."""
        return max(0.0, self.stillness.last_seconds + LATE_SECONDS - now_seconds) if self.wanted else math.inf
