"""Energy for each token of a pool: generated tokens for Decode and Mixed, computed prompt tokens for Prefill."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from wattlock_api.constants import Role
from wattlock_api.nodeenergy import InstanceStatus

from wattlock_operator.reports import NodeGpu, NodeInstance, number
from wattlock_operator.selection import Member, missing_pods


def work_rate(role: Role, instance: InstanceStatus) -> float | None:
    """Return the tokens per second that are a pool's work, or None where they are not measured."""
    rate = instance.prompt_tokens_per_second if role is Role.PREFILL else instance.tokens_per_second
    return None if rate is None else number(rate)


def joules_per_token(
    role: Role, members: Sequence[Member], gpus: Iterable[NodeGpu], instances: Iterable[NodeInstance]
) -> float | None:
    """Return watts over tokens per second; None without tokens: energy for each of none is neither 0 nor infinite.

    An instance counts with all its GPUs on all its nodes, or not at all: while one of its pods has no GPU with a
    known power (its agent is silent, say), the rest would look too good. An idle instance counts with its watts: the
    pool's tokens cost them too.
    """
    pods: dict[str, set[str]] = defaultdict(set)
    for member in members:
        if member.pod.wants_gpu:
            pods[member.instance].add(member.pod.uid)
    incomplete = {name for name, missing in missing_pods(members).items() if missing}
    watts: dict[str, float] = defaultdict(float)
    measured: dict[str, set[str]] = defaultdict(set)
    for entry in gpus:
        gpu = entry.gpu
        if gpu.instance is None or gpu.holder is None:
            continue
        if gpu.power_watts is None:
            incomplete.add(gpu.instance)
            continue
        watts[gpu.instance] += gpu.power_watts
        measured[gpu.instance].add(gpu.holder.uid)
    rates: dict[str, float] = defaultdict(float)
    for item in instances:
        rate = work_rate(role, item.instance)
        if rate is not None:
            rates[item.instance.instance] += rate
    whole = [
        name
        for name in rates
        if watts[name] > 0 and name not in incomplete and pods[name] and pods[name] <= measured[name]
    ]
    tokens = sum(rates[name] for name in whole)
    return sum(watts[name] for name in whole) / tokens if tokens > 0 else None


def idle_message(role: Role, instances: Sequence[NodeInstance]) -> str:
    """Return what to say about instances without work in the last report interval; empty when there are none."""
    known = [rate for item in instances if (rate := work_rate(role, item.instance)) is not None]
    idle = sum(rate == 0 for rate in known)
    if not idle:
        return ""
    verb = "computed no prompt" if role is Role.PREFILL else "generated no tokens"
    if idle == len(known):
        return f"all instances {verb} lately: their power is measured, energy for each token is not defined"
    return f"{idle} of {len(known)} instances {verb} lately: their power counts into the pool's energy for each token"
