"""The images of operator and agent: Python, what it loads, and nothing that helps an intruder."""

import re
import stat
import subprocess
from functools import cache
from pathlib import Path

import pytest
import sbom
from image_archive import Image, read_image
from workloads import AGENT_LABEL, OPERATOR_LABEL, SYSTEM, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
INTERPRETER = re.compile(r"usr/(local/)?bin/python3\.\d+")
LIBRARY = re.compile(r".*\.so(\.[\d.]+)?")
#: What no package owns: written while building, or left of a package whose list is not kept.
WRITTEN = {
    "app/.venv/pyvenv.cfg", "etc/group", "etc/ld.so.cache", "etc/nsswitch.conf", "etc/passwd",
}  # fmt: skip
BOTH = pytest.mark.parametrize("name", ["operator", "agent"])


@cache
def image(name: str) -> Image:
    listed = subprocess.run([ROOT / "dev/images", "--list"], capture_output=True, text=True, check=True, timeout=20)
    (archive,) = [line for line in listed.stdout.splitlines() if line.endswith(f"wattlock-{name}.tar")]
    return read_image(Path(archive))


@BOTH
def test_nothing_but_python_and_ours_can_be_started(name):
    programs = {path for path, file in image(name).files.items() if file.is_executable and not LIBRARY.fullmatch(path)}
    (interpreter,) = [path for path in programs if INTERPRETER.fullmatch(path)]
    assert programs - {interpreter} == {f"app/.venv/bin/wattlock-{name}"}
    folders = {str(Path(path).parent) for path in image(name).files if re.search(r"(^|/)s?bin/", path)}
    assert folders <= {"usr/bin", "usr/local/bin", "app/.venv/bin"}
    links = {path for path, file in image(name).files.items() if file.is_link and re.search(r"(^|/)s?bin/", path)}
    assert all(Path(path).name.startswith("python") for path in links)


@BOTH
def test_nobody_becomes_somebody_else_and_nothing_is_writable(name):
    files = image(name).files.values()
    assert [file.path for file in files if file.is_setuid] == []
    writable = [file.path for file in files if not file.is_link and file.mode & stat.S_IWOTH]
    assert writable == ["tmp"]
    kinds = {file.kind for file in files}
    assert kinds <= {b"0", b"1", b"2", b"5"}, "devices or pipes"


@BOTH
def test_it_starts_our_program_without_a_shell_as_the_user_that_the_page_says(name):
    config = image(name).config["config"]
    assert config["Entrypoint"] == [f"wattlock-{name}"]
    assert config.get("Cmd") in (None, [])
    assert config["User"] == {"operator": "65532:65532", "agent": "0:0"}[name]
    assert [line.split(":")[0] for line in image(name).text("etc/passwd").splitlines()] == ["root", "wattlock"]


@BOTH
def test_nothing_installs_or_compiles_packages(name):
    parts = {part for path in image(name).files for part in Path(path).parts}
    assert parts & {"pip", "setuptools", "wheel", "ensurepip", "distutils", "apt", "dpkg.cfg", "gcc"} == set()
    settings = {path for path in image(name).files if Path(path).name in ("pip.conf", "uv.toml", "ca-certificates.crt")}
    assert settings == set(), "settings of the machine that built it"


@pytest.mark.parametrize(("name", "megabytes"), [("operator", 225), ("agent", 95)])
def test_it_is_small(name, megabytes):
    assert image(name).size_bytes / 1e6 < megabytes


@BOTH
def test_the_list_of_what_is_in_it_is_whole_and_valid(name, tmp_path):
    document, unclaimed = sbom.list_image(image(name))
    assert unclaimed <= WRITTEN | {"etc/ld.so.conf", "etc/ld.so.conf.d/libc.conf"}
    sbom.write(document, tmp_path / "document.json")
    python = {(part.name, part.version): part for part in document.components if part.purl and part.purl.type == "pypi"}
    export = [
        "dev/uv",
        "export",
        "--quiet",
        "--frozen",
        "--no-dev",
        "--no-emit-workspace",
        "--no-header",
        "--no-annotate",
    ]
    wanted = subprocess.run(
        [*export, "--package", f"wattlock-{name}"], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    locked = re.findall(r"^([\w.-]+)==([^\s;]+)(.*)$", wanted.stdout, re.MULTILINE)
    demanded = {(package, version) for package, version, condition in locked if ";" not in condition}
    others = {(package, version) for package, version, condition in locked if ";" in condition}
    ours = {key for key in python if key[0].startswith("wattlock-")}
    assert demanded <= set(python) - ours <= demanded | others
    assert {key[0] for key in ours} == {"wattlock-api", f"wattlock-{name}"}
    assert [key for key, part in python.items() if not part.hashes and key not in ours] == []
    debian = {part.name: part for part in document.components if part.purl and part.purl.type == "deb"}
    assert "libc.so.6" in {Path(file.name).name for file in debian["libc6"].components}
    assert {"bash", "dash", "apt", "dpkg", "perl-base", "coreutils", "util-linux", "login"} & set(debian) == set()


@pytest.mark.parametrize("label", [OPERATOR_LABEL, AGENT_LABEL])
def test_a_running_pod_has_no_shell(label, serving_pods, good_policy, kubectl):
    serving_pods.kubectl.apply(good_policy)  # agents are there while a policy is
    system = kubectl.within(SYSTEM)
    running = lambda: system.get("pods", "-l", label, "--field-selector", "status.phase=Running")["items"]  # noqa: E731
    pod = eventually("it runs", running, 60)[0]["metadata"]["name"]
    assert system.run("exec", pod, "--", "python", "-c", "print(6 * 7)").stdout.strip() == "42"
    for program in ("sh", "bash", "/bin/sh", "cat", "pip", "apt-get", "mount", "perl"):
        refused = system.run("exec", pod, "--", program, check=False)
        assert refused.returncode != 0
        assert "not found" in refused.stderr or "no such file" in refused.stderr
