"""Makes projections of the objects that the API server tells of. Pure.

Parsing never raises: what is missing or odd in an object becomes an absent value here, and the decisions
turn absent values into holds with a reason.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from wattlock_api.clockprofile import ClockProfileSpec
from wattlock_api.constants import FORCE_RELEASE_ANNOTATION, PEER_POWER_ANNOTATION
from wattlock_api.energypolicy import EnergyPolicySpec
from wattlock_api.nodeenergy import GpuStatus, InstanceStatus, NodeEnergyStatus, Order
from wattlock_api.policystatus import EnergyPolicyStatus

from wattlock_operator.world import MetricsHint, NodeEnergyView, NodeView, PodView, PolicyView
from wattlock_operator.writers import claims_of, writer_of

Json = Mapping[str, Any]
_Model = TypeVar("_Model", Order, GpuStatus, InstanceStatus)

#: Set by the LeaderWorkerSet controller on each pod: https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/
_GROUP_SIZE = "leaderworkerset.sigs.k8s.io/size"
_METRICS_PORT_NAMES = ("metrics", "prometheus", "system", "http")
#: Of the lists in the contract.
_MAX_GPUS, _MAX_INSTANCES = 32, 256
_METRICS_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,127}")


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _items(value: Any) -> list[Json]:
    return [item for item in _list(value) if isinstance(item, Mapping)]


def _whole(value: Any) -> int:
    return value if type(value) is int else 0


def _labels(metadata: Json) -> dict[str, str]:
    return {str(key): str(value) for key, value in _mapping(metadata.get("labels")).items()}


def _is_ready(status: Json) -> bool:
    conditions = _items(status.get("conditions"))
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:500]


def parse_policy(body: Json) -> PolicyView:
    """Return the projection of an EnergyPolicy."""
    metadata = _mapping(body.get("metadata"))
    spec, problem, status = None, "", None
    try:
        spec = EnergyPolicySpec.model_validate(body.get("spec"))
    except ValidationError as error:
        problem = _first_problem(error)
    if body.get("status"):
        try:
            status = EnergyPolicyStatus.model_validate(body["status"])
        except ValidationError:
            status = None  # somebody else's text: it is overwritten
    return PolicyView(
        namespace=str(metadata.get("namespace", "")),
        name=str(metadata.get("name", "")),
        uid=str(metadata.get("uid", "")),
        generation=_whole(metadata.get("generation")),
        created=str(metadata.get("creationTimestamp", "")),
        spec=spec,
        status=status,
        problem=problem,
        deleting=bool(metadata.get("deletionTimestamp")),
        deleted_at=str(metadata.get("deletionTimestamp") or ""),
        finalizers=tuple(name for name in _list(metadata.get("finalizers")) if isinstance(name, str)),
        force_release=_mapping(metadata.get("annotations")).get(FORCE_RELEASE_ANNOTATION) == "true",
        version=str(metadata.get("resourceVersion") or ""),
    )


def _port(text: Any) -> int | None:
    try:
        number = int(text)
    except (TypeError, ValueError):
        return None
    return number if 1 <= number <= 65535 else None


def _size(text: Any) -> int | None:
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 4 else None


def _container_wants_gpu(container: Json) -> bool:
    resources = _mapping(container.get("resources"))
    asked = (*_mapping(resources.get("limits")).items(), *_mapping(resources.get("requests")).items())
    some = any(str(name).startswith("nvidia.com/") and str(amount) != "0" for name, amount in asked)
    return some or bool(resources.get("claims"))


def _command_line(container: Json) -> str:
    return " ".join(str(word) for part in ("command", "args") for word in _list(container.get(part)))


def _metrics_hint(metadata: Json, containers: list[Json]) -> MetricsHint:
    annotations = _mapping(metadata.get("annotations"))
    path = annotations.get("prometheus.io/path")
    named: dict[str, int] = {}
    for container in containers:
        for port in _items(container.get("ports")):
            number = _port(port.get("containerPort"))
            if number is not None:
                named.setdefault(str(port.get("name", "")), number)
    gpu_ports = [
        number
        for container in containers
        if _container_wants_gpu(container)
        for port in _items(container.get("ports"))
        if (number := _port(port.get("containerPort"))) is not None
    ]
    return MetricsHint(
        annotated_port=_port(annotations.get("prometheus.io/port")),
        annotated_path=path if isinstance(path, str) and _METRICS_PATH.fullmatch(path) else None,
        named_port=next((named[name] for name in _METRICS_PORT_NAMES if name in named), None),
        gpu_container_port=gpu_ports[0] if gpu_ports else None,
    )


def _addresses(status: Json, whose: str) -> frozenset[str]:
    """Return the addresses of a pod ("pod") or of its node ("host")."""
    several = {str(entry.get("ip") or "") for entry in _items(status.get(f"{whose}IPs"))}
    return frozenset({str(status.get(f"{whose}IP") or ""), *several} - {""})


def parse_pod(body: Json) -> PodView:
    """Return the projection of a pod."""
    metadata, spec, status = (_mapping(body.get(part)) for part in ("metadata", "spec", "status"))
    # A sidecar is an init container that keeps running: it may own the metrics port.
    containers = _items(spec.get("containers")) + _items(spec.get("initContainers"))
    labels = _labels(metadata)
    return PodView(
        namespace=str(metadata.get("namespace", "")),
        name=str(metadata.get("name", "")),
        uid=str(metadata.get("uid", "")),
        node=str(spec.get("nodeName") or ""),
        phase=str(status.get("phase") or ""),
        ready=_is_ready(status),
        terminating=bool(metadata.get("deletionTimestamp")),
        labels=labels,
        ip=str(status.get("podIP") or ""),
        host_network=spec.get("hostNetwork") is True or bool(_addresses(status, "pod") & _addresses(status, "host")),
        wants_gpu=any(map(_container_wants_gpu, containers)) or bool(spec.get("resourceClaims")),
        hint=_metrics_hint(metadata, containers),
        group_size=_size(_mapping(metadata.get("annotations")).get(_GROUP_SIZE)),
        claims=claims_of(_mapping(metadata.get("annotations"))),
        writer=writer_of(labels, (str(each.get("image") or "") for each in containers), map(_command_line, containers)),
    )


def parse_node(body: Json) -> NodeView:
    """Return the projection of a node."""
    metadata, status = _mapping(body.get("metadata")), _mapping(body.get("status"))
    return NodeView(name=str(metadata.get("name", "")), labels=_labels(metadata), ready=_is_ready(status))


def _parse_each(model: type[_Model], value: Any) -> tuple[list[_Model], bool]:
    parsed: list[_Model] = []
    complete = True
    for item in _items(value):
        try:
            parsed.append(model.model_validate(item))
        except ValidationError:
            complete = False
    return parsed, complete


def _parse_report(value: Any) -> NodeEnergyStatus | None:
    if not isinstance(value, Mapping) or not value:
        return None
    try:
        return NodeEnergyStatus.model_validate(value)
    except ValidationError:
        pass  # an agent of another version: keep the entries that are understood
    generation = value.get("observedGeneration")
    reported_at = value.get("reportedAt")
    return NodeEnergyStatus(
        observed_generation=_whole(generation),
        reported_at=reported_at if isinstance(reported_at, str) else None,
        phase="Stopping" if value.get("phase") == "Stopping" else "Running",
        gpus=_parse_each(GpuStatus, value.get("gpus"))[0][:_MAX_GPUS],
        instances=_parse_each(InstanceStatus, value.get("instances"))[0][:_MAX_INSTANCES],
    )


def parse_node_energy(body: Json) -> NodeEnergyView:
    """Return the projection of a NodeEnergy."""
    metadata = _mapping(body.get("metadata"))
    orders, readable = _parse_each(Order, _mapping(body.get("spec")).get("orders"))
    return NodeEnergyView(
        name=str(metadata.get("name", "")),
        uid=str(metadata.get("uid", "")),
        generation=_whole(metadata.get("generation")),
        orders=tuple(sorted(orders, key=lambda order: order.pod_uid)),
        readable=readable,
        status=_parse_report(body.get("status")),
        peer_power=str(_mapping(metadata.get("annotations")).get(PEER_POWER_ANNOTATION) or ""),
        annotated=bool(_mapping(metadata.get("annotations"))),
    )


def parse_profile(body: Json) -> ClockProfileSpec | None:
    """Return the rows of a ClockProfile, or None when they are not understood."""
    try:
        return ClockProfileSpec.model_validate(body.get("spec"))
    except ValidationError:
        return None
