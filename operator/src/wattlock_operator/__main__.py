"""Command line of the operator: run (the default), check, profile, release-all."""

import argparse
import asyncio
import logging
import os
import sys

import kubernetes

from wattlock_operator import check, profile, release_all
from wattlock_operator.kube import connect
from wattlock_operator.run import run
from wattlock_operator.settings import SettingsError, from_environment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wattlock-operator", description="Wattlock's operator.")
    parser.add_argument("--verbose", action="store_true", help="log debug messages")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="run the operator (the default)")
    checking = commands.add_parser("check", help="tell whether the installation works; exit 1 when it does not")
    checking.add_argument("--timeout-seconds", type=float, default=120, help="how long to wait for it (default 120)")
    writing = commands.add_parser("profile", help="print what a pool's tuner found as a ClockProfile for kubectl apply")
    writing.add_argument("policy", metavar="NAMESPACE/POLICY", help="the policy with the tuner")
    writing.add_argument("--pool", default="", help="name of the pool, where several have a tuner")
    writing.add_argument("--name", default="", help="name of the profile (default: NAMESPACE-POLICY, or PROFILE)")
    writing.add_argument("--into", default="", metavar="PROFILE", help="an existing profile whose other rows are kept")
    releasing = commands.add_parser("release-all", help="stop operator and agents so that every GPU is released")
    releasing.add_argument("--timeout-seconds", type=float, help="how long to wait (default 240)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status: 0 well, 1 it failed, 2 it was asked wrongly."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for chatty in ("kopf", "urllib3", "kubernetes", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.INFO if options.verbose else logging.WARNING)
    # Kopf runs in a thread of its own; the signals are ours.
    logging.getLogger("kopf._core.reactor.running").addFilter(lambda record: "OS signals" not in record.getMessage())
    try:
        if options.command == "profile":  # reads the API alone: it needs no settings, and works from anywhere
            asked = (options.policy, options.pool, options.name, options.into)
            return profile.run(connect(), *asked, sys.stdout, sys.stderr)
        settings = from_environment(os.environ)
        match options.command:
            case "check":
                return check.run(settings, connect(), options.timeout_seconds, sys.stdout)
            case "release-all":
                timeout_seconds = options.timeout_seconds or settings.release_timeout_seconds
                return release_all.run(settings, connect(), timeout_seconds, sys.stdout)
            case _:
                return asyncio.run(run(settings))
    except SettingsError as error:
        sys.stderr.write(f"wattlock-operator: {error}\n")
        return 2
    except kubernetes.config.ConfigException as error:
        sys.stderr.write(f"wattlock-operator: no cluster to connect to ({error}): run in a pod or set KUBECONFIG\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
