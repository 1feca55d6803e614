"""Writes the CRD manifests: ``python -m wattlock_api.generate DIRECTORY [--check]``."""

import argparse
import sys
from pathlib import Path

import yaml

from wattlock_api.crd import RESOURCES, custom_resource_definition

_HEADER = '# Generated from crds/src/wattlock_api by "make generate". Do not edit.\n'


class _Dumper(yaml.SafeDumper):
    """Dumps without anchors: kubectl shows them to nobody's benefit."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def manifests() -> dict[str, str]:
    """Return file name and content of every CRD."""
    return {
        f"{resource.crd_name}.yaml": _HEADER
        + yaml.dump(custom_resource_definition(resource), Dumper=_Dumper, sort_keys=False, width=120)
        for resource in RESOURCES
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the manifests, or with --check tell which ones differ from the models."""
    parser = argparse.ArgumentParser(prog="python -m wattlock_api.generate", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a file is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for directory in options.directory:
        for name, content in manifests().items():
            path = directory / name
            if path.exists() and path.read_text() == content:
                continue
            stale.append(path)
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
    if options.check and stale:
        sys.stderr.write("out of date, run 'make generate': " + ", ".join(map(str, stale)) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
