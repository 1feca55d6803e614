"""What each sub-command does with its parsed arguments."""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict

from wattlock_simulator import control, driver, layout, physics, show, state
from wattlock_simulator.device_plugin import DevicePlugin, PluginSettings
from wattlock_simulator.node import Node
from wattlock_simulator.physics import Phase, Workload
from wattlock_simulator.serving.engine import Role, Settings
from wattlock_simulator.serving.follow import Follower
from wattlock_simulator.serving.instance import Instance
from wattlock_simulator.serving.server import Server
from wattlock_simulator.state import StateError, StateFile


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM or SIGINT sets; call it before any thread starts.

    A thread waits for the signals. A handler would run inside the main thread's own wait on the event, and could
    meet the event's lock there.
    """
    stop = threading.Event()
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        signal.sigwait(signals)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    return stop


def node(options: argparse.Namespace) -> int:
    """Installs the library, then steps the GPUs until SIGTERM."""
    stop = _stop_on_signals()
    driver.install(options.directory)
    with StateFile.create(options.directory, options.node_name, options.product, options.gpus) as file:
        plugin, thread = None, None
        if options.device_plugin:
            plugin = DevicePlugin(
                PluginSettings(
                    uuids=tuple(g.identity.uuid.decode() for g in file.gpus),
                    directory=options.directory,
                    host_directory=options.host_directory or options.directory,
                    kubelet_directory=options.kubelet_directory,
                    resource_name=options.resource_name,
                )
            )
            thread = threading.Thread(target=plugin.run, name="device-plugin", daemon=True)
            thread.start()
        Node(file, seed=options.seed).run(stop)
        if plugin and thread:
            plugin.stop()
            thread.join(timeout=5.0)
    return 0


def _held(file: StateFile, names: str) -> tuple[layout.Gpu, ...]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or wanted in (["none"], ["void"]):
        raise StateError("no GPU: set NVIDIA_VISIBLE_DEVICES (the device plugin does) or --gpus")
    return tuple(gpu for name in wanted for gpu in file.find(name))


def serve(options: argparse.Namespace) -> int:
    """Serves until SIGTERM."""
    stop = _stop_on_signals()
    settings = Settings(
        role=Role.MIXED if options.requests else options.role,
        architecture=options.architecture,
        batch=options.batch,
        context=options.context,
        jitter=options.jitter,
        computes_prompts=options.computes_prompts,
        output_tokens=options.output_tokens,
    )
    # The host name of a pod is its name: the load of two replicas differs, and that of one stays the same.
    seed = zlib.crc32(socket.gethostname().encode()) if options.seed is None else options.seed
    with StateFile.open(options.directory) as file:
        instance = Instance(
            _held(file, options.gpus),
            settings,
            model_name=options.model_name,
            seed=seed,
            by_requests=options.requests,
        )
        Server((options.address, options.port), instance).run(stop)
    return 0


def follow(options: argparse.Namespace) -> int:
    """Follows a real engine until SIGTERM."""
    stop = _stop_on_signals()
    busy = Workload(options.architecture, Phase.DECODE, options.batch, options.context)
    with StateFile.open(options.directory) as file:
        Follower(options.url, _held(file, options.gpus), busy).run(stop)
    return 0


def truth(options: argparse.Namespace) -> int:
    """Prints the true saving."""
    workload = Workload(options.architecture, options.phase, options.batch, options.context)
    saving = physics.true_saving(options.product, workload, options.cap, options.power_limit)
    if options.json:
        sys.stdout.write(json.dumps({"product": options.product, "capMHz": options.cap, **asdict(saving)}) + "\n")
        return 0
    load = f"batch {workload.batch:g} context {workload.context:g}"
    lines = [f"{options.product} {workload.architecture} {workload.phase} {load}"]
    for name, point in (("unlocked", saving.control), (f"cap {options.cap} MHz", saving.capped)):
        limited = "  (held by the power limit)" if point.power_limited else ""
        lines.append(
            f"{name:<14} {point.clock_mhz:>5} MHz {point.watts:>7.1f} W {point.tokens_per_second:>10.1f} tok/s "
            f"{point.joules_per_token:>10.6f} J/token{limited}"
        )
    lines.append(f"true saving    {saving.energy_percent:.2f} % energy per token")
    lines.append(f"throughput     {saving.throughput_change_percent:+.3f} %")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def control_gpus(options: argparse.Namespace) -> int:
    """Does one thing to the GPUs."""
    with StateFile.open(options.directory) as file:
        if options.action == "show":
            shown = show.describe(file)
            sys.stdout.write((json.dumps(shown) if options.json else show.table(shown)) + "\n")
        elif options.action == "reload":
            control.reload_driver(file, end_sessions=options.end_sessions)
        elif options.action == "reboot":
            control.reboot(file)
        elif options.action == "clear-faults":
            for slots in (file.state.faults, *(gpu.faults for gpu in file.gpus)):
                control.clear_faults(slots)
        elif options.action == "fault" and options.gpu == "driver":
            control.inject_fault(
                file.state.faults, options.function, options.code, count=options.count, delay_ms=options.delay_ms
            )
        else:
            for gpu in file.find(options.gpu):
                _on_gpu(file, gpu, options)
    return 0


def _on_gpu(file: StateFile, gpu: layout.Gpu, options: argparse.Namespace) -> None:
    match options.action:
        case "reset":
            control.reset_gpus([gpu])
        case "fault":
            control.inject_fault(
                gpu.faults, options.function, options.code, count=options.count, delay_ms=options.delay_ms
            )
        case "mig":
            gpu.condition.mig_pending = int(options.mode == "on")
            control.reset_gpus([gpu])
        case "virtualization":
            gpu.condition.virtualization_mode = state.VIRTUALIZATION_CODES[options.mode]
        case "limiter":
            control.set_limiter(gpu, options.kind, options.mhz)
        case "power-limit":
            control.set_power_limit(gpu, options.watts)
        case "lock":
            control.foreign_lock(file, gpu, options.min, options.max)
        case "unlock":
            control.foreign_unlock(file, gpu)
        case "workload":
            _set_workload(gpu, options)


def _set_workload(gpu: layout.Gpu, options: argparse.Namespace) -> None:
    if options.phase == "none":
        state.clear_workload(gpu)
    elif options.phase == "idle":
        state.set_workload(gpu, None)
    else:
        workload = Workload(options.architecture, Phase(options.phase), options.batch, options.context)
        state.set_workload(gpu, workload)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "node": node,
    "serve": serve,
    "follow": follow,
    "truth": truth,
    "control": control_gpus,
}
"""The sub-commands by name."""
