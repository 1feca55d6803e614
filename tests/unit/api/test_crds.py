"""The generated CRDs: equal to the models, structural, bounded, described."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from wattlock_api import generate
from wattlock_api.base import DecimalString, PositiveDecimalString, api_name, decimal_string, parse_timestamp, timestamp
from wattlock_api.crd import RESOURCES, custom_resource_definition, structural
from wattlock_api.energypolicy import EnergyPolicySpec
from wattlock_api.nodeenergy import NodeEnergyStatus
from wattlock_api.policystatus import EnergyPolicyStatus

CRDS = Path(__file__).parents[3] / "crds"


def schemas():
    for resource in RESOURCES:
        version = custom_resource_definition(resource)["spec"]["versions"][0]
        yield pytest.param(version["schema"]["openAPIV3Schema"], id=resource.kind)


def walk(schema: dict[str, Any], path: str = ""):
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from walk(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{path}[]")


def test_the_committed_manifests_are_up_to_date():
    assert generate.main([str(CRDS), "--check"]) == 0


def test_a_stale_manifest_is_found_and_rewritten(tmp_path, capsys):
    assert generate.main([str(tmp_path), "--check"]) == 1
    assert "run 'make generate'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert generate.main([str(tmp_path)]) == 0
    assert generate.main([str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize("schema", [*schemas()])
def test_every_field_has_a_type_and_a_description(schema):
    for path, field in walk(schema):
        assert "type" in field or field.get("x-kubernetes-int-or-string"), path
        if not path.endswith("[]") and path not in ("", ".metadata"):
            assert field.get("description"), path


@pytest.mark.parametrize("schema", [*schemas()])
def test_every_list_map_and_free_text_that_people_write_is_bounded(schema):
    # CEL's cost estimate and etcd's size limit both need bounds
    for path, field in walk(schema["properties"]["spec"]):
        if field.get("x-kubernetes-int-or-string"):
            assert field.get("x-kubernetes-validations"), path
            continue
        if field["type"] == "array":
            assert "maxItems" in field, path
        if field["type"] == "string" and "enum" not in field and field.get("format") != "date-time":
            assert "maxLength" in field, path
        if "additionalProperties" in field:
            assert "maxProperties" in field, path


def test_a_union_is_refused_by_the_generator():
    with pytest.raises(ValueError, match="no place for this union"):
        structural({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {})


def test_fractional_bounds_become_rules_because_the_api_server_truncates_them():
    verification = EnergyPolicySpec.model_json_schema()["$defs"]["Verification"]
    share = structural(verification, {})["properties"]["controlShare"]
    assert "minimum" not in share
    assert share["x-kubernetes-validations"][0]["rule"] == "self >= 0.02 && self <= 0.5"


@pytest.mark.parametrize(
    ("python_name", "name"),
    [
        ("max_sm_clock_mhz", "maxSMClockMHz"),
        ("cap_mhz", "capMHz"),
        ("price_per_kwh", "pricePerKWh"),
        ("grams_co2_per_kwh", "gramsCO2PerKWh"),
        ("saved_kg_co2", "savedKgCO2"),
        ("metrics_url", "metricsURL"),
        ("clamped_gpus", "clampedGPUs"),
        ("gpus", "gpus"),
        ("ci95", "ci95"),
    ],
)
def test_units_are_spelled_as_usual(python_name, name):
    assert api_name(python_name) == name


def test_unknown_fields_of_a_newer_version_are_ignored():
    assert NodeEnergyStatus.model_validate({"observedGeneration": 3, "later": {"a": 1}}).observed_generation == 3


def test_absent_numbers_stay_absent():
    assert "measuredAt" not in EnergyPolicyStatus().to_api()


def test_decimal_strings_have_no_exponent():
    assert decimal_string(1e-7, 3) == "0.000"
    assert decimal_string(123456789.5, 1) == "123456789.5"


@pytest.mark.parametrize("value", [9.9e14, 999_999_999_999_999.9, 1e15, 2e15, 1e22, 1e300, math.inf])
@pytest.mark.parametrize("places", [0, 1, 9])
def test_a_decimal_string_never_has_more_digits_than_the_schema_allows(value, places):
    accepted = TypeAdapter(PositiveDecimalString).validate_python(decimal_string(value, places))
    assert float(accepted) == min(value, 999_999_999_999_999)
    assert TypeAdapter(DecimalString).validate_python(decimal_string(-value, places)) == f"-{accepted}"


def test_what_is_no_number_is_published_as_none():
    with pytest.raises(ValidationError):
        TypeAdapter(PositiveDecimalString).validate_python(decimal_string(math.nan, 1))


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "0000-01-01T00:00:00Z"])
def test_a_time_that_could_not_be_written_again_is_not_read(text):
    with pytest.raises(ValueError, match="out of range"):
        parse_timestamp(text)


def test_timestamps_survive_a_round_trip():
    assert timestamp(0) == "1970-01-01T00:00:00Z"
    assert parse_timestamp(timestamp(1795377240.9)) == 1795377240


def test_manifests_are_plain_yaml_without_anchors():
    for content in generate.manifests().values():
        assert "&id" not in content
        assert yaml.safe_load(content)["kind"] == "CustomResourceDefinition"
