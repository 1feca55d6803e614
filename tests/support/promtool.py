"""promtool, Prometheus' own judge of metrics pages."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def _path() -> str:
    found = subprocess.run([ROOT / "dev" / "promtool", "--path"], capture_output=True, text=True, timeout=20)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def check_metrics(page: str) -> str:
    """Return what promtool has to say to a page: nothing when all is well. It tells errors and style alike."""
    done = subprocess.run([_path(), "check", "metrics"], input=page, capture_output=True, text=True, timeout=20)
    said = (done.stdout + done.stderr).strip()
    return said or ("" if done.returncode == 0 else f"promtool ended with {done.returncode}")
