"""Where the tuner of a pool is: for people to read, and for a restarted operator to go on from. Bounded."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from wattlock_api.base import ApiModel, DecimalString, Mhz, PositiveDecimalString, Sentence, Timestamp
from wattlock_api.constants import PowerCapVerdict
from wattlock_api.pairs import PairStats


class SearchCause(StrEnum):
    """Why a search begins."""

    FIRST = "First"
    WORK_CHANGED = "WorkChanged"
    COSTS_ENERGY = "CostsEnergy"
    BROKE_BOUND = "BrokeBound"


class TuningArm(ApiModel):
    """A cap that the search has measured against released."""

    cap_mhz: Mhz
    """The cap, in MHz."""
    outcome: Literal["Open", "Admitted", "Breach", "NotShown", "DoesNotPay"]
    """Open: measured and not ruled out. Admitted: shown to stay within the guardrail and to save energy. Breach: shown
    to be worse than the guardrail allows. NotShown: too close to a bound to be shown within it. DoesNotPay: saves less
    than minSavingPercent."""
    message: Sentence = ""
    """Why, as a sentence."""
    energy_percent: DecimalString | None = None
    """Energy saved for each token, in percent. Absent with fewer than two pairs."""
    ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """Its 95 % confidence interval, for one look: [low, high]."""
    throughput_change_percent: DecimalString | None = None
    """Change of tokens per second under the cap, in percent."""
    inter_token_latency_change_percent: DecimalString | None = None
    """Change of the mean inter-token latency under the cap, in percent."""
    sums: PairStats
    """Sums over the pairs of this search."""
    seen: PairStats
    """All of the pool's pairs with this cap at the last look: what comes beyond them is new."""


class TuningRegime(ApiModel):
    """The kind of work that the search was made under. Another kind reopens it."""

    batch: PositiveDecimalString
    """Sequences that an instance decodes at once: tokens per second times inter-token latency."""
    inter_token_latency_ms: PositiveDecimalString
    """Mean inter-token latency, in milliseconds."""
    kind: Annotated[str, Field(max_length=64)] = ""
    """Hash over GPU products, driver versions and pod templates."""
    products: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=8)] = []
    """The GPU products, as NVML names them: for whoever writes the result down as a row of a ClockProfile."""
    driver_versions: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=8)] = []
    """The NVIDIA driver versions, likewise."""
    power_cap: PowerCapVerdict = PowerCapVerdict.UNKNOWN
    """Whether the power limit held the clock down, half an hour after the choice."""


class TuningSearches(ApiModel):
    """How many searches began for a cause."""

    cause: SearchCause
    """First: the pool asked for a tuner. WorkChanged: the work is another one. CostsEnergy: the chosen cap turned out
    to cost energy. BrokeBound: the chosen cap turned out to break a bound."""
    searches: Annotated[int, Field(ge=0)]
    """Number of searches."""


class TuningStatus(ApiModel):
    """The tuner of a pool."""

    phase: Literal["Starting", "Searching", "Settled", "Released"]
    """Starting: nothing is locked, the released pool is looked at. Searching: one cap after the other is measured.
    Settled: the chosen cap is in force and watched. Released: no cap pays, the pool is left alone."""
    message: Sentence = ""
    """Where it is, as a sentence."""
    cap_mhz: Mhz | None = None
    """The cap in force: under test, or chosen. In phase Starting the last choice, which is not in force."""
    arm: int | None = None
    """Number of the arm under test, from 1."""
    arms: int | None = None
    """How many arms the search will have, at most."""
    remaining_seconds: int | None = None
    """Time that the search still takes, roughly."""
    changed_at: Timestamp | None = None
    """When the phase or the cap last changed: the agents need a moment to act on it."""
    searches: int = 0
    """Searches so far."""
    begun: Annotated[
        list[TuningSearches],
        Field(
            max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["cause"]}
        ),
    ] = []
    """The same by cause."""
    next_cause: SearchCause = SearchCause.FIRST
    """Why the next search begins, in phase Starting."""
    guardrail_arms: Annotated[int, Field(ge=0)] = 0
    """Arms so far that were given up because the guardrail released half of the instances."""
    goal: Annotated[str, Field(max_length=128)] = ""
    """What is searched for, as a word: another goal begins anew."""
    since: Timestamp | None = None
    """When the phase began."""
    search_began: Timestamp | None = None
    """When the present or last search began."""
    search_seconds: Annotated[int, Field(ge=0)] = 0
    """How long the last finished search took."""
    work_changed_at: Timestamp | None = None
    """Since when the work is of another kind."""
    confirming: bool = False
    """Whether the cap is measured until it is decided."""
    released_mhz: Mhz | None = None
    """Clock that the released GPUs ran at: no cap from there on does anything."""
    note: Sentence = ""
    """Why the phase is what it is."""
    regime: TuningRegime | None = None
    tried: Annotated[
        list[TuningArm],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["capMHz"]}
        ),
    ] = []
    """The arms of the present or last search."""
    held: PairStats | None = None
    """Sums over the pairs since the choice."""
