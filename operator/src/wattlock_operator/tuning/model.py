"""What a search looks for, what it sees and what it remembers: frozen data, nothing else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from wattlock_api.tuningstatus import SearchCause

from wattlock_operator.ledger import Tally

NO_PAIRS = Tally()


class Objective(StrEnum):
    """What is made as small as the bounds allow."""

    ENERGY_PER_TOKEN = "EnergyPerToken"  # noqa: S105
    ENERGY_DELAY_PRODUCT = "EnergyDelayProduct"
    """Energy for each token times the inter-token latency: gives up a saving that costs as much speed."""


@dataclass(frozen=True)
class Goal:
    """What is looked for, and within which bounds."""

    objective: Objective = Objective.ENERGY_PER_TOKEN
    max_throughput_loss_percent: float = 2.0
    """Tokens per second under the cap may be so much below released."""
    max_latency_increase_percent: float | None = 3.0
    """Mean inter-token latency under the cap may be so much above released. ``None``: no bound."""
    min_saving_percent: float = 1.0
    """A cap that saves less is not worth it: then the pool stays released."""
    min_mhz: int | None = None
    """No cap below this is tried."""
    max_mhz: int | None = None
    """No cap above this is tried."""

    @property
    def least_log_throughput(self) -> float:
        """The bound on throughput as a log ratio: the effect of a cap must be above it."""
        return math.log1p(-self.max_throughput_loss_percent / 100)

    @property
    def most_log_latency(self) -> float | None:
        """The bound on latency as a log ratio: the effect of a cap must be below it."""
        bound = self.max_latency_increase_percent
        return None if bound is None else math.log1p(bound / 100)


#: The work must be another one for so long before anything is done about it.
MOVED_SECONDS = 600.0
#: After a search the load may move as it likes for at least so long, and for REST_FACTOR times as long as the search
#: took: a search costs about half of the saving while it lasts.
REST_SECONDS = 3600.0
REST_FACTOR = 4.0


@dataclass(frozen=True)
class Patience:
    """When another kind of work begins the search anew. Like a goal it is the user's, but may change under a search."""

    moved_seconds: float = MOVED_SECONDS
    """The work must be another one for so long."""
    rest_seconds: float | None = None
    """No matter of load begins a search for so long after the last one. ``None``: REST_SECONDS or longer, by what the
    last search took."""

    def rest_after_seconds(self, took_seconds: float) -> float:
        """Return for how long the tuner rests after a search that took so long."""
        return max(REST_SECONDS, REST_FACTOR * took_seconds) if self.rest_seconds is None else self.rest_seconds


PATIENCE = Patience()


@dataclass(frozen=True)
class Regime:
    """The kind of work that a pool does: a clock that was found holds for one."""

    batch: float
    """Sequences that an instance decodes at once: tokens per second times inter-token latency."""
    latency_seconds: float
    """Mean inter-token latency: at the same batch it tells of longer contexts or another model."""
    kind: str = ""
    """Products, driver versions and pod templates, as one word."""
    power_limited: bool | None = None
    """Whether the power limit held the clock down; ``None``: not known."""
    products: tuple[str, ...] = ()
    """GPU products that ``kind`` is about."""
    drivers: tuple[str, ...] = ()
    """Driver versions that ``kind`` is about."""


@dataclass(frozen=True)
class Observation:
    """What is known of a pool at a look."""

    now_seconds: float
    instances: int
    tallies: Mapping[int, Tally] = field(default_factory=dict)
    """Sums over all pairs of the pool so far, by cap in MHz."""
    tripped: int = 0
    """Instances that the guardrail holds released now."""
    regime: Regime | None = None
    """``None``: tokens or latency are not known now."""
    released_mhz: int | None = None
    """SM clock that busy GPUs run at while nothing is locked; ``None``: not known."""
    supported_mhz: tuple[int, ...] = ()
    """SM clocks that every GPU of the pool supports, highest first. Empty: not known yet."""
    pair_seconds: float = 120.0
    """Time that one pair of an instance takes."""


class Outcome(StrEnum):
    """What came out of an arm."""

    OPEN = "Open"
    """Being measured, or measured and not ruled out."""
    ADMITTED = "Admitted"
    """Shown to be within the bounds and to save energy."""
    BREACH = "Breach"
    """Shown to be beyond a bound, or the guardrail released too many instances."""
    NOT_SHOWN = "NotShown"
    """It cannot be shown within a bearable time that it stays within the bounds."""
    DOES_NOT_PAY = "DoesNotPay"
    """It saves less than is asked for."""


#: An arm beyond which nothing lower is tried.
TOO_SLOW = (Outcome.BREACH, Outcome.NOT_SHOWN)


@dataclass(frozen=True)
class Trial:
    """An arm of the search: one cap against released."""

    cap_mhz: int
    seen: Tally = NO_PAIRS
    """The pool's sums for this cap at the last look."""
    sums: Tally = NO_PAIRS
    """What of them belongs to this search."""
    outcome: Outcome = Outcome.OPEN
    note: str = ""
    """Why, for people."""


class Phase(StrEnum):
    """Where the tuner is."""

    STARTING = "Starting"
    """Nothing is locked; the work and the released clock are looked at."""
    SEARCHING = "Searching"
    """One cap after the other is measured against released."""
    SETTLED = "Settled"
    """The chosen cap is in force, and watched."""
    RELEASED = "Released"
    """No cap pays, or none can be shown to stay within the bounds: the pool is left alone."""


@dataclass(frozen=True)
class Tuning:
    """All that the tuner remembers of a pool. It is published in status: an operator restart goes on from there."""

    phase: Phase = Phase.STARTING
    since_seconds: float | None = None
    """When the phase began; ``None``: it was never looked at."""
    looked_seconds: float | None = None
    """When the last look was."""
    searches: int = 0
    """Searches so far, the present one included."""
    begun: Mapping[SearchCause, int] = field(default_factory=dict)
    """The same by cause."""
    next_cause: SearchCause = SearchCause.FIRST
    """Why the next search begins."""
    guardrail_arms: int = 0
    """Arms so far that the guardrail ended."""
    changed_seconds: float | None = None
    """When phase or cap last changed; ``None``: never."""
    began_seconds: float | None = None
    """When the present or last search began."""
    took_seconds: float = 0.0
    """How long the last finished search took."""
    trials: tuple[Trial, ...] = ()
    """Arms of the present or last search in the order of their first epochs."""
    current_mhz: int | None = None
    """The cap under test, or the chosen one."""
    confirming: bool = False
    """Whether the current cap is measured until it is decided, as the likely choice."""
    top_mhz: int | None = None
    """The clock that released GPUs ran at: caps from there on do nothing."""
    held: Tally = NO_PAIRS
    """Pairs since the choice."""
    regime: Regime | None = None
    """The work that the search was made under."""
    moved_since_seconds: float | None = None
    """Since when the work is another one."""
    note: str = ""
    """Why the phase is what it is, for people."""

    @property
    def cap_mhz(self) -> int | None:
        """The cap that is to be in force now; ``None``: released."""
        return self.current_mhz if self.phase in (Phase.SEARCHING, Phase.SETTLED) else None

    def trial(self, cap_mhz: int | None) -> Trial | None:
        """Return the arm of a cap."""
        return next((each for each in self.trials if each.cap_mhz == cap_mhz), None)
