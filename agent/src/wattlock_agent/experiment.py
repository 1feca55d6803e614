"""Pairs epochs: the sufficient statistics of capped against released, for one instance. Pure.

For each pair of neighbouring epochs with different arms the log ratios log(cap) - log(control) of joules per token,
tokens per second and inter-token latency are added up with their squares. The operator turns the sums of all instances
into an estimate with its interval.

An instance with GPUs on other nodes (``Span``) counts its tokens on one node only. The agents of the others tell the
mean power of each closed epoch, the operator hands it on, and the epoch is paired when its whole energy is known:
own joules plus the others' watts over the same time. All agents know the schedule, so they mean the same epoch.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace

from wattlock_api.base import decimal_string
from wattlock_api.nodeenergy import ArmTotals, DroppedEpochs, EpochPower, InstanceStatus, Moments, PairStats
from wattlock_api.peerpower import PeerPower
from wattlock_api.schedule import Arm, Experiment, Pair, arm_of, epoch_at, epoch_start_seconds, pair_of

from wattlock_agent.clock import Clock
from wattlock_agent.epochs import END_MARGIN_SECONDS, SETTLE_SECONDS, Drop, EpochResult, Sample, judge_epoch
from wattlock_agent.span import KEPT_EPOCHS, Peers, Span, Unknown

#: Energy is interpolated between readings, so the last sample of an epoch is complete only after its end.
_CLOSE_SECONDS = 4.0
_MAX_CLOCK_STEP_SECONDS = 0.5
_MAX_CAPS = 15


@dataclass(frozen=True)
class PairRatios:
    """log(cap) - log(control) of a pair of epochs."""

    throughput: float
    """Of tokens per second."""
    latency: float | None
    """Of the mean inter-token latency; ``None`` where the pages do not tell it."""


@dataclass
class _Open:
    samples: list[Sample] = field(default_factory=list)
    as_asked: bool = True


@dataclass
class _Sums:
    pairs: int = 0
    energy: tuple[float, float] = (0.0, 0.0)
    throughput: tuple[float, float] = (0.0, 0.0)
    latency_pairs: int = 0
    latency: tuple[float, float] = (0.0, 0.0)


class _Pairs:
    """Results of epochs until the other one of their pair is there."""

    def __init__(self) -> None:
        self._results: dict[int, EpochResult] = {}

    def clear(self) -> None:
        self._results.clear()

    def add(self, pair: Pair, epoch: int, result: EpochResult) -> tuple[EpochResult, EpochResult] | None:
        """Add the result of an epoch, later than all before; returns (cap, control) when the pair is complete."""
        self._results = {each: kept for each, kept in self._results.items() if epoch - each <= 2}
        self._results[epoch] = result
        if pair.cap in self._results and pair.control in self._results:
            return self._results.pop(pair.cap), self._results.pop(pair.control)
        return None


class Switchback:
    """The experiment of one instance: open epochs, and sums over the closed ones."""

    def __init__(self, before: InstanceStatus | None = None) -> None:
        """``before``: the statistics that an earlier agent reported; they go on from there."""
        self._experiment: Experiment | None = None
        self._instance = ""
        self._cap_mhz = 0
        self._peers = Peers(None)
        self._open: dict[int, _Open] = {}
        self._local = _Pairs()
        self._whole = _Pairs()
        self._waiting: dict[int, EpochResult] = {}
        self._epochs: deque[EpochPower] = deque(maxlen=KEPT_EPOCHS)
        self._offset_seconds: float | None = None
        self._lives: tuple[object, ...] | None = None
        self._dropped = dict.fromkeys(Drop, 0)
        self._arms: dict[int, tuple[float, float, float]] = {}
        self._sums: dict[int, _Sums] = {}
        if before is not None:
            self._restore(before)

    def configure(
        self, experiment: Experiment | None, instance: str, cap_mhz: int | None, span: Span | None = None
    ) -> None:
        """Follow this schedule with this cap from now on; ``experiment`` or ``cap_mhz`` None: there is no experiment.

        A change spoils the epochs that are open, without counting them as dropped.
        """
        if cap_mhz is None:
            experiment = None
        wanted = (experiment, instance, cap_mhz or 0, span)
        if wanted == (self._experiment, self._instance, self._cap_mhz, self._peers.span):
            return
        self._experiment, self._instance, self._cap_mhz = experiment, instance, cap_mhz or 0
        self._peers = Peers(span)
        self._lives = None
        for each in (self._open, self._local, self._whole, self._waiting, self._epochs):
            each.clear()

    def take_peers(self, power: PeerPower) -> None:
        """Take in what the other nodes of the instance measured."""
        self._peers.take(power)

    def next_scrape_unix_seconds(self, after_unix_seconds: float) -> float | None:
        """Return the first time after the given one at which the schedule needs a scrape."""
        if self._experiment is None:
            return None
        start = epoch_start_seconds(self._experiment, epoch_at(self._experiment, after_unix_seconds))
        length = self._experiment.epoch_seconds
        times = (start + SETTLE_SECONDS, start + length - END_MARGIN_SECONDS, start + length + SETTLE_SECONDS)
        return next(time for time in times if time > after_unix_seconds)

    def note(self, clock: Clock, as_asked: bool) -> list[PairRatios]:
        """Note whether the GPUs are now as the schedule asks, and close the epochs that are over.

        Returns:
            The ratios of each pair that is complete now, for the guardrail.
        """
        if self._experiment is None:
            return []
        stepped = self._offset_seconds is not None and (
            abs(clock.offset_seconds - self._offset_seconds) > _MAX_CLOCK_STEP_SECONDS
        )
        self._offset_seconds = clock.offset_seconds
        epoch = epoch_at(self._experiment, clock.unix_seconds)
        into_seconds = clock.unix_seconds - epoch_start_seconds(self._experiment, epoch)
        if epoch not in self._open:
            # Began before we looked: it cannot be known that the GPUs were as asked all along.
            self._open[epoch] = _Open(as_asked=into_seconds <= SETTLE_SECONDS)
        if stepped:
            for each in self._open.values():
                each.as_asked = False
        if into_seconds > SETTLE_SECONDS and not as_asked:
            self._open[epoch].as_asked = False
        return self._close(clock.unix_seconds)

    def spoil(self, unix_seconds: float) -> None:
        """Drop the epoch of this time: serving was so bad that the instance would have been released if it was capped.

        Only in this way both arms lose the same epochs.
        """
        if self._experiment is not None and (current := self._open.get(epoch_at(self._experiment, unix_seconds))):
            current.as_asked = False

    def add(self, sample: Sample) -> None:
        """Add a scrape. One that belongs to no open epoch is left out."""
        if self._experiment is not None:
            current = self._open.get(epoch_at(self._experiment, sample.unix_seconds))
            if current is not None:
                current.samples.append(sample)

    def arms(self) -> list[ArmTotals]:
        """Return the sums by arm; cap 0 is the control arm."""
        return [
            ArmTotals(
                cap_mhz=cap_mhz,
                seconds=decimal_string(seconds, 3),
                joules=decimal_string(joules, 1),
                generated_tokens=decimal_string(tokens, 0),
            )
            for cap_mhz, (seconds, joules, tokens) in self._arms.items()
        ]

    def pair_stats(self) -> list[PairStats]:
        """Return the statistics of the pairs, by cap."""
        return [
            PairStats(
                cap_mhz=cap_mhz,
                pairs=sums.pairs,
                energy=_moments(sums.energy),
                throughput=_moments(sums.throughput),
                latency_pairs=sums.latency_pairs,
                latency=_moments(sums.latency),
            )
            for cap_mhz, sums in self._sums.items()
        ]

    def dropped(self) -> DroppedEpochs:
        """Return how many epochs were not used, by cause."""
        return DroppedEpochs(**{drop.value: count for drop, count in self._dropped.items()})

    def epochs(self) -> list[EpochPower]:
        """Return the power of the last closed epochs; empty where the instance's tokens are counted here."""
        return list(self._epochs)

    def _close(self, unix_seconds: float) -> list[PairRatios]:
        ratios: list[PairRatios] = []
        experiment = self._experiment
        if experiment is None:
            return ratios
        for epoch in sorted(self._open):
            end = epoch_start_seconds(experiment, epoch) + experiment.epoch_seconds
            if unix_seconds < end + _CLOSE_SECONDS:
                continue
            closing = self._open.pop(epoch)
            counts = self._peers.serves
            result = judge_epoch(experiment, epoch, closing.samples, closing.as_asked, counts, self._lives)
            if closing.samples:
                self._lives = closing.samples[-1].lives
            if not counts:
                watts = None if isinstance(result, Drop) else decimal_string(result.joules / result.seconds, 3)
                self._epochs.append(EpochPower(epoch=epoch, watts=watts))
            elif isinstance(result, Drop):
                self._dropped[result] += 1
            else:
                self._waiting[epoch] = result
                # The guardrail needs no energy, and must not wait for that of other nodes.
                pair = self._local.add(pair_of(experiment, self._instance, epoch), epoch, result)
                if pair is not None:
                    ratios.append(PairRatios(_log_throughput(*pair), _log_latency(*pair)))
        for epoch in sorted(self._waiting):
            whole = self._with_peers(experiment, epoch, self._waiting[epoch], unix_seconds)
            if whole is None:
                break  # in order, as the pairs need it
            del self._waiting[epoch]
            if isinstance(whole, Drop):
                self._dropped[whole] += 1
            else:
                self._add_epoch(experiment, epoch, whole)
        self._bound()
        return ratios

    def _with_peers(
        self, experiment: Experiment, epoch: int, result: EpochResult, unix_seconds: float
    ) -> EpochResult | Drop | None:
        """Return the epoch with the energy of all nodes, or None while that may still come."""
        end = epoch_start_seconds(experiment, epoch) + experiment.epoch_seconds
        watts = self._peers.watts(epoch, unix_seconds - end)
        if watts is None:
            return None
        return (
            Drop.PEERS if watts is Unknown.UNKNOWN else replace(result, joules=result.joules + watts * result.seconds)
        )

    def _add_epoch(self, experiment: Experiment, epoch: int, result: EpochResult) -> None:
        cap_mhz = 0 if arm_of(experiment, self._instance, epoch) is Arm.CONTROL else self._cap_mhz
        seconds, joules, tokens = self._arms.pop(cap_mhz, (0.0, 0.0, 0.0))
        self._arms[cap_mhz] = (seconds + result.seconds, joules + result.joules, tokens + result.generated_tokens)
        pair = self._whole.add(pair_of(experiment, self._instance, epoch), epoch, result)
        if pair is not None:
            self._add_pair(*pair)

    def _add_pair(self, cap: EpochResult, control: EpochResult) -> None:
        sums = self._sums.pop(self._cap_mhz, None) or _Sums()
        self._sums[self._cap_mhz] = sums  # at the end: the newest is forgotten last
        sums.pairs += 1
        sums.energy = _plus(
            sums.energy,
            math.log(cap.joules / cap.generated_tokens) - math.log(control.joules / control.generated_tokens),
        )
        sums.throughput = _plus(sums.throughput, _log_throughput(cap, control))
        if (latency := _log_latency(cap, control)) is not None:
            sums.latency_pairs += 1
            sums.latency = _plus(sums.latency, latency)

    def _bound(self) -> None:
        while len(self._sums) > _MAX_CAPS:
            del self._sums[next(iter(self._sums))]
        while len(self._arms) > _MAX_CAPS:
            del self._arms[next(cap for cap in self._arms if cap)]

    def _restore(self, before: InstanceStatus) -> None:
        for drop in Drop:
            self._dropped[drop] = getattr(before.dropped, drop.value)
        for arm in before.arms:
            self._arms[arm.cap_mhz] = (float(arm.seconds), float(arm.joules), float(arm.generated_tokens))
        for stats in before.pair_stats:
            self._sums[stats.cap_mhz] = _Sums(
                stats.pairs,
                (float(stats.energy.total), float(stats.energy.squares)),
                (float(stats.throughput.total), float(stats.throughput.squares)),
                stats.latency_pairs,
                (float(stats.latency.total), float(stats.latency.squares)),
            )


def _log_throughput(cap: EpochResult, control: EpochResult) -> float:
    return math.log(cap.generated_tokens / cap.seconds) - math.log(control.generated_tokens / control.seconds)


def _log_latency(cap: EpochResult, control: EpochResult) -> float | None:
    if cap.mean_latency_seconds is None or control.mean_latency_seconds is None:
        return None
    return math.log(cap.mean_latency_seconds) - math.log(control.mean_latency_seconds)


def _plus(sums: tuple[float, float], value: float) -> tuple[float, float]:
    return sums[0] + value, sums[1] + value * value


def _moments(sums: tuple[float, float]) -> Moments:
    return Moments(total=decimal_string(sums[0], 9), squares=decimal_string(sums[1], 9))
