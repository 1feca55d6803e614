"""What must be true of the GPUs, from what the API server and the kubelets say. Pure: no operator's or agent's code.

Three answers for each GPU: the cap that it must have, none, or that either is right for the moment (a pod that goes,
the turn between two epochs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wattlock_api.schedule import Arm, Experiment, arm_of, epoch_at, epoch_start_seconds

#: Around the turn of an epoch either arm is right. Locks are written within seconds.
TURN_SECONDS = 6.0
#: A lock is written on what the kubelet said up to two seconds before; polling adds to that.
HOLDER_LAG_SECONDS = 8.0


RELEASED = 0
"""No lock may be there."""
EITHER = None
"""With a lock or without: both are right for the moment."""


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
    cap_mhz: int
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
        cap_mhz=sum(pool.get("clock", {}).get("maxSMClockMHz", 0) for pool in spec["pools"]),
        epoch_seconds=verification.get("epochSeconds", 60) if switches else None,
        control_share=float(verification.get("controlShare", 0.1)),
        saved_kwh=sum(numbers) if numbers else None,
    )


def _matches(selector: Mapping[str, str] | None, pod: Pod) -> bool:
    return bool(selector) and all(pod.labels.get(key) == value for key, value in (selector or {}).items())


def _in_experiment(policy: Policy, pod: Pod, unix_seconds: float) -> int | None:
    if policy.epoch_seconds is None:
        return policy.cap_mhz
    experiment = Experiment(policy.uid, policy.epoch_seconds, policy.control_share)
    epoch = epoch_at(experiment, unix_seconds)
    if unix_seconds - epoch_start_seconds(experiment, epoch) < TURN_SECONDS:
        return EITHER
    return policy.cap_mhz if arm_of(experiment, pod.name, epoch) is Arm.CAP else RELEASED


def wanted_mhz(world: World, uuid: str) -> int | None:
    """Return the cap that a GPU must have: MHz, ``RELEASED`` or ``EITHER``."""
    if uuid in world.foreign:
        return EITHER
    pod = world.pods.get(world.holders.get(uuid, ""))
    if pod is None or not (pod.running or pod.begins):
        return RELEASED
    claims = [each for each in world.policies if _matches(each.decode, pod) and not each.going]
    if not claims or not claims[0].enforces:
        return RELEASED
    policy = claims[0]
    if pod.going or pod.begins or len(claims) > 1:
        return EITHER
    peers = [each for each in world.pods.values() if _matches(policy.prefill, each)]
    if not any(each.ready and not each.going for each in peers):
        return EITHER if any(each.going for each in peers) else RELEASED
    return _in_experiment(policy, pod, world.unix_seconds)


@dataclass(frozen=True)
class Wrong:
    """What is not as it must be, a sentence by GPU."""

    locked: Mapping[str, str] = field(default_factory=dict)
    """Locked, and no live order wants it."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Wanted, and not there or with another cap."""


def wrong(world: World) -> Wrong:
    """Judge every GPU."""
    locked, missing = {}, {}
    for uuid, mhz in world.locks.items():
        wanted = wanted_mhz(world, uuid)
        pod = world.pods.get(world.holders.get(uuid, ""))
        who = f"held by {pod.name}" if pod else "held by no pod of the API server"
        if wanted == RELEASED and mhz:
            locked[uuid] = f"locked at {mhz} MHz though no live order wants it ({who})"
        elif wanted is not EITHER and mhz != wanted:
            missing[uuid] = f"at {mhz} MHz (0: not locked), wanted is {wanted} MHz ({who})"
    return Wrong(locked, missing)


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
