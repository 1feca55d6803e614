"""Writes the generated protobuf modules of the agent: ``python agent/generate_protos.py [--check]``."""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).parent / "src"
PROTOS = ("wattlock_agent/holders/podresources.proto",)


def generate(directory: Path) -> list[Path]:
    """Write the modules under ``directory`` and return their paths relative to it."""
    written = []
    for proto in PROTOS:
        arguments = [f"--proto_path={SOURCES}", f"--python_out={directory}", f"--pyi_out={directory}", proto]
        if protoc.main(["protoc", *arguments]) != 0:
            raise SystemExit(f"protoc refused {proto}")
        module = Path(proto).with_suffix("")
        written += [module.with_name(f"{module.name}_pb2{ending}") for ending in (".py", ".pyi")]
    return written


def main(arguments: list[str] | None = None) -> int:
    """Generate into the source tree, or with --check tell what differs from it."""
    parser = argparse.ArgumentParser(prog="python agent/generate_protos.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a file is out of date")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        stale = []
        for path in generate(Path(scratch)):
            content = (Path(scratch) / path).read_bytes()
            target = SOURCES / path
            if target.exists() and target.read_bytes() == content:
                continue
            stale.append(target)
            if not options.check:
                target.write_bytes(content)
    if options.check and stale:
        sys.stderr.write("out of date, run 'python agent/generate_protos.py': " + ", ".join(map(str, stale)) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
