"""What a pool does, and which of it chooses the rows of its ClockProfile. Pure.

One clock holds for one kind of work (batch and inter-token latency, see tuning.regime), so a profile may have rows for
several. Traffic moves all the time, and a clock that follows each whiff proves nothing: rows are chosen by a *regime*
that stays until the work was another one, by a factor of MARGIN, for all of MOVED_SECONDS. So a pool at the border of
two rows stays with the one that it has, whichever it is, and no pool changes its row more often than that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wattlock_api.base import decimal_string, parse_timestamp, timestamp
from wattlock_api.policystatus import PoolWork, ProfileStatus

from wattlock_operator.reports import PoolKey, PoolReport, number
from wattlock_operator.tuning.model import Regime
from wattlock_operator.tuning.regime import follow, ratio
from wattlock_operator.world import World

#: The work is another one from a factor of this on: ordinary traffic moves it by a fifth.
MARGIN = 1.25
#: For so long it must be another one before rows are chosen anew.
MOVED_SECONDS = 600.0
#: The first regime is taken after so long.
FIRST_SECONDS = 60.0
#: Reports are means over 20 s; what is compared follows them with this time constant.
SMOOTH_SECONDS = 60.0
#: Beyond any batch, and any latency in seconds.
_MOST = 1e9


def measured_work(report: PoolReport) -> Regime | None:
    """Return batch and latency as means over the instances that generate tokens; ``None``: not known now."""
    known = [
        (number(item.instance.tokens_per_second), number(item.instance.inter_token_latency_ms) / 1000)
        for item in report.instances
        if not item.silent and item.instance.tokens_per_second and item.instance.inter_token_latency_ms
    ]
    known = [(rate, latency) for rate, latency in known if rate > 0 and latency > 0]
    if not known:
        return None
    tokens = sum(rate for rate, _ in known)
    latency = sum(rate * each for rate, each in known) / tokens
    # Reports are not to be trusted: a number that no status could hold must not end the pass over the cluster.
    return Regime(min(tokens * latency / len(known), _MOST), min(latency, _MOST))


@dataclass(frozen=True)
class Watch:
    """What is remembered of a pool's work. It is published in status: a restarted operator goes on from there."""

    regime: Regime | None = None
    """Chooses the rows; ``None``: not known yet."""
    since_seconds: float | None = None
    """Since when it does."""
    work: Regime | None = None
    """The work as it was measured last, smoothed."""
    looked_seconds: float | None = None
    """When that was."""
    moved_since_seconds: float | None = None
    """Since when the work is another one than the regime, without a break; ``None``: it is not."""


def _with_moved(regime: Regime | None, work: Regime) -> Regime:
    """Return the regime with what of it is another one: that the one has moved must not move the other at a border."""
    if regime is None:
        return work
    return replace(
        regime,
        batch=work.batch if ratio(regime.batch, work.batch) > MARGIN else regime.batch,
        latency_seconds=work.latency_seconds
        if ratio(regime.latency_seconds, work.latency_seconds) > MARGIN
        else regime.latency_seconds,
    )


def watch(state: Watch, now: Regime | None, now_seconds: float) -> Watch:
    """Return what is known after a look. A pool that generates nothing keeps its regime, and a change begins anew."""
    if now is None:
        return replace(state, work=None, looked_seconds=None, moved_since_seconds=None)
    if state.work is None or state.looked_seconds is None:  # the first look, also after a restart
        work = now
    else:
        work = follow(state.work, now, now_seconds - state.looked_seconds, SMOOTH_SECONDS)
    seen = replace(state, work=work, looked_seconds=now_seconds)
    moved = _with_moved(state.regime, work)
    if moved == state.regime:
        return replace(seen, moved_since_seconds=None)
    since = now_seconds if state.moved_since_seconds is None else state.moved_since_seconds
    if now_seconds - since < (FIRST_SECONDS if state.regime is None else MOVED_SECONDS):
        return replace(seen, moved_since_seconds=since)
    return replace(seen, regime=moved, since_seconds=now_seconds, moved_since_seconds=None)


def _told(work: Regime | None) -> PoolWork | None:
    if work is None:
        return None
    latency_ms = decimal_string(1000 * work.latency_seconds, 3)
    return PoolWork(batch=decimal_string(work.batch, 3), inter_token_latency_ms=latency_ms)


def told_watch(name: str, state: Watch) -> ProfileStatus:
    """Return the status of a pool's profile, without rows."""
    return ProfileStatus(
        name=name,
        regime=_told(state.regime),
        since=None if state.since_seconds is None else timestamp(state.since_seconds),
        work=_told(state.work),
        work_changed_at=None if state.moved_since_seconds is None else timestamp(state.moved_since_seconds),
    )


def _read(told: PoolWork | None) -> Regime | None:
    if told is None:
        return None
    read = Regime(number(told.batch), number(told.inter_token_latency_ms) / 1000)
    # From zero nothing is far away: such a regime would stay for ever.
    return read if read.batch > 0 and read.latency_seconds > 0 else None


def read_watch(told: ProfileStatus | None) -> Watch:
    """Return what a status remembers; of an unreadable one nothing."""
    if told is None:
        return Watch()
    try:
        since, moved = (None if text is None else parse_timestamp(text) for text in (told.since, told.work_changed_at))
    except ValueError:  # somebody else's times
        return Watch()
    return Watch(_read(told.regime), since, _read(told.work), None, moved)


def watch_pools(
    world: World, reports: Mapping[PoolKey, PoolReport], memory: Mapping[PoolKey, Watch], now_seconds: float
) -> Mapping[PoolKey, Watch]:
    """Return what is known of the pools with a profile after a look."""
    found: dict[PoolKey, Watch] = {}
    for policy in world.policies:
        before = {pool.name: pool.profile for pool in policy.status.pools} if policy.status is not None else {}
        for pool in policy.spec.pools if policy.spec is not None else ():
            if pool.clock is None or pool.clock.profile is None:
                continue
            key = (policy.uid, pool.name)
            state = memory[key] if key in memory else read_watch(before.get(pool.name))
            found[key] = watch(state, measured_work(reports.get(key, PoolReport())), now_seconds)
    return found
