"""Status of an EnergyPolicy: what people read. Bounded: pools, not pods or GPUs."""

from contextlib import suppress
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError

from wattlock_api.base import (
    ApiModel,
    Condition,
    DecimalString,
    Mhz,
    PositiveDecimalString,
    ReasonName,
    Sentence,
    Timestamp,
)
from wattlock_api.constants import PowerCapVerdict, Role, RolloutPhase, RooflineVerdict, SavingsVerdict
from wattlock_api.pairs import PairStats
from wattlock_api.tuningstatus import TuningStatus


class Limiters(ApiModel):
    """Seconds, summed over GPUs, for which the driver's counters say that something held the clock down.

    Absent where no GPU has the counter.
    """

    power_cap_seconds: PositiveDecimalString | None = None
    """Software power cap: the board's power limit."""
    thermal_seconds: PositiveDecimalString | None = None
    """Thermal slowdown, software and hardware."""
    power_brake_seconds: PositiveDecimalString | None = None
    """External power brake signal."""
    reliability_seconds: PositiveDecimalString | None = None
    """Voltage reliability."""
    board_limit_seconds: PositiveDecimalString | None = None
    """Board limit."""


class PowerCap(ApiModel):
    """Whether the GPUs' power limit acted. It is measured per pool, never assumed."""

    limit_watts: int | None = None
    """Lowest enforced power limit of the pool's GPUs, in watts."""
    peak_watts: int | None = None
    """Highest instantaneous power of one GPU among the readings (one a second) of the last 20 s, in watts. Peaks above
    the limit for tenths of a second are normal and say nothing about the verdict."""
    time_at_cap_percent: PositiveDecimalString | None = None
    """Share of the busy time at the power cap in percent, over each GPU's last 15 minutes of busy time, from the
    driver's nanosecond counter. GPUs that were busy for less than a minute do not count."""
    verdict: PowerCapVerdict = PowerCapVerdict.UNKNOWN
    """Inert: at most 1 % of the busy time. Binding: more, so it held the clock down. Unknown: no GPU was busy for a
    minute yet, or none counts this time. (The counter trails the load by up to 0.4 s: 0.7 % of a minute.)"""


class Roofline(ApiModel):
    """Whether memory bandwidth or arithmetic limits the pool, from the engines' own estimate of their work."""

    arithmetic_intensity: PositiveDecimalString
    """Estimated floating-point operations for each byte read or written in GPU memory."""
    ridge: PositiveDecimalString | None = None
    """Intensity at which the GPU turns from memory-bound to compute-bound, in FLOP per byte: dense BF16 peak by memory
    bandwidth, from the data sheet. Absent where it is not known for the pool's GPUs."""
    verdict: RooflineVerdict = RooflineVerdict.UNKNOWN
    """MemoryBound: below the ridge. ComputeBound: not below it. Unknown: the message says why."""
    message: Sentence = ""
    """The same as a sentence."""


class Savings(ApiModel):
    """The measured saving of a pool: GPU-board energy for each generated token, capped against released."""

    method: Literal["Switchback", "None"]
    """How it was measured."""
    verdict: SavingsVerdict
    """Verified: the interval excludes zero, its half-width is under 3 points, and the evidence holds for someone who
    looks again and again. Inconclusive: not yet. Unknown: it cannot be measured, the reason says why."""
    reason: ReasonName
    """One word for programs."""
    message: Sentence
    """A sentence for people."""
    energy_percent: DecimalString | None = None
    """Energy saved for each token, in percent of the energy when released. Negative: the cap costs energy."""
    ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """95 % confidence interval of energyPercent, right at one look: [low, high]."""
    ci95_every_look: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """The wider interval that holds at all looks at once with 95 % probability, so also at the look at which one
    stops: [low, high]. Absent while there is too little data."""
    evidence: PositiveDecimalString | None = None
    """Evidence against "the cap does nothing", good at every look (an e-value): 20 is enough for Verified. At most
    1000000000."""
    throughput_change_percent: DecimalString | None = None
    """Change of tokens per second under the cap, in percent."""
    throughput_change_ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """Its 95 % confidence interval: [low, high]."""
    inter_token_latency_change_percent: DecimalString | None = None
    """Change of the mean inter-token latency under the cap, in percent."""
    inter_token_latency_change_ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """Its 95 % confidence interval: [low, high]."""
    pairs: int = 0
    """Pairs of neighbouring epochs behind the estimate: the unit of the confidence interval."""
    instances: int = 0
    """Serving instances behind the estimate that are there now."""
    departed: Annotated[
        list[PairStats],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["capMHz"]}
        ),
    ] = []
    """Sums over the pairs of pods that are gone, by cap: what was measured stays in the estimate."""
    dropped_epochs: int = 0
    """Epochs that could not be used: restarts, no tokens, missing samples, GPUs not as the schedule asked."""
    saved_kwh: DecimalString | None = None
    """Energy of the GPU boards saved so far, in kWh, without PUE. Energy used under the cap while Verified counts, each
    joule once, at the estimate in force then. Falls only while the cap is verified to cost energy (reason
    CapCostsEnergy)."""
    saved_kwh_ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """95 % confidence interval of savedKWh: [low, high]. Its ends are sums over the ends of ci95EveryLook."""
    saved_cost: DecimalString | None = None
    """savedKWh times the policy's present price, and PUE where the policy gives it."""
    saved_cost_ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """95 % confidence interval of savedCost: [low, high]. The price counts as exact."""
    saved_kg_co2: DecimalString | None = None
    """savedKWh times the policy's present carbon intensity, and PUE where the policy gives it, in kg."""
    saved_kg_co2_ci95: Annotated[list[DecimalString], Field(max_length=2)] | None = None
    """95 % confidence interval of savedKgCO2: [low, high]. The intensity counts as exact."""


