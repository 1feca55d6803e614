"""Asks what is known against the packages in the images:  python dev/supplychain/scan.py SBOM... [--release]

Python packages: the advisories of the package index, by pip-audit. Packages of Debian: whether Debian's archive has
newer versions, which for a stable release means a mended security or other grave bug. What Debian knows and has not
mended yet is not seen. Ends with 0: nothing found; 1: something found; 2: nothing found, but not all could be asked.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packageurl import PackageURL

# A release with an advisory (CVE-2019-10906) that is in no image: an index that says nothing of it has no advisories.
CANARY = ("jinja2", "2.10")
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
SECONDS = 300

Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Report:
    """Found: what a person should act on. Unasked: what nobody answered."""

    found: list[str] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.found else 2 if self.unasked else 0


def packages(documents: list[dict[str, Any]], kind: str) -> dict[str, PackageURL]:
    """Return the packages of one kind in all documents, ours not among them."""
    urls = [
        PackageURL.from_string(part["purl"])
        for document in documents
        for part in document["components"]
        if "purl" in part
    ]
    return {str(url): url for url in urls if url.type == kind and not url.name.startswith("wattlock-")}


def property_of(document: dict[str, Any], name: str) -> str:
    properties = document["metadata"]["component"]["properties"]
    return next((str(entry["value"]) for entry in properties if entry["name"] == name), "")


def run(command: list[str], seconds: int = SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def audit_python(urls: list[PackageURL], report: Report, run: Run = run) -> None:
    """Ask the package index for advisories against each release."""
    asked = [*sorted({(url.name, url.version) for url in urls}), CANARY]
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in asked))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--timeout", "15", "--desc", "off"]
        try:
            result = run(command)
        except subprocess.TimeoutExpired:
            report.unasked.append(f"Python: the package index did not answer within {SECONDS} s")
            return
    read_audit(result.stdout, result.stderr, asked, report)


def read_audit(answer: str, complaint: str, asked: list[tuple[str, str]], report: Report) -> None:
    """Read pip-audit's answer. It calls packages fine that the index knows nothing about, so that is looked at here."""
    try:
        told = {entry["name"]: entry for entry in json.loads(answer)["dependencies"]}
    except (ValueError, KeyError, TypeError):
        last = (complaint.strip().splitlines() or ["no answer"])[-1]
        report.unasked.append(f"Python: pip-audit could not ask the package index: {last[:300]}")
        return
    canary = told.pop(CANARY[0], {})
    names = [name for name, _ in asked if name != CANARY[0]]
    skipped = [name for name in names if "vulns" not in told.get(name, {})]
    if not canary.get("vulns"):
        report.unasked.append(
            f"Python: {len(names)} packages were not checked, for the index that this machine reaches has no "
            f"advisories: not even for {'=='.join(CANARY)}, CVE-2019-10906. Run this where the public index is reached"
        )
    elif skipped:
        report.unasked.append(f"Python: the index has no advisory data for: {', '.join(skipped)}")
    for name in names:
        for known in told.get(name, {}).get("vulns", []):
            mended = ", ".join(known["fix_versions"]) or "no release yet"
            names_of_it = "/".join([known["id"], *known.get("aliases", [])])
            report.found.append(f"Python: {name} {told[name]['version']}: {names_of_it}, mended in {mended}")
    if canary.get("vulns") and not skipped:
        report.clean.append(f"Python: advisories asked for {len(names)} packages")


def check_debian(urls: list[PackageURL], suite: str, report: Report, run: Run = run) -> None:
    """Compare with what Debian's archive has now, its security fixes among it."""
    try:
        sources = run(["dev/debian-sources", suite]).stdout
        if not sources.strip():
            raise FileNotFoundError("this machine has no apt with a source of Debian")
        with tempfile.TemporaryDirectory() as folder:
            offered = ask_debian(Path(folder), sources, sorted({url.name for url in urls}), run)
    except (OSError, subprocess.SubprocessError) as error:
        report.unasked.append(f"Debian {suite}: could not ask: {error}")
        return
    missing = [url.name for url in urls if url.name not in offered]
    if missing:
        report.unasked.append(f"Debian {suite}: the archive does not know: {', '.join(sorted(set(missing)))}")
    for url in urls:
        newer = [
            (version, security)
            for version, security in offered.get(url.name, [])
            if is_newer(version, url.version, run)
        ]
        if newer:
            # The archive lists the newest first.
            version, _ = newer[0]
            why = "with a security fix" if any(security for _, security in newer) else "with a fix"
            report.found.append(f"Debian {suite}: {url.name} {url.version} is old: {version} is there, {why}")
    report.clean.append(f"Debian {suite}: compared {len(urls)} packages with the archive")


def ask_debian(folder: Path, sources: str, names: list[str], run: Run) -> dict[str, list[tuple[str, bool]]]:
    """Return the versions that the archive offers, newest first, each with whether it is a security fix.

    With apt, so that Debian's signatures are checked; in a folder of its own, so that this machine is not changed.
    """
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    (folder / "sources.list").write_text(sources)
    options = {
        "Dir::State": folder / "state", "Dir::Cache": folder / "cache", "Dir::State::status": "/dev/null",
        "Dir::Etc::sourcelist": folder / "sources.list", "Dir::Etc::sourceparts": "-", "APT::Update::Error-Mode": "any",
        "Acquire::Retries": 1, "Acquire::http::Timeout": 20, "Acquire::https::Timeout": 20,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    updated = run(["apt-get", "-q", *words, "update"])
    if updated.returncode != 0:
        reasons = [line for line in updated.stderr.splitlines() if line.startswith("E:")] or ["E: no reason given"]
        raise OSError(reasons[0][2:].strip())
    offered: dict[str, list[tuple[str, bool]]] = {}
    for line in run(["apt-cache", *words, "madison", *names]).stdout.splitlines():
        name, version, source = (part.strip() for part in line.split("|"))
        offered.setdefault(name, []).append((version, "-security" in source))
    return offered


def is_newer(version: str, installed: str, run: Run) -> bool:
    return run(["dpkg", "--compare-versions", version, "gt", installed]).returncode == 0


def check_release(documents: list[dict[str, Any]], report: Report) -> None:
    """Refuse what was not built on a base image that a digest pins."""
    for document in documents:
        name, base = document["metadata"]["component"]["name"], property_of(document, "wattlock:base")
        if not DIGEST.search(base):
            report.found.append(
                f"{name} was built on {base or 'an unknown base'}, which no digest pins: not for release"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask what is known against the packages in the images.")
    parser.add_argument("documents", nargs="+", type=Path, metavar="SBOM", help="what dev/sbom wrote")
    parser.add_argument("--release", action="store_true", help="also refuse images whose base no digest pins")
    options = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in options.documents]
    report = Report()
    audit_python(list(packages(documents, "pypi").values()), report)
    for suite in sorted({property_of(document, "wattlock:debian-suite") for document in documents}):
        these = [document for document in documents if property_of(document, "wattlock:debian-suite") == suite]
        check_debian(list(packages(these, "deb").values()), suite, report)
    if options.release:
        check_release(documents, report)
    for title, lines in (("asked", report.clean), ("NOT ASKED", report.unasked), ("FOUND", report.found)):
        for line in lines:
            print(f"{title}: {line}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
