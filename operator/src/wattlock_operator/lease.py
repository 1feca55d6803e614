"""The operator's lease: it tells the agents that somebody leads, and keeps two operators from leading at once.

Whether another operator still leads is judged as client-go does (tools/leaderelection): by how long *we* have seen no
change of the lease, on our own clock for durations. The times written in it come from another machine's clock, which
may be hours off; they are for people, and so that each renewal differs from the last.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from wattlock_api import boottime
from wattlock_api.base import parse_timestamp
from wattlock_api.constants import LEASE_NAME, LEASE_RENEW_SECONDS

from wattlock_operator.kube import Kube, KubeError, lease_path

#: Others take a lease over that they have not seen change for so long.
DURATION_SECONDS = 3 * LEASE_RENEW_SECONDS
#: Its holder acts for so long after it *asked* for the last renewal. Shorter, so that a write that is under way then
#: has come to its end when another operator begins.
LEADING_SECONDS = DURATION_SECONDS - 15


@dataclass(frozen=True)
class LeaseView:
    """A lease. Two that are equal are the same renewal."""

    holder: str = ""
    renewal: str = ""
    """When its holder renewed it, by the holder's clock: a text that changes with each renewal."""
    transitions: int = 0

    @property
    def renewed_at_seconds(self) -> float | None:
        """When it was renewed, in seconds since 1970 by the holder's clock. For people, never to decide by."""
        try:
            return parse_timestamp(self.renewal)
        except ValueError:
            return None


def parse_lease(body: Mapping[str, Any]) -> LeaseView:
    """Return the projection of a lease; what is not understood counts as absent."""
    spec = body.get("spec") or {}
    transitions = spec.get("leaseTransitions")
    return LeaseView(
        str(spec.get("holderIdentity") or ""),
        str(spec.get("renewTime") or ""),
        transitions if type(transitions) is int else 0,
    )


@dataclass(frozen=True)
class Sighting:
    """A lease as we see it, and since when, in seconds of our own clock for durations."""

    lease: LeaseView
    since_seconds: float


def sight(before: Sighting | None, lease: LeaseView, answered_seconds: float) -> Sighting:
    """Return the sighting after a reading. A change counts from when the answer came: it may be as young as that."""
    if before is not None and before.lease == lease:
        return before
    return Sighting(lease, answered_seconds)


def may_take(sighting: Sighting, identity: str, asked_seconds: float) -> bool:
    """Return whether the lease is ours, given up, or was not renewed for its duration until we asked."""
    if sighting.lease.holder in ("", identity):
        return True
    return asked_seconds - sighting.since_seconds >= DURATION_SECONDS


def _micro_time(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lease:
    """Takes, renews and gives up the lease. Blocking; safe to use from several threads."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        now_seconds: Callable[[], float] = boottime.now_seconds,
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        self._kube, self._namespace, self._identity = kube, namespace, identity
        self._now_seconds, self._unix_seconds = now_seconds, unix_seconds
        self._lock = threading.Lock()
        self._given_up = False
        self._held: Mapping[str, Any] | None = None
        """The lease as we last wrote it: renewing it needs no reading."""
        self._sighting: Sighting | None = None
        self._ours = False
        """Whether we know that nobody else held it since we took it. An answer that we never got may have given it."""
        self.term = 0
        """Grows each time that we take the lease from somebody else, or from nobody."""

    def renew(self) -> bool:
        """Take or renew the lease; return whether we hold it now.

        Raises:
            KubeError: the API server did not answer as it should.
        """
        with self._lock:
            if self._given_up:
                return False
            if self._held is not None and self._write(self._held):
                return True
            asked_seconds = self._now_seconds()
            body = self._kube.get(lease_path(self._namespace, LEASE_NAME))
            if body is not None:
                self._sighting = sight(self._sighting, parse_lease(body), self._now_seconds())
                if not may_take(self._sighting, self._identity, asked_seconds):
                    self._ours = False
                    return False
            return self._write(body)

    def _write(self, body: Mapping[str, Any] | None) -> bool:
        """Write the lease in our name over ``body``; return False when somebody else was faster."""
        self._held = None
        spec = dict((body or {}).get("spec") or {})
        before = parse_lease(body or {})
        changes_hands = before.holder != self._identity
        now = _micro_time(self._unix_seconds())
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_SECONDS,
            "renewTime": now,
            "leaseTransitions": before.transitions + (1 if changes_hands and body is not None else 0),
        }
        if changes_hands:
            spec["acquireTime"], self._ours = now, False
        try:
            if body is None:
                metadata = {"name": LEASE_NAME, "namespace": self._namespace}
                created = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
                self._held = self._kube.request("POST", lease_path(self._namespace), body=created)
            else:
                # The resourceVersion in the body makes the server refuse it when another operator was faster.
                path = lease_path(self._namespace, LEASE_NAME)
                self._held = self._kube.request("PUT", path, body={**body, "spec": spec})
        except KubeError as error:
            if error.status in (404, 409):
                return False
            raise
        if not self._ours:
            self.term, self._ours = self.term + 1, True
        return True

    def give_up(self) -> None:
        """Let the next operator begin at once, and never take the lease again.

        The time of the last renewal stays: the agents go by its changes.

        Raises:
            KubeError: the API server did not answer as it should.
        """
        with self._lock:
            self._given_up = True
            body = self._kube.get(lease_path(self._namespace, LEASE_NAME))
            if body is not None and parse_lease(body).holder == self._identity:
                spec = dict(body["spec"]) | {"holderIdentity": ""}
                self._kube.request("PUT", lease_path(self._namespace, LEASE_NAME), body=body | {"spec": spec})
