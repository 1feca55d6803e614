"""Conditions of a policy: one word for programs, one sentence for people that says what to do.

No sentence holds a number that is measured anew with every report: a condition that changes all the time tells nobody
anything, and wakes everybody who waits for it. Those numbers are in the status of the pools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wattlock_api.base import Condition, timestamp
from wattlock_api.constants import (
    ConditionReason,
    ConditionType,
    ConflictPolicy,
    Mode,
    PowerCapVerdict,
    Reason,
    Role,
    RolloutPhase,
    SavingsVerdict,
)
from wattlock_api.energypolicy import EnergyPolicySpec
from wattlock_api.policystatus import PoolStatus, RolloutStatus, Savings

from wattlock_operator.poolstatus import CAPPED
from wattlock_operator.release import Release, release_sentence
from wattlock_operator.reports import PoolReport
from wattlock_operator.selection import Member
from wattlock_operator.sharing import Refusal
from wattlock_operator.world import PolicyView
from wattlock_operator.writers import controller_of, suspects_sentence


@dataclass(frozen=True)
class Facts:
    """What the conditions of a policy follow from."""

    policy: PolicyView
    pools: Sequence[PoolStatus] = ()
    reports: Sequence[PoolReport] = ()
    """In the order of ``pools``."""
    disputes: Sequence[Member] = ()
    claimed: Sequence[Member] = ()
    """Pods that may be capped whose GPUs another controller sets as well, by an annotation."""
    suspects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Pods that may set clocks or power, by node."""
    lagging_nodes: Sequence[str] = ()
    """Nodes whose agents have not acted on the newest orders of this policy."""
    release: Release | None = None
    """Present while the policy is being deleted."""
    template_problem: str = ""
    refusal: Refusal | None = None
    """Present when nothing is done for the policy because of its placement."""
    overruled: str = ""
    """A sentence when the agents run with the RuntimeClass of another policy."""
    young: bool = False
    """The policy is so new that its agents may still be starting."""


@dataclass(frozen=True)
class Finding:
    """A condition without its time."""

    type: ConditionType
    status: bool | None
    """None is Unknown."""
    reason: str
    message: str


#: Reasons that keep a pool from being ready, the gravest first. Others are part of normal work.
_NOT_READY = (
    Reason.NO_AGENT,
    Reason.AGENT_SILENT,
    Reason.NO_MATCHING_PODS,
    Reason.PROFILE_NOT_FOUND,
    Reason.NO_PROFILE_ROW,
    Reason.PRODUCT_UNKNOWN,
    Reason.NO_PERMISSION,
    Reason.NVML_NOT_FOUND,
    Reason.NVML_ERROR,
    Reason.JOURNAL_UNWRITABLE,
    Reason.KUBELET_UNREACHABLE,
    Reason.GPU_LOST,
    Reason.STALE_ORDERS,
    Reason.OTHER_WRITER,
    Reason.FOREIGN_LOCK,
    Reason.OTHER_CONTROLLER,
    Reason.NO_PREFILL_PEER,
    Reason.NO_GPUS,
)


#: GPUs whose clock somebody else is seen to set, the gravest first.
OTHERS_WRITE = (Reason.OTHER_WRITER, Reason.FOREIGN_LOCK, Reason.CONTESTED)
#: Phases of a tuner that come to an end by themselves.
_SEARCHING = ("Starting", "Searching")
#: What GPUs are, one after the other, while a tuner goes from arm to arm. That the guardrail ended an arm is told by
#: GuardrailTripped; on the way down it is to be expected.
_ARMS = {*CAPPED, Reason.WAITING_TO_WRITE.value, Reason.TUNING.value, Reason.GUARDRAIL.value}


def _reason_in(pools: Sequence[PoolStatus], wanted: Sequence[Reason]) -> tuple[str, str] | None:
    for reason in wanted:
        for pool in pools:
            for entry in pool.reasons:
                if entry.reason == reason.value:
                    return entry.reason, f"pool {pool.name}: {entry.message}"
    return None


