"""What the experiment of a pool says: a verdict, always with a reason, and numbers only where they were measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wattlock_api.base import decimal_string
from wattlock_api.constants import Mode, Reason, SavingsVerdict
from wattlock_api.energypolicy import Cost, Verification
from wattlock_api.pairs import PairStats
from wattlock_api.policystatus import Savings

from wattlock_operator.accounting import JOULES_PER_KWH, Saved, Worth
from wattlock_operator.ledger import Tallies, Tally, published, tally_of
from wattlock_operator.pooling import Effect, Percent, Sample, change_percent, pool, saving_percent
from wattlock_operator.reports import NodeInstance, PoolReport
from wattlock_operator.verdict import (
    MIN_PAIRS,
    VERIFIED,
    Pooled,
    at_every_look,
    judge,
    percent_text,
    sentence,
    signed,
)

MAX_EVIDENCE = 1e9


@dataclass(frozen=True)
class Finding:
    """The effects behind a verdict."""

    savings: Savings
    energy: Effect | None = None
    always: Effect | None = None
    """The same effect with the interval that holds at every look."""
    caps_mhz: frozenset[int] = frozenset()
    """The caps that the effects are about."""

    @property
    def worth(self) -> Worth | None:
        """What energy used under the caps is worth, only while the effect is verified.

        The sum adds up looks, and begins at the first one that is verified: only an interval that holds at every look
        is still one for the sum.
        """
        if self.always is None or self.savings.verdict is not SavingsVerdict.VERIFIED:
            return None
        return Worth(self.always, self.caps_mhz)


def current_stats(report: PoolReport, item: NodeInstance) -> PairStats | None:
    """Return the statistics of the cap that an instance has now; else of the cap with the most pairs."""
    stats = item.instance.pair_stats
    requested = {
        entry.gpu.requested_mhz
        for entry in report.gpus
        if entry.node == item.node and entry.gpu.instance == item.instance.instance
    } - {None}
    for entry in stats:
        if entry.cap_mhz in requested:
            return entry
    return None if requested else max(stats, key=lambda entry: entry.pairs, default=None)


def _pooled(samples: Sequence[Sample], gone: Sample) -> Pooled | None:
    """Return what all pairs say about one quantity. Those of pods that are gone form a stratum of their own."""
    samples = [*samples, gone]
    effect = pool(samples)
    if effect is None:
        return None
    there = replace(effect, instances=effect.instances - bool(gone.pairs))
    return Pooled(there, sum(sample.total for sample in samples), sum(sample.squares for sample in samples))


def _ends(percent: Percent) -> list[str]:
    return [percent_text(percent.low), percent_text(percent.high)]


def _without_data(pairs: int, locked: bool, report: PoolReport) -> tuple[SavingsVerdict, Reason, str]:
    """Return why there are fewer than six pairs."""
    if pairs == 0 and not locked:
        return SavingsVerdict.UNKNOWN, Reason.NOTHING_LOCKED, "no GPU of the pool is capped, so nothing is compared"
    if pairs == 0 and report.gpus and all(entry.gpu.energy_reason for entry in report.gpus):
        return (
            SavingsVerdict.UNKNOWN,
            Reason.NO_ENERGY_COUNTER,
            "the pool's GPUs do not count their energy, so energy for each token cannot be measured on them",
        )
    if pairs == 0 and all(item.instance.tokens_per_second is None for item in report.instances):
        example = next((item.instance.message for item in report.instances if item.instance.message), "")
        return (
            SavingsVerdict.UNKNOWN,
            Reason.NO_SERVING_METRICS,
            "no pod of the pool serves metrics that count generated tokens, so energy for each token is unknown: "
            "check the pool's metrics.port and metrics.path" + (f" ({example})" if example else ""),
        )
    return (
        SavingsVerdict.INCONCLUSIVE,
        Reason.TOO_FEW_PAIRS,
        f"{pairs} of at least {MIN_PAIRS} pairs of epochs are measured",
    )


def find_saving(
    verification: Verification,
    mode: Mode,
    report: PoolReport,
    departed: Tallies | None = None,
    chances: int = 1,
) -> Finding:
    """Return the verdict on a Decode pool. ``departed``: sums over the pairs of its pods that are gone.

    ``chances``: out of how many caps the one in force may have been picked by its saving.
    """
    departed = departed or {}
    if verification.method == "None":
        return Finding(
            Savings(
                method="None",
                verdict=SavingsVerdict.UNKNOWN,
                reason=Reason.VERIFICATION_OFF.value,
                message="verification.method is None: write Switchback to measure the saving",
                departed=published(departed),
            )
        )
    # An instance on several nodes has its pairs, with the energy of all of them, on the node that counts its tokens.
    found = [entry for item in report.instances if (entry := current_stats(report, item)) is not None]
    caps_mhz = frozenset(entry.cap_mhz for entry in found)
    asked_mhz = {entry.gpu.requested_mhz for entry in report.gpus} - {None}
    used = {cap_mhz: tally for cap_mhz, tally in departed.items() if cap_mhz in caps_mhz | asked_mhz}
    there = [tally_of(entry) for entry in found]
    gone = sum(used.values(), Tally())
    energy = _pooled([Sample(each.pairs, *each.energy) for each in there], Sample(gone.pairs, *gone.energy))
    throughput = _pooled([Sample(each.pairs, *each.throughput) for each in there], Sample(gone.pairs, *gone.throughput))
    latency = _pooled(
        [Sample(each.latency_pairs, *each.latency) for each in there], Sample(gone.latency_pairs, *gone.latency)
    )
    locked = mode is Mode.ENFORCE and any(entry.gpu.requested_mhz is not None for entry in report.gpus)
    energy = None if energy is None else replace(energy, chances=chances)
    reason = judge(energy)
    if energy is None or reason is Reason.TOO_FEW_PAIRS:
        verdict, reason, message = _without_data(energy.effect.pairs if energy else 0, locked, report)
    else:
        verdict = SavingsVerdict.VERIFIED if reason in VERIFIED else SavingsVerdict.INCONCLUSIVE
        message = sentence(energy, reason, verification)
    if mode is Mode.OBSERVE and reason is Reason.NOTHING_LOCKED:
        message = "mode is Observe: a saving is measured only while GPUs are capped, in mode Enforce"
    saving = saving_percent(energy.effect) if energy and energy.effect.pairs >= MIN_PAIRS else None
    always = at_every_look(energy) if energy and saving else None
    faster = change_percent(throughput.effect) if throughput and throughput.effect.pairs >= MIN_PAIRS else None
    slower = change_percent(latency.effect) if latency and latency.effect.pairs >= MIN_PAIRS else None
    savings = Savings(
        method="Switchback",
        verdict=verdict,
        reason=reason.value,
        message=message[:1024],
        energy_percent=percent_text(saving.value) if saving else None,
        ci95=_ends(saving) if saving else None,
        ci95_every_look=_ends(saving_percent(always)) if always else None,
        evidence=decimal_string(min(MAX_EVIDENCE, math.exp(min(50.0, energy.log_evidence))), 2) if energy else None,
        throughput_change_percent=percent_text(faster.value) if faster else None,
        throughput_change_ci95=_ends(faster) if faster else None,
        inter_token_latency_change_percent=percent_text(slower.value) if slower else None,
        inter_token_latency_change_ci95=_ends(slower) if slower else None,
        pairs=energy.effect.pairs if energy else 0,
        instances=energy.effect.instances if energy else 0,
        departed=published(departed),
        dropped_epochs=_dropped(report.instances),
    )
    return Finding(savings, energy.effect if energy else None, always, caps_mhz | used.keys())


def _dropped(items: Sequence[NodeInstance]) -> int:
    return sum(
        dropped.restart + dropped.no_tokens + dropped.samples + dropped.not_applied + dropped.peers
        for dropped in (item.instance.dropped for item in items)
    )


def with_totals(savings: Savings, saved: Saved | None, cost: Cost) -> Savings:
    """Return the savings with the sums in kWh, money and carbon, each with its interval.

    Kilowatt-hours are those of the GPU boards. PUE enters cost and carbon alone, and only where the policy gives it.
    """
    if saved is None:
        return savings
    amounts = (saved.joules, saved.low_joules, saved.high_joules)
    price, grams = cost.price_per_kwh, cost.grams_co2_per_kwh
    pue = float(cost.pue or 1)
    factors = {
        "saved_kwh": (1.0, 6),
        "saved_cost": None if price is None else (pue * float(price), 4),
        "saved_kg_co2": None if grams is None else (pue * grams / 1000, 4),
    }
    update: dict[str, object] = {}
    for name, factor in factors.items():
        if factor is None:
            continue
        value, *ends = (signed(decimal_string(joules / JOULES_PER_KWH * factor[0], factor[1])) for joules in amounts)
        update |= {name: value, f"{name}_ci95": ends}
    return savings.model_copy(update=update)
