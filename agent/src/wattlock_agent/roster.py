"""The instances of the node: those that have orders, and those whose orders went away lately. Pure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from wattlock_api.base import decimal_string
from wattlock_api.nodeenergy import DroppedEpochs, InstanceStatus, Order

from wattlock_agent.clock import Clock
from wattlock_agent.guardrail import Remembered
from wattlock_agent.holding import last_words
from wattlock_agent.instance import InstanceTrack
from wattlock_agent.orders import InstanceKey, key_of
from wattlock_agent.track import GpuTrack
from wattlock_agent.world import Decision, Refusal

_MAX_PARTED = 64
#: Instances without orders are reported for so long: three reports, so that the operator sees their last joules.
#: One that comes back later begins at zero: see ``_Parted.resumed``.
PARTED_SECONDS = 60.0


@dataclass(frozen=True)
class _Parted:
    """An instance without orders, which may come back after its pod was replaced."""

    status: InstanceStatus
    since_seconds: float
    remembered: Remembered | None = None
    """None: another agent had followed it."""

    def is_told(self, now_seconds: float) -> bool:
        """Return whether it is still reported."""
        return now_seconds - self.since_seconds <= PARTED_SECONDS

    def resumed(self, now_seconds: float) -> InstanceStatus:
        """Return what goes on when it comes back.

        Its sums, only as long as they are told without a break. The operator puts those that are told no more with the
        sums of all pods that are gone, where no name is kept once it restarts: told again, they would count twice. It
        understands sums that begin anew, whether or not it restarted. What held the instance released is no sum.
        """
        if self.is_told(now_seconds):
            return self.status
        nothing = {"energy_joules": "0", "arms": [], "pair_stats": [], "dropped": DroppedEpochs()}
        return self.status.model_copy(update=nothing)


class Roster:
    """One track for each instance that has orders."""

    def __init__(self) -> None:
        self.tracks: dict[InstanceKey, InstanceTrack] = {}
        self._parted: dict[InstanceKey, _Parted] = {}

    def follow(self, orders: Iterable[Order], earlier: Mapping[str, InstanceStatus], clock: Clock) -> None:
        """Follow these orders, which are all of the node.

        ``earlier``: by key, what an earlier agent had reported when this one saw its first orders, and with those only:
        from then on the node's report is this agent's own.
        """
        by_instance: dict[InstanceKey, list[Order]] = defaultdict(list)
        for order in orders:
            by_instance[key_of(order)].append(order)
        for status in earlier.values():
            # Its pod may just be replaced: then it is told on, and may go on, like one that this agent followed.
            key = InstanceKey(status.policy_uid, status.instance)
            if key not in by_instance:
                self._part(key, _Parted(status, clock.now_seconds))
        for key in self.tracks.keys() - by_instance.keys():
            track = self.tracks.pop(key)
            self._part(key, _Parted(track.status(clock.now_seconds, None), clock.now_seconds, track.remembered))
        for key, group in by_instance.items():
            if key not in self.tracks:
                parted = self._parted.pop(key, None)
                before = parted.resumed(clock.now_seconds) if parted else earlier.get(key.text)
                self.tracks[key] = InstanceTrack(key, before, clock, parted.remembered if parted else None)
            self.tracks[key].follow(group, clock)

    def _part(self, key: InstanceKey, parted: _Parted) -> None:
        self._parted[key] = parted
        while len(self._parted) > _MAX_PARTED:
            del self._parted[next(iter(self._parted))]

    def credit(self, key: InstanceKey | None, joules: float) -> None:
        """Add the energy of a GPU of an instance, also if its orders went away since."""
        if key in self.tracks:
            self.tracks[key].credit(joules)
        elif key in self._parted and joules > 0:
            parted = self._parted[key]
            if parted.status.energy_joules is None:  # of some of its GPUs it was not known
                return
            total = decimal_string(float(parted.status.energy_joules) + joules, 1)
            self._parted[key] = replace(parted, status=parted.status.model_copy(update={"energy_joules": total}))

    def ticked(self, clock: Clock, decisions: Iterable[Decision], tracks: Mapping[str, GpuTrack]) -> None:
        """Tell each instance how its GPUs stand at the end of a pass; ``tracks``: of all GPUs, by UUID."""
        by_instance: dict[InstanceKey, list[Decision]] = defaultdict(list)
        for decision in decisions:
            if decision.order is not None:
                by_instance[key_of(decision.order)].append(decision)
        for key, instance in self.tracks.items():
            mine = by_instance[key]
            instance.ticked(clock, mine, {each.uuid: tracks[each.uuid] for each in mine if each.uuid in tracks})

    def parted(self, now_seconds: float) -> list[InstanceStatus]:
        """Return the instances whose orders went away lately: their last joules are still to be told.

        Also those of unknown energy: their pairs may go on.
        """
        return [last_words(each.status) for each in self._parted.values() if each.is_told(now_seconds)]

    def holds(self, now_seconds: float) -> dict[InstanceKey, Refusal]:
        """Return what holds instances released."""
        held = ((key, instance.hold(now_seconds)) for key, instance in self.tracks.items())
        return {key: hold for key, hold in held if hold is not None}

    def idle(self, now_seconds: float) -> frozenset[InstanceKey]:
        """Return the instances that have had no work for as long as their orders ask."""
        return frozenset(key for key, instance in self.tracks.items() if instance.is_idle(now_seconds))

    def waking(self, now_seconds: float) -> frozenset[InstanceKey]:
        """Return the instances for which the last pass wanted the lower cap, and that are not idle any more."""
        wanted = frozenset(key for key, instance in self.tracks.items() if instance.idle.wanted)
        return wanted - self.idle(now_seconds)

    def scrapes_wanted(self, clock: Clock) -> list[tuple[InstanceKey, str]]:
        """Return the metrics pages that are to be read now; the caller then reads them."""
        urls = ((key, instance.scrape_wanted(clock)) for key, instance in self.tracks.items())
        return [(key, url) for key, url in urls if url is not None]

    def seconds_to_next_scrape(self, clock: Clock) -> float:
        """Return how long it is until a metrics page is due (at least 0)."""
        return min((instance.seconds_to_scrape(clock) for instance in self.tracks.values()), default=60.0)

    def seconds_to_late_page(self, clock: Clock) -> float:
        """Return how long it is until the cap of an idle instance must go because its page is too old (at least 0)."""
        pages = (instance.idle.seconds_to_late_page(clock.now_seconds) for instance in self.tracks.values())
        return min(pages, default=math.inf)
