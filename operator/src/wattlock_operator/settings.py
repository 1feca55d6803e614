"""Settings of the operator, read once from the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from wattlock_api.energypolicy import Placement

from wattlock_operator.sharing import placement_problem

_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_PLACEMENTS = TypeAdapter(tuple[Placement, ...])


class SettingsError(ValueError):
    """A setting is unusable. The message names the variable and says what to write."""


@dataclass(frozen=True)
class Settings:
    """What the operator is told from outside; the chart sets all of it."""

    namespace: str
    """WATTLOCK_NAMESPACE: the operator's own namespace, where its lease lives."""
    agent_namespace: str
    """WATTLOCK_AGENT_NAMESPACE: where the agents' DaemonSets live. Default: the own namespace."""
    agent_template: Path | None
    """WATTLOCK_AGENT_TEMPLATE: a DaemonSet manifest rendered by Helm. Absent: the operator makes no DaemonSets. A file
    that cannot be used is told by every policy's Ready condition (AgentTemplateInvalid)."""
    host_network_namespaces: frozenset[str]
    """WATTLOCK_HOST_NETWORK_NAMESPACES: names of namespaces, parted by commas, whose pods with the host's network are
    asked for their serving metrics. Default: none."""
    allowed_placements: tuple[Placement, ...]
    """WATTLOCK_ALLOWED_PLACEMENTS: a JSON list of objects as in spec.placement of a policy, with the same defaults. A
    policy may write one of them, or one that goes less far. Default: an empty list, any placement."""
    http_port: int
    """WATTLOCK_HTTP_PORT: /metrics, /healthz and /readyz. Default 8080; 0 takes any free port."""
    identity: str
    """POD_NAME: holder of the lease. Default: operator."""
    deployment: str
    """WATTLOCK_DEPLOYMENT: the operator's own Deployment, for release-all. Default: wattlock-operator."""
    release_timeout_seconds: int
    """WATTLOCK_RELEASE_TIMEOUT_SECONDS: how long release-all waits. Default 240."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Return the settings.

    Raises:
        SettingsError: a variable has a value that cannot be used.
    """
    namespace = environment.get("WATTLOCK_NAMESPACE", "") or _own_namespace()
    template = environment.get("WATTLOCK_AGENT_TEMPLATE", "")
    return Settings(
        namespace=namespace,
        agent_namespace=environment.get("WATTLOCK_AGENT_NAMESPACE", "") or namespace,
        agent_template=Path(template) if template else None,
        host_network_namespaces=_names(environment.get("WATTLOCK_HOST_NETWORK_NAMESPACES", "")),
        allowed_placements=_placements(environment, "WATTLOCK_ALLOWED_PLACEMENTS"),
        http_port=_number(environment, "WATTLOCK_HTTP_PORT", 8080, 65535),
        identity=environment.get("POD_NAME", "") or "operator",
        deployment=environment.get("WATTLOCK_DEPLOYMENT", "") or "wattlock-operator",
        release_timeout_seconds=_number(environment, "WATTLOCK_RELEASE_TIMEOUT_SECONDS", 240, 86400),
    )


def _number(environment: Mapping[str, str], variable: str, default: int, highest: int) -> int:
    text = environment.get(variable, "") or str(default)
    if not text.isascii() or not text.isdigit() or not 0 <= int(text) <= highest:
        raise SettingsError(f"{variable} is {text!r}: write a number from 0 to {highest}, e.g. {default}")
    return int(text)


def _names(text: str) -> frozenset[str]:
    return frozenset(name for part in text.split(",") if (name := part.strip()))


def _placements(environment: Mapping[str, str], variable: str) -> tuple[Placement, ...]:
    try:
        found = _PLACEMENTS.validate_json(environment.get(variable, "") or "[]")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingsError(
            f"{variable} is unusable ({'.'.join(map(str, first['loc']))}: {first['msg']}): write a JSON list such as "
            '[{"nodeSelector": {"nvidia.com/gpu.present": "true"}, "runtimeClassName": "nvidia"}]'
        ) from None
    problems = [problem for placement in found if (problem := placement_problem(placement))]
    if problems:
        raise SettingsError(f"{variable} is unusable: {problems[0]}")
    return found


def _own_namespace() -> str:
    try:
        return _SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
    except OSError:
        raise SettingsError(
            "WATTLOCK_NAMESPACE is not set and there is no service account: set it to the operator's namespace"
        ) from None
