"""What the plan depends on and what comes of it: values without behaviour. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from wattlock_api.constants import GpuState, Mode
from wattlock_api.nodeenergy import Order

from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders
from wattlock_agent.orders import InstanceKey, Orders

#: Frequent writes are known to stall NCCL (https://github.com/NVIDIA/nccl/issues/1551): one lock a GPU in this time.
MIN_LOCK_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class Lock:
    """Limit the SM clock to [low, cap] MHz; both are supported clocks."""

    low_mhz: int
    cap_mhz: int
    idle: bool = False
    """The lower cap of an instance without requests."""


@dataclass(frozen=True)
class Release:
    """Undo our lock, then remove its record."""


@dataclass(frozen=True)
class Forget:
    """Remove our record without touching the GPU: another writer has replaced our lock."""


Action = Lock | Release | Forget | None


@dataclass(frozen=True)
class Refusal:
    """Why a GPU is not to be locked."""

    state: GpuState
    reason: str
    message: str


@dataclass(frozen=True)
class AppliedLock:
    """A lock that the driver has accepted and that nothing has undone since, as far as we know."""

    cap_mhz: int
    pod_uid: str
    idle: bool = False
    """The lower cap of an instance without requests."""


@dataclass(frozen=True)
class GpuView:
    """One GPU as far as the plan needs to know it."""

    identity: GpuIdentity
    lock: AppliedLock | None = None
    """``None`` also when unknown, e.g. after a driver reload or a restart of the agent."""
    recorded: bool = False
    """Whether the journal has a record of a lock of ours."""
    left_idle: bool = False
    """Whether that record is about the lower cap of an instance without requests and the lock itself is not known: an
    agent before this one has left it, or a write to the driver failed."""
    undone: bool = False
    """The driver has reset the GPU since; if there is a record it could not be removed."""
    fault: Refusal | None = None
    """The GPU does not answer: nothing is written to it while this stands."""
    refused: Refusal | None = None
    """The driver or the disk refused the last write; stands until something has changed."""
    conflict: Refusal | None = None
    """Another writer keeps undoing our lock, and the policy says Skip."""
    contested: str = ""
    """The same where the policy says Coexist, in words; empty: nobody does."""
    foreign_mhz: int | None = None
    """The clock at which a lock that is not ours seems to hold the GPU."""
    suspected_until_seconds: float = 0.0
    """Monotonic time until which it is watched for such a lock."""
    lock_not_before_seconds: float = 0.0
    """Monotonic time before which no lock may be written: rate limit and back-off."""
    release_not_before_seconds: float = 0.0
    """Monotonic time before which a release that failed is not tried again."""
    release_problem: str = ""
    """Why the last release failed."""


@dataclass(frozen=True)
class World:
    """All that the plan depends on."""

    now_seconds: float
    """Monotonic time."""
    unix_seconds: float
    """Wall-clock time, for the schedule of arms alone."""
    mode: Mode
    """Mode of the process."""
    may_write: bool
    orders: Orders | None
    """``None``: none received yet."""
    stale: str
    """Why the orders are no longer to be followed; empty: they are."""
    holders: Holders | None
    """``None``: the kubelet has not answered, or too long ago."""
    holders_problem: str
    gpus: tuple[GpuView, ...]
    holds: Mapping[InstanceKey, Refusal]
    """Instances that the guardrail or their own prompts hold released."""
    idle: frozenset[InstanceKey]
    """Instances without work for long enough, by a page of this moment."""
    journal_problem: str
    """Why nothing can be recorded; empty: it can."""
    pending: bool
    """At the start, while orders, holders or a sign of the operator may still come: locks of an earlier agent wait."""
    stopping: bool = False
    journal_damage: str = ""
    """What of the journal could not be read when this agent began; decides nothing, is shown to people."""
    other_agent: str = ""
    """Another agent of ours acts on this node, in words: this one knows nothing of the locks and writes nothing."""


@dataclass(frozen=True)
class Decision:
    """What is to be done with a GPU, and the words for it."""

    uuid: str
    state: GpuState
    reason: str
    message: str
    action: Action = None
    order: Order | None = None
    """The order of the only holder of the GPU."""
    requested_mhz: int | None = None
    """The cap that is, or in a control epoch would be, in force; of an idle instance the one that it gets back."""
    settled: bool = True
    """Whether the order is in force or refused, so that nothing is left to do."""
    in_force: bool = False
    """Whether our lock is on the GPU, as far as we know."""
    idle: bool = False
    """Whether the lower cap of an idle instance is wanted."""
