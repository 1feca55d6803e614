"""All that goes into an image is pinned, and the pins agree."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
STEPS = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()


def test_the_base_image_is_pinned_by_digest_and_every_stage_starts_from_it():
    (base,) = [line for line in STEPS if line.startswith("ARG BASE_IMAGE=")]
    assert re.fullmatch(r"ARG BASE_IMAGE=docker\.io/library/python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    stages = [line.split() for line in STEPS if line.startswith("FROM ")]
    names = {stage[3] for stage in stages}
    assert {stage[1] for stage in stages} - names <= {"${BASE_IMAGE}", "scratch"}
    origins = {stage[3]: stage[1] for stage in stages}
    assert (origins["operator"], origins["agent"]) == ("scratch", "scratch")


def test_every_python_package_is_installed_with_its_hash():
    installs = [part for line in STEPS if line.startswith("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 7
    for install in installs:
        ours = "--no-index" in install and "--no-deps" in install
        assert ours or ("--require-hashes" in install and "--only-binary :all:" in install), install


def test_uv_and_hatchling_come_from_the_lock():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {package["name"]: package for package in lock["package"]}
    text = (ROOT / "dev/supplychain/build-requirements.txt").read_text()
    requirements = re.findall(r"^([\w.-]+)==(\S+) ", text, re.MULTILINE)
    assert {"uv", "hatchling"} <= {name for name, _ in requirements}
    for name, version in requirements:
        assert locked[name]["version"] == version
        hashes = {wheel["hash"] for wheel in locked[name]["wheels"]}
        assert hashes & set(re.findall(r"sha256:\w{64}", text)) == hashes


def test_packages_of_debian_are_installed_for_the_simulators_compiler_alone():
    stage, found = "", []
    for line in STEPS:
        stage = line.split()[-1] if line.startswith("FROM ") else stage
        if "apt-get install" in line:
            found.append(stage)
    assert found == ["compiler"]
