"""The tuner: from what it remembers and what it sees to what it does next. A total, pure function.

| phase | goes to | when |
| --- | --- | --- |
| Starting | Searching | tokens, latency and supported clocks are known for half a minute |
| Searching | Settled | the best arm is shown to keep the bounds and to pay |
| Searching | Released | no arm is |
| Searching | Starting | the work changed under it |
| Settled | Searching | the chosen cap turns out to break a bound: it is given up, the search goes on above it |
| Settled, Released | Starting | the work is another one, or the cap costs energy |
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict

from wattlock_api.tuningstatus import SearchCause

from wattlock_operator.tuning.arms import (
    STEP,
    Choose,
    Confirm,
    Try,
    floor_mhz,
    is_clear,
    judged,
    next_arm,
    usable_clocks,
)
from wattlock_operator.tuning.evidence import breach, costs_energy, grown
from wattlock_operator.tuning.model import (
    NO_PAIRS,
    PATIENCE,
    Goal,
    Observation,
    Outcome,
    Patience,
    Phase,
    Trial,
    Tuning,
)
from wattlock_operator.tuning.regime import follow, is_other_kind, moved

#: The released pool is looked at for so long before the first cap: reports are means over 20 s.
START_SECONDS = 30.0
#: For so long the tuner waits for the clock of the released GPUs; then it begins at the highest there is.
CLOCK_SECONDS = 180.0
#: So long after the choice it is noted whether the power limit acts.
NOTE_POWER_SECONDS = 1800.0


class _Counts(TypedDict):
    searches: int
    begun: Mapping[SearchCause, int]


def step(state: Tuning, goal: Goal, seen: Observation, patience: Patience = PATIENCE) -> Tuning:
    """Return the tuner after a look. Looks may come at any time; each pair is counted once.

    A change of ``goal`` is a new tuner: the caller begins with an empty state.
    """
    before = (state.phase, state.cap_mhz)
    state = _counted(state, seen)
    if state.since_seconds is None:
        state = replace(state, since_seconds=seen.now_seconds, looked_seconds=seen.now_seconds)
    state = _with_regime(state, seen)
    if state.phase is Phase.STARTING:
        state = _start(state, goal, seen, patience)
    elif state.phase is Phase.SEARCHING:
        state = _search(state, goal, seen, patience)
    elif (reason := _wants_anew(state, seen, patience)) is not None:
        state = _anew(state, seen, *reason)
    elif state.phase is Phase.SETTLED:
        state = _hold(state, goal, seen)
    if (state.phase, state.cap_mhz) != before:
        state = replace(state, changed_seconds=seen.now_seconds)
    return replace(state, looked_seconds=seen.now_seconds)


def too_many_tripped(seen: Observation) -> bool:
    """Return whether the guardrail speaks against the cap: it released half of the instances, and two of several.

    Each agent judges its instance at 99 % again and again, so now and then one is released by chance.
    """
    if seen.instances <= 1:
        return seen.tripped >= 1
    return seen.tripped >= max(2, math.ceil(seen.instances / 2))


def _counted(state: Tuning, seen: Observation) -> Tuning:
    """Return the state with the pairs that came since the last look."""
    trials, held = [], state.held
    for trial in state.trials:
        now = seen.tallies.get(trial.cap_mhz, trial.seen)
        more = grown(trial.seen, now)
        trials.append(replace(trial, seen=now, sums=trial.sums + more) if now != trial.seen else trial)
        if trial.cap_mhz == state.current_mhz and state.phase is Phase.SETTLED:
            held = held + more
    return replace(state, trials=tuple(trials), held=held)


def _with_regime(state: Tuning, seen: Observation) -> Tuning:
    """Return the state with what the load is and since when it is another one."""
    # The arms of a search take the power limit away and give it back: it says nothing then.
    resting = state.phase in (Phase.SETTLED, Phase.RELEASED)
    now = seen.regime if resting or seen.regime is None else replace(seen.regime, power_limited=None)
    reference = state.regime
    if reference is None or now is None:
        return replace(state, regime=reference or now)
    if reference.kind == now.kind:  # a status of before does not tell them
        reference = replace(reference, products=now.products, drivers=now.drivers)
    if moved(reference, now):
        since = state.moved_since_seconds
        return replace(state, regime=reference, moved_since_seconds=seen.now_seconds if since is None else since)
    if not resting:
        last = seen.now_seconds if state.looked_seconds is None else state.looked_seconds
        reference = follow(reference, now, seen.now_seconds - last)
    elif reference.power_limited is None and _age_seconds(state, seen) >= NOTE_POWER_SECONDS:
        reference = replace(reference, power_limited=now.power_limited)
    return replace(state, regime=reference, moved_since_seconds=None)


def _has_moved(state: Tuning, seen: Observation, patience: Patience) -> bool:
    since = state.moved_since_seconds
    return since is not None and seen.now_seconds - since >= patience.moved_seconds


def _age_seconds(state: Tuning, seen: Observation) -> float:
    return 0.0 if state.since_seconds is None else seen.now_seconds - state.since_seconds


def _start(state: Tuning, goal: Goal, seen: Observation, patience: Patience) -> Tuning:
    if seen.regime is None or not seen.supported_mhz:
        what = "tokens and inter-token latency" if seen.regime is None else "the clocks that the GPUs support"
        note = f"waiting for {what} to be reported"
        return replace(state, since_seconds=seen.now_seconds, note=note)
    if _has_moved(state, seen, patience):
        state = replace(state, regime=replace(seen.regime, power_limited=None), moved_since_seconds=None)
    look_seconds = START_SECONDS if seen.released_mhz is not None else CLOCK_SECONDS
    if _age_seconds(state, seen) < look_seconds or too_many_tripped(seen):
        return replace(state, note="looking at the released pool before the first cap")
    highest = max(seen.supported_mhz)
    top = highest if seen.released_mhz is None else min(highest, seen.released_mhz)
    begun = replace(
        state,
        phase=Phase.SEARCHING,
        since_seconds=seen.now_seconds,
        began_seconds=seen.now_seconds,
        **_one_more(state, state.next_cause),
        trials=(),
        confirming=False,
        top_mhz=top,
        note="",
    )
    return _advance(replace(begun, current_mhz=None), goal, seen, start_mhz=_start_mhz(state, top))


def _one_more(state: Tuning, cause: SearchCause) -> _Counts:
    """Return the counts of searches with one more."""
    return {"searches": state.searches + 1, "begun": {**state.begun, cause: state.begun.get(cause, 0) + 1}}


def _start_mhz(state: Tuning, top_mhz: int) -> int:
    """Return where the first cap is: a step below the released clock, or a step above the last choice."""
    first = STEP * top_mhz
    return round(first if state.current_mhz is None else min(first, state.current_mhz / STEP))


def _search(state: Tuning, goal: Goal, seen: Observation, patience: Patience) -> Tuning:
    if _has_moved(state, seen, patience):
        reason = f"the work changed during the search: {moved(state.regime, seen.regime)}"
        return _anew(state, seen, SearchCause.WORK_CHANGED, reason)
    if too_many_tripped(seen):
        # Released until the cool-down is over: what comes next would not be measured anyway.
        note = f"the guardrail released {seen.tripped} of {seen.instances} instance(s)"
        trials = tuple(
            replace(trial, outcome=Outcome.BREACH, note=note) if trial.cap_mhz == state.current_mhz else trial
            for trial in state.trials
        )
        ended = state.guardrail_arms + (state.current_mhz is not None)  # it goes on through the cool-down
        return replace(state, trials=trials, current_mhz=None, confirming=False, guardrail_arms=ended, note=note)
    return _advance(state, goal, seen)


def _advance(state: Tuning, goal: Goal, seen: Observation, start_mhz: int | None = None) -> Tuning:
    """Judge the current arm; when it is clear, go on to the next."""
    trials = tuple(judged(trial, goal) for trial in state.trials)
    state = replace(state, trials=trials)
    current = state.trial(state.current_mhz)
    # An arm above it may turn out to be too slow by pairs that were reported late: then it is out of question itself.
    if current is not None and current.outcome is Outcome.OPEN and current.cap_mhz > (floor_mhz(trials) or 0):
        others = [trial for trial in trials if trial.cap_mhz != current.cap_mhz]
        if state.confirming or not is_clear(current, others, goal):
            return state
    if not seen.supported_mhz:
        return replace(state, current_mhz=None, confirming=False, note="the clocks that the GPUs support are not known")
    top = state.top_mhz or max(seen.supported_mhz)
    clocks = usable_clocks(seen.supported_mhz, goal, top)
    if not clocks:
        return _finish(state, seen, Phase.RELEASED, None, "no supported clock lies within the bounds of the search")
    nxt = next_arm(trials, goal, clocks, top, top if start_mhz is None else start_mhz)
    if isinstance(nxt, Try):
        trial = Trial(nxt.cap_mhz, seen=seen.tallies.get(nxt.cap_mhz, NO_PAIRS))
        return replace(state, trials=(*trials, trial), current_mhz=nxt.cap_mhz, confirming=False, note="")
    if isinstance(nxt, Confirm):
        return replace(state, current_mhz=nxt.cap_mhz, confirming=True, note="")
    if isinstance(nxt, Choose):
        return _finish(state, seen, Phase.SETTLED, nxt.cap_mhz, "")
    return _finish(state, seen, Phase.RELEASED, None, _why_nothing(state))


def _why_nothing(state: Tuning) -> str:
    outcomes = {trial.outcome for trial in state.trials}
    if outcomes <= {Outcome.DOES_NOT_PAY}:
        return "no cap saves enough energy for each token"
    return "no cap both saves energy and is shown to stay within the bounds"


def _finish(state: Tuning, seen: Observation, phase: Phase, cap_mhz: int | None, note: str) -> Tuning:
    began = seen.now_seconds if state.began_seconds is None else state.began_seconds
    return replace(
        state,
        phase=phase,
        since_seconds=seen.now_seconds,
        took_seconds=max(0.0, seen.now_seconds - began),
        current_mhz=cap_mhz,
        confirming=False,
        held=NO_PAIRS,
        moved_since_seconds=None,
        note=note,
    )


def _wants_anew(state: Tuning, seen: Observation, patience: Patience) -> tuple[SearchCause, str] | None:
    """Return why a settled tuner searches anew; ``None``: it does not."""
    if state.phase is Phase.SETTLED and costs_energy(state.held):
        return SearchCause.COSTS_ENERGY, "the chosen cap costs energy now"
    if not _has_moved(state, seen, patience):
        return None
    rested = _age_seconds(state, seen) >= patience.rest_after_seconds(state.took_seconds)
    if not (rested or is_other_kind(state.regime, seen.regime)):
        return None
    return SearchCause.WORK_CHANGED, moved(state.regime, seen.regime) or "the work is another one"


def _anew(state: Tuning, seen: Observation, cause: SearchCause, reason: str) -> Tuning:
    """Begin again, from the released pool: it tells what the work is now."""
    chosen = state.current_mhz if state.phase is Phase.SETTLED else None
    return Tuning(
        since_seconds=seen.now_seconds,
        looked_seconds=seen.now_seconds,
        searches=state.searches,
        begun=state.begun,
        next_cause=cause,
        guardrail_arms=state.guardrail_arms,
        took_seconds=state.took_seconds,
        current_mhz=chosen,
        note=f"searching anew: {reason}",
    )


def _hold(state: Tuning, goal: Goal, seen: Observation) -> Tuning:
    tripped = too_many_tripped(seen)
    worse = breach(goal, state.held)
    if not tripped and not worse:
        return state
    note = f"the guardrail released {seen.tripped} of {seen.instances} instance(s)" if tripped else ""
    note = note or f"{worse} is worse than allowed"
    trials = tuple(
        replace(trial, outcome=Outcome.BREACH, note=note) if trial.cap_mhz == state.current_mhz else trial
        for trial in state.trials
    )
    again = replace(
        state,
        phase=Phase.SEARCHING,
        since_seconds=seen.now_seconds,
        began_seconds=seen.now_seconds,
        **_one_more(state, SearchCause.BROKE_BOUND),
        guardrail_arms=state.guardrail_arms + tripped,
        trials=trials,
        current_mhz=None,
        confirming=False,
        note=note,
    )
    return again if tripped else _advance(again, goal, seen)