def _ready(facts: Facts) -> Finding:
    kind = ConditionType.READY
    policy = facts.policy
    if facts.release is not None:
        going = ConditionReason.RELEASE_STUCK if facts.release.stuck else ConditionReason.RELEASING
        going = ConditionReason.RELEASED if facts.release.complete else going
        return Finding(kind, False, going, release_sentence(policy, facts.release))
    if policy.spec is None:
        text = f"this operator does not understand the policy ({policy.problem})"
        return Finding(kind, False, ConditionReason.INVALID_SPEC, text)
    if facts.refusal is not None:
        return Finding(kind, False, facts.refusal.reason.value, facts.refusal.message)
    if facts.template_problem:
        return Finding(kind, False, ConditionReason.AGENT_TEMPLATE_INVALID, facts.template_problem)
    if facts.disputes:
        return Finding(kind, False, Reason.POLICY_CONFLICT.value, _dispute_sentence(facts))
    found = _reason_in(facts.pools, _NOT_READY)
    if found is not None:
        reason, message = found
        starting = facts.young and reason in (Reason.NO_AGENT.value, Reason.AGENT_SILENT.value)
        return Finding(kind, False, ConditionReason.WAITING_FOR_AGENTS if starting else reason, message)
    if facts.lagging_nodes:
        return Finding(kind, False, ConditionReason.WAITING_FOR_AGENTS, _lagging_sentence(facts))
    if (rolled_back := _rolling(facts, RolloutPhase.ROLLED_BACK)) is not None:
        name, rollout = rolled_back
        return Finding(kind, False, Reason.ROLLED_BACK.value, f"pool {name}: {rollout.message}"[:1024])
    if policy.spec.mode is Mode.OBSERVE:
        text = "all selected pods are measured; mode Observe caps nothing"
        return Finding(kind, True, ConditionReason.OBSERVING, text)
    if (damaged := _reason_in(facts.pools, (Reason.JOURNAL_DAMAGED,))) is not None:
        return Finding(kind, True, damaged[0], f"the agents have acted on every order, but {damaged[1]}")
    return Finding(kind, True, ConditionReason.IN_FORCE, "the agents have acted on every order")


def _lagging_sentence(facts: Facts) -> str:
    shown = ", ".join(facts.lagging_nodes[:5]) + (" and more" if len(facts.lagging_nodes) > 5 else "")
    return f"waiting for the agent(s) of {shown} to act on new orders"


def _dispute_sentence(facts: Facts) -> str:
    first = facts.disputes[0]
    return (
        f"{len(facts.disputes)} pod(s) are claimed more than once and are not capped, e.g. {first.pod.name} by "
        f"{' and by '.join(first.rivals)}: change the selectors so that every pod belongs to one pool"
    )


def _enforced(facts: Facts) -> Finding:
    kind, spec = ConditionType.ENFORCED, facts.policy.spec
    if facts.release is not None or spec is None:
        going = ConditionReason.RELEASING if facts.release else ConditionReason.INVALID_SPEC
        return Finding(kind, False, going, "no GPU is to be capped")
    if spec.mode is Mode.OBSERVE:
        return Finding(
            kind, False, Reason.OBSERVE_MODE.value, "mode is Observe: write mode: Enforce to cap the pools with a clock"
        )
    pools = [pool for pool in facts.pools if pool.name in spec.capped_pools]
    if not pools:
        return Finding(kind, False, ConditionReason.NO_CLOCK, "no pool has a clock: nothing is to be capped")
    capped = sum(pool.capped for pool in pools)
    gpus = sum(pool.gpus for pool in pools)
    searching = [pool.name for pool in pools if _on_arms(pool)]
    if gpus and gpus == sum(_follow_arms(pool) if _on_arms(pool) else pool.capped for pool in pools):
        if searching:
            text = (
                f"every GPU follows the search for the clock of pool {', '.join(searching)}, from one arm to the next"
            )
            return Finding(kind, True, Reason.TUNING.value, text[:1024])
        text = "every GPU of the pools with a clock is capped (or in a control epoch, or idle under a lower cap)"
        return Finding(kind, True, ConditionReason.CAPPED, text)
    others = [
        (entry.gpus, entry.reason, f"pool {pool.name}: {entry.message}")
        for pool in pools
        for entry in pool.reasons
        if entry.reason not in (_ARMS if _on_arms(pool) else CAPPED)
    ]
    if not others:
        return Finding(kind, False, Reason.NO_GPUS.value, "no GPU of a pool with a clock is reported yet")
    _, reason, message = max(others, key=lambda entry: entry[0])
    return Finding(kind, False, reason, f"{capped} of {gpus} GPUs are capped. {message}" if gpus else message)


