"""The scan: what it makes of the answers of registries, and of none."""

import json
import subprocess

import pytest
from packageurl import PackageURL
from scan import CANARY, Report, audit_python, check_debian, check_release, packages, read_audit

KNOWN = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
CANARY_FOUND = {"name": CANARY[0], "version": CANARY[1], "vulns": [KNOWN]}
ASKED = [("spam", "1.0"), ("eggs", "3.0"), CANARY]


def answer(*entries):
    return json.dumps({"dependencies": list(entries), "fixes": []})


def fine(name, version="1.0", vulns=()):
    return {"name": name, "version": version, "vulns": list(vulns)}


def audited(text, complaint=""):
    report = Report()
    read_audit(text, complaint, ASKED, report)
    return report


def test_nothing_known():
    report = audited(answer(fine("spam"), fine("eggs"), CANARY_FOUND))
    assert (report.exit_code, report.found, report.unasked) == (0, [], [])
    assert report.clean == ["Python: advisories asked for 2 packages"]


def test_an_advisory_is_found_with_what_mends_it():
    report = audited(answer(fine("spam", vulns=[KNOWN]), fine("eggs"), CANARY_FOUND))
    assert report.exit_code == 1
    assert report.found == ["Python: spam 1.0: PYSEC-1/CVE-1, mended in 2.0"]


@pytest.mark.parametrize(
    ("text", "complaint", "says"),
    [
        (answer(fine("spam"), fine("eggs"), fine(*CANARY)), "", "has no advisories: not even"),
        (
            answer({"name": "spam", "skip_reason": "not found"}, {"name": "eggs", "skip_reason": "not found"}),
            "",
            "no advisories",
        ),
        (
            answer(fine("spam"), {"name": "eggs", "skip_reason": "not found"}, CANARY_FOUND),
            "",
            "no advisory data for: eggs",
        ),
        (answer(fine("spam"), CANARY_FOUND), "", "no advisory data for: eggs"),
        ("", "Traceback\nConnectionError: no route", "ConnectionError: no route"),
        ("[]", "", "could not ask"),
    ],
)
def test_no_answer_is_never_taken_for_a_good_one(text, complaint, says):
    report = audited(text, complaint)
    assert report.exit_code == 2
    assert says in " ".join(report.unasked)
    assert report.clean == []


def test_an_index_that_does_not_answer_in_time_was_not_asked():
    def slow(command):
        raise subprocess.TimeoutExpired(command, 1)

    report = Report()
    audit_python([PackageURL("pypi", name="spam", version="1")], report, slow)
    assert report.exit_code == 2


def done(stdout="", code=0, stderr=""):
    return subprocess.CompletedProcess([], code, stdout, stderr)


class Archive:
    """Debian's archive behind apt."""

    def __init__(self, lines, sources="deb x bookworm main\n", update=None):
        self.lines, self.sources, self.update = lines, sources, update or done()

    def __call__(self, command):
        match command[0]:
            case "dev/debian-sources":
                return done(self.sources)
            case "apt-get":
                return self.update
            case "apt-cache":
                return done("".join(f"{line}\n" for line in self.lines))
            case _:
                _, _, offered, _, installed = command
                return done(code=0 if offered > installed else 1)


def debian(archive, version="1.1", suite="bookworm"):
    report = Report()
    check_debian([PackageURL("deb", "debian", "libssl3", version)], suite, report, archive)
    return report


LINES = [
    "libssl3 | 1.2 | http://x/debian-security bookworm-security/main amd64 Packages",
    "libssl3 | 1.1 | http://x/debian bookworm/main amd64 Packages",
]


def test_a_package_with_a_security_fix_in_the_archive_is_old():
    report = debian(Archive(LINES))
    assert report.found == ["Debian bookworm: libssl3 1.1 is old: 1.2 is there, with a security fix"]
    assert report.exit_code == 1


def test_the_newest_package_is_fine():
    assert debian(Archive(LINES), "1.2").exit_code == 0


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (Archive(LINES, sources=""), "no apt with a source of Debian"),
        (Archive(LINES, update=done(code=100, stderr="E: Failed to fetch x\n")), "Failed to fetch x"),
        (Archive([]), "does not know: libssl3"),
    ],
)
def test_an_archive_that_does_not_answer_is_never_taken_for_a_good_answer(archive, says):
    report = debian(archive)
    assert report.exit_code == 2
    assert says in " ".join(report.unasked)


def document(name, base, *purls):
    subject = {"name": name, "properties": [{"name": "wattlock:base", "value": base}]}
    return {"metadata": {"component": subject}, "components": [{"purl": purl} for purl in purls] + [{"name": "/etc/x"}]}


def test_an_image_whose_base_no_digest_pins_is_not_released():
    report = Report()
    good = document("good", f"docker.io/library/python:3.11.16@sha256:{'a' * 64}")
    check_release(
        [good, document("bad", "localhost/wattlock-base:1"), document("odd", "x@sha256:short"), document("none", "")],
        report,
    )
    assert [line.split()[0] for line in report.found] == ["bad", "odd", "none"]


def test_our_own_packages_are_not_asked_about():
    told = document("a", "", "pkg:pypi/spam@1", "pkg:pypi/wattlock-api@0.1.0", "pkg:deb/debian/libc6@2")
    assert [url.name for url in packages([told, told], "pypi").values()] == ["spam"]
