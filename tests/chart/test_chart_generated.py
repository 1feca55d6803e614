"""The chart's copies of the CRDs and its table of values are up to date, and a drift would be seen."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chart]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("wattlock_chart_generate", ROOT / "charts" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while it is executed
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the generator reads and writes."""
    shutil.copytree(ROOT / "charts", tmp_path / "charts")
    (tmp_path / "crds").mkdir()
    for path in (ROOT / "crds").glob("*.yaml"):
        shutil.copy(path, tmp_path / "crds")
    return tmp_path


def test_the_committed_files_are_up_to_date(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_a_line_of_a_description_may_begin_with_an_option(generate):
    text = "# -- Ports (kubectl get endpointslice\n# --namespace default).\nports: [443]\n"
    (value,) = generate.documented_values(text)
    assert value.description == "Ports (kubectl get endpointslice --namespace default)."


def test_the_chart_has_exactly_the_crds(generate):
    copies = {p.name: p.read_bytes() for p in (ROOT / "charts/wattlock/files/crds").iterdir()}
    assert copies == {p.name: p.read_bytes() for p in (ROOT / "crds").glob("*.yaml")}


@pytest.mark.parametrize("drift", ["changed CRD", "new CRD", "dropped CRD", "new value"])
def test_a_drift_is_found_and_repaired(generate, checkout, capsys, drift):
    crd = checkout / "crds" / "nodeenergies.wattlock.dev.yaml"
    if drift == "changed CRD":
        crd.write_text(crd.read_text() + "# changed\n")
    elif drift == "new CRD":
        shutil.copy(crd, crd.with_name("others.wattlock.dev.yaml"))
    elif drift == "dropped CRD":
        crd.unlink()
    else:
        values = checkout / "charts/wattlock/values.yaml"
        values.write_text(values.read_text() + "# -- A new thing.\nthing: 1\n")
    assert generate.main(["--check"], checkout) == 1
    assert "out of date, run 'make generate': charts/wattlock/" in capsys.readouterr().err
    assert generate.main(["--check"], checkout) == 1, "--check must not write"
    assert generate.main([], checkout) == 0
    assert generate.main(["--check"], checkout) == 0


def test_a_value_without_a_description_is_refused(generate):
    with pytest.raises(ValueError, match=r"a\.c has no description, write '# -- \.\.\.' above it"):
        generate.documented_values("a:\n  # -- Described.\n  b: 1\n  c: 2\n")


def test_values_are_described_in_order_with_their_defaults(generate):
    text = '# -- First.\na: "x"\nb:\n  # -- Second,\n  # in two lines.\n  c: {d: 1}\n# -- A mapping.\ne:\n  f: 1\n'
    first, second, third = generate.documented_values(text)
    assert (first.path, first.description, first.default) == (("a",), "First.", "x")
    assert (second.path, second.description, second.default) == (("b", "c"), "Second, in two lines.", {"d": 1})
    assert (third.path, third.default) == (("e",), {"f": 1})
    assert generate.table([second]).splitlines()[-1] == '| `b.c` | `{"d": 1}` | Second, in two lines. |'
