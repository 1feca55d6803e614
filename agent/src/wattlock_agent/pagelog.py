"""The pages of an instance, each joined with the energy of its GPUs at the moment of the page. Pure."""

from collections import deque
from collections.abc import Callable, Mapping

from wattlock_api.nodeenergy import Order

from wattlock_agent.clock import Clock
from wattlock_agent.epochs import SCRAPE_SECONDS, Sample
from wattlock_agent.rates import Scrape, token_energy, work_rates
from wattlock_agent.serving.base import ServingCounters, no_tokens
from wattlock_agent.track import GpuTrack

#: How long a page waits for the energy readings around it.
_PENDING_SECONDS = 5.0
#: Pages that are kept: more than a report interval of them.
_KEPT = 32


class PageLog:
    """The last pages and samples of an instance."""

    def __init__(self, clock: Clock) -> None:
        self._life = 0
        """Grows with each restart of the engine."""
        self._pages: deque[Scrape] = deque(maxlen=_KEPT)
        self._pending: deque[Scrape] = deque(maxlen=_KEPT)
        self._samples: deque[Sample] = deque(maxlen=_KEPT)
        self._marked = clock
        """When power was last looked at, where there is no page to read."""

    @property
    def newest(self) -> ServingCounters | None:
        """The newest page, whatever life of the engine it is of."""
        return self._pages[-1].counters if self._pages else None

    def restarted(self) -> None:
        """The engine restarted: the next page begins anew."""
        self._life += 1

    def forget(self) -> None:
        """Pages come from another address now."""
        self._life += 1
        self._pages.clear()
        self._pending.clear()
        self._samples.clear()

    def add(self, page: ServingCounters, clock: Clock, sharp: bool) -> None:
        """Add a page; ``sharp``: it came quickly enough to know its time."""
        scrape = Scrape(page, page.at_seconds + clock.offset_seconds, self._life, sharp)
        self._pages.append(scrape)
        self._pending.append(scrape)

    def mark(self, clock: Clock, next_unix_seconds: Callable[[float], float | None]) -> None:
        """Note the times at which the power of an epoch is wanted, where no page does: the tokens are elsewhere.

        ``next_unix_seconds``: when, after a given time, the experiment asks for a page; ``None``: as ever.
        """
        if abs(clock.unix_seconds - self._marked.unix_seconds) > 2 * SCRAPE_SECONDS:
            self._marked = clock  # a pause or a step of the clock: what was between is not made up
        while True:
            due_unix = self._marked.unix_seconds + SCRAPE_SECONDS
            asked_unix = next_unix_seconds(self._marked.unix_seconds)
            due_unix = due_unix if asked_unix is None else min(due_unix, asked_unix)
            if due_unix > clock.unix_seconds:
                return
            self._marked = Clock(due_unix - clock.offset_seconds, due_unix)
            self._pending.append(Scrape(no_tokens(self._marked.now_seconds), due_unix, self._life, sharp=True))

    def join(self, now_seconds: float, tracks: Mapping[str, GpuTrack]) -> list[Sample]:
        """Join waiting pages with the energy at their time, once readings from before and after it are there.

        Returns the samples of sharp pages.
        """
        joined: list[Sample] = []
        while self._pending:
            scrape = self._pending[0]
            at_seconds = scrape.counters.at_seconds
            ready = bool(tracks) and all(track.meter.newest_seconds >= at_seconds for track in tracks.values())
            if not ready and now_seconds - at_seconds < _PENDING_SECONDS:
                break
            self._pending.popleft()
            if ready and (sample := _sample(scrape, tracks)) is not None:
                self._samples.append(sample)
                if scrape.sharp:
                    joined.append(sample)
        return joined

    def rates(self, order: Order, complete: bool, now_seconds: float) -> dict[str, object]:
        """Return the measurements over the last report interval, as fields of InstanceStatus.

        ``complete``: the GPUs of all its pods on this node are known.
        """
        rates = work_rates(self._pages, self._life, now_seconds)
        if "tokens_per_second" in rates and self._samples and complete:
            rates |= token_energy(self._samples, order.role, order.span is not None)
        return rates


def _sample(scrape: Scrape, tracks: Mapping[str, GpuTrack]) -> Sample | None:
    counters = scrape.counters
    points = {uuid: track.meter.at(counters.at_seconds) for uuid, track in tracks.items()}
    known = {uuid: point for uuid, point in points.items() if point is not None}
    if counters.generated_tokens is None or len(known) < len(points):
        return None
    lives = sorted((uuid, tracks[uuid].holder_uid, point.life) for uuid, point in known.items())
    return Sample(
        unix_seconds=scrape.unix_seconds,
        generated_tokens=counters.generated_tokens,
        latency_sum_seconds=counters.inter_token_latency_sum_seconds,
        latency_count=counters.inter_token_latency_count,
        joules=sum(point.joules for point in known.values()),
        lives=(scrape.life, *lives),
        computed_prompt_tokens=counters.computed_prompt_tokens,
    )
