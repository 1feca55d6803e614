"""Helm on the chart, without a cluster."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "charts" / "wattlock"


@dataclass(frozen=True)
class Helm:
    """The helm program and our chart."""

    program: str
    chart: Path = CHART

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run helm; with ``check`` a failure shows what it printed."""
        result = subprocess.run([self.program, *arguments], capture_output=True, text=True, timeout=50)
        if check and result.returncode != 0:
            raise AssertionError(f"helm {' '.join(arguments)}\n{result.stdout}{result.stderr}")
        return result

    def template(
        self, *arguments: str, release: str = "wattlock", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Render the chart."""
        return self.run("template", release, str(self.chart), "--namespace", "wattlock-system", *arguments, check=check)

    def render(self, *sets: str, release: str = "wattlock") -> list[dict[str, Any]]:
        """Return the rendered objects; each of ``sets`` is a KEY=VALUE."""
        return [document for document in yaml.safe_load_all(_rendered(self, sets, release)) if document]


@cache
def _rendered(helm: Helm, sets: tuple[str, ...], release: str) -> str:
    """Render every combination once: helm is the slow part of these tests."""
    return helm.template(*(word for pair in sets for word in ("--set", pair)), release=release).stdout


@pytest.fixture(scope="session")
def helm() -> Helm:
    """The helm that WATTLOCK_HELM names, else the one on the PATH."""
    program = os.environ.get("WATTLOCK_HELM") or shutil.which("helm")
    if not program:
        pytest.fail("no helm: run 'dev/programs/build' and put it on the PATH, or set WATTLOCK_HELM")
    return Helm(program)