def _searching(facts: Facts) -> list[str]:
    """Return the pools whose tuner is on its way to a choice. In mode Observe it rests, wherever it is."""
    if facts.policy.spec is None or facts.policy.spec.mode is Mode.OBSERVE:
        return []
    return [pool.name for pool in facts.pools if pool.tuning and pool.tuning.phase in _SEARCHING]


def _on_arms(pool: PoolStatus) -> bool:
    """Return whether the pool's tuner measures one cap after the other."""
    return pool.tuning is not None and pool.tuning.phase == "Searching"


def _follow_arms(pool: PoolStatus) -> int:
    """Return how many GPUs are as the search wants them, or on their way from one arm to the next."""
    return sum(entry.gpus for entry in pool.reasons if entry.reason in _ARMS)


def _progressing(facts: Facts) -> Finding:
    kind = ConditionType.PROGRESSING
    if facts.release is not None and not facts.release.complete:
        return Finding(kind, True, ConditionReason.RELEASING, release_sentence(facts.policy, facts.release))
    for phase, reason in _ROLLOUT_REASONS.items():
        if (found := _rolling(facts, phase)) is not None:
            name, rollout = found
            text = f"pool {name}, step {rollout.step} of {rollout.steps}: {rollout.message}"
            return Finding(kind, True, reason, text[:1024])
    # Before the agents that have not acted yet: they have to with each arm.
    if searching := _searching(facts):
        text = f"the clock of pool {', '.join(searching)} is being found: tuning in status.pools says how far it is"
        return Finding(kind, True, Reason.TUNING.value, text[:1024])
    if facts.lagging_nodes:
        return Finding(kind, True, ConditionReason.WAITING_FOR_AGENTS, _lagging_sentence(facts))
    rolled_out = any(pool.rollout is not None and pool.rollout.steps for pool in facts.pools)
    if rolled_out and _rolling(facts, RolloutPhase.ROLLED_BACK) is None:
        return Finding(kind, False, ConditionReason.ROLLED_OUT, "every instance has the clock that its pool asks for")
    return Finding(kind, False, ConditionReason.UP_TO_DATE, "nothing is under way")


#: Why Progressing is true while the clock of a pool is rolled out.
_ROLLOUT_REASONS = {
    RolloutPhase.PAUSED: ConditionReason.ROLLOUT_PAUSED,
    RolloutPhase.PROGRESSING: ConditionReason.ROLLING_OUT,
}


def _rolling(facts: Facts, phase: RolloutPhase) -> tuple[str, RolloutStatus] | None:
    """Return the first pool whose rollout is in this phase."""
    found = ((pool.name, pool.rollout) for pool in facts.pools if pool.rollout is not None)
    return next(((name, rollout) for name, rollout in found if rollout.phase is phase), None)


def _guardrail(facts: Facts) -> Finding:
    # In mode Observe the agents go on counting their cool-downs, but there is no cap that anything could be done about.
    observes = facts.policy.spec is not None and facts.policy.spec.mode is Mode.OBSERVE
    tripped = [
        item.instance
        for report in ([] if observes else facts.reports)
        for item in report.instances
        if item.instance.guardrail_tripped and not item.silent
    ]
    kind = ConditionType.GUARDRAIL_TRIPPED
    if tripped:
        return Finding(
            kind,
            True,
            ConditionReason.BREACHED,
            f"{len(tripped)} instance(s) are released, e.g. {tripped[0].instance}: {tripped[0].guardrail_message} "
            "Raise the cap or widen the guardrail if this comes again",
        )
    return Finding(kind, False, ConditionReason.WITHIN_LIMITS, "no instance breaks the guardrail")


