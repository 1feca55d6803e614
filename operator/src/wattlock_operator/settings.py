"""Settings of the operator, read once from the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


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
    """WATTLOCK_AGENT_TEMPLATE: a DaemonSet manifest rendered by Helm. Absent: the operator makes no DaemonSets."""
    http_port: int
    """WATTLOCK_HTTP_PORT: /metrics, /healthz and /readyz. Default 8080; 0 takes any free port."""
    identity: str
    """POD_NAME: holder of the lease. Default: operator."""
    deployment: str
    """WATTLOCK_DEPLOYMENT: the operator's own Deployment, for release-all. Default: wattlock-operator."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Return the settings.

    Raises:
        SettingsError: a variable has a value that cannot be used.
    """
    namespace = environment.get("WATTLOCK_NAMESPACE", "") or _own_namespace()
    port_text = environment.get("WATTLOCK_HTTP_PORT", "") or "8080"
    if not port_text.isascii() or not port_text.isdigit() or not 0 <= int(port_text) <= 65535:
        raise SettingsError(f"WATTLOCK_HTTP_PORT is {port_text!r}: write a port number from 0 to 65535, e.g. 8080")
    template = environment.get("WATTLOCK_AGENT_TEMPLATE", "")
    if template and not Path(template).is_file():
        raise SettingsError(
            f"WATTLOCK_AGENT_TEMPLATE is {template!r}, which is no file: mount the chart's agent template there"
        )
    return Settings(
        namespace=namespace,
        agent_namespace=environment.get("WATTLOCK_AGENT_NAMESPACE", "") or namespace,
        agent_template=Path(template) if template else None,
        http_port=int(port_text),
        identity=environment.get("POD_NAME", "") or "operator",
        deployment=environment.get("WATTLOCK_DEPLOYMENT", "") or "wattlock-operator",
    )


def _own_namespace() -> str:
    try:
        return _SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
    except OSError:
        raise SettingsError(
            "WATTLOCK_NAMESPACE is not set and there is no service account: set it to the operator's namespace"
        ) from None
