"""The agent as it is, in Observe mode, with NVML made read-only: only its surroundings are stand-ins.

Writes what the agent publishes, once for each pass, to a file of JSON lines; at the end the record of NVML calls.
usage: agent_process.py DIRECTORY API_URL    (DIRECTORY holds kubelet.sock, token, ca.crt; results go there)
"""

import json
import logging
import resource
import sys
import threading
import time
from pathlib import Path

import pynvml
from readonly import CallLog, give_up_capabilities, guard
from wattlock_agent.gpu.nvml import NvmlDriver
from wattlock_agent.holders.podresources import PodResources
from wattlock_agent.journal_file import FileJournal, read_boot_id
from wattlock_agent.loop import Loop
from wattlock_agent.serving.scrape import Scraper
from wattlock_agent.settings import Settings
from wattlock_api.constants import Mode

NODE_NAME = "this-machine"
_LOOK_SECONDS = 0.1


def _publish(loop: Loop, path: Path, done: threading.Event) -> None:
    """Write each new snapshot of the agent: what it would serve at /metrics and send to the API server."""
    passes = 0
    with path.open("w", encoding="utf-8") as file:
        while not done.wait(_LOOK_SECONDS):
            snapshot = loop.board.snapshot
            if snapshot.passes == passes:
                continue
            passes = snapshot.passes
            used = resource.getrusage(resource.RUSAGE_SELF)
            line = {
                "atSeconds": snapshot.at_seconds,
                "writtenSeconds": time.clock_gettime(time.CLOCK_BOOTTIME),
                "passes": passes,
                "passSeconds": snapshot.pass_seconds,
                "cpuSeconds": used.ru_utime + used.ru_stime,
                "memoryMiB": _memory_mib(),
                "smMHz": dict(snapshot.sm_mhz),
                "clockWrites": sum(snapshot.clock_writes.values()),
                "status": snapshot.status.to_api(),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()


def _memory_mib() -> dict[str, float]:
    """Return the resident memory: anonymous is the process's own, file is libraries that the kernel can drop."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return {
        "anonymous": int(sizes["RssAnon"].split()[0]) / 1024,
        "file": int(sizes["RssFile"].split()[0]) / 1024,
    }


def _calls(log: CallLog) -> dict[str, object]:
    return {
        "functions": {
            name: {"codes": calls.codes, "latenciesMicroseconds": sorted(calls.latencies_us)}
            for name, calls in sorted(log.functions.items())
        },
        "fields": {str(number): calls.codes for number, calls in sorted(log.fields.items())},
        "missing": sorted(log.missing),
        "refused": log.refused,
    }


def main(directory: Path, api_url: str) -> int:
    """Run until SIGTERM; returns the agent's exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="agent: %(levelname)s %(name)s %(message)s")
    log = guard(pynvml)
    give_up_capabilities()
    settings = Settings(
        node_name=NODE_NAME,
        pod_name="hardware-tier",
        operator_namespace="wattlock",
        state_directory=directory / "state",
        kubelet_socket=directory / "kubelet.sock",
        http_port=0,
        mode=Mode.OBSERVE,
        api_server=api_url,
        service_account_directory=directory,
    )
    boot_id = read_boot_id()
    driver = NvmlDriver()
    loop = Loop(
        settings,
        driver,
        PodResources(settings.kubelet_socket),
        Scraper(),
        FileJournal(settings.state_directory, boot_id),
        boot_id,
        "hardware-tier",
    )
    done = threading.Event()
    publisher = threading.Thread(target=_publish, args=(loop, directory / "agent.jsonl", done), name="publish")
    publisher.start()
    try:
        return loop.run()
    finally:
        done.set()
        publisher.join()
        calls = _calls(log) | {"mayWrite": driver.may_write()}
        (directory / "calls.json").write_text(json.dumps(calls), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
