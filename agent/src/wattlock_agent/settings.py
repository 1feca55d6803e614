"""The agent's settings, from environment variables that the operator sets on the DaemonSet."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wattlock_api.constants import (
    MAX_STALE_ORDERS_SECONDS,
    MIN_STALE_ORDERS_SECONDS,
    STALE_ORDERS_SECONDS,
    Mode,
)

from wattlock_agent.journal_file import KERNEL_BOOT_ID

DEFAULT_STATE_DIRECTORY = "/var/lib/wattlock"
DEFAULT_KUBELET_SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
DEFAULT_SERVICE_ACCOUNT_DIRECTORY = "/var/run/secrets/kubernetes.io/serviceaccount"
DEFAULT_HTTP_PORT = "9400"

_OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9.:\[\]-]{1,253}")


class SettingsError(Exception):
    """Settings that cannot be used. The message names each variable and what to write."""


@dataclass(frozen=True)
class Settings:
    """What the process was told at its start."""

    node_name: str
    pod_name: str
    operator_namespace: str
    """Namespace of the operator's lease."""
    state_directory: Path
    """Directory of the host in which the journal lies."""
    kubelet_socket: Path
    http_port: int
    mode: Mode
    """Observe: this process never writes to a GPU, whatever its orders say."""
    api_server: str
    """Base URL of the Kubernetes API."""
    service_account_directory: Path
    """Holds ``token`` and ``ca.crt``."""
    stale_orders_seconds: int = STALE_ORDERS_SECONDS
    """GPUs are released when API server or operator have been silent for longer."""
    boot_id_file: Path = Path(KERNEL_BOOT_ID)


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Return the settings in ``environment``.

    Raises:
        SettingsError: one or more variables are missing or malformed; all of them are named.
    """
    problems: list[str] = []

    def name(variable: str, remedy: str) -> str:
        value = environment.get(variable, "")
        if not _OBJECT_NAME.fullmatch(value):
            problems.append(f"{variable}={value!r} is no Kubernetes object name: {remedy}")
        return value

    def path(variable: str, default: str) -> Path:
        value = environment.get(variable, default)
        if not value.startswith("/"):
            problems.append(f"{variable}={value!r} is no absolute path, e.g. {default}")
        return Path(value)

    def seconds(variable: str, default: int, low: int, high: int) -> int:
        value = environment.get(variable, str(default))
        if not (value.isascii() and value.isdecimal() and len(value) <= 9 and low <= int(value) <= high):
            problems.append(f"{variable}={value!r}: write a number of seconds from {low} to {high}, e.g. {default}")
            return default
        return int(value)

    def port(variable: str, default: str) -> int:
        value = environment.get(variable, default)
        if not (value.isascii() and value.isdecimal() and len(value) <= 5 and 1 <= int(value) <= 65535):
            problems.append(f"{variable}={value!r} is no TCP port: write a number from 1 to 65535, e.g. {default}")
            return 0
        return int(value)

    mode_text = environment.get("WATTLOCK_MODE", Mode.OBSERVE.value)
    if mode_text not in tuple(Mode):
        problems.append(f"WATTLOCK_MODE={mode_text!r}: write Observe or Enforce")
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    if not _HOST.fullmatch(host):
        problems.append(f"KUBERNETES_SERVICE_HOST={host!r} is no host: run as a pod, the kubelet sets it")
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    settings = Settings(
        node_name=name("NODE_NAME", "take it from spec.nodeName with fieldRef"),
        pod_name=name("POD_NAME", "take it from metadata.name with fieldRef"),
        operator_namespace=name("WATTLOCK_NAMESPACE", "the namespace that the operator runs in"),
        state_directory=path("WATTLOCK_STATE_DIR", DEFAULT_STATE_DIRECTORY),
        kubelet_socket=path("WATTLOCK_KUBELET_SOCKET", DEFAULT_KUBELET_SOCKET),
        http_port=port("WATTLOCK_HTTP_PORT", DEFAULT_HTTP_PORT),
        mode=Mode(mode_text) if mode_text in tuple(Mode) else Mode.OBSERVE,
        api_server=f"https://{host}:{port('KUBERNETES_SERVICE_PORT', '443')}",
        service_account_directory=path("WATTLOCK_SERVICE_ACCOUNT_DIR", DEFAULT_SERVICE_ACCOUNT_DIRECTORY),
        stale_orders_seconds=seconds(
            "WATTLOCK_STALE_ORDERS_SECONDS", STALE_ORDERS_SECONDS, MIN_STALE_ORDERS_SECONDS, MAX_STALE_ORDERS_SECONDS
        ),
        boot_id_file=path("WATTLOCK_BOOT_ID_FILE", KERNEL_BOOT_ID),
    )
    if problems:
        raise SettingsError("; ".join(problems))
    return settings
