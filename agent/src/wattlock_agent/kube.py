"""What the agent hears from and tells the API server, in two threads that never hold up the loop.

One thread watches the node's own NodeEnergy, the other reads the operator's lease and writes the status. What they
hear goes to the loop's queue as events.
"""

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from wattlock_api.base import parse_timestamp
from wattlock_api.boottime import now_seconds
from wattlock_api.constants import AGENT_FIELD_MANAGER, GROUP, LEASE_NAME, STALE_ORDERS_SECONDS, VERSION
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_api.peerpower import PeerPowers

from wattlock_agent.api_client import WATCH_SECONDS, ApiClient, ApiError, Json
from wattlock_agent.orders import NO_ORDERS, Orders, parse_orders, parse_peers
from wattlock_agent.staleness import TRUSTED_AGE_SECONDS

_log = logging.getLogger(__name__)
_spread = random.Random()  # noqa: S311 - spreads load, guards nothing

LEASE_SECONDS = 120.0
#: At least so often within the time after which a silent operator counts as gone.
LEASE_READS = 5
#: Until the lease has been seen to change once.
FIRST_LEASE_SECONDS = 5.0
MISSING_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 30.0
#: A watch that held for so long had worked. One that ends sooner is not begun anew at once.
WORKED_SECONDS = 30.0

_COLLECTION = f"/apis/{GROUP}/{VERSION}/nodeenergies"


@dataclass(frozen=True)
class OrdersSeen:
    """The orders as they are now."""

    orders: Orders
    status: Json | None = None
    """With the first answer: the status that an earlier agent left."""


@dataclass(frozen=True)
class PeersSeen:
    """Power of instances on their other nodes, as it is now."""

    peers: PeerPowers


@dataclass(frozen=True)
class ApiAnswered:
    """The API server answered."""


@dataclass(frozen=True)
class LeaseSeen:
    """The operator's lease was read."""

    renewal: str | None
    age_seconds: float | None
    """Age by the API server's clock, which stamps each write and each answer."""


@dataclass(frozen=True)
class StatusWritten:
    """The end of an attempt to write the status."""

    problem: str
    """Empty: it is written."""
    missing: bool = False
    """The NodeEnergy does not exist (yet)."""


Event = OrdersSeen | PeersSeen | ApiAnswered | LeaseSeen | StatusWritten
Post = Callable[[Event], None]


class OrderWatch:
    """Follows the orders."""

    def __init__(self, client: ApiClient, node_name: str, post: Post) -> None:
        self._client = client
        self._node_name = node_name
        self._post = post
        self._seen: tuple[str, int] | None = None
        self._peers = PeerPowers()
        self._first = True
        self._closed = threading.Event()

    def close(self) -> None:
        """End ``run`` after the request in progress."""
        self._closed.set()

    def run(self) -> None:
        """Follow until closed."""
        backoff_seconds = 1.0
        while not self._closed.is_set():
            started_seconds = now_seconds()
            problem: ApiError | None = None
            exists = True
            try:
                exists = self.follow()
            except ApiError as error:
                problem = error
            if now_seconds() - started_seconds > WORKED_SECONDS:
                backoff_seconds = 1.0
            if not exists:
                pause_seconds, backoff_seconds = MISSING_SECONDS, 1.0
            else:
                pause_seconds, backoff_seconds = backoff_seconds, min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)
            if problem is not None:
                pause_seconds = max(pause_seconds, problem.retry_after_seconds or 0.0)
                _log.warning("orders: %s; trying again in %.0f s", problem, pause_seconds)
            self._closed.wait(pause_seconds * _spread.uniform(1.0, 1.3))

    def follow(self) -> bool:
        """Read the object, then watch it until the server ends the watch. Returns whether it exists.

        Starting each watch with a read makes resumption and expired resource versions no special case.

        Raises:
            ApiError: the API server does not answer.
        """
        resource = self._client.get(f"{_COLLECTION}/{self._node_name}")
        self._notice(resource)
        if resource is None:
            return False
        version = resource.get("metadata", {}).get("resourceVersion", "")
        query = (
            f"?watch=1&fieldSelector=metadata.name={self._node_name}&allowWatchBookmarks=true"
            f"&resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}"
        )
        for event in self._client.watch(_COLLECTION + query):
            kind = event.get("type")
            if kind == "ERROR":
                return True
            if kind == "BOOKMARK":
                self._post(ApiAnswered())
            elif kind == "DELETED":
                self._notice(None)
                return False
            else:
                self._notice(event.get("object"))
        return True

    def _notice(self, resource: Json | None) -> None:
        if resource is None:
            self._seen, self._first = None, False
            self._post(OrdersSeen(NO_ORDERS))
            return
        metadata = resource.get("metadata", {})
        seen = (str(metadata.get("uid")), int(metadata.get("generation", 0)))
        peers = parse_peers(metadata.get("annotations"))
        if seen == self._seen:  # our own status, mostly
            self._post(ApiAnswered())
            self._notice_peers(peers)
            return
        self._seen = seen
        orders = parse_orders(seen[1], resource.get("spec") or {})
        for problem in orders.unreadable:
            _log.warning("orders: %s", problem)
        self._post(OrdersSeen(orders, resource.get("status") if self._first else None))
        self._first = False
        self._notice_peers(peers)

    def _notice_peers(self, peers: PeerPowers) -> None:
        if peers != self._peers:
            self._peers = peers
            self._post(PeersSeen(peers))


