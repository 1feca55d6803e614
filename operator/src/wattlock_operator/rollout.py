"""Rollout of a change of clock: by instances, in steps, each held until it has proved harmless. Pure.

| phase | goes to | when |
| --- | --- | --- |
| Complete | Progressing | the pool asks for another clock |
| Progressing | the next step | the instances of this one ran under the new clock for the hold time without a breach |
| Progressing | Complete | the last step has held |
| Progressing | RolledBack | the guardrail of an instance under the new clock trips: all get the clock of before |
| Progressing | Paused, and back | ``spec.rollout.paused`` |
| RolledBack | Progressing | the policy's spec has changed |

The state is in the pool's status, so that a restarted operator goes on where it was. Which instances come first
follows from a hash of their names: no list of them is kept, and pods that come and go do not start anything anew.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import parse_timestamp, timestamp
from wattlock_api.constants import RolloutPhase
from wattlock_api.energypolicy import Rollout
from wattlock_api.policystatus import MAX_PRODUCT_CAPS, ProductCap, RolloutStatus

Caps = Mapping[str, int]
"""Cap in MHz by GPU product; the product "" stands for all."""


@dataclass(frozen=True)
class Breach:
    """What the agent of one node says of a guardrail that holds an instance released."""

    message: str
    ordered_mhz: int | None
    """The cap in the order that is written for that node; None: it has none, so it cools down from an earlier one."""
    acted: bool
    """Whether that agent has acted on its newest orders: what it reported before is about the clock of before."""


@dataclass(frozen=True)
class Candidate:
    """An instance that may be capped, as far as its nodes' agents tell."""

    name: str
    product: str
    """GPU product; "": not known (yet)."""
    cap_mhz: int
    """The cap that the pool asks for."""
    ready: bool
    """Whether all its pods are ready."""
    ordered_mhz: int | None = None
    """The cap in the orders that are written for its pods; None: none yet, or they do not agree."""
    acted: bool = False
    """Whether its nodes' agents have acted on their newest orders."""
    breaches: tuple[Breach, ...] = ()
    """By the agents of its nodes."""
    cools_down: bool = False
    """Whether the guardrail holds it released for a breach from before the order."""
    by_product: bool = True
    """Whether the clock that the pool asks for depends on the product. The clock of before may have, all the same."""

    @property
    def breach(self) -> str:
        """Why the guardrail holds it released under the cap that the pool asks for; empty: it does not.

        Only the node that tells is asked. The agent that reads the metrics trips alone, and the orders of the others
        say at once that the instance is held: its nodes do not agree any more, and need not.
        """
        told = (each.message for each in self.breaches if each.acted and each.ordered_mhz == self.cap_mhz)
        return next(told, "")


@dataclass(frozen=True)
class Plan:
    """Which clock every instance gets now."""

    status: RolloutStatus
    on_target: frozenset[str]
    """Instances under the new clock; the others are under the one of before."""

    def cap_mhz(self, candidate: Candidate) -> int | None:
        """Return the cap of an instance; None: it is released until its turn comes."""
        if candidate.name in self.on_target:
            return candidate.cap_mhz
        return _cap(_caps(self.status.previous), candidate.product)


def _caps(listed: Sequence[ProductCap]) -> Caps:
    return {each.product: each.cap_mhz for each in listed}


def _listed(caps: Caps) -> list[ProductCap]:
    return [ProductCap(product=product, cap_mhz=mhz) for product, mhz in sorted(caps.items())][:MAX_PRODUCT_CAPS]


def _cap(caps: Caps, product: str) -> int | None:
    """Return the cap of a product; where that is not known, the one on which all products agree."""
    if not product and len(agreed := set(caps.values())) == 1:
        return next(iter(agreed))
    return caps.get(product, caps.get(""))


def _asked(candidates: Sequence[Candidate]) -> Caps:
    return {each.product if each.by_product else "": each.cap_mhz for each in candidates}


def _same(caps: Caps, candidates: Sequence[Candidate]) -> bool:
    return all(_cap(caps, each.product) == each.cap_mhz for each in candidates)


def instances_of_step(step: int | str, total: int) -> int:
    """Return how many of ``total`` instances a step reaches: a number, or a percentage rounded up."""
    if isinstance(step, int):
        return min(step, total)
    return min(total, math.ceil(total * int(step.removesuffix("%")) / 100))


