"""ClockProfile: caps by GPU product, phase, architecture and regime, each with its evidence."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from wattlock_api.base import ApiModel, DecimalString, Timestamp, cel
from wattlock_api.constants import Architecture


class Evidence(ApiModel):
    """Why a row may be trusted."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "self.kind != 'Published' || has(self.source)",
                    "Published evidence needs its source, e.g. a DOI or URL",
                ),
                cel(
                    "self.kind != 'Measured' || (has(self.date) && has(self.driverVersion) && has(self.samples))",
                    "Measured evidence needs date, driverVersion and samples",
                ),
            ]
        }
    )

    kind: Literal["Published", "Measured"]
    """Published: from the literature. Measured: on hardware like yours, with date, driver and sample size."""
    source: Annotated[str, Field(max_length=512)] | None = None
    """Where it was published."""
    date: Timestamp | None = None
    """When it was measured."""
    driver_version: Annotated[str, Field(max_length=64)] | None = None
    """Driver that it was measured on."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Number of pairs of epochs behind it."""


#: Bounds of what a regime may say. An absent bound counts as these where two regimes are compared.
MIN_BATCH, MAX_BATCH = 0.1, 100_000
MIN_LATENCY_MS, MAX_LATENCY_MS = 0.1, 100_000

Batch = Annotated[float, Field(ge=MIN_BATCH, le=MAX_BATCH)]
LatencyMs = Annotated[float, Field(ge=MIN_LATENCY_MS, le=MAX_LATENCY_MS)]


class ProfileRegime(ApiModel):
    """The work that a row is for, as it is measured: means over a pool's instances. Bounds are part of it.

    While no serving metrics tell what a pool does, a row with a regime is not used.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "has(self.minBatch) || has(self.maxBatch) || has(self.minInterTokenLatencyMs) || "
                    "has(self.maxInterTokenLatencyMs)",
                    "write at least one bound, e.g. minBatch: 16, or leave regime out: the row is then for any work",
                ),
                cel(
                    "!has(self.minBatch) || !has(self.maxBatch) || self.minBatch <= self.maxBatch",
                    "minBatch must not be above maxBatch",
                ),
                cel(
                    "!has(self.minInterTokenLatencyMs) || !has(self.maxInterTokenLatencyMs) || "
                    "self.minInterTokenLatencyMs <= self.maxInterTokenLatencyMs",
                    "minInterTokenLatencyMs must not be above maxInterTokenLatencyMs",
                ),
            ]
        }
    )

    min_batch: Batch | None = None
    """Least number of sequences that an instance decodes at once: its tokens per second times its inter-token
    latency."""
    max_batch: Batch | None = None
    """Most of them."""
    min_inter_token_latency_ms: LatencyMs | None = None
    """Least mean inter-token latency, in milliseconds: at the same batch it tells of longer contexts or a larger
    model."""
    max_inter_token_latency_ms: LatencyMs | None = None
    """Most of it, in milliseconds."""


class ProfileRow(ApiModel):
    """The cap for one kind of work on one GPU product."""

    product: Annotated[str, Field(min_length=1, max_length=128)]
    """GPU product as NVML names it, e.g. "NVIDIA H200"."""
    phase: Literal["Decode"]
    """Phase of serving. Only decode is ever capped."""
    architecture: Architecture | None = None
    """Attention architecture; absent: any that has no row of its own."""
    regime: ProfileRegime | None = None
    """Work that the row is for; absent: any for which no other row is."""
    max_sm_clock_mhz: Annotated[int, Field(ge=100, le=5000)]
    """Upper bound of the SM clock in MHz."""
    expected_saving_percent: DecimalString | None = None
    """Energy saved for each token, in percent, as the evidence says; absent where it does not say."""
    expected_throughput_change_percent: DecimalString | None = None
    """Change of tokens per second, in percent, as the evidence says."""
    evidence: Evidence
    """Why the row may be trusted."""


class ClockProfileSpec(ApiModel):
    """Rows. Of those for a pool's GPU product, architecture and work one is used; without one nothing is capped.

    A row that names the architecture goes before one that does not; then one with a regime before one without; then
    Measured before Published; then the narrower regime (maxBatch/minBatch times the same of the latency; an absent
    bound counts as the widest that may be written); then the first in the list.
    """

    rows: Annotated[list[ProfileRow], Field(min_length=1, max_length=128)]
    """At most 128 rows."""


#: arXiv 2605.11999: above about 1590 MHz decode throughput does not change on the H200, the step from there to the
#: default buys nothing and costs 7 to 13 % of power. It names no other product, so neither do we.
PUBLISHED = ClockProfileSpec(
    rows=[
        ProfileRow(
            product="NVIDIA H200",
            phase="Decode",
            max_sm_clock_mhz=1590,
            expected_throughput_change_percent="0",
            evidence=Evidence(kind="Published", source="arXiv 2605.11999 (H200 SXM 700 W, dense models of about 4B)"),
        )
    ]
)
