"""What all models share: naming, decimal strings, Kubernetes' own small types."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

_UNITS = {"Mhz": "MHz", "Kwh": "KWh", "Co2": "CO2", "Url": "URL", "Gpus": "GPUs"}
_IRREGULAR = {
    "max_sm_clock_mhz": "maxSMClockMHz",
    "grams_co2_per_kwh": "gramsCO2PerKWh",
    "throughput_change_ci95": "throughputChangeCI95",
    "inter_token_latency_change_ci95": "interTokenLatencyChangeCI95",
    "saved_kwh_ci95": "savedKWhCI95",
    "saved_cost_ci95": "savedCostCI95",
    "saved_kg_co2_ci95": "savedKgCO2CI95",
}


def api_name(python_name: str) -> str:
    """Return the camelCase name of a field in the API, units spelled as usual (``requestedMHz``)."""
    if python_name in _IRREGULAR:
        return _IRREGULAR[python_name]
    name = to_camel(python_name)
    for plain, spelled in _UNITS.items():
        if name.endswith(plain):
            name = name[: -len(plain)] + spelled
    return name


class ApiModel(BaseModel):
    """Base of every model: immutable, camelCase in JSON, unknown fields ignored.

    The API server refuses unknown fields of people's input (strict validation); ignoring
    them here lets an older agent read what a newer operator wrote.
    """

    model_config = ConfigDict(
        frozen=True, alias_generator=api_name, populate_by_name=True, extra="ignore", use_attribute_docstrings=True
    )

    def to_api(self) -> dict[str, Any]:
        """Return the JSON form for the API server: API names, no absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(rule: str, message: str, field_path: str | None = None) -> dict[str, Any]:
    """Return one validation rule for the schema: a CEL expression and what to write instead."""
    return {"rule": rule, "message": message} | ({"fieldPath": field_path} if field_path else {})


#: A decimal number in a string: the API conventions advise against floats in resources.
DecimalString = Annotated[str, Field(pattern=r"^-?[0-9]{1,15}(\.[0-9]{1,9})?$", max_length=26)]
#: The same, never negative.
PositiveDecimalString = Annotated[str, Field(pattern=r"^[0-9]{1,15}(\.[0-9]{1,9})?$", max_length=26)]


#: The largest whole number of as many digits as the two patterns allow.
_MOST = 999_999_999_999_999.0


def decimal_string(value: float, places: int) -> str:
    """Format ``value`` with ``places`` digits after the point, never as an exponent.

    What has more digits than the schema allows becomes the largest number that it allows. Numbers that are each within
    the schema have sums and products that are not, and one of these would have the whole status refused.
    """
    # The bound is whole: rounding to any number of places adds no digit to it. What is no number stays none.
    return f"{Decimal(repr(min(max(value, -_MOST), _MOST))):.{places}f}"


def timestamp(unix_seconds: float) -> str:
    """Return the RFC 3339 form of a time, whole seconds, UTC."""
    return datetime.fromtimestamp(int(unix_seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_timestamp(text: str) -> float:
    """Return seconds since 1970 of an RFC 3339 time.

    Raises:
        ValueError: the text is no such time, or one that ``timestamp`` could not write.
    """
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC).timestamp()
    except OverflowError as error:  # in UTC it is before the year 1 or after 9999
        raise ValueError(str(error)) from error


#: Bounds of a clock that may be asked for, in MHz.
MIN_CLOCK_MHZ, MAX_CLOCK_MHZ = 100, 5000
Mhz = Annotated[int, Field(ge=MIN_CLOCK_MHZ, le=MAX_CLOCK_MHZ)]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Uid = Annotated[str, Field(min_length=1, max_length=64)]
Sentence = Annotated[str, Field(max_length=1024)]
ReasonName = Annotated[str, Field(max_length=64)]


#: A label or taint key, without the bounds of its length, and a value that is not empty.
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
LABEL_VALUE = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"


class LabelSelectorRequirement(ApiModel):
    """One expression of a label selector."""

    key: Annotated[str, Field(min_length=1, max_length=316)]
    """Label key."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the values relate to the label."""
    values: Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=32)] = []
    """Values for In and NotIn; empty for Exists and DoesNotExist."""


class LabelSelector(ApiModel):
    """A Kubernetes label selector: all of its terms must hold."""

    match_labels: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = {}
    """Labels that a pod must carry with exactly these values."""
    match_expressions: Annotated[list[LabelSelectorRequirement], Field(max_length=16)] = []
    """Further terms, as in any Kubernetes selector."""


class Toleration(ApiModel):
    """A pod toleration, as in a pod's spec.

    There is no tolerationSeconds: a DaemonSet's pod that leaves after a while is started again at once.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "(has(self.key) && self.key != '') || (has(self.operator) && self.operator == 'Exists')",
                    "write the key of a taint, e.g. nvidia.com/gpu; without one the operator must be Exists",
                ),
                cel(
                    "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
                    "operator Exists compares no value: remove value, or write operator: Equal",
                ),
                cel(
                    f"!has(self.key) || self.key == '' || self.key.matches('{LABEL_KEY}')",
                    "key must be the key of a taint, e.g. nvidia.com/gpu",
                ),
                cel(
                    f"!has(self.value) || self.value == '' || self.value.matches('{LABEL_VALUE}')",
                    "value must be the value of a taint: letters and digits, and '-', '_' or '.' between them",
                ),
            ]
        }
    )

    key: Annotated[str, Field(max_length=316)] | None = None
    """Taint key; empty with operator Exists tolerates every taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """Equal (the default) compares the value, Exists does not."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value to tolerate."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect to tolerate; empty means all."""


class Condition(ApiModel):
    """A condition as Kubernetes' API conventions define it."""

    type: Annotated[str, Field(max_length=316)]
    """Name of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=64)]
    """One CamelCase word for programs."""
    message: Annotated[str, Field(max_length=1024)]
    """A sentence for people: what is the case, and what to do if something is wrong."""
    last_transition_time: Timestamp
    """When the status last changed."""
    observed_generation: int | None = None
    """The generation of the spec that the condition is about."""


class ObjectRef(ApiModel):
    """A namespaced object, by name and UID."""

    namespace: Name
    """Namespace."""
    name: Name
    """Name."""
    uid: Uid
    """UID: tells an object from a later one of the same name."""
