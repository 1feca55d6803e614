"""The command ``wattlock-agent sweep``: what it refuses, its course, and the files it writes."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from wattlock_api.base import timestamp

from wattlock_agent.gpu.base import DriverInfo, GpuError, GpuFault, GpuIdentity
from wattlock_agent.journal import JournalError
from wattlock_agent.journal_file import FileJournal, read_boot_id
from wattlock_agent.sweep import plot, vllm_load
from wattlock_agent.sweep.arguments import make_parser
from wattlock_agent.sweep.endpoint import (
    Endpoint,
    EndpointError,
    MetricsTokens,
    TokenSource,
    metrics_url,
    parse_endpoint,
    served_model,
    served_tokenizer,
)
from wattlock_agent.sweep.estimates import Row, Window, summarise
from wattlock_agent.sweep.findings import choose
from wattlock_agent.sweep.levers import Levers, PowerLimitChangedError, PowerLimits, RestoreError, SweepDriver
from wattlock_agent.sweep.load import ClientLoad, Load, LoadError, prompt_seed
from wattlock_agent.sweep.meter import Meter, MeterError
from wattlock_agent.sweep.nvml_power import NvmlSweepDriver
from wattlock_agent.sweep.plan import (
    Lever,
    Plan,
    PlanError,
    Setting,
    clock_points,
    interleaved,
    power_points,
    workloads,
)
from wattlock_agent.sweep.record import RUN_NAME, RecordError, Run, encode_run, read_run
from wattlock_agent.sweep.report import comparison, page, points_csv, profile
from wattlock_agent.sweep.run import Sweep, duration, undo
from wattlock_agent.sweep.stop import Interrupted, Stop

EXIT_FAILED = 1
EXIT_REFUSED = 2


class RefusedError(Exception):
    """Nothing was changed, and the message says what to write or do instead."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when done, 1 when it failed or was stopped, 2 when it refused to begin."""
    options = make_parser().parse_args(arguments)
    try:
        if options.compare:
            return _compare(options)
        return _sweep(options, NvmlSweepDriver(), Stop())
    except (RefusedError, PlanError, RecordError) as error:
        return _fail(error, EXIT_REFUSED)
    except Interrupted as error:
        return _fail(f"stopped by {error}; everything is as it was before", EXIT_FAILED)
    except RestoreError as error:
        return _fail(f"NOT EVERYTHING IS AS IT WAS: {error}", EXIT_FAILED)
    except (GpuError, JournalError, PowerLimitChangedError, EndpointError, LoadError, MeterError, OSError) as error:
        return _fail(error, EXIT_FAILED)


def _fail(error: object, status: int) -> int:
    sys.stderr.write(f"wattlock-agent sweep: {error}\n")
    return status


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _sweep(options: argparse.Namespace, driver: SweepDriver, stop: Stop) -> int:
    if not options.gpus:
        raise RefusedError("say which GPUs the endpoint runs on: --gpus UUID,... ('wattlock-agent show' lists them)")
    info = driver.open()
    try:
        gpus = _choose(driver.list_gpus(), options.gpus)
        limits = _limits(driver, gpus)
        plan = _plan(options, gpus, limits)
        _say(_describe(plan, gpus, info))
        if options.dry_run:
            return 0
        if not options.i_may_change_clocks:
            raise RefusedError(
                "this changes clocks and power limits of the GPUs above and slows whoever uses them; "
                "add --i-may-change-clocks if you may, or --dry-run to see the plan alone"
            )
        if not options.url or not options.out:
            raise RefusedError("give the endpoint (--url) and a directory for the result (--out)")
        if not driver.may_write():
            raise RefusedError("clocks and power limits can be changed by root with CAP_SYS_ADMIN only: run as root")
        directory = _empty_directory(options.out)
        boot_id = read_boot_id()
        journal = FileJournal(options.state_dir, boot_id)
        journal.acquire()
        try:
            _refuse_leftovers(journal)
            load, tokens, run = _prepare(options, plan, gpus, limits, info, directory)
            levers = Levers(driver, journal, gpus, boot_id, run.date, limits)
            meter = Meter(driver, [gpu.uuid for gpu in gpus], tokens, stop.pause)
            stop.install()
            try:
                windows = Sweep(plan, levers, load, meter, directory, stop.pause, _say).run()
            finally:
                try:
                    undo(levers, driver)
                finally:
                    load.stop()  # after that: it may wait for requests on their way
        finally:
            journal.release()
    finally:
        driver.close()
    _say("clocks and power limits are as they were before")
    _write(directory, run, windows, options.max_loss_percent)
    return 0


def _choose(found: Sequence[GpuIdentity], wanted: Sequence[str]) -> tuple[GpuIdentity, ...]:
    by_uuid = {gpu.uuid: gpu for gpu in found}
    uuids = list(by_uuid) if list(wanted) == ["all"] else list(dict.fromkeys(wanted))
    if missing := [uuid for uuid in uuids if uuid not in by_uuid]:
        raise RefusedError(f"no GPU {', '.join(missing)} here; there are {', '.join(by_uuid) or 'none'}")
    gpus = tuple(by_uuid[uuid] for uuid in uuids)
    if not gpus:
        raise RefusedError("the driver lists no GPU")
    for gpu in gpus:
        if gpu.mig_enabled or gpu.virtual:
            raise RefusedError(f"{gpu.uuid} is in MIG mode or virtual: its clock belongs to others as well")
    if len({gpu.product for gpu in gpus}) > 1 or len({gpu.supported_clocks_mhz for gpu in gpus}) > 1:
        raise RefusedError("the GPUs are of several kinds: sweep one kind at a time")
    return gpus