def in_turn(seed: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the instances in the order in which their turn comes."""
    return sorted(candidates, key=lambda each: hashlib.sha256(f"{seed}/{each.name}".encode()).digest())


def plan_rollout(
    rules: Rollout | None,
    before: RolloutStatus | None,
    candidates: Sequence[Candidate],
    seed: str,
    generation: int,
    now_seconds: float,
) -> Plan | None:
    """Return who gets which clock now, and the state to be kept.

    Args:
        rules: None: every change reaches all instances at once.
        before: the state as last decided; None: nothing of the pool was ever capped.
        candidates: the instances that nothing else holds released.
        seed: decides who comes first: the policy's UID.
        generation: of the policy's spec.
        now_seconds: since 1970.

    Returns:
        None where there was no instance to be capped, ever.
    """
    if not candidates:
        return None if before is None else Plan(before, frozenset())
    target = _asked(candidates)
    everyone = frozenset(each.name for each in candidates)
    if rules is None:
        return Plan(_complete(target, len(everyone), 0), everyone)
    if before is None:
        return _step(rules, _begin({}, target, rules), candidates, seed, generation, now_seconds)
    known = _caps(before.target)
    if not _same(known, candidates):
        # Those that had got the clock which nobody asks for any more go back, too, until their turn comes.
        old = known if before.phase is RolloutPhase.COMPLETE else _caps(before.previous)
        if old and _same(old, candidates):
            return Plan(_complete(target, len(everyone), len(rules.steps)), everyone)
        return _step(rules, _begin(old, target, rules), candidates, seed, generation, now_seconds)
    if before.phase is RolloutPhase.COMPLETE:
        return Plan(_complete(target, len(everyone), before.steps), everyone)
    if before.phase is RolloutPhase.ROLLED_BACK:
        if generation == before.generation:
            return Plan(before, frozenset())
        before = _begin(_caps(before.previous), target, rules)
    return _step(rules, before, candidates, seed, generation, now_seconds)


def _complete(target: Caps, total: int, steps: int) -> RolloutStatus:
    return RolloutStatus(
        phase=RolloutPhase.COMPLETE, target=_listed(target), step=steps, steps=steps, updated=total, instances=total
    )


def _begin(previous: Caps, target: Caps, rules: Rollout) -> RolloutStatus:
    return RolloutStatus(
        phase=RolloutPhase.PROGRESSING,
        target=_listed(target),
        previous=_listed(previous),
        step=1,
        steps=len(rules.steps),
    )


def _step(
    rules: Rollout,
    state: RolloutStatus,
    candidates: Sequence[Candidate],
    seed: str,
    generation: int,
    now_seconds: float,
) -> Plan:
    """Return the plan within a rollout: hold, go on, go back, or done."""
    turns = in_turn(seed, candidates)
    steps = len(rules.steps)
    step = min(max(state.step, 1), steps)
    first = turns[: instances_of_step(rules.steps[step - 1], len(turns))]
    breached = next((each for each in first if each.breach), None)
    if breached is not None:
        return Plan(
            _with(
                state,
                phase=RolloutPhase.ROLLED_BACK,
                step=step,
                updated=0,
                instances=len(turns),
                since=timestamp(now_seconds),
                generation=generation,
                message=f"instance {breached.name}: {breached.breach}; every instance has the clock of before. Change "
                "the policy (the clock, the guardrail, anything in spec) to try again"[:600],
            ),
            frozenset(),
        )
    began_seconds = _began_seconds(state)
    waits = _waits(rules, first, turns, begun=began_seconds is not None)
    held = began_seconds is not None and now_seconds - began_seconds >= rules.hold_seconds
    goes_on = not waits and not rules.paused and held
    if goes_on and step == steps:
        return Plan(_complete(_asked(turns), len(turns), steps), _names(turns))
    if goes_on:
        step += 1
        first = turns[: instances_of_step(rules.steps[step - 1], len(turns))]
        waits = f"{len(first)} instance(s) get the new clock"
    since = None
    if not waits and not rules.paused:
        since = timestamp(now_seconds) if began_seconds is None else state.since
    message = waits or f"holds for {rules.hold_seconds} s"
    if rules.paused:
        message = "paused: set spec.rollout.paused to false to go on"
    status = _with(
        state,
        phase=RolloutPhase.PAUSED if rules.paused else RolloutPhase.PROGRESSING,
        step=step,
        steps=steps,
        updated=len(first),
        instances=len(turns),
        since=since,
        message=message,
    )
    return Plan(status, _names(first))


def _began_seconds(state: RolloutStatus) -> float | None:
    """Return since when the step holds; None where nobody can tell: then it holds from now on."""
    try:
        return None if state.since is None else parse_timestamp(state.since)
    except ValueError:  # somebody else's time
        return None


def _waits(rules: Rollout, first: Sequence[Candidate], turns: Sequence[Candidate], begun: bool) -> str:
    """Return what the step waits for before its hold time runs; empty: nothing.

    ``begun``: it runs. Orders of other pods on the same nodes come and go all day: they do not stop it.
    """
    unavailable = [each.name for each in turns if not each.ready]
    if len(unavailable) > rules.max_unavailable:
        return f"waits: {len(unavailable)} instance(s) are not ready, e.g. {unavailable[0]}"[:600]
    behind = [each.name for each in first if each.ordered_mhz != each.cap_mhz or not (each.acted or begun)]
    if behind:
        return f"waits for the agents of {len(behind)} instance(s), e.g. {behind[0]}"[:600]
    cooling = [each.name for each in first if each.cools_down]
    if cooling:  # released so long: nothing would be proved about them
        return f"waits for the guardrail's cool-down of {len(cooling)} instance(s), e.g. {cooling[0]}"[:600]
    return ""


def _names(candidates: Sequence[Candidate]) -> frozenset[str]:
    return frozenset(each.name for each in candidates)


def _with(state: RolloutStatus, **changes: object) -> RolloutStatus:
    return state.model_copy(update=changes)