def _clamped(facts: Facts) -> Finding:
    kind = ConditionType.CLOCK_CLAMPED
    clamped = [pool for pool in facts.pools if pool.clamped_gpus]
    if clamped:
        first = clamped[0]
        clocks = f" ({first.observed_mhz} MHz for {first.requested_mhz} MHz asked)" if first.observed_mhz else ""
        return Finding(
            kind,
            True,
            ConditionReason.BELOW_REQUEST,
            f"{first.clamped_gpus} GPU(s) of pool {first.name} run below the cap under load{clocks} while no limiter "
            "acts: the firmware holds the clock down. Ask for a lower cap to know what you get",
        )
    if any(pool.observed_mhz is not None for pool in facts.pools):
        return Finding(kind, False, ConditionReason.AS_REQUESTED, "capped GPUs run at the clock that was asked for")
    return Finding(kind, None, ConditionReason.NOT_OBSERVED, "no capped GPU was busy yet")


def _power_cap(facts: Facts) -> Finding:
    kind = ConditionType.POWER_CAP_BINDING
    # Prefill sits on its power limit whenever it works: that is no news, and its pool's status shows it.
    pools = [pool for pool in facts.pools if pool.role is not Role.PREFILL]
    binding = [pool for pool in pools if pool.power_cap.verdict is PowerCapVerdict.BINDING]
    if binding:
        names = ", ".join(pool.name for pool in binding)
        text = f"the GPUs' power limit holds clocks down in pool {names}: powerCap in status.pools says how often"
        return Finding(kind, True, ConditionReason.BINDING, text[:1024])
    if any(pool.power_cap.verdict is PowerCapVerdict.INERT for pool in pools):
        return Finding(
            kind, False, ConditionReason.INERT, "the power limit held clocks down for at most 1 % of the busy time"
        )
    return Finding(kind, None, ConditionReason.UNKNOWN, "the GPUs were not busy long enough to say")


def _conflict(facts: Facts) -> Finding:
    if facts.disputes:
        return Finding(ConditionType.CONFLICT, True, Reason.POLICY_CONFLICT.value, _dispute_sentence(facts))
    for reason in OTHERS_WRITE:
        if (found := _reason_in(facts.pools, (reason,))) is not None:
            # Where the policy wants to coexist it is no alarm that it does.
            held = reason is not Reason.CONTESTED
            return Finding(ConditionType.CONFLICT, held, found[0], f"{found[1][:600]}. {_suspicion(facts, reason)}")
    if facts.claimed and facts.policy.spec is not None and facts.release is None:
        return _claims(facts.policy.spec, facts.claimed)
    if facts.overruled:
        return Finding(ConditionType.CONFLICT, True, Reason.PLACEMENT_OVERLAP.value, facts.overruled)
    text = "every selected pod belongs to one pool, and no other program is seen to set its clock"
    return Finding(ConditionType.CONFLICT, False, ConditionReason.NO_CONFLICT, text)


def _suspicion(facts: Facts, reason: Reason) -> str:
    nodes = sorted(
        {each.node for report in facts.reports for each in report.gpus if each.gpu.reason == reason and not each.silent}
    )
    return suspects_sentence([each for node in nodes for each in facts.suspects.get(node, ())], nodes or ["its node"])


