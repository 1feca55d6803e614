"""The traps of this repository's layout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("directory", ["operator", "agent", "crds", "simulator"])
def test_a_top_level_folder_is_no_package(directory):
    # operator/__init__.py would shadow the standard library's operator for every program started here
    assert not (ROOT / directory / "__init__.py").exists()


def test_the_standard_library_operator_is_found_from_the_root():
    code = "import operator; assert operator.itemgetter(0)([1]) == 1"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20).returncode == 0


def test_test_folders_are_no_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_test_files_have_unique_names():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_module_is_longer_than_a_reader_can_hold():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("operator", "agent", "crds", "simulator")
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.endswith("_pb2.py") and (lines := len(path.read_text().splitlines())) > 450
    }
    assert long == {}
