"""The arguments of ``wattlock-agent sweep``."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wattlock_api.constants import Architecture

from wattlock_agent.settings import DEFAULT_STATE_DIRECTORY
from wattlock_agent.sweep.plan import Shape

_Value = TypeVar("_Value")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="wattlock-agent sweep",
        description="Measures throughput and energy per token of a live OpenAI-compatible endpoint over SM clocks and "
        "power limits, puts both back, and writes tables, a Pareto plot and a ClockProfile. See docs/sweep.md.",
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--url", help="base URL of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000")
    what.add_argument(
        "--gpus",
        type=_words,
        help="UUIDs of all GPUs that the endpoint runs on, with commas; 'all' for those of the machine",
    )
    what.add_argument("--shapes", type=_shapes, default=tuple(Shape), help="decode, prefill or both (default)")
    what.add_argument("--concurrency", type=_numbers, default=(32,), help="requests on the way at a time (default: 32)")
    what.add_argument(
        "--lengths", type=_numbers, default=(1024, 4096, 16384), help="tokens of a prompt (default: 1024,4096,16384)"
    )
    what.add_argument("--output-tokens", type=_number, default=256, help="tokens of a decode answer (default: 256)")
    what.add_argument("--clocks", type=_points, help="SM clocks in MHz, or none (default: seven)")
    what.add_argument("--power-limits", type=_points, help="power limits in W, or none (default: six)")
    what.add_argument("--repeats", type=_number, default=5, help="measurements of each point (default: 5)")
    what.add_argument("--stock-every", type=_number, default=4, help="points between two stock points (default: 4)")
    what.add_argument("--window-seconds", type=_seconds, default=20.0, help="length of a measurement (default: 20)")
    what.add_argument("--settle-seconds", type=_seconds, default=5.0, help="wait after a change (default: 5)")
    what.add_argument("--seed", default="wattlock", help="of the order of the points")
    load = parser.add_argument_group("the load")
    load.add_argument("--model", help="name of the model (default: the first one that the endpoint serves)")
    load.add_argument(
        "--client",
        choices=("auto", "vllm", "own"),
        default="auto",
        help="'vllm bench serve', or this program's own client; auto takes vLLM's where it is installed",
    )
    load.add_argument("--tokenizer", help="for vLLM's client (default: what the endpoint was started with)")
    load.add_argument(
        "--metrics-url",
        help="the engine's metrics, from which tokens are counted (default: /metrics of --url; where there are none, "
        "the client's own count)",
    )
    result = parser.add_argument_group("the result")
    result.add_argument("--out", type=Path, help="directory for the result; must be empty or absent")
    result.add_argument("--label", help="name of this run (default: the architecture, else the model)")
    result.add_argument(
        "--architecture", choices=[each.value for each in Architecture], help="of the model, for the profile's row"
    )
    result.add_argument(
        "--max-loss-percent", type=_seconds, default=1.0, help="of throughput, for the profile (default: 1)"
    )
    result.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="measure nothing: put finished runs beside each other, into --out",
    )
    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--dry-run", action="store_true", help="print the points and the time that they take; writes nothing"
    )
    safety.add_argument(
        "--i-may-change-clocks",
        action="store_true",
        help="you may change clocks and power limits of these GPUs, and slow whoever uses the endpoint",
    )
    safety.add_argument(
        "--state-dir",
        type=Path,
        default=Path(os.environ.get("WATTLOCK_STATE_DIR", DEFAULT_STATE_DIRECTORY)),
        help="directory of the journal, the same as the agent's on this machine (default: %(default)s)",
    )
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _number(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 7 else 0
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 1 to 1000000")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return _some(text, _number)


def _points(text: str) -> tuple[int, ...]:
    return () if text == "none" else _some(text, _number)


def _shapes(text: str) -> tuple[Shape, ...]:
    try:
        return _some(text, Shape)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write {' or '.join(Shape)}, or both with a comma") from None


def _some(text: str, convert: Callable[[str], _Value]) -> tuple[_Value, ...]:
    values = tuple(convert(word) for word in _words(text))
    if not values:
        raise argparse.ArgumentTypeError("nothing in it: write values with commas")
    return values


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 0.1 to 3600")
    return value
