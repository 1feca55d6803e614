"""Command line of the agent: ``run`` (the default), ``reset``, ``show`` and ``sweep``."""

import argparse
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from wattlock_agent.gpu.base import GpuDriver, GpuError
from wattlock_agent.gpu.nvml import NvmlDriver
from wattlock_agent.holders.podresources import PodResources
from wattlock_agent.journal import JournalError
from wattlock_agent.journal_file import KERNEL_BOOT_ID, FileJournal, read_boot_id
from wattlock_agent.loop import Loop
from wattlock_agent.serving.scrape import Scraper
from wattlock_agent.settings import DEFAULT_STATE_DIRECTORY, SettingsError, read_settings
from wattlock_agent.sweep.levers import undo_locks, undo_power_limits
from wattlock_agent.sweep.nvml_power import NvmlSweepDriver

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="wattlock-agent", description="Wattlock's node agent.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="serve the orders of this node (the default); settings come from the environment")
    reset = commands.add_parser(
        "reset",
        help="undo every lock that the journal on this host knows, for the day when no agent can run",
        description="Undoes every lock that the journal on this host knows, and the power limits that a killed sweep "
        "had changed. Needs root with the capability SYS_ADMIN and no running agent.",
    )
    reset.add_argument(
        "--state-dir",
        type=Path,
        default=Path(os.environ.get("WATTLOCK_STATE_DIR", DEFAULT_STATE_DIRECTORY)),
        help="directory of the journal (default: %(default)s)",
    )
    commands.add_parser("show", help="print one reading of every GPU; writes nothing")
    commands.add_parser("sweep", help="measure what clocks and power limits do to a live endpoint, then undo them")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["sweep"]:
        return _sweep(given[1:])
    options = parser.parse_args(given)
    _log_from(logging.INFO)
    try:
        if options.command == "reset":
            return _reset(options.state_dir)
        if options.command == "show":
            return _show(NvmlDriver())
        return _run()
    except (SettingsError, JournalError, GpuError) as error:
        sys.stderr.write(f"wattlock-agent: {error}\n")
        return EXIT_USAGE


def _log_from(level: int) -> None:
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format="%(asctime)s.%(msecs)03dZ level=%(levelname)s module=%(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    logging.Formatter.converter = time.gmtime


def _sweep(arguments: Sequence[str]) -> int:
    from wattlock_agent.sweep.command import main as sweep  # the agent itself never loads it

    _log_from(logging.WARNING)
    return sweep(arguments)


def _run() -> int:
    settings = read_settings(os.environ)
    boot_id = read_boot_id(settings.boot_id_file)
    loop = Loop(
        settings,
        NvmlDriver(),
        PodResources(settings.kubelet_socket),
        Scraper(),
        FileJournal(settings.state_directory, boot_id),
        boot_id,
        importlib.metadata.version("wattlock-agent"),
    )
    return loop.run()


def _reset(state_directory: Path) -> int:
    if not state_directory.is_dir():  # the journal would make it, and find nothing in it
        raise JournalError(
            f"there is no folder {state_directory} here: give the one of the journal (agent.stateDirectory of the Helm "
            "release) with --state-dir. Nothing was undone"
        )
    boot_id = read_boot_id(Path(os.environ.get("WATTLOCK_BOOT_ID_FILE", KERNEL_BOOT_ID)))
    journal = FileJournal(state_directory, boot_id)
    journal.acquire()
    for problem in journal.problems:
        sys.stderr.write(f"{problem}\n")
    if not journal.records() and journal.power_limits is None:
        sys.stdout.write(f"no lock of Wattlock is recorded in {state_directory}\n")
        return 0
    driver = NvmlSweepDriver()
    driver.open()
    try:
        driver.list_gpus()
        problems = undo_locks(driver, journal, boot_id, _say)
        problems += undo_power_limits(driver, journal, boot_id, _say)
    finally:
        driver.close()
    for problem in problems:
        _say(problem)
    return 1 if problems else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _show(driver: GpuDriver) -> int:
    info = driver.open()
    try:
        sys.stdout.write(f"driver {info.driver_version}, NVML {info.nvml_version}, may write: {driver.may_write()}\n")
        sys.stdout.write(
            f"{'GPU':<42}{'product':<26}{'SM MHz':>8}{'watts':>8}{'limit':>8}{'busy %':>8}{'joules':>14}\n"
        )
        for gpu in driver.list_gpus():
            try:
                reading = driver.read(gpu.uuid)
            except GpuError as error:
                sys.stdout.write(f"{gpu.uuid:<42}{gpu.product:<26}{error}\n")
                continue
            numbers = (
                (reading.sm_mhz, 1, 8),
                (reading.power_instant_mw, 1000, 8),
                (reading.power_limit_mw, 1000, 8),
                (reading.utilization_percent, 1, 8),
                (reading.energy_mj, 1000, 14),
            )
            cells = "".join(
                f"{'-' if value is None else round(value / unit):>{width}}" for value, unit, width in numbers
            )
            sys.stdout.write(f"{gpu.uuid:<42}{gpu.product:<26}{cells}\n")
    finally:
        driver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
