"""Generates the Python messages from the .proto file. Needs grpcio-tools, which is a development dependency."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_TIMEOUT_SECONDS = 60


def main() -> int:
    """Runs protoc; the files land beside the .proto file."""
    root = Path(__file__).resolve().parents[2]
    name = "wattlock_simulator/proto/deviceplugin.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--pyi_out=.", name]
    return subprocess.run(command, cwd=root, check=False, timeout=_TIMEOUT_SECONDS).returncode  # noqa: S603 - fixed


if __name__ == "__main__":
    sys.exit(main())