def _claims(spec: EnergyPolicySpec, claimed: Sequence[Member]) -> Finding:
    names = ", ".join(member.pod.name for member in claimed[:5]) + (" and more" if len(claimed) > 5 else "")
    other = controller_of(claimed[0].pod.claims[0])
    text = (
        f"{len(claimed)} pod(s) have the annotation {other.annotation}, by which {other.name} {other.does}: {names}. "
    )
    if spec.conflict_policy is ConflictPolicy.COEXIST:
        text += "conflictPolicy is Coexist: they are capped all the same, and what is measured has both in it"
    elif spec.mode is Mode.OBSERVE:
        text += (
            "Nothing is capped in mode Observe; mode Enforce would leave them alone unless conflictPolicy is Coexist"
        )
    else:
        text += "They are not capped. Remove the annotation, or write conflictPolicy: Coexist"
    held = spec.conflict_policy is ConflictPolicy.SKIP and spec.mode is Mode.ENFORCE
    return Finding(ConditionType.CONFLICT, held, Reason.OTHER_CONTROLLER.value, text)


#: What the verdict is, without the numbers of savings.message.
_VERDICTS = {
    Reason.INTERVAL_EXCLUDES_ZERO: "the saving of GPU-board energy for each token is verified",
    Reason.CAP_COSTS_ENERGY: "the cap is verified to cost energy: raise or remove it",
    Reason.INTERVAL_INCLUDES_ZERO: "the interval includes zero: there may be no saving",
    Reason.INTERVAL_TOO_WIDE: "the interval is still too wide",
    Reason.NEEDS_MORE_EVIDENCE: "there is enough for one look, not yet for someone who looks again and again",
    Reason.TOO_FEW_PAIRS: "too few pairs of epochs are measured so far",
}


def _verdict_sentence(name: str, savings: Savings) -> str:
    said = next((text for reason, text in _VERDICTS.items() if reason.value == savings.reason), None)
    return f"pool {name}: {savings.message}" if said is None else f"pool {name}: {said}"


def _verified(facts: Facts) -> Finding:
    kind = ConditionType.VERIFIED
    found = [(pool.name, pool.savings) for pool in facts.pools if pool.savings is not None]
    if not found:
        return Finding(
            kind, None, ConditionReason.NO_DECODE_POOL, "the policy has no pool with a clock, so nothing is compared"
        )
    if searching := _searching(facts):
        # The verdict on each arm comes and goes with it: status.pools has it, beside what the tuner makes of it.
        text = (
            f"the clock of pool {', '.join(searching)} is being found: the saving of the choice is verified after that"
        )
        return Finding(kind, None, Reason.TUNING.value, text[:1024])
    for wanted, status in ((SavingsVerdict.UNKNOWN, None), (SavingsVerdict.INCONCLUSIVE, False)):
        for name, savings in found:
            if savings.verdict is wanted:
                return Finding(kind, status, savings.reason, _verdict_sentence(name, savings)[:1024])
    # A cap that costs energy is the news, wherever it stands.
    worst = next((savings for _, savings in found if savings.reason == Reason.CAP_COSTS_ENERGY.value), found[0][1])
    return Finding(kind, True, worst.reason, "; ".join(_verdict_sentence(*each) for each in found)[:1024])


def find_conditions(facts: Facts) -> tuple[Finding, ...]:
    """Return all conditions of a policy."""
    judges = (_ready, _enforced, _progressing, _guardrail, _clamped, _power_cap, _conflict, _verified)
    return tuple(judge(facts) for judge in judges)


def dated(
    findings: Sequence[Finding], before: Sequence[Condition], generation: int, now_seconds: float
) -> list[Condition]:
    """Return the conditions; a time moves only with its status."""
    known = {condition.type: condition for condition in before}
    result = []
    for finding in findings:
        status = "Unknown" if finding.status is None else str(finding.status)
        previous = known.get(finding.type.value)
        same = previous is not None and previous.status == status
        result.append(
            Condition.model_validate(
                {
                    "type": finding.type.value,
                    "status": status,
                    "reason": str(finding.reason),
                    "message": finding.message[:1024],
                    "lastTransitionTime": previous.last_transition_time
                    if same and previous is not None
                    else timestamp(now_seconds),
                    "observedGeneration": generation,
                }
            )
        )
    return result
