"""``check``: tells in a readable list whether the installation works (helm test runs it)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from wattlock_api.constants import AGENT_COMPONENT, COMPONENT_LABEL, LEASE_NAME
from wattlock_api.crd import RESOURCES

from wattlock_operator import kube as api
from wattlock_operator.kube import Kube, KubeError
from wattlock_operator.lease import DURATION_SECONDS, parse_lease
from wattlock_operator.placement import MANAGED_BY_LABEL, MANAGER
from wattlock_operator.settings import Settings

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Point:
    """A point of the list."""

    well: bool
    text: str


def _crds(kube: Kube, settings: Settings) -> list[Point]:
    points = []
    for resource in RESOURCES:
        body = kube.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{resource.crd_name}")
        conditions = ((body or {}).get("status") or {}).get("conditions") or []
        served = any(entry.get("type") == "Established" and entry.get("status") == "True" for entry in conditions)
        points.append(
            Point(served, f"{resource.kind} is " + ("served" if served else "not served: apply the chart's CRDs"))
        )
    return points


def _lease(kube: Kube, settings: Settings) -> list[Point]:
    body = kube.get(api.lease_path(settings.namespace, LEASE_NAME))
    lease = parse_lease(body) if body else None
    if lease is None or lease.renewed_at_seconds is None:
        return [Point(False, f"there is no lease {settings.namespace}/{LEASE_NAME}: the operator has not started")]
    age = time.time() - lease.renewed_at_seconds
    fresh = age <= DURATION_SECONDS and bool(lease.holder)
    text = f"the operator ({lease.holder or 'nobody'}) renewed its lease {age:.0f} s ago"
    return [Point(fresh, text + ("" if fresh else ": see its log"))]


def _agents(kube: Kube, settings: Settings) -> list[Point]:
    selector = f"{MANAGED_BY_LABEL}={MANAGER},{COMPONENT_LABEL}={AGENT_COMPONENT}"
    points = []
    for body in kube.list_all(api.daemon_sets_path(settings.agent_namespace), selector):
        status, name = body.get("status") or {}, body["metadata"]["name"]
        wanted, ready = int(status.get("desiredNumberScheduled") or 0), int(status.get("numberReady") or 0)
        seen = int(status.get("observedGeneration") or 0) >= int(body["metadata"].get("generation") or 0)
        hint = "" if ready >= wanted and seen else f": kubectl describe daemonset {name} -n {settings.agent_namespace}"
        points.append(Point(ready >= wanted and seen, f"{ready} of {wanted} agents of {name} are ready{hint}"))
    return points or [Point(True, "there are no agents, because there is no policy yet")]


_CHECKS: tuple[Callable[[Kube, Settings], list[Point]], ...] = (_crds, _lease, _agents)


def inspect(kube: Kube, settings: Settings) -> list[Point]:
    """Return all points; a question that the API server refuses is a point that failed."""
    points: list[Point] = []
    for question in _CHECKS:
        try:
            points.extend(question(kube, settings))
        except KubeError as error:
            points.append(Point(False, str(error)))
    return points


def run(settings: Settings, kube: Kube, timeout_seconds: float, out: TextIO) -> int:
    """Inspect until all is well or the time is over; print the last list. Returns the exit status."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        points = inspect(kube, settings)
        well = all(point.well for point in points)
        if well or time.monotonic() >= deadline:
            break
        time.sleep(POLL_SECONDS)
    for point in points:
        out.write(f"{'ok  ' if point.well else 'FAIL'}  {point.text}\n")
    out.flush()
    return 0 if well else 1