def _limits(driver: SweepDriver, gpus: Sequence[GpuIdentity]) -> PowerLimits | None:
    """Return the power limits that the GPUs have in common; None where they cannot be changed."""
    try:
        found = {driver.power_limits(gpu.uuid) for gpu in gpus}
    except GpuError as error:
        if error.fault is not GpuFault.NOT_SUPPORTED:
            raise
        return None
    if len(found) > 1:
        raise RefusedError("the GPUs have different power limits: set them alike first (nvidia-smi -pl)")
    return found.pop()


def _plan(options: argparse.Namespace, gpus: Sequence[GpuIdentity], limits: PowerLimits | None) -> Plan:
    clocks = clock_points(gpus[0].supported_clocks_mhz, options.clocks)
    watts: tuple[int, ...] = ()
    if limits is not None:
        watts = power_points(limits.low_mw / 1000, limits.set_mw / 1000, options.power_limits)
    elif options.power_limits:
        raise RefusedError("these GPUs do not let their power limit be changed: add --power-limits none")
    points = [*(Setting(Lever.CLOCK, clock) for clock in clocks), *(Setting(Lever.POWER, each) for each in watts)]
    return Plan(
        workloads(options.shapes, options.concurrency, options.lengths, options.output_tokens),
        interleaved(points, options.repeats, options.stock_every, options.seed),
        options.settle_seconds,
        options.window_seconds,
    )


def _describe(plan: Plan, gpus: Sequence[GpuIdentity], info: DriverInfo) -> str:
    order = ", ".join(str(setting) for setting in plan.settings)
    return (
        f"{len(gpus)} x {gpus[0].product}, driver {info.driver_version}: {', '.join(gpu.uuid for gpu in gpus)}\n"
        f"loads: {', '.join(map(str, plan.workloads))}\n"
        f"for each of them, in this order: {order}\n"
        f"{plan.windows} measurements of {plan.window_seconds:g} s take {duration(plan.remaining_seconds(0))}, and "
        "for each load the time until all its requests run"
    )


def _empty_directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise RefusedError(f"{path} is not empty: give a new directory, so that no result is overwritten")
    return path


def _refuse_leftovers(journal: FileJournal) -> None:
    if journal.records() or journal.power_limits is not None:
        raise RefusedError(
            "the journal names locks or power limits that an agent or a sweep left behind; "
            "run 'wattlock-agent reset' first"
        )


def _prepare(
    options: argparse.Namespace,
    plan: Plan,
    gpus: Sequence[GpuIdentity],
    limits: PowerLimits | None,
    info: DriverInfo,
    directory: Path,
) -> tuple[Load, TokenSource, Run]:
    endpoint = parse_endpoint(options.url)
    model = options.model or served_model(endpoint)
    seed = prompt_seed()
    metrics = _metrics(endpoint, options)
    load: Load
    tokens: TokenSource
    if metrics and (options.client == "vllm" or (options.client == "auto" and vllm_load.installed())):
        tokenizer = options.tokenizer or served_tokenizer(endpoint, model)
        load = vllm_load.VllmLoad(endpoint, model, tokenizer, metrics, seed, directory / "vllm-bench.log")
        tokens, client = metrics, "vllm bench serve"
    else:
        own = ClientLoad(endpoint, model, seed)
        load, tokens, client = own, metrics or own, "its own client"
    run = Run(
        label=options.label or options.architecture or model,
        architecture=options.architecture or "",
        model=model,
        product=gpus[0].product,
        gpus=len(gpus),
        driver_version=info.driver_version,
        date=timestamp(time.time()),
        client=client,
        tokens_from="the engine's metrics" if metrics else "the client",
        settle_seconds=plan.settle_seconds,
        window_seconds=plan.window_seconds,
        repeats=options.repeats,
        seed=options.seed,
        limit_watts=limits.set_mw / 1000 if limits else None,
        planned_windows=plan.windows,
    )
    (directory / RUN_NAME).write_text(encode_run(run), encoding="utf-8")
    return load, tokens, run


def _metrics(endpoint: Endpoint, options: argparse.Namespace) -> MetricsTokens | None:
    try:
        found = MetricsTokens(metrics_url(endpoint, options.metrics_url))
        found.page()
    except EndpointError:
        if options.metrics_url or options.client == "vllm":
            raise  # asked for, or needed: vLLM's client does not tell its count while it runs
        return None
    return found


def _write(directory: Path, run: Run, windows: Sequence[Window], max_loss_percent: float) -> None:
    rows = summarise(windows)
    texts = {"points.csv": points_csv(rows), "report.md": page(run, rows, max_loss_percent)}
    if (choice := choose(rows, max_loss_percent)) is not None:
        texts["profile.yaml"] = profile(run, choice)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    _draw(directory / "pareto.png", run, rows)
    _say(texts["report.md"])
    _say(f"written to {directory}: {', '.join(sorted(each.name for each in directory.iterdir()))}")


def _draw(path: Path, run: Run, rows: Sequence[Row]) -> None:
    if plot.available():
        plot.draw(path, run, rows)
    else:
        _say("no plot: install matplotlib (wattlock-agent[sweep]) and add it with --compare of this directory")


def _compare(options: argparse.Namespace) -> int:
    if not options.out:
        raise RefusedError("give a directory for the result (--out)")
    runs = [(run, summarise(windows)) for run, windows in map(read_run, options.compare)]
    labels = [run.label for run, _ in runs]
    if len(set(labels)) < len(labels):
        raise RefusedError(f"runs have the same label ({', '.join(labels)}): give each its own with --label")
    directory = _empty_directory(options.out)
    for number, (run, rows) in enumerate(runs):
        _draw(directory / f"pareto-{number}.png", run, rows)
    text = comparison(runs)
    (directory / "lengths.md").write_text(text, encoding="utf-8")
    _say(text)
    return 0
