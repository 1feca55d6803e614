"""``make chaos``: random sequences of faults, from a seed. Run inside ``dev/cluster run`` (``dev/chaos`` does it)."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from chaos.catalogue import CATALOGUE
from chaos.engine import Engine, Result, draw
from chaos.nodes import ROOT, cluster_name
from chaos.recorder import Recorder
from chaos.site import NAMESPACE, Site
from workloads import SYSTEM


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="how many faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="repeats a sequence; a new one is drawn and printed if left out")
    parser.add_argument("--from-step", type=int, default=1, help="begin in the middle of the sequence")
    parser.add_argument("--only", action="append", default=[], choices=sorted(CATALOGUE), help="of these faults alone")
    parser.add_argument("--each", action="store_true", help="each fault of the catalogue once, in its order")
    parser.add_argument("--go-on", action="store_true", help="go on after a failure, to see more of them")
    parser.add_argument("--bundle", type=Path, help="folder for logs and objects when a step fails")
    return parser.parse_args()


def _command(*words: str) -> str:
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return result.stdout + result.stderr


def bundle(folder: Path, recorder: Recorder, site: Site) -> None:
    """Write all that a person needs to find out what happened."""
    folder.mkdir(parents=True, exist_ok=True)
    world = "policies,nodeenergies,pods,daemonsets,deployments,events".replace("policies", "energypolicies")
    (folder / "objects.yaml").write_text(_command("kubectl", "get", world, "-A", "-o", "yaml"))
    (folder / "overview.txt").write_text(_command("kubectl", "get", "nodes,pods,epol,nen", "-A", "-o", "wide"))
    for body in site.pods(SYSTEM) + site.pods(NAMESPACE):
        name = body["metadata"]["name"]
        for suffix, more in (("", []), (".previous", ["--previous"])):
            text = _command("kubectl", "-n", body["metadata"]["namespace"], "logs", name, *more)
            if "not found" not in text[:200]:
                (folder / f"{name}{suffix}.log").write_text(text)
    for name, node in site.nodes.items():
        log = node.path(site.write_log)
        (folder / f"writes-{name}.log").write_bytes(log.read_bytes()[-200_000:] if log.exists() else b"")
    (folder / "wrong.txt").write_text("\n".join(recorder.wrong))
    for component in ("kube-apiserver", "kubelet-node0", "kubelet-node1"):
        text = _command(str(ROOT / "dev/cluster"), "logs", "--name", cluster_name(), component)
        (folder / f"{component}.log").write_text(text[-500_000:])


def _say(number: int, last: int, name: str, result: Result, took_seconds: float) -> None:
    verdict = f"restored in {result.restore_seconds:4.1f} s" if not result.problems else "FAILED"
    print(f"[{number:>{len(str(last))}}/{last}] {name:<64} {verdict}   ({took_seconds:.0f} s)", flush=True)
    for problem in result.problems:
        print(f"    {problem}", flush=True)


def main() -> int:
    options = _options()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3))
    again = f"make chaos SEED={seed} N={options.steps}"
    print(f"chaos: seed {seed}; the same again: {again}", flush=True)
    site = Site()
    site.prepare()
    recorder = Recorder(site)
    recorder.start()
    engine = Engine(site, recorder)
    began, failed = time.monotonic(), 0
    print(f"all is as it should be after {engine.settle(120):.1f} s", flush=True)
    names = options.only or list(CATALOGUE)
    steps = len(names) if options.each else options.steps
    for number in range(options.from_step, steps + 1):
        step = draw(seed, number, (names[number - 1],) if options.each else tuple(options.only))
        started = time.monotonic()
        result = engine.do(step)
        _say(number, steps, step.name, result, time.monotonic() - started)
        if result.problems:
            failed += 1
            print(f"    seed {seed}, step {number}: {again} FROM={number}", flush=True)
            if options.bundle:
                bundle(options.bundle / f"seed-{seed}-step-{number}", recorder, site)
                print(f"    logs and objects: {options.bundle}/seed-{seed}-step-{number}", flush=True)
            if not options.go_on:
                break
            site.repair()
    recorder.stop()
    print(f"\n{engine.table()}\n", flush=True)
    print(
        f"{recorder.locks_written} locks written, {len(recorder.wrong)} of them to a wrong GPU; "
        f"{time.monotonic() - began:.0f} s; seed {seed}: {'failed' if failed else 'all restored'}",
        flush=True,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
