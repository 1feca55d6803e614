"""What must be true of the GPUs, from what the API server and the kubelets say. Pure: no operator's or agent's code.

Three answers for each GPU: it must be locked, it must not, or either is right for the moment (a pod that goes, the
turn between two epochs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from wattlock_api.schedule import Arm, Experiment, arm_of, epoch_at, epoch_start_seconds

#: Around the turn of an epoch either arm is right. Locks are written within seconds.
TURN_SECONDS = 6.0
#: A lock is written on what the kubelet said up to two seconds before; polling adds to that.
HOLDER_LAG_SECONDS = 8.0


class Must(Enum):
    """What the driver must have."""

    LOCKED = "locked"
    RELEASED = "released"
    EITHER = "either"


@dataclass(frozen=True)
class Pod:
    """A pod of the workload."""

    uid: str
    name: str
    labels: Mapping[str, str]
    running: bool
    begins: bool
    """Its containers do not run yet; it may hold its GPU already."""
    ready: bool
    going: bool


@dataclass(frozen=True)
class Policy:
    """A policy, as far as it says what is to be locked."""

    uid: str
    name: str
    enforces: bool
    going: bool
    decode: Mapping[str, str] | None
    """Labels of its decode pool; ``None``: it has none."""
    prefill: Mapping[str, str]
    epoch_seconds: int | None
    control_share: float
    saved_kwh: float | None


@dataclass(frozen=True)
class World:
    """All of it, at one moment."""

    unix_seconds: float
    locks: Mapping[str, int]
    """MHz by GPU; 0 without a lock."""
    holders: Mapping[str, str]
    """UID of the pod by GPU."""
    pods: Mapping[str, Pod]
    """By UID."""
    policies: tuple[Policy, ...]
    foreign: frozenset[str] = frozenset()
    """GPUs that somebody else has locked, for a test."""


def parse_pod(body: Mapping[str, Any]) -> Pod:
    metadata, status = body["metadata"], body.get("status", {})
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", []))
    running, begins = status.get("phase") == "Running", status.get("phase") == "Pending"
    labels = metadata.get("labels", {})
    return Pod(metadata["uid"], metadata["name"], labels, running, begins, ready, "deletionTimestamp" in metadata)


def parse_policy(body: Mapping[str, Any]) -> Policy:
    metadata, spec, status = body["metadata"], body["spec"], body.get("status", {})
    by_role = {pool["role"]: pool["selector"].get("matchLabels", {}) for pool in spec["pools"]}
    verification = spec.get("verification", {})
    switches = verification.get("method", "Switchback") == "Switchback"
    saved = [pool.get("savings", {}).get("savedKWh") for pool in status.get("pools", [])]
    numbers = [float(each) for each in saved if each is not None]
    return Policy(
        uid=metadata["uid"],
        name=metadata["name"],
        enforces=spec.get("mode") == "Enforce",
        going="deletionTimestamp" in metadata,
        decode=by_role.get("Decode"),
        prefill=by_role.get("Prefill", {}),
        epoch_seconds=verification.get("epochSeconds", 60) if switches else None,
        control_share=float(verification.get("controlShare", 0.1)),
        saved_kwh=sum(numbers) if numbers else None,
    )


def _matches(selector: Mapping[str, str] | None, pod: Pod) -> bool:
    return bool(selector) and all(pod.labels.get(key) == value for key, value in (selector or {}).items())


def _arm(policy: Policy, pod: Pod, unix_seconds: float) -> Must:
    if policy.epoch_seconds is None:
        return Must.LOCKED
    experiment = Experiment(policy.uid, policy.epoch_seconds, policy.control_share)
    epoch = epoch_at(experiment, unix_seconds)
    if unix_seconds - epoch_start_seconds(experiment, epoch) < TURN_SECONDS:
        return Must.EITHER
    return Must.LOCKED if arm_of(experiment, pod.name, epoch) is Arm.CAP else Must.RELEASED


def must(world: World, uuid: str) -> Must:
    """Return what the driver must have for a GPU."""
    if uuid in world.foreign:
        return Must.EITHER
    pod = world.pods.get(world.holders.get(uuid, ""))
    if pod is None or not (pod.running or pod.begins):
        return Must.RELEASED
    claims = [policy for policy in world.policies if _matches(policy.decode, pod)]
    if not claims or not claims[0].enforces:
        return Must.RELEASED
    policy = claims[0]
    if policy.going or pod.going or pod.begins or len(claims) > 1:
        return Must.EITHER
    peers = [each for each in world.pods.values() if _matches(policy.prefill, each)]
    if not any(each.ready and not each.going for each in peers):
        return Must.EITHER if any(each.ready for each in peers) else Must.RELEASED
    return _arm(policy, pod, world.unix_seconds)


def wrong(world: World) -> dict[str, str]:
    """Return what is not as it must be, a sentence by GPU."""
    found = {}
    for uuid, mhz in world.locks.items():
        wanted = must(world, uuid)
        pod = world.pods.get(world.holders.get(uuid, ""))
        who = f"held by {pod.name}" if pod else "held by no pod of the API server"
        if wanted is Must.RELEASED and mhz:
            found[uuid] = f"locked at {mhz} MHz though no live order wants it ({who})"
        elif wanted is Must.LOCKED and not mhz:
            found[uuid] = f"not locked though it is wanted ({who})"
    return found


@dataclass
class Held:
    """Who held a GPU from when to when, by the kubelet; open at the end."""

    pod_uid: str
    since_seconds: float
    until_seconds: float = float("inf")


@dataclass
class History:
    """Who held which GPU when. Bounded: what is over for long is forgotten."""

    held: dict[str, list[Held]] = field(default_factory=dict)

    def see(self, at_seconds: float, holders: Mapping[str, str]) -> None:
        """Take in what the kubelets say now."""
        for uuid in self.held.keys() | holders.keys():
            spans = self.held.setdefault(uuid, [])
            now = holders.get(uuid)
            if spans and spans[-1].until_seconds == float("inf"):
                if spans[-1].pod_uid == now:
                    continue
                spans[-1].until_seconds = at_seconds
            if now is not None:
                spans.append(Held(now, at_seconds))
            del spans[:-16]

    def around(self, uuid: str, at_seconds: float) -> list[str]:
        """Return the UIDs of the pods that held the GPU at that time, or a moment before or after."""
        return [
            span.pod_uid
            for span in self.held.get(uuid, [])
            if span.since_seconds - HOLDER_LAG_SECONDS <= at_seconds <= span.until_seconds + HOLDER_LAG_SECONDS
        ]


def wrong_lock(history: History, decode_uids: frozenset[str], uuid: str, at_seconds: float) -> str:
    """Return what speaks against a lock that was written then, from who held the GPU; empty when nothing does."""
    around = history.around(uuid, at_seconds)
    if not around:
        return "no pod held it"
    return "" if any(uid in decode_uids for uid in around) else "its holder is no decode pod"


def fell(before: Mapping[str, float], policies: Sequence[Policy]) -> list[str]:
    """Return of which policies the saved energy is less than it was, a sentence for each. The keys are UIDs."""
    return [
        f"savedKWh of {policy.name} fell from {before[policy.uid]:g} to {policy.saved_kwh:g}"
        for policy in policies
        if policy.saved_kwh is not None and policy.saved_kwh < before.get(policy.uid, float("-inf"))
    ]
