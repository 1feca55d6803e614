"""Instances that are not all on this node: whose energy is missing here, and what the other nodes say. Pure."""

from dataclasses import dataclass
from enum import Enum

from wattlock_api.peerpower import PeerPower

#: How long after an epoch its energy on other nodes may become known. They report every 20 s, the operator hands it on
#: within seconds; a minute more is for an API server that is away for a moment.
PEER_WAIT_SECONDS = 120.0
#: Bound of InstanceStatus.epochs: more than PEER_WAIT_SECONDS of the shortest epochs (20 s).
KEPT_EPOCHS = 8


class Unknown(Enum):
    """In place of a number that will not become known."""

    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Span:
    """The nodes of an instance that is not all on this one."""

    nodes: frozenset[str]
    """All of them, this one too."""
    missing_pods: int
    """Pods whose energy nobody measures."""
    serves: bool
    """Whether its tokens are counted here."""


class Peers:
    """The power of an instance's other nodes by epoch, as far as it is known."""

    def __init__(self, span: Span | None) -> None:
        """``span`` None: there are no other nodes."""
        self.span = span
        self._watts: dict[int, float | None] = {}

    @property
    def serves(self) -> bool:
        """Whether the instance's tokens are counted here."""
        return self.span is None or self.span.serves

    def take(self, power: PeerPower) -> None:
        """Take in news. They must be about exactly the other nodes: of fewer, the energy would be too low."""
        others = frozenset(power.nodes)
        if self.span is None or not others < self.span.nodes or len(others) + 1 != len(self.span.nodes):
            return
        for each in power.epochs:
            self._watts[each.epoch] = None if each.watts is None else float(each.watts)
        while len(self._watts) > 2 * KEPT_EPOCHS:
            del self._watts[min(self._watts)]

    def watts(self, epoch: int, since_end_seconds: float) -> float | Unknown | None:
        """Return the mean power of the other nodes in an epoch that ended so long ago; None: it may still come."""
        if self.span is None:
            return 0.0
        if self.span.missing_pods:
            return Unknown.UNKNOWN
        if len(self.span.nodes) == 1:
            return 0.0
        if epoch in self._watts:
            watts = self._watts[epoch]
            return Unknown.UNKNOWN if watts is None else watts
        return Unknown.UNKNOWN if since_end_seconds >= PEER_WAIT_SECONDS else None
