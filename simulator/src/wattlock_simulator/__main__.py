"""The command ``wattlock-simulator``."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from wattlock_simulator import commands, state
from wattlock_simulator.device_plugin import KUBELET_DIRECTORY
from wattlock_simulator.driver import DriverError
from wattlock_simulator.physics import Architecture, Phase, Product
from wattlock_simulator.serving.engine import Role
from wattlock_simulator.state import StateError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wattlock-simulator", description="A simulated GPU node.")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    parts = parser.add_subparsers(dest="part", required=True)
    _node_arguments(parts.add_parser("node", help="the driver's node process, and the device plugin"))
    _serve_arguments(parts.add_parser("serve", help="a simulated serving engine"))
    _follow_arguments(parts.add_parser("follow", help="put the load of a real vLLM on the simulated GPUs it holds"))
    _truth_arguments(parts.add_parser("truth", help="print what a cap truly saves"))
    _control_arguments(parts.add_parser("control", help="do something to the GPUs from outside, or show them"))
    return parser


def _directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(os.environ.get("WATTLOCK_SIMULATOR_DIR") or state.DEFAULT_DIRECTORY),
        help="state, library and write log (default: $WATTLOCK_SIMULATOR_DIR or %(default)s)",
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", type=Architecture, choices=list(Architecture), default=Architecture.GQA)
    parser.add_argument("--batch", type=float, default=32.0, help="sequences in the running batch")
    parser.add_argument("--context", type=float, default=4096.0, help="tokens per sequence")


def _node_arguments(parser: argparse.ArgumentParser) -> None:
    _directory(parser)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--product", type=Product, choices=list(Product), default=Product.H200)
    parser.add_argument(
        "--node-name",
        default=os.environ.get("NODE_NAME") or socket.gethostname(),
        help="gives the GPUs their UUIDs (default: $NODE_NAME or the host name)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sensor noise")
    parser.add_argument("--device-plugin", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kubelet-directory", type=Path, default=KUBELET_DIRECTORY)
    parser.add_argument("--resource-name", default="nvidia.com/gpu")
    parser.add_argument("--host-directory", type=Path, help="--directory on the host, if that differs")


def _held_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", default=os.environ.get("NVIDIA_VISIBLE_DEVICES", ""), help="UUIDs, or all")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    _directory(parser)
    _model_arguments(parser)
    _held_gpus(parser)
    parser.add_argument("--role", type=Role, choices=list(Role), default=Role.DECODE)
    parser.add_argument("--jitter", type=float, default=0.03, help="noise of the running batch per second, relative")
    parser.add_argument("--computes-prompts", action="store_true", help="a decode engine that prefills by itself")
    parser.add_argument(
        "--requests",
        action="store_true",
        help="the load are the requests to /v1/completions; --batch is the most that run at a time, --context, "
        "--jitter and --role count for nothing",
    )
    parser.add_argument("--output-tokens", type=int, default=256, help="tokens that a request generates")
    parser.add_argument("--model-name", default="simulated")
    parser.add_argument("--seed", type=int, help="of the load noise (default: from the host name)")
    parser.add_argument("--address", default="", help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=8000)


def _follow_arguments(parser: argparse.ArgumentParser) -> None:
    _directory(parser)
    _model_arguments(parser)
    _held_gpus(parser)
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000/metrics", help="the engine's page (default: %(default)s)"
    )


def _truth_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--product", type=Product, choices=list(Product), default=Product.H200)
    parser.add_argument("--phase", type=Phase, choices=list(Phase), default=Phase.DECODE)
    parser.add_argument("--cap", type=int, default=1590, help="upper end of the locked range, MHz")
    parser.add_argument("--power-limit", type=float, default=700.0, help="W")
    parser.add_argument("--json", action="store_true")


def _control_arguments(parser: argparse.ArgumentParser) -> None:
    _directory(parser)
    actions = parser.add_subparsers(dest="action", required=True)
    shown = actions.add_parser("show", help="the GPUs as a table")
    shown.add_argument("--json", action="store_true", help="as JSON, for programs")
    reload_parser = actions.add_parser("reload", help="driver reload: locks gone, counters restart")
    reload_parser.add_argument("--end-sessions", action="store_true", help="open NVML sessions die as well")
    actions.add_parser("reboot", help="the GPUs as after a reboot of the node, with a new boot id")
    actions.add_parser("clear-faults", help="end all injected faults")

    def on_gpu(name: str, text: str, gpu_help: str = "UUID, index or all") -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text)
        action.add_argument("--gpu", default="all", help=f"{gpu_help} (default: all)")
        return action

    on_gpu("reset", "GPU reset: as a reload, for one GPU; a pending MIG mode takes effect")
    fault = on_gpu("fault", "let an NVML function fail", "UUID, index, all, or driver for calls that concern no GPU")
    fault.add_argument("--function", required=True, help="NVML name without version suffix, nvmlInit, or *")
    fault.add_argument("--code", type=int, required=True, help="NVML return code, e.g. 4, 15, 999; 0 with a delay")
    fault.add_argument("--count", type=int, default=-1, help="calls that fail; -1 until cleared")
    fault.add_argument("--delay-ms", type=int, default=0, help="block before answering")
    on_gpu("mig", "MIG mode, at once").add_argument("--mode", choices=["on", "off"], required=True)
    virtual = on_gpu("virtualization", "virtualization mode; under vgpu every write is refused")
    virtual.add_argument("--mode", choices=list(state.VIRTUALIZATION_CODES), required=True)
    limiter = on_gpu("limiter", "hold the clock down as a thermal or power-brake limiter does")
    limiter.add_argument("--kind", choices=list(state.LIMITER_CODES), required=True)
    limiter.add_argument("--mhz", type=int, default=1200)
    on_gpu("power-limit", "set the power limit").add_argument("--watts", type=float, required=True)
    lock = on_gpu("lock", "lock clocks as another writer would")
    lock.add_argument("--min", type=int, default=345, help="MHz")
    lock.add_argument("--max", type=int, required=True, help="MHz")
    on_gpu("unlock", "reset locked clocks as another writer would")
    workload = on_gpu("workload", "put a workload on a GPU without a serving engine; it stays until taken off")
    _model_arguments(workload)
    workload.add_argument("--phase", choices=[*map(str, Phase), "idle", "none"], default=str(Phase.DECODE))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a part; returns the exit code: 0 done, 1 refused with a sentence on stderr, 2 bad arguments."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return commands.PARTS[options.part](options)
    except (StateError, DriverError, ValueError, OSError) as error:
        sys.stderr.write(f"wattlock-simulator {options.part}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