class CountedEnergy(ApiModel):
    """How far the agents' counters of energy under a cap are counted."""

    cap_mhz: Mhz
    """The cap, in MHz."""
    joules: PositiveDecimalString
    """Sum of the counters, in joules."""


class PoolReason(ApiModel):
    """How many GPUs of a pool are in a state, and why."""

    reason: ReasonName
    """One word for programs."""
    gpus: int
    """Number of GPUs (0: about pods that have none yet)."""
    message: Sentence
    """A sentence for people."""


#: Entries of a list of caps by product.
MAX_PRODUCT_CAPS = 16


class ProductCap(ApiModel):
    """A cap of the GPUs of a product."""

    product: Annotated[str, Field(max_length=128)]
    """GPU product as NVML names it; empty: any."""
    cap_mhz: Mhz
    """The cap, in MHz."""


def _readable_caps(listed: object) -> object:
    """Leave out what is no cap: an order could not carry it, and the rest of a status is worth more than it."""
    if not isinstance(listed, list):
        return listed
    kept = []
    for each in listed:
        with suppress(ValidationError):
            kept.append(ProductCap.model_validate(each))
    return kept


ProductCaps = Annotated[list[ProductCap], Field(max_length=MAX_PRODUCT_CAPS), BeforeValidator(_readable_caps)]


class RolloutStatus(ApiModel):
    """How far the clock that the pool asks for has come. The operator goes on from here after a restart."""

    phase: RolloutPhase
    """Progressing, Paused, RolledBack (the guardrail tripped on the way), or Complete."""
    target: ProductCaps = []
    """The clock that is being rolled out."""
    previous: ProductCaps = []
    """The clock of the instances whose turn has not come; empty: they are released."""
    step: int = 0
    """Present step, from 1."""
    steps: int = 0
    """Number of steps."""
    updated: int = 0
    """Instances that are to have the target."""
    instances: int = 0
    """Instances of the pool that nothing else holds released."""
    since: Timestamp | None = None
    """Since when the step holds, or was rolled back. Absent: it is waiting, see message."""
    generation: int = 0
    """Of the policy's spec for which it was rolled back."""
    message: Sentence = ""
    """What it is doing, or why it went back."""


class ProfileRowInUse(ApiModel):
    """The row of a profile that GPUs of a product have."""

    product: Annotated[str, Field(max_length=128)]
    """GPU product as NVML names it."""
    row: int
    """Its place in the profile, from 1."""
    cap_mhz: int
    """Its cap, in MHz."""


class PoolWork(ApiModel):
    """What a pool does, as means over its instances that generate tokens."""

    batch: PositiveDecimalString
    """Sequences that an instance decodes at once: tokens per second times inter-token latency."""
    inter_token_latency_ms: PositiveDecimalString
    """Mean inter-token latency, in milliseconds."""


class ProfileStatus(ApiModel):
    """Which rows of its ClockProfile a pool uses, and for which work. A restarted operator goes on from here."""

    name: Annotated[str, Field(max_length=253)]
    """Name of the ClockProfile."""
    rows: Annotated[
        list[ProfileRowInUse],
        Field(
            max_length=MAX_PRODUCT_CAPS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["product"]},
        ),
    ] = []
    """One for each product of the pool's GPUs that has a row."""
    regime: PoolWork | None = None
    """The work by which rows are chosen. It stays until the work was another one for ten minutes. Absent: not known."""
    since: Timestamp | None = None
    """Since when it is that."""
    work: PoolWork | None = None
    """The work as it was measured last, smoothed over a minute."""
    work_changed_at: Timestamp | None = None
    """Since when the work is another one than the regime: more than a quarter away from it."""


