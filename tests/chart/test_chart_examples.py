"""The examples of the chart fit the CRDs (a real API server judges them in tests/cluster)."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from wattlock_api.energypolicy import EnergyPolicySpec

pytestmark = [pytest.mark.chart]

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "charts/wattlock/examples").glob("*.yaml"))


def closed(schema: Any) -> Any:
    """Return the schema with unknown fields refused, as the API server does with strict validation."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result["additionalProperties"] = False
    return result


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    crd = yaml.safe_load((ROOT / "crds/energypolicies.wattlock.dev.yaml").read_text())
    schema = closed(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def test_there_are_examples_for_every_choice():
    specs = [yaml.safe_load(path.read_text())["spec"] for path in EXAMPLES]
    assert {spec["mode"] for spec in specs} == {"Observe", "Enforce"}
    clocks = [key for spec in specs for pool in spec["pools"] for key in pool.get("clock", {})]
    assert set(clocks) == {"maxSMClockMHz", "profile", "tune"}
    assert {pool["role"] for spec in specs for pool in spec["pools"]} == {"Decode", "Prefill", "Mixed"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_the_crd(path, validator):
    policy = yaml.safe_load(path.read_text())
    assert [error.message for error in validator.iter_errors(policy)] == []
    assert "namespace" not in policy["metadata"], "the user says where"
    spec = EnergyPolicySpec.model_validate(policy["spec"])
    assert {pool.role for pool in spec.pools} in ({"Decode", "Prefill"}, {"Mixed"}), "decode has its peer"


def test_a_typo_in_an_example_would_be_seen(validator):
    policy = yaml.safe_load(EXAMPLES[0].read_text())
    policy["spec"]["pools"][0]["clocks"] = {}
    assert any("'clocks' was unexpected" in error.message for error in validator.iter_errors(policy))


@pytest.mark.parametrize("document", ["README.md", "templates/NOTES.txt"])
def test_documents_name_examples_that_exist(document):
    text = (ROOT / "charts/wattlock" / document).read_text()
    named = {word.strip("()`") for word in text.replace("](", " ").split() if "examples/" in word}
    assert named
    for word in named:
        assert (ROOT / "charts/wattlock/examples" / word.rsplit("/", 1)[1].rstrip(")")).is_file(), word
