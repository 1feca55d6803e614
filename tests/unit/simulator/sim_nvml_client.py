"""An NVML client in a process of its own: the unchanged pynvml, driven by JSON lines.

Reads {"call": name, "uuid": or null, "args": [...]} and answers {"value": ...} or {"error": NVML code}.
"""

import json
import sys

import pynvml


def plain(value):
    if isinstance(value, pynvml._PrintableStructure):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, list | tuple) or hasattr(value, "_length_"):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode()
    return value


def field_value(field):
    kinds = {pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal", pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal"}
    return [field.fieldId, field.nvmlReturn, getattr(field.value, kinds.get(field.valueType, "ullVal"))]


def answer(request):
    handles = [pynvml.nvmlDeviceGetHandleByUUID(request["uuid"])] if request["uuid"] else []
    arguments = [tuple(a) if isinstance(a, list) else a for a in request["args"]]
    if request["call"] == "nvmlDeviceGetFieldValues":
        return [field_value(f) for f in pynvml.nvmlDeviceGetFieldValues(*handles, list(arguments))]
    value = getattr(pynvml, request["call"])(*handles, *arguments)
    return None if request["call"].startswith("nvmlDeviceGetHandle") else plain(value)


for line in sys.stdin:
    try:
        result = {"value": answer(json.loads(line))}
    except pynvml.NVMLError as error:
        result = {"error": error.value}
    print(json.dumps(result), flush=True)
