"""Whether orders may still be followed: somebody must be there who would take them back. Pure."""

from dataclasses import dataclass, replace

from wattlock_api.constants import LEASE_NAME, STALE_ORDERS_SECONDS

#: A lease written so recently is taken for alive at once at the start: by the API server's clock alone, see
#: ``kube.parse_lease``. Else the agent waits until it has seen the lease change.
TRUSTED_AGE_SECONDS = 60.0


@dataclass(frozen=True)
class Freshness:
    """What was last heard of the API server and of the operator. Times are monotonic seconds."""

    api_seen_seconds: float
    lease_renewal: str | None = None
    """``renewTime`` of the lease as it was last read."""
    lease_changed_seconds: float | None = None
    """When we last saw it change; ``None``: never, so the operator may have been gone before we came."""
    stale_seconds: int = STALE_ORDERS_SECONDS
    """So long a silence is borne."""


def api_answered(freshness: Freshness, now_seconds: float) -> Freshness:
    """Note an answer of the API server."""
    return replace(freshness, api_seen_seconds=max(freshness.api_seen_seconds, now_seconds))


def lease_read(freshness: Freshness, now_seconds: float, renewal: str | None, age_seconds: float | None) -> Freshness:
    """Note the lease's ``renewTime`` (``None``: there is no lease) and its age by the API server's clock.

    Whether the operator lives is judged by when *we* saw the text change, so clocks need not agree.
    """
    freshness = api_answered(freshness, now_seconds)
    if renewal is None:
        return freshness
    if freshness.lease_renewal is None:
        trusted = age_seconds is not None and age_seconds <= TRUSTED_AGE_SECONDS
        return replace(freshness, lease_renewal=renewal, lease_changed_seconds=now_seconds if trusted else None)
    if renewal == freshness.lease_renewal:
        return freshness
    return replace(freshness, lease_renewal=renewal, lease_changed_seconds=now_seconds)


def why_stale(freshness: Freshness, now_seconds: float) -> str:
    """Return why orders must not be followed, as a sentence; empty when they may."""
    silent_seconds = now_seconds - freshness.api_seen_seconds
    if silent_seconds > freshness.stale_seconds:
        return f"the API server has not answered for more than {freshness.stale_seconds} s"
    if freshness.lease_changed_seconds is None:
        return f"waiting for a sign of life of the operator: its lease {LEASE_NAME} has not been renewed yet"
    silent_seconds = now_seconds - freshness.lease_changed_seconds
    if silent_seconds > freshness.stale_seconds:
        return f"the operator has not renewed its lease {LEASE_NAME} for more than {freshness.stale_seconds} s"
    return ""
