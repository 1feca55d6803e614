"""Turns the models into CustomResourceDefinitions with structural schemas."""

from dataclasses import dataclass
from typing import Any

from wattlock_api.base import ApiModel, cel
from wattlock_api.clockprofile import ClockProfileSpec
from wattlock_api.constants import GROUP, VERSION
from wattlock_api.energypolicy import EnergyPolicySpec
from wattlock_api.nodeenergy import NodeEnergySpec, NodeEnergyStatus
from wattlock_api.policystatus import EnergyPolicyStatus

Json = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of kubectl get; ``wide`` ones show with -o wide only."""

    name: str
    path: str
    type: str = "string"
    description: str = ""
    wide: bool = False

    def to_api(self) -> Json:
        """Return the column as an entry of additionalPrinterColumns."""
        column: Json = {"name": self.name, "type": self.type, "jsonPath": self.path}
        if self.description:
            column["description"] = self.description
        if self.wide:
            column["priority"] = 1
        return column


@dataclass(frozen=True)
class Resource:
    """A kind of our API group."""

    kind: str
    plural: str
    short_name: str
    namespaced: bool
    description: str
    spec: type[ApiModel]
    status: type[ApiModel] | None
    columns: tuple[Column, ...]
    categories: tuple[str, ...] = ("wattlock",)

    @property
    def crd_name(self) -> str:
        """Name of the CustomResourceDefinition."""
        return f"{self.plural}.{GROUP}"


_AGE = Column("Age", ".metadata.creationTimestamp", "date")


def _condition(kind: str, field: str = "status") -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


RESOURCES = (
    Resource(
        kind="EnergyPolicy",
        plural="energypolicies",
        short_name="epol",
        namespaced=True,
        description="EnergyPolicy saves energy in LLM serving: it caps the SM clock of the GPUs that decode, leaves "
        "prefill alone, and measures what that saved. It selects pods of its own namespace.",
        spec=EnergyPolicySpec,
        status=EnergyPolicyStatus,
        columns=(
            Column("Mode", ".spec.mode", description="Observe measures only, Enforce caps"),
            Column("GPUs", ".status.summary.gpus", "integer", "GPUs of all pools"),
            Column("Capped", ".status.summary.capped", description="GPUs under the cap, of those that decode"),
            Column("Clock", ".status.summary.clock", description="Cap asked for"),
            Column("Power", ".status.summary.power", description="Power of all GPU boards"),
            Column("Saved", ".status.summary.saved", description="Energy saved for each token, or why it is not known"),
            Column("Ready", _condition("Ready")),
            Column("Observed", ".status.summary.observed", description="Clock of capped GPUs under load", wide=True),
            Column("J/token", ".status.summary.joulesPerToken", description="Decode", wide=True),
            Column("Saved-kWh", ".status.summary.savedKWh", description="GPU-board energy saved so far", wide=True),
            Column("Reason", _condition("Ready", "reason"), wide=True),
            _AGE,
        ),
    ),
    Resource(
        kind="NodeEnergy",
        plural="nodeenergies",
        short_name="nen",
        namespaced=False,
        description="NodeEnergy carries the operator's orders to the agent of one node and the agent's measurements "
        "back. It is written by Wattlock; people read it.",
        spec=NodeEnergySpec,
        status=NodeEnergyStatus,
        columns=(
            Column("Capped", ".status.capped", description="GPUs under a cap, of all on the node"),
            Column("Driver", ".status.agent.driverVersion"),
            Column("Writes", ".status.agent.canWrite", "boolean", "Whether the agent may lock clocks"),
            Column("Phase", ".status.phase"),
            Column("Reported", ".status.reportedAt", "date"),
            Column("Locked", ".status.locked", "integer", "GPUs locked at this moment", wide=True),
            Column("Agent", ".status.agent.pod", wide=True),
            Column("Reason", ".status.agent.reason", wide=True),
            _AGE,
        ),
    ),
    Resource(
        kind="ClockProfile",
        plural="clockprofiles",
        short_name="cprof",
        namespaced=False,
        description="ClockProfile says which cap suits which GPU product and attention architecture, and on what "
        "evidence.",
        spec=ClockProfileSpec,
        status=None,
        columns=(
            Column("Products", ".spec.rows[*].product"),
            Column("MHz", ".spec.rows[*].maxSMClockMHz"),
            Column("Evidence", ".spec.rows[*].evidence.kind"),
            _AGE,
        ),
    ),
)


def structural(schema: Json, definitions: Json) -> Json:
    """Return ``schema`` (JSON Schema of pydantic) as a structural schema of Kubernetes.

    References are inlined, ``X | None`` becomes an optional X, titles go, and bounds of lists, maps
    and strings keep the names that Kubernetes knows. Validation rules are listed before the fields.
    """
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        schema = target | {key: value for key, value in schema.items() if key != "$ref"}
    if schema.get("x-kubernetes-int-or-string"):
        return {key: value for key, value in schema.items() if key not in ("anyOf", "title")}
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        if len(choices) != 1:
            raise ValueError(f"a structural schema has no place for this union: {schema}")
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return structural(choices[0] | rest, definitions)
    result: Json = {}
    for key, value in schema.items():
        match key:
            case "title" | "additionalProperties" | "$defs" | "propertyNames":
                continue
            case "const":
                result["enum"] = [value]
            case "exclusiveMinimum":
                result |= {"minimum": value, "exclusiveMinimum": True}
            case "properties":
                result["properties"] = {name: structural(field, definitions) for name, field in value.items()}
            case "items":
                result["items"] = structural(value, definitions)
            case "default" if value in (None, {}, []):
                continue  # an absent field reads the same and keeps "kubectl get -o yaml" short
            case "description":
                result[key] = " ".join(value.split())
            case _:
                result[key] = value
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = structural(schema["additionalProperties"], definitions)
    if result.get("type") == "integer":
        result.setdefault("format", "int64")
    if result.get("type") == "number":
        result = _exact_bounds(result)
    if "default" in result:
        result["default"] = _without_empty(result["default"], result)
    return result


def _exact_bounds(schema: Json) -> Json:
    """Turn fractional bounds into a CEL rule.

    The API server cuts a fractional minimum or maximum to a whole number when the value is written without a
    fraction: with ``minimum: 0.02`` it takes 0 (kube-openapi, validation/validate, MinimumNativeType).
    """
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None or high is None or (low == int(low) and high == int(high)):
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("minimum", "maximum")}
    rule = cel(f"self >= {float(low)} && self <= {float(high)}", f"must be between {low} and {high}")
    return rest | {"x-kubernetes-validations": [rule]}


def _without_empty(default: Any, schema: Json) -> Any:
    """Drop absent (null) fields of a default: the API server would refuse them."""
    if isinstance(default, dict):
        fields = schema.get("properties", {})
        return {key: _without_empty(value, fields.get(key, {})) for key, value in default.items() if value is not None}
    if isinstance(default, list):
        return [_without_empty(value, schema.get("items", {})) for value in default]
    return default


def _schema(model: type[ApiModel]) -> Json:
    # Absent fields of an input model get the server's defaults, so the "validation" form is the right one.
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return structural(schema, schema.get("$defs", {}))


def custom_resource_definition(resource: Resource) -> Json:
    """Return the CustomResourceDefinition of a kind."""
    properties: Json = {
        "apiVersion": {"type": "string", "description": "Version of the API: wattlock.dev/v1alpha1."},
        "kind": {"type": "string", "description": f"Kind of the resource: {resource.kind}."},
        "metadata": {"type": "object"},
        "spec": _schema(resource.spec),
    }
    version: Json = {"name": VERSION, "served": True, "storage": True}
    if resource.status is not None:
        properties["status"] = _schema(resource.status)
        version["subresources"] = {"status": {}}
    version["additionalPrinterColumns"] = [column.to_api() for column in resource.columns]
    version["schema"] = {
        "openAPIV3Schema": {
            "type": "object",
            "description": resource.description,
            "required": ["spec"],
            "properties": properties,
        }
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": resource.crd_name},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
                "shortNames": [resource.short_name],
                "categories": list(resource.categories),
            },
            "versions": [version],
        },
    }
