"""Generates what the chart repeats: ``python charts/generate.py [--check]``.

The CRDs are copied from ``crds/`` (Helm packs only what lies inside the chart, and a symbolic link does not survive on
every system), and the table of values in the chart's README is made from the comments in ``values.yaml``.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "wattlock"
BEGIN = "<!-- values:begin (charts/generate.py) -->\n"
END = "<!-- values:end -->"
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][A-Za-z0-9]*):(?P<rest> .*)?$")
_INDENT = 2


@dataclass(frozen=True)
class Value:
    """One documented key of values.yaml."""

    path: tuple[str, ...]
    description: str
    default: Any


def documented_values(text: str) -> list[Value]:
    """Return the keys with a ``# --`` comment, in the order of the file.

    A key without one must be a mapping whose keys have theirs; below a documented mapping nothing more is expected.

    Raises:
        ValueError: a key has no description.
    """
    defaults = yaml.safe_load(text)
    values: list[Value] = []
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            if stripped.startswith("# -- "):
                comment = [stripped.removeprefix("# -- ").strip()]
            elif comment:
                comment.append(stripped.removeprefix("#").strip())
            continue
        match = _KEY.match(line)
        if match:
            path = [*path[: len(match["indent"]) // _INDENT], match["key"]]
            inside = any(value.path == tuple(path[: len(value.path)]) for value in values)
            default = _at(defaults, path)
            if comment and not inside:
                values.append(Value(tuple(path), " ".join(comment), default))
            elif not inside and (match["rest"] or not isinstance(default, dict)):
                raise ValueError(f"values.yaml: {'.'.join(path)} has no description, write '# -- ...' above it")
        comment = []
    return values


def _at(tree: Any, path: list[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def table(values: list[Value]) -> str:
    """Return the values as a Markdown table."""
    rows = ["| value | default | description |", "| --- | --- | --- |"]
    for value in values:
        default = json.dumps(value.default).replace("|", r"\|")
        description = value.description.replace("|", r"\|")
        rows.append(f"| `{'.'.join(value.path)}` | `{default}` | {description} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str, values: list[Value]) -> str:
    """Return the README with the table between its marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(values) + END + after


def outputs(root: Path = ROOT) -> dict[Path, str | None]:
    """Return what each generated file should hold; None: it should not be there."""
    chart = root / "charts" / "wattlock"
    copies = chart / "files" / "crds"
    result: dict[Path, str | None] = dict.fromkeys(copies.glob("*.yaml"))
    result |= {copies / path.name: path.read_text() for path in sorted((root / "crds").glob("*.yaml"))}
    readme = chart / "README.md"
    result[readme] = with_table(readme.read_text(), documented_values((chart / "values.yaml").read_text()))
    return result


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the files, or with --check tell which ones are out of date."""
    parser = argparse.ArgumentParser(prog="python charts/generate.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a file is out of date")
    options = parser.parse_args(arguments)
    wanted = outputs(root)
    stale = [path for path, text in wanted.items() if (path.read_text() if path.exists() else None) != text]
    if options.check:
        for path in stale:
            sys.stderr.write(f"out of date, run 'make generate': {path.relative_to(root)}\n")
        return 1 if stale else 0
    for path in stale:
        text = wanted[path]
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