class PoolStatus(ApiModel):
    """What was measured on the GPUs of a pool. Absent numbers are unknown, never zero."""

    name: Annotated[str, Field(max_length=32)]
    """Name of the pool."""
    role: Role
    """Role of the pool."""
    instances: int = 0
    """Serving instances: pods, or groups of pods that serve together."""
    pods: int = 0
    """Selected pods."""
    gpus: int = 0
    """GPUs that those pods hold."""
    capped: int = 0
    """GPUs under the cap, those that one of its control epochs releases for comparison and those under the lower cap of
    idle instances included. Steady."""
    locked: int = 0
    """GPUs that are locked at this moment. Moves with the control epochs, which release some of the capped."""
    requested_mhz: int | None = None
    """The cap in force, snapped to what the GPUs support, in MHz."""
    observed_mhz: int | None = None
    """SM clock that capped GPUs ran at while busy, in MHz (the lowest of the pool)."""
    power_watts: int | None = None
    """Power of the pool's GPU boards now, from their energy counters, in watts."""
    energy_kwh: PositiveDecimalString | None = None
    """GPU-board energy of the pool since the policy was created, in kWh."""
    counted_joules: PositiveDecimalString | None = None
    """Sum of the agents' energy counters, in joules, as far as energyKWh includes them: a restarted operator goes
    on from here."""
    counted_capped_joules: Annotated[
        list[CountedEnergy],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["capMHz"]}
        ),
    ] = []
    """The same for savedKWh: the agents' counters of energy under each cap that it has looked at."""
    tokens_per_second: PositiveDecimalString | None = None
    """Generated tokens per second. Absent unless all instances are known."""
    prompt_tokens_per_second: PositiveDecimalString | None = None
    """Prompt tokens per second that the pool computed itself (not taken from a cache or another instance)."""
    joules_per_generated_token: PositiveDecimalString | None = None
    """GPU-board joules for each generated token; Decode and Mixed pools. Absent: not measured, or no tokens."""
    joules_per_prompt_token: PositiveDecimalString | None = None
    """GPU-board joules for each computed prompt token; Prefill pools. Absent: not measured, or no tokens."""
    inter_token_latency_ms: PositiveDecimalString | None = None
    """Mean inter-token latency, in milliseconds."""
    limiters: Limiters | None = None
    clamped_gpus: int | None = None
    """GPUs whose clock stays below the cap under load although no limiter acts: firmware does it. Absent until a GPU is
    measured."""
    clamp_seconds: PositiveDecimalString | None = None
    """Seconds for which that was so, summed over GPUs."""
    power_cap: PowerCap = PowerCap()
    roofline: Roofline | None = None
    savings: Savings | None = None
    rollout: RolloutStatus | None = None
    tuning: TuningStatus | None = None
    profile: ProfileStatus | None = None
    reasons: Annotated[
        list[PoolReason],
        Field(
            max_length=12, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["reason"]}
        ),
    ] = []
    """Why GPUs of the pool are not capped (or are), by number of GPUs."""


class Summary(ApiModel):
    """The policy in a line, for kubectl get."""

    gpus: int = 0
    """GPUs of all pools."""
    capped: Annotated[str, Field(max_length=32)] | None = None
    """GPUs under the cap of the GPUs of the Decode pools and of the Mixed pools with a clock, e.g. 6/6. GPUs that a
    control epoch releases for comparison count: they are under the experiment that the cap is part of."""
    locked: int = 0
    """GPUs that are locked at this moment. Moves with the control epochs."""
    clock: Annotated[str, Field(max_length=64)] | None = None
    """Caps asked for, e.g. 1590MHz; while a tuner searches with the arm that it is at, e.g. 1200MHz(4/9)."""
    power: Annotated[str, Field(max_length=32)] | None = None
    """Power of all GPUs, e.g. 5120W. Absent unless the power of all of them is known."""
    saved: Annotated[str, Field(max_length=64)] | None = None
    """Saving for each token with its half-width, e.g. 21.4%±1.5, or the verdict."""
    saved_kwh: Annotated[str, Field(max_length=32)] | None = None
    """Energy of the GPU boards saved so far by all pools, in kWh, rounded for reading."""
    observed: Annotated[str, Field(max_length=64)] | None = None
    """SM clock that capped GPUs ran at while busy, e.g. 1590MHz."""
    joules_per_token: Annotated[str, Field(max_length=32)] | None = None
    """Of the pools that are capped, e.g. 0.120."""


class EnergyPolicyStatus(ApiModel):
    """What is the case now, written by the operator."""

    observed_generation: int = 0
    """The generation of the spec that this status is about."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = []
    """Ready, Enforced, Progressing, GuardrailTripped, ClockClamped, PowerCapBinding, Conflict, Verified."""
    summary: Summary = Summary()
    pools: Annotated[
        list[PoolStatus],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = []
    """What was measured, by pool."""
    measured_at: Timestamp | None = None
    """Time of the newest report behind these numbers."""
