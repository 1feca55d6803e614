"""The operator's memory of the cluster: projections of watched objects, and whether they changed.

Filled by whole lists (at start and from time to time: a watch may miss a deletion while it reconnects) and kept
up to date by watch events in between.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wattlock_api.energypolicy import Placement

from wattlock_operator.parse import parse_node, parse_node_energy, parse_pod, parse_policy, parse_profile
from wattlock_operator.world import DaemonSetView, World


@dataclass(frozen=True)
class Kind:
    """A watched kind."""

    name: str
    parse: Callable[[Mapping[str, Any]], Any]


POLICY = Kind("EnergyPolicy", parse_policy)
POD = Kind("Pod", parse_pod)
NODE = Kind("Node", parse_node)
NODE_ENERGY = Kind("NodeEnergy", parse_node_energy)
PROFILE = Kind("ClockProfile", parse_profile)
KINDS = (POLICY, POD, NODE, NODE_ENERGY, PROFILE)


#: Deleted objects that are remembered: an answer that was on its way must not bring one back.
MAX_DROPPED = 4096


@dataclass(frozen=True)
class _Entry:
    version: int
    view: Any


@dataclass(frozen=True)
class _Earlier:
    """What was known of a kind before a whole list was asked for."""

    entries: Mapping[tuple[str, str], _Entry]
    dropped: Mapping[tuple[str, str], int]

    def still_is(self, key: tuple[str, str], known: _Entry | None, dropped: int) -> bool:
        """Return whether nothing was heard of an object since."""
        return self.entries.get(key) is known and self.dropped.get(key, -1) == dropped


def _identify(body: Mapping[str, Any]) -> tuple[str, str]:
    metadata = body.get("metadata") or {}
    return str(metadata.get("namespace") or ""), str(metadata.get("name") or "")


def _version(body: Mapping[str, Any]) -> int:
    """Return the resourceVersion: a number that grows, by Kubernetes' promise since 1.35 and by habit before."""
    text = str((body.get("metadata") or {}).get("resourceVersion") or "0")
    return int(text) if text.isascii() and text.isdigit() else 0


class Store:
    """All projections by kind and name. Safe to use from several threads."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._entries: dict[str, dict[tuple[str, str], _Entry]] = {kind.name: {} for kind in KINDS}
        self._dropped: dict[tuple[str, tuple[str, str]], int] = {}
        """Version of the deletion, by kind and name, the latest last."""

    def put(self, kind: Kind, body: Mapping[str, Any]) -> None:
        """Take in an object as a watch or an answer showed it. Older news than what is known is ignored."""
        self._put(kind, body, None)

    def _put(self, kind: Kind, body: Mapping[str, Any], earlier: _Earlier | None) -> bool:
        """Take in an object; return whether its version went back.

        ``earlier``: for an object of a whole list, what was known before that was asked for.
        """
        key, version = _identify(body), _version(body)
        view = kind.parse(body)
        with self._lock:
            entries = self._entries[kind.name]
            known, dropped = entries.get(key), self._dropped.get((kind.name, key), -1)
            is_older = known.version > version if known is not None else dropped >= version
            if is_older and (earlier is None or not earlier.still_is(key, known, dropped)):
                return False
            entries[key] = _Entry(version, view)
            if is_older:
                self._dropped.pop((kind.name, key), None)
        if known is None or known.view != view:
            self._changed()
        return is_older

    def drop(self, kind: Kind, body: Mapping[str, Any]) -> None:
        """Forget a deleted object, unless a later one has its name."""
        key, version = _identify(body), _version(body)
        with self._lock:
            entries = self._entries[kind.name]
            known = entries.get(key)
            if known is not None and known.version > version:
                return
            self._dropped.pop((kind.name, key), None)
            self._dropped[kind.name, key] = version
            if len(self._dropped) > MAX_DROPPED:
                del self._dropped[next(iter(self._dropped))]
            if known is None:
                return
            del entries[key]
        self._changed()

    def version(self, kind: Kind, key: tuple[str, str]) -> int | None:
        """Return the version that is known of an object; None: it is not known. ``key``: namespace and name."""
        with self._lock:
            known = self._entries[kind.name].get(key)
        return None if known is None else known.version

    def gone(self, kind: Kind, key: tuple[str, str], version: int) -> None:
        """Forget an object that was not found, unless another version than this is known by now.

        Not as sure as a deletion that was told: a server that is about to serve a kind anew finds nothing for a moment.
        So the same version is taken in again when it is seen.
        """
        with self._lock:
            known = self._entries[kind.name].get(key)
            if known is None or known.version != version:
                return
            del self._entries[kind.name][key]
        self._changed()

    def replace(self, kind: Kind, bodies: Iterable[Mapping[str, Any]]) -> bool:
        """Take in a whole list: it goes before all that was known when it was asked for, not before what came since.

        A list that is asked for without a resourceVersion shows the newest state, never an older one than what any
        watch or answer showed before (Kubernetes, API concepts: "Most Recent"). Its objects can have lower versions
        than those known before only where the cluster's history itself went back: etcd was restored from a snapshot.
        Then the list is the world; by their versions its objects would be ignored until they have caught up, maybe for
        ever. What a watch shows while the list is read may well be newer than the list: there the version decides.

        ``bodies`` asks for the list when its first object is asked for, not sooner.

        Returns:
            Whether history went back. What a watch showed of the new one while the list was read was then taken for
            old: the list is to be read once more.
        """
        with self._lock:
            entries = self._entries[kind.name]
            dropped = {key: version for (name, key), version in self._dropped.items() if name == kind.name}
            earlier = _Earlier(dict(entries), dropped)
        seen, went_back = set(), False
        for body in bodies:
            seen.add(_identify(body))
            went_back |= self._put(kind, body, earlier)
        with self._lock:
            for key, entry in earlier.entries.items():
                if key not in seen and entries.get(key) is entry:
                    del entries[key]
            if went_back:  # deletions of a history that is no more, by which objects of the new one would be ignored
                for key in earlier.dropped:
                    self._dropped.pop((kind.name, key), None)
        self._changed()
        return went_back

    def world(
        self,
        daemon_sets: tuple[DaemonSetView, ...],
        agent_namespace: str,
        host_network_namespaces: frozenset[str] = frozenset(),
        allowed_placements: tuple[Placement, ...] = (),
    ) -> World:
        """Return a snapshot."""
        with self._lock:
            shown = {name: {key: entry.view for key, entry in found.items()} for name, found in self._entries.items()}
        return World(
            policies=tuple(sorted(shown[POLICY.name].values(), key=lambda policy: policy.age_key)),
            pods=tuple(shown[POD.name].values()),
            nodes={name: view for (_, name), view in shown[NODE.name].items()},
            node_energies={name: view for (_, name), view in shown[NODE_ENERGY.name].items()},
            profiles={name: view for (_, name), view in shown[PROFILE.name].items() if view is not None},
            daemon_sets=daemon_sets,
            agent_namespace=agent_namespace,
            host_network_namespaces=host_network_namespaces,
            allowed_placements=allowed_placements,
        )