class StatusLink:
    """Writes the newest status and reads the lease."""

    def __init__(
        self,
        client: ApiClient,
        node_name: str,
        operator_namespace: str,
        post: Post,
        stale_seconds: int = STALE_ORDERS_SECONDS,
    ) -> None:
        self._client = client
        self._lease_seconds = min(LEASE_SECONDS, stale_seconds / LEASE_READS)
        self._status_path = f"{_COLLECTION}/{node_name}/status?fieldManager={AGENT_FIELD_MANAGER}"
        self._lease_path = f"/apis/coordination.k8s.io/v1/namespaces/{operator_namespace}/leases/{LEASE_NAME}"
        self._post = post
        self._next: NodeEnergyStatus | None = None
        self._wake = threading.Condition()
        self._writing = False
        self._closed = False
        self._renewal: str | None = None
        self._lease_changed = False
        self._not_before_seconds = now_seconds()
        """The API server wants to be left alone until then."""

    def put(self, status: NodeEnergyStatus) -> None:
        """Hand over a status; one that was not written yet is superseded."""
        with self._wake:
            self._next = status
            self._wake.notify_all()

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until nothing is left to write; returns whether it came to that."""
        with self._wake:
            return self._wake.wait_for(lambda: self._next is None and not self._writing, timeout_seconds)

    def close(self) -> None:
        """End ``run`` after the request in progress."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def run(self) -> None:
        """Serve until closed."""
        lease_due_seconds = now_seconds()
        while not self._closed:
            with self._wake:
                self._wake.wait_for(lambda: self._closed, max(0.0, self._not_before_seconds - now_seconds()))
                self._wake.wait_for(
                    lambda: self._next is not None or self._closed, max(0.0, lease_due_seconds - now_seconds())
                )
                status, self._next = self._next, None
                self._writing = status is not None
            if status is not None:
                self.write(status)
                with self._wake:
                    self._writing = False
                    self._wake.notify_all()
            if now_seconds() >= max(lease_due_seconds, self._not_before_seconds):
                self.read_lease()
                pause_seconds = self._lease_seconds if self._lease_changed else FIRST_LEASE_SECONDS
                lease_due_seconds = now_seconds() + pause_seconds * _spread.uniform(0.8, 1.0)

    def _leave_alone(self, error: ApiError) -> None:
        if error.retry_after_seconds:
            pause_seconds = error.retry_after_seconds * _spread.uniform(1.0, 1.3)
            self._not_before_seconds = now_seconds() + pause_seconds

    def write(self, status: NodeEnergyStatus) -> None:
        """Write the status once."""
        try:
            self._client.merge_patch(self._status_path, {"status": status.to_api()})
        except ApiError as error:
            self._leave_alone(error)
            if error.status != 404:
                _log.warning("status: %s", error)
            self._post(StatusWritten(str(error), missing=error.status == 404))
            return
        self._post(StatusWritten(""))

    def read_lease(self) -> None:
        """Read the lease once."""
        try:
            found = self._client.get_dated(self._lease_path)
        except ApiError as error:
            self._leave_alone(error)
            _log.warning("lease: %s", error)
            return
        renewal, age_seconds = parse_lease(*found) if found is not None else (None, None)
        trusted = age_seconds is not None and age_seconds <= TRUSTED_AGE_SECONDS
        if trusted or (self._renewal is not None and renewal != self._renewal):
            self._lease_changed = True
        self._renewal = renewal
        self._post(LeaseSeen(renewal, age_seconds))


def parse_lease(lease: Json, server_unix_seconds: float | None) -> tuple[str | None, float | None]:
    """Return the lease's ``renewTime`` and how long ago the lease was written, in seconds.

    Both moments of the age are of the API server's clock: when it answered, and its stamp of the last write
    (``managedFields``). The ``renewTime`` is by the operator's clock, which may be hours from it and from ours.
    """
    spec, metadata = lease.get("spec"), lease.get("metadata")
    renewal = spec.get("renewTime") if isinstance(spec, dict) else None
    if _seconds(renewal) is None:
        return None, None
    entries = metadata.get("managedFields") if isinstance(metadata, dict) else None
    stamps = [
        seconds
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and (seconds := _seconds(entry.get("time"))) is not None
    ]
    if server_unix_seconds is None or not stamps:
        return renewal, None
    return renewal, max(0.0, server_unix_seconds - max(stamps))


def _seconds(text: object) -> float | None:
    """Return seconds since 1970, or None where the text is no time."""
    try:
        return parse_timestamp(text) if isinstance(text, str) else None
    except ValueError:
        return None
