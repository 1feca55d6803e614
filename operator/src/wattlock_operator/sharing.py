"""Which policies' placements are taken on, and which of them share one DaemonSet. Pure.

Two placements that one node could meet share their agents: there must be one agent on a node, and which policy it
serves must not be the scheduler's choice. Whether they could follows from their labels alone and not from the nodes
that there are, so nodes that come and go change no DaemonSet (each change of one restarts its agents).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import Toleration
from wattlock_api.constants import Mode, Reason
from wattlock_api.energypolicy import Placement

from wattlock_operator.world import PolicyView

#: Different placements that are taken on, and so the most DaemonSets that there can be.
MAX_PLACEMENTS = 16

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class Refusal:
    """Why nothing is done for a policy."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Shared:
    """Placements that share one DaemonSet, and what becomes of them together."""

    placements: tuple[Placement, ...]
    """The one of the oldest policy first: it names the DaemonSet."""
    mode: Mode
    runtime_class_name: str | None = None
    decided_by: str = ""
    """Title of the policy whose RuntimeClass that is."""
    overruled: tuple[PolicyView, ...] = ()
    """Policies that wrote another RuntimeClass, or none."""

    @property
    def node_selectors(self) -> tuple[Mapping[str, str], ...]:
        """Agents run where one of these fits: none of them is a narrower case of another."""
        found = [placement.node_selector for placement in self.placements]
        kept = {
            json.dumps(one, sort_keys=True): one
            for one in found
            if not any(other.items() < one.items() for other in found)
        }
        return tuple(kept[key] for key in sorted(kept))

    @property
    def tolerations(self) -> tuple[Toleration, ...]:
        """Every taint that one of the placements tolerates."""
        found = {
            json.dumps(each.to_api(), sort_keys=True): each
            for placement in self.placements
            for each in placement.tolerations
        }
        ordered = [found[key] for key in sorted(found)]
        return tuple(
            one
            for index, one in enumerate(ordered)
            if not any(
                tolerates_as_much(other, one) and (place < index or not tolerates_as_much(one, other))
                for place, other in enumerate(ordered)
                if place != index
            )
        )


def placement_hash(placement: Placement) -> str:
    """Return sixteen hexadecimal digits that tell placements apart; the order of tolerations does not matter.

    A placement is a tenant's to write. Of eight digits a laptop finds one with the hash of another tenant's in an hour,
    and both would be one DaemonSet, placed as the newer policy says.
    """
    canonical = placement.to_api()
    canonical["tolerations"] = sorted(
        canonical.get("tolerations", []), key=lambda entry: json.dumps(entry, sort_keys=True)
    )
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]


def tolerates_as_much(wide: Toleration, narrow: Toleration) -> bool:
    """Return whether the first tolerates every taint that the second does."""
    if wide.effect is not None and wide.effect != narrow.effect:
        return False
    if not wide.key:
        return wide.operator == "Exists"
    same_value = narrow.operator != "Exists" and (wide.value or "") == (narrow.value or "")
    return wide.key == narrow.key and (wide.operator == "Exists" or same_value)


def is_within(placement: Placement, limit: Placement) -> bool:
    """Return whether a placement goes no further than another: no other nodes, no other taints, the same runtime."""
    return (
        limit.node_selector.items() <= placement.node_selector.items()
        and all(any(tolerates_as_much(wide, each) for wide in limit.tolerations) for each in placement.tolerations)
        and limit.runtime_class_name == placement.runtime_class_name
    )


def can_meet(one: Placement, other: Placement) -> bool:
    """Return whether a node could have the labels of both. Taints come and go, so they do not keep two apart."""
    return all(other.node_selector.get(key, value) == value for key, value in one.node_selector.items())


def _is_label_key(text: str) -> bool:
    prefix, slash, name = text.rpartition("/")
    well = bool(_SUBDOMAIN.fullmatch(prefix)) and len(prefix) <= 253 if slash else True
    return well and bool(_LABEL_NAME.fullmatch(name))


def _toleration_problem(toleration: Toleration) -> str | None:
    if not toleration.key and toleration.operator != "Exists":
        return "a toleration without a key must have operator: Exists"
    if toleration.key and not _is_label_key(toleration.key):
        return f"{toleration.key[:80]!r} in tolerations is no taint key: write one as nvidia.com/gpu"
    if toleration.value and toleration.operator == "Exists":
        return "a toleration with operator: Exists must have no value"
    if toleration.value and not _LABEL_NAME.fullmatch(toleration.value):
        return f"{toleration.value[:80]!r} in tolerations is no taint value: write letters, digits, '-', '_' or '.'"
    return None


def placement_problem(placement: Placement) -> str | None:
    """Return why no DaemonSet can be made of a placement, with what to write instead, or None.

    The API server would refuse the DaemonSet, and with it those that share it.
    """
    for key, value in placement.node_selector.items():
        if not _is_label_key(key):
            return f"{key[:80]!r} in nodeSelector is no label key: write one as nvidia.com/gpu.present"
        if value and not _LABEL_NAME.fullmatch(value):
            return f"{value[:80]!r} in nodeSelector is no label value: write letters, digits, '-', '_' or '.'"
    for toleration in placement.tolerations:
        if problem := _toleration_problem(toleration):
            return problem
    name = placement.runtime_class_name
    if name is not None and not _SUBDOMAIN.fullmatch(name):
        return f"{name[:80]!r} is no name of a RuntimeClass: write one of 'kubectl get runtimeclasses', or leave it out"
    return None


