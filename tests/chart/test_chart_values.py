"""Values that the chart refuses, and that its schema, its values and its documentation agree."""

import json
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.chart]

#: case: (--set argument, words of helm's answer)
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "typo at the top": ("simulater.enabled=true", ("additional properties 'simulater' not allowed",)),
    "typo inside": ("simulator.enable=true", ("'/simulator'", "additional properties 'enable' not allowed")),
    "typo deep inside": ("agent.driver.hostPath.folder=/x", ("'/agent/driver/hostPath'", "'folder' not allowed")),
    "no operator": ("operator.replicas=0", ("'/operator/replicas'", "minimum: got 0, want 1")),
    "half an operator": ("operator.replicas=1.5", ("'/operator/replicas'", "want integer")),
    "unknown driver mode": ("agent.driver.mode=cdi", ("'/agent/driver/mode'", "'runtime', 'hostPath'")),
    "unknown product": ("simulator.product=B200", ("'/simulator/product'", "'H200', 'H100'")),
    "no GPUs": ("simulator.gpusPerNode=0", ("'/simulator/gpusPerNode'", "minimum: got 0, want 1")),
    "GPUs as text": ("simulator.gpusPerNode=many", ("'/simulator/gpusPerNode'", "got string, want integer")),
    "boolean as text": ("crds.keep=never", ("'/crds/keep'", "got string, want boolean")),
    "namespace with capitals": ("agent.namespace=GPU", ("'/agent/namespace'", "does not match pattern")),
    "relative folder": ("agent.stateDirectory=state", ("'/agent/stateDirectory'", "does not match pattern")),
    "tag that is a digest": ("image.tag=sha256:abc", ("'/image/tag'", "does not match pattern")),
    "short digest": ("agent.image.digest=sha256:abc", ("'/agent/image/digest'", "does not match pattern")),
    "unknown pull policy": ("image.pullPolicy=always", ("'/image/pullPolicy'", "'IfNotPresent'")),
    "label that is a boolean": ("simulator.nodeSelector.gpu=true", ("/simulator/nodeSelector/gpu", "want string")),
    "API server at port 0": ("networkPolicy.apiServer.ports={0}", ("'/networkPolicy/apiServer/ports/0'",)),
    "address without a mask": ("networkPolicy.servingCIDRs={10.0.0.1}", ("'/networkPolicy/servingCIDRs/0'",)),
    "name for an address": ("networkPolicy.apiServer.cidrs={api/24}", ("'/networkPolicy/apiServer/cidrs/0'",)),
    "peer without a selector": ("networkPolicy.metricsFrom={monitoring}", ("'/networkPolicy/metricsFrom/0'",)),
    "agents without patience": ("agent.staleOrdersSeconds=30", ("/agent/staleOrdersSeconds", "want 60")),
    "node that is no name": ("reset.node=GPU_7", ("'/reset/node'", "does not match pattern")),
    "pattern for a namespace": ("metrics.hostNetworkNamespaces={llm-*}", ("'/metrics/hostNetworkNamespaces/0'",)),
    "hook without time": ("hooks.preDelete.timeoutSeconds=5", ("/hooks/preDelete/timeoutSeconds", "want 60")),
    "placement with a misspelt field": ("agent.allowedPlacements[0].nodeselector.a=b", ("'nodeselector' not allowed",)),
    "placement that tolerates for a while": (
        "agent.allowedPlacements[0].tolerations[0].tolerationSeconds=1",
        ("'tolerationSeconds' not allowed",),
    ),
    "toleration in lower case": ("simulator.tolerations[0].operator=exists", ("'Exists', 'Equal'",)),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_value_is_refused_with_its_place(helm, case):
    value, words = REFUSED[case]
    answer = helm.template("--set", value, check=False)
    assert answer.returncode != 0, answer.stdout
    for word in words:
        assert word in answer.stderr, answer.stderr


def chart_file(helm, name: str) -> str:
    return (helm.chart / name).read_text()


def keys_of_values(values: Any, schema: dict[str, Any], definitions: dict[str, Any], path: str = "") -> list[str]:
    """Return the places where the values and a closed schema do not list the same keys."""
    schema = definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    if schema.get("additionalProperties") is not False or not isinstance(values, dict):
        return []
    listed = schema["properties"]
    wrong = [f"{path}.{key}" for key in set(values) ^ set(listed)]
    for key in set(values) & set(listed):
        wrong += keys_of_values(values[key], listed[key], definitions, f"{path}.{key}")
    return wrong


def test_schema_and_values_list_the_same_keys(helm):
    schema = json.loads(chart_file(helm, "values.schema.json"))
    values = yaml.safe_load(chart_file(helm, "values.yaml"))
    # resource claims have no default
    wrong = [place for place in keys_of_values(values, schema, schema["$defs"]) if not place.endswith("claims")]
    assert wrong == []


def test_no_object_of_the_schema_is_open_by_accident(helm):
    def open_objects(schema: Any, path: str) -> list[str]:
        if isinstance(schema, list):
            return [place for inner in schema for place in open_objects(inner, path)]
        if not isinstance(schema, dict):
            return []
        found = [path] if "properties" in schema and schema.get("additionalProperties") is not False else []
        return found + [
            place
            for key, inner in schema.items()
            if key != "enum"
            for place in open_objects(inner, f"{path}/{key}" if key != "properties" else path)
        ]

    # "properties" may itself be the name of a key only in schemas that describe schemas, and ours does not
    assert open_objects(json.loads(chart_file(helm, "values.schema.json")), "") == []
