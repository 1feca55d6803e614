"""Runs one NvmlDriver in a process of its own, so that the dynamic loader finds the library that a test chose.

Reads a JSON list from standard input, [method, arguments ...], and answers each with a JSON object on standard output.
"""

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

from wattlock_agent.gpu.base import GpuError
from wattlock_agent.gpu.nvml import NvmlDriver


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


driver = NvmlDriver()
for line in sys.stdin:
    method, *arguments = json.loads(line)
    try:
        answer = {"value": plain(getattr(driver, method)(*arguments))}
    except GpuError as error:
        answer = {"fault": error.fault, "call": error.call, "uuid": error.uuid, "message": str(error)}
    print(json.dumps(answer), flush=True)