def _as_written(placement: Placement) -> str:
    return json.dumps(placement.to_api(), sort_keys=True)


def _refusal(placement: Placement, allowed: Sequence[Placement]) -> Refusal | None:
    if problem := placement_problem(placement):
        return Refusal(
            Reason.PLACEMENT_INVALID, f"nothing is done, because spec.placement cannot be used: {problem}"[:1024]
        )
    if allowed and not any(is_within(placement, limit) for limit in allowed):
        listed = " or ".join(map(_as_written, allowed[:3])) + (" or others" if len(allowed) > 3 else "")
        return Refusal(
            Reason.PLACEMENT_NOT_ALLOWED,
            "nothing is done, because spec.placement goes further than the cluster's administrator allows "
            "(agent.allowedPlacements of the Helm release): write one of these, or more labels and fewer tolerations: "
            f"{listed}"[:1024],
        )
    return None


def refusals(policies: Iterable[PolicyView], allowed: Sequence[Placement]) -> dict[str, Refusal]:
    """Return the policies for which nothing is done because of their placement, by UID.

    ``allowed`` are the administrator's limits; none means any. Of more than MAX_PLACEMENTS different placements those
    go first that are the first of their namespace, then the second ones and so on, each by the age of their policies:
    one namespace cannot push out another's first.
    """
    refused: dict[str, Refusal] = {}
    hashes: dict[str, str] = {}
    of_namespace: dict[str, list[str]] = {}
    ranks: dict[str, tuple[int, tuple[str, str, str]]] = {}
    for policy in sorted(policies, key=lambda policy: policy.age_key):
        if policy.spec is None:
            continue
        refusal = _refusal(policy.spec.placement, allowed)
        if refusal is not None:
            refused[policy.uid] = refusal
            continue
        placed = hashes[policy.uid] = placement_hash(policy.spec.placement)
        own = of_namespace.setdefault(policy.namespace, [])
        if placed not in own:
            own.append(placed)
        rank = (own.index(placed), policy.age_key)
        ranks[placed] = min(ranks.get(placed, rank), rank)
    kept = set(sorted(ranks, key=lambda placed: ranks[placed])[:MAX_PLACEMENTS])
    for uid, placed in hashes.items():
        if placed not in kept:
            refused[uid] = Refusal(
                Reason.TOO_MANY_PLACEMENTS,
                f"nothing is done, because the policies of this cluster have more than {MAX_PLACEMENTS} different "
                "placements and others go first (the first placement of each namespace, older policies before younger "
                "ones): write the same spec.placement as another policy, best that of your namespace's oldest",
            )
    return refused


def _groups(placements: Mapping[str, Placement]) -> list[list[str]]:
    """Return the placements in groups: two that can meet are in one, also by way of a third."""
    groups: list[list[str]] = []
    for placed, placement in placements.items():
        near = [group for group in groups if any(can_meet(placements[other], placement) for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([*(other for group in near for other in group), placed])
    return groups


def share(policies: Iterable[PolicyView]) -> tuple[Shared, ...]:
    """Return the DaemonSets that the policies need: no node can meet two of them.

    Agents run wherever one of the placements asks for them, and may write where one of the policies enforces. Only of
    RuntimeClasses there can be but one: that of a policy that enforces, then of one with the default placement, then
    of the oldest.
    """
    by_placement: dict[str, list[PolicyView]] = {}
    placements: dict[str, Placement] = {}
    for policy in sorted(policies, key=lambda policy: policy.age_key):
        if policy.spec is not None:
            placed = placement_hash(policy.spec.placement)
            placements.setdefault(placed, policy.spec.placement)
            by_placement.setdefault(placed, []).append(policy)
    default = placement_hash(Placement())
    age = {placed: found[0].age_key for placed, found in by_placement.items()}
    shared = []
    for group in _groups(placements):
        group.sort(key=lambda placed: age[placed])
        enforcing = {
            placed
            for placed in group
            if any(policy.spec is not None and policy.spec.mode is Mode.ENFORCE for policy in by_placement[placed])
        }
        decides = min(group, key=lambda placed: (placed not in enforcing, placed != default, age[placed]))
        runtime = placements[decides].runtime_class_name
        shared.append(
            Shared(
                placements=tuple(placements[placed] for placed in group),
                mode=Mode.ENFORCE if enforcing else Mode.OBSERVE,
                runtime_class_name=runtime,
                decided_by=by_placement[decides][0].title,
                overruled=tuple(
                    policy
                    for placed in group
                    if placements[placed].runtime_class_name != runtime
                    for policy in by_placement[placed]
                ),
            )
        )
    return tuple(shared)


def overruled_sentence(shared: Shared) -> str:
    """Return what a policy is told whose RuntimeClass is not used."""
    used = (
        f"runtimeClassName {shared.runtime_class_name}" if shared.runtime_class_name else "the nodes' default runtime"
    )
    return (
        f"the agents run with {used}, as {shared.decided_by} writes it: its spec.placement and the one here can select "
        "the same nodes, where one agent serves both (policies that enforce go first, then the default placement, then "
        "the oldest). Write the same runtimeClassName, or give the two nodeSelectors different values of one label"
    )
