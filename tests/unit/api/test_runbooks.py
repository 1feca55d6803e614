"""docs/runbooks has a page for every condition, and its commands name fields that our CRDs have."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from wattlock_api.constants import FORCE_RELEASE_ANNOTATION, ConditionType
from wattlock_operator.conditions import _NOT_READY

ROOT = Path(__file__).parents[3]
BOOKS = ROOT / "docs" / "runbooks"
PAGES = {path.name: path.read_text() for path in BOOKS.glob("*.md")}
KINDS = {"epol": "energypolicies", "energypolicy": "energypolicies", "nodeenergy": "nodeenergies"}
#: Of every object; the schemas of the CRDs do not list them.
METADATA = {"metadata": {"properties": {"generation": {"type": "integer"}, "name": {"type": "string"}}}}


def file_of(condition: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", condition).lower() + ".md"


@cache
def schema(plural: str) -> dict[str, Any]:
    crd = yaml.safe_load((ROOT / "crds" / f"{plural}.wattlock.dev.yaml").read_text())
    (version,) = crd["spec"]["versions"]
    found = version["schema"]["openAPIV3Schema"]
    return {"properties": {**found["properties"], **METADATA}}


def walk(node: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the schema at a path such as ``.status.gpus[*].uuid``; filters must name a field of the items."""
    for step in re.findall(r"\.(\w+)|\[([^\]]*)\]", path):
        name, index = step
        if name:
            assert name in node.get("properties", {}), f"{path}: no {name}"
            node = node["properties"][name]
        else:
            assert "items" in node, f"{path}: [{index}] of something that is no list"
            node = node["items"]
            if index != "*":
                match = re.fullmatch(r'\?\(@\.(\w+)==(?:"(\w+)"|true)\)', index)
                assert match, f"{path}: [{index}] is not understood"
                field = node["properties"][match[1]]
                if match[2] is None:
                    assert field["type"] == "boolean", path
                else:
                    assert match[2] in field.get("enum", [*ConditionType]), path
    return node


def used(plural: str, template: str) -> Iterator[str]:
    """Yield the paths of a jsonpath template, and fail where the CRD does not have them."""
    base = root = schema(plural)
    for expression in re.findall(r'\{("(?:[^"\\]|\\.)*"|[^{}]*)\}', template):
        if expression.startswith("range "):
            base = walk(root, expression.removeprefix("range ").removesuffix("[*]"))
            base = base.get("items", base)
        elif expression == "end":
            base = root
        elif not expression.startswith('"'):
            walk(base, expression)
        yield expression


def commands() -> list[tuple[str, str, str]]:
    """Return page, plural of the resource and jsonpath of every command that has one."""
    form = re.compile(r"kubectl (?:-n NAMESPACE )?get (\w+) (?:NAME|NODE) -o jsonpath='([^']*)'")
    return [(page, KINDS[kind], path) for page, text in PAGES.items() for kind, path in form.findall(text)]


def test_every_condition_has_a_page_in_the_index_and_no_page_is_lost():
    wanted = {file_of(str(condition)): str(condition) for condition in ConditionType}
    assert set(PAGES) - {"README.md"} == set(wanted)
    for name, condition in wanted.items():
        assert f"| `{condition}` |" in PAGES["README.md"]
        assert f"({name})" in PAGES["README.md"]
        text = PAGES[name]
        assert condition in text.splitlines()[0] or condition == "Verified"
        assert [word for word in ("**Means:**", "**Look:**", "**Do", "**Goes away**") if word not in text] == [], name


def test_every_reason_for_not_being_ready_is_on_its_page():
    assert {str(reason) for reason in _NOT_READY} - set(re.findall(r"`(\w+)`", PAGES["ready.md"])) == set()


def test_every_jsonpath_is_looked_at():
    assert len(commands()) == sum(text.count("jsonpath=") for text in PAGES.values())


@pytest.mark.parametrize(("page", "plural", "template"), commands())
def test_fields_of_commands_exist(page, plural, template):
    assert list(used(plural, template))


def test_a_field_that_does_not_exist_would_be_found():
    for template in ("{.status.joules}", "{range .status.pools[*]}{.joules}{end}", "{.status.pools[?(@.x==true)]}"):
        with pytest.raises((AssertionError, KeyError)):
            list(used("energypolicies", template))


def test_fields_that_the_text_names_exist():
    for page, text in PAGES.items():
        for path in re.findall(r"`(\.(?:status|spec)[\w.\[\]*]*)`", text):
            plurals = ("energypolicies", "nodeenergies")
            found = []
            for plural in plurals:
                try:
                    found.append(walk(schema(plural), path))
                except AssertionError:
                    continue
            assert found, f"{page}: {path}"


def test_patches_are_what_the_schema_takes():
    patches = [patch for text in PAGES.values() for patch in re.findall(r"-p '([^']*)'", text)]
    assert patches
    for patch in patches:
        value, path = json.loads(patch)["spec"], ".spec"
        while isinstance(value, dict):
            ((key, value),) = value.items()
            path += f".{key}"
        field = walk(schema("energypolicies"), path)
        assert value in field.get("enum", [True, False] if field["type"] == "boolean" else [])


def test_the_annotation_and_the_metric_have_their_names():
    assert f"{FORCE_RELEASE_ANNOTATION}=true" in PAGES["ready.md"]
    assert "`wattlock_policy_condition`" in (ROOT / "docs" / "metrics.md").read_text()
    assert "wattlock_policy_condition{" in PAGES["README.md"]
