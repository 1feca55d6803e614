"""Builds and installs the driver library ``libnvidia-ml.so.1``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

LIBRARY_NAME = "libnvidia-ml.so.1"

PRECOMPILED = Path("/usr/local/lib/wattlock-simulator") / LIBRARY_NAME
"""Where the container image keeps the compiled library."""

SOURCES = Path(__file__).resolve().parents[2] / "driver"
"""The C sources in a source checkout; absent in an installed wheel."""

_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY_NAME}")
_COMPILE_TIMEOUT_SECONDS = 60


class DriverError(Exception):
    """The library could not be built or installed; the message says what to do."""


def build(directory: Path) -> Path:
    """Compiles the library into a directory.

    Args:
        directory: where ``libnvidia-ml.so.1`` is put; made if absent.

    Returns:
        Path of the library.

    Raises:
        DriverError: no sources, no ``gcc`` or a compiler error.
    """
    sources = sorted(SOURCES.glob("*.c"))
    if not sources:
        raise DriverError(f"no C sources in {SOURCES}: build from a source checkout, or use the container image")
    compiler = shutil.which("gcc")
    if compiler is None:
        raise DriverError("gcc not found: install it, or use the container image, which has the library compiled")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / LIBRARY_NAME
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
        output = Path(scratch) / LIBRARY_NAME
        command = [compiler, *_FLAGS, "-o", str(output), *map(str, sources)]
        done = subprocess.run(  # noqa: S603 - a fixed command on our own sources
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_SECONDS, check=False
        )
        if done.returncode != 0:
            raise DriverError(f"gcc failed:\n{done.stderr}")
        output.replace(target)  # a new inode: processes that have the old one loaded keep it
    return target


def install(directory: Path) -> Path:
    """Puts the library into the directory that agent and serving pods mount.

    The image's compiled library is copied; without it the library is built from the sources.

    Raises:
        DriverError: neither a compiled library nor a way to build one.
        OSError: the directory cannot be written.
    """
    if not PRECOMPILED.is_file():
        return build(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / LIBRARY_NAME
    scratch = directory / f".{LIBRARY_NAME}.{os.getpid()}"
    shutil.copyfile(PRECOMPILED, scratch)
    scratch.chmod(0o755)
    scratch.replace(target)
    return target
