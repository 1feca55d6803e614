"""The kubectl program, as tests use it."""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Kubectl:
    """The kubectl program against one cluster."""

    kubeconfig: str
    namespace: str = ""

    def run(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl; with ``check`` a failure shows what it printed."""
        scope = ["--namespace", self.namespace] if self.namespace else []
        result = subprocess.run(
            ["kubectl", "--kubeconfig", self.kubeconfig, *scope, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}\n{result.stdout}{result.stderr}")
        return result

    def apply(self, *manifests: dict[str, Any], check: bool = True) -> subprocess.CompletedProcess[str]:
        """Apply manifests as a user would, from standard input."""
        return self.run("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests), check=check)

    def get(self, *what: str) -> dict[str, Any]:
        """Return an object or a list as parsed JSON."""
        parsed: dict[str, Any] = json.loads(self.run("get", *what, "-o", "json").stdout)
        return parsed

    def within(self, namespace: str) -> "Kubectl":
        """Return the same for another namespace."""
        return Kubectl(self.kubeconfig, namespace)
