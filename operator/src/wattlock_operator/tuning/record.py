"""The tuner's memory as status: written for people, read back by a restarted operator. Pure."""

from collections.abc import Sequence
from typing import Literal

from wattlock_api.base import decimal_string, parse_timestamp, timestamp
from wattlock_api.constants import PowerCapVerdict
from wattlock_api.pairs import PairStats
from wattlock_api.tuningstatus import TuningArm, TuningRegime, TuningSearches, TuningStatus

from wattlock_operator.ledger import Tally, published, tally_of
from wattlock_operator.reports import number
from wattlock_operator.tuning.evidence import Mean, mean_of
from wattlock_operator.tuning.model import NO_PAIRS, Goal, Observation, Outcome, Phase, Regime, Trial, Tuning
from wattlock_operator.tuning.progress import describe, percent_of, progress, saving_of

_VERDICTS = {True: PowerCapVerdict.BINDING, False: PowerCapVerdict.INERT, None: PowerCapVerdict.UNKNOWN}


def goal_word(goal: Goal) -> str:
    """Return a goal as a word: a status that tells of another one is no memory of this search."""
    bounds = (goal.max_throughput_loss_percent, goal.max_latency_increase_percent, goal.min_saving_percent)
    return f"{goal.objective.value} {' '.join(map(str, bounds))} {goal.min_mhz}-{goal.max_mhz}"[:128]


def _stats(cap_mhz: int, tally: Tally) -> PairStats:
    return published({cap_mhz: tally})[0]


def _percent(mean: Mean) -> str | None:
    found = percent_of(mean)
    return None if found is None else decimal_string(found[0], 2)


def _arm(trial: Trial) -> TuningArm:
    saving = saving_of(trial)
    return TuningArm(
        cap_mhz=trial.cap_mhz,
        outcome=trial.outcome.value,
        message=trial.note[:1024],
        energy_percent=None if saving is None else decimal_string(saving[0], 2),
        ci95=None if saving is None else [decimal_string(saving[0] + sign * saving[1], 2) for sign in (-1, 1)],
        throughput_change_percent=_percent(mean_of(trial.sums.pairs, trial.sums.throughput)),
        inter_token_latency_change_percent=_percent(mean_of(trial.sums.latency_pairs, trial.sums.latency)),
        sums=_stats(trial.cap_mhz, trial.sums),
        seen=_stats(trial.cap_mhz, trial.seen),
    )


def _arms(trials: Sequence[Trial]) -> list[TuningArm]:
    """Return the arms, each cap once: the API server would refuse the whole status for one key that is there twice."""
    arms: dict[int, TuningArm] = {}
    for trial in trials:
        arms.setdefault(trial.cap_mhz, _arm(trial))
    return list(arms.values())


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else timestamp(seconds)


def _phase(phase: Phase) -> Literal["Starting", "Searching", "Settled", "Released"]:
    match phase:
        case Phase.STARTING:
            return "Starting"
        case Phase.SEARCHING:
            return "Searching"
        case Phase.SETTLED:
            return "Settled"
        case Phase.RELEASED:
            return "Released"


def to_status(state: Tuning, goal: Goal, seen: Observation) -> TuningStatus:
    """Return the status of a tuner."""
    found, regime = progress(state, goal, seen), state.regime
    left = None if found is None else found.seconds_left
    return TuningStatus(
        phase=_phase(state.phase),
        message=describe(state, goal, seen)[:1024],
        cap_mhz=state.current_mhz,
        arm=found.arm if found else None,
        arms=found.arms if found else None,
        # To the minute: a forecast that changes with every look would only be noise.
        remaining_seconds=None if left is None else 60 * round(left / 60),
        changed_at=_time(state.changed_seconds),
        searches=state.searches,
        begun=[TuningSearches(cause=cause, searches=count) for cause, count in sorted(state.begun.items())],
        next_cause=state.next_cause,
        guardrail_arms=state.guardrail_arms,
        goal=goal_word(goal),
        since=_time(state.since_seconds),
        search_began=_time(state.began_seconds),
        search_seconds=round(state.took_seconds),
        work_changed_at=_time(state.moved_since_seconds),
        confirming=state.confirming,
        released_mhz=state.top_mhz,
        note=state.note[:1024],
        regime=None
        if regime is None
        else TuningRegime(
            batch=decimal_string(regime.batch, 2),
            inter_token_latency_ms=decimal_string(1000 * regime.latency_seconds, 3),
            kind=regime.kind,
            power_cap=_VERDICTS[regime.power_limited],
            products=[product[:128] for product in regime.products[:8]],
            driver_versions=[driver[:64] for driver in regime.drivers[:8]],
        ),
        tried=_arms(state.trials),
        held=None if state.current_mhz is None or not state.held.pairs else _stats(state.current_mhz, state.held),
    )


def _seconds(text: str | None) -> float | None:
    return None if text is None else parse_timestamp(text)


def _regime(status: TuningRegime | None) -> Regime | None:
    if status is None:
        return None
    limited = {verdict: flag for flag, verdict in _VERDICTS.items()}[status.power_cap]
    latency_seconds = number(status.inter_token_latency_ms) / 1000
    return Regime(
        number(status.batch),
        latency_seconds,
        status.kind,
        limited,
        tuple(status.products),
        tuple(status.driver_versions),
    )


def from_status(status: TuningStatus | None, goal: Goal) -> Tuning:
    """Return the memory that a status tells of; of another goal or an unreadable one: that of a new tuner."""
    if status is None or status.goal != goal_word(goal):
        return Tuning()
    try:
        return Tuning(
            phase=Phase(status.phase),
            since_seconds=_seconds(status.since),
            searches=status.searches,
            begun={each.cause: each.searches for each in status.begun},
            next_cause=status.next_cause,
            guardrail_arms=status.guardrail_arms,
            changed_seconds=_seconds(status.changed_at),
            began_seconds=_seconds(status.search_began),
            took_seconds=float(status.search_seconds),
            trials=tuple(
                Trial(arm.cap_mhz, tally_of(arm.seen), tally_of(arm.sums), Outcome(arm.outcome), arm.message)
                for arm in status.tried
            ),
            current_mhz=status.cap_mhz,
            confirming=status.confirming,
            top_mhz=status.released_mhz,
            held=NO_PAIRS if status.held is None else tally_of(status.held),
            regime=_regime(status.regime),
            moved_since_seconds=_seconds(status.work_changed_at),
            note=status.note,
        )
    except ValueError:  # somebody else's times
        return Tuning()
