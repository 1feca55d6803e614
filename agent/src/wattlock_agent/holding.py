"""Whose numbers a GPU's are: one track for each GPU and holder, and the instance that its energy belongs to. Pure.

Every joule between two readings goes to exactly one holder: the one that was known when the second was taken. So what
a GPU used up to a change of hands is the old holder's, what comes after it the new one's, and none is counted twice.
"""

from dataclasses import dataclass

from wattlock_api.nodeenergy import GpuStatus, InstanceStatus, Order

from wattlock_agent.gpu.base import GpuReading
from wattlock_agent.orders import InstanceKey, key_of
from wattlock_agent.track import GpuTrack
from wattlock_agent.verify import Finding


@dataclass(frozen=True)
class Reading:
    """What came of a reading."""

    finding: Finding
    """About our lock."""
    restarted: bool
    """Whether a counter went back."""
    owner: InstanceKey | None
    joules: float
    """What the owner's GPU used since the reading before."""


class Holdings:
    """The tracks of the node's GPUs."""

    def __init__(self) -> None:
        self.tracks: dict[str, GpuTrack] = {}
        """By GPU UUID, for the present holder."""
        self._owners: dict[str, InstanceKey | None] = {}
        self._former: dict[str, GpuTrack] = {}
        """The track of the holder before, by GPU UUID: it may be back, after the kubelet was silent, say."""
        self._resumed: set[str] = set()

    def add(
        self,
        reading: GpuReading,
        cap_mhz: int | None,
        step_mhz: int,
        lock_age_seconds: float | None,
        idle: bool = False,
    ) -> Reading:
        """Add a reading for the present holder; see ``GpuTrack.add``."""
        track = self.tracks[reading.uuid]
        before_joules = track.meter.joules
        finding, restarted = track.add(reading, cap_mhz, step_mhz, lock_age_seconds, idle)
        return Reading(finding, restarted, self._owners.get(reading.uuid), track.meter.joules - before_joules)

    def follow(self, reading: GpuReading, order: Order | None, before: GpuStatus | None) -> None:
        """Give the GPU's numbers to the pod of this order from this reading on; it is in the old holder's already.

        ``before`` is what an earlier agent had reported of the GPU.
        """
        uuid, holder_uid = reading.uuid, order.pod_uid if order else ""
        self._owners[uuid] = key_of(order) if order else None  # the same pod may now be another policy's
        old = self.tracks.get(uuid)
        if old is not None and old.holder_uid == holder_uid:
            return
        former = self._former.pop(uuid, None)
        if old is not None and old.holder_uid:
            self._former[uuid] = old
        if former is not None and former.holder_uid == holder_uid:
            former.interrupt()  # it was not known to be its for a while: a gap, and told as one
            track = former
        else:
            # What an earlier agent had counted goes on once, with the first holder that this one sees.
            track = GpuTrack(holder_uid, None if uuid in self._resumed else before)
        if holder_uid:
            self._resumed.add(uuid)
        self.tracks[uuid] = track
        track.add(reading, None, 1, None)


def last_words(status: InstanceStatus) -> InstanceStatus:
    """Return what is still to be told of an instance whose order went away: its sums, and nothing about the present."""
    return InstanceStatus(
        key=status.key,
        policy_uid=status.policy_uid,
        pool=status.pool,
        instance=status.instance,
        energy_joules=status.energy_joules,
        guardrail_trips=status.guardrail_trips,
        arms=status.arms,
        pair_stats=status.pair_stats,
        dropped=status.dropped,
    )
