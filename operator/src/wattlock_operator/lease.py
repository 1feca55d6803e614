"""The operator's lease: it tells the agents that somebody leads, and keeps two operators from leading at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from wattlock_api.base import parse_timestamp
from wattlock_api.constants import LEASE_NAME, LEASE_RENEW_SECONDS

from wattlock_operator.kube import Kube, KubeError, lease_path

DURATION_SECONDS = 3 * LEASE_RENEW_SECONDS


@dataclass(frozen=True)
class LeaseView:
    """A lease."""

    holder: str
    renewed_at_seconds: float | None
    """Seconds since 1970."""


def parse_lease(body: Mapping[str, Any]) -> LeaseView:
    """Return holder and time of a lease; what is not understood counts as absent."""
    spec = body.get("spec") or {}
    try:
        renewed = parse_timestamp(str(spec.get("renewTime") or ""))
    except ValueError:
        renewed = None
    return LeaseView(str(spec.get("holderIdentity") or ""), renewed)


def may_take(lease: LeaseView | None, identity: str, now_seconds: float) -> bool:
    """Return whether the lease is ours, free or expired."""
    if lease is None or lease.holder in ("", identity) or lease.renewed_at_seconds is None:
        return True
    return now_seconds - lease.renewed_at_seconds > DURATION_SECONDS


def _micro_time(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lease:
    """Takes and renews the lease. Blocking."""

    def __init__(self, kube: Kube, namespace: str, identity: str) -> None:
        self._kube, self._namespace, self._identity = kube, namespace, identity
        self._held: Mapping[str, Any] | None = None
        """The lease as we last wrote it: renewing it needs no reading."""

    def renew(self, now_seconds: float) -> bool:
        """Take or renew the lease; return whether we hold it now.

        Raises:
            KubeError: the API server did not answer as it should.
        """
        if self._held is not None and self._write(self._held, now_seconds):
            return True
        body = self._kube.get(lease_path(self._namespace, LEASE_NAME))
        if not may_take(None if body is None else parse_lease(body), self._identity, now_seconds):
            return False
        return self._write(body, now_seconds)

    def _write(self, body: Mapping[str, Any] | None, now_seconds: float) -> bool:
        """Write the lease in our name over ``body``; return False when somebody else was faster."""
        self._held = None
        spec = dict((body or {}).get("spec") or {})
        changes_hands = spec.get("holderIdentity") != self._identity
        transitions = int(spec.get("leaseTransitions") or 0) + (1 if changes_hands and body is not None else 0)
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_SECONDS,
            "renewTime": _micro_time(now_seconds),
            "leaseTransitions": transitions,
        }
        if changes_hands:
            spec["acquireTime"] = _micro_time(now_seconds)
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
        return True

    def give_up(self) -> None:
        """Let the next operator begin at once. The time of the last renewal stays: the agents go by it.

        Raises:
            KubeError: the API server did not answer as it should.
        """
        body = self._kube.get(lease_path(self._namespace, LEASE_NAME))
        if body is not None and parse_lease(body).holder == self._identity:
            spec = dict(body["spec"]) | {"holderIdentity": ""}
            self._kube.request("PUT", lease_path(self._namespace, LEASE_NAME), body=body | {"spec": spec})
