"""What a sweep leaves on disk and reads again: ``run.json`` about the run, ``windows.csv`` with its windows."""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wattlock_agent.sweep.estimates import Window
from wattlock_agent.sweep.plan import Lever, Setting, Shape, Workload

RUN_NAME = "run.json"
WINDOWS_NAME = "windows.csv"
_VERSION = 1
_MAX_FILE_BYTES = 16 << 20

_NUMBERS = ("at_seconds", "seconds", "watts", "generated_per_second", "prompt_per_second")
_OPTIONAL = ("observed_mhz", "cap_share", "celsius")
COLUMNS = ("shape", "concurrency", "length_tokens", "output_tokens", "lever", "value", *_NUMBERS, *_OPTIONAL)


class RecordError(Exception):
    """A directory that holds no finished sweep. The message says what is missing."""


@dataclass(frozen=True)
class Run:
    """What was measured, on what, and how."""

    label: str
    """Architecture of the model, or whatever else tells it apart from other runs."""
    architecture: str
    """Architecture for the row of the profile; empty where none was given."""
    model: str
    product: str
    gpus: int
    driver_version: str
    date: str
    """RFC 3339 time of the start."""
    client: str
    tokens_from: str
    """Whose counts of tokens were taken: the engine's metrics, or the client."""
    settle_seconds: float
    window_seconds: float
    repeats: int
    seed: str
    limit_watts: float | None
    """Power limit of each GPU at stock."""
    planned_windows: int | None = None
    """How many measurements it has when it is finished; ``None`` in runs of versions that did not write it."""


def encode_run(run: Run) -> str:
    """Return the text of ``run.json``."""
    return json.dumps({"version": _VERSION, **asdict(run)}, indent=1) + "\n"


def csv_line(values: Iterable[Any]) -> str:
    """Return one line of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def window_line(window: Window) -> str:
    """Return a window as a line of ``windows.csv``."""
    work, setting = window.workload, window.setting
    numbers = [_text(getattr(window, name)) for name in (*_NUMBERS, *_OPTIONAL)]
    head = [work.shape, work.concurrency, work.length_tokens, work.output_tokens, setting.lever, setting.value]
    return csv_line([*head, *numbers])


def read_run(directory: Path) -> tuple[Run, tuple[Window, ...]]:
    """Return a finished run.

    Raises:
        RecordError: it cannot be read, or ended before its last measurement.
    """
    try:
        document = json.loads(_read(directory / RUN_NAME))
        if document.pop("version", None) != _VERSION:
            raise RecordError(f"{directory / RUN_NAME}: not of version {_VERSION}")
        document.setdefault("planned_windows", None)
        run = Run(**{field.name: document[field.name] for field in fields(Run)})
        lines = csv.DictReader(io.StringIO(_read(directory / WINDOWS_NAME)))
        windows = tuple(_window(line) for line in lines)
        if run.planned_windows is not None and len(windows) != run.planned_windows:
            raise RecordError(
                f"{directory} holds no finished sweep: {len(windows)} of {run.planned_windows} measurements; "
                "what is missing would be missing in the comparison"
            )
        return run, windows
    except OSError as error:
        raise RecordError(f"{error.filename}: {error.strerror}; give the output directory of a sweep") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{directory}: no finished sweep ({type(error).__name__}: {error})") from None


def _window(line: dict[str, str]) -> Window:
    numbers = {name: float(line[name]) for name in _NUMBERS}
    optional = {name: float(line[name]) if line[name] else None for name in _OPTIONAL}
    if not all(math.isfinite(value) for value in (*numbers.values(), *filter(None, optional.values()))):
        raise ValueError("a number that is none")
    workload = Workload(
        Shape(line["shape"]), int(line["concurrency"]), int(line["length_tokens"]), int(line["output_tokens"])
    )
    setting = Setting(Lever(line["lever"]), int(line["value"]))
    return Window(
        workload,
        setting,
        **numbers,
        observed_mhz=optional["observed_mhz"],
        cap_share=optional["cap_share"],
        celsius=optional["celsius"],
    )


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is too long")
    return content.decode()
