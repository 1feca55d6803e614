"""The hardware tier: the agent in Observe mode on this machine's GPU, under a decode and a prefill load. Only reads.

Writes a report (Markdown, a picture, the figures as JSON) and ends with 0 if every check that was made holds.
usage: measure.py [--output DIRECTORY] [--load-python PYTHON] [--gpu INDEX] [--scale FACTOR]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pynvml
from cluster import ApiServer, Kubelet, now_seconds
from evaluate import Phase, Recording, evaluate
from readonly import guard
from report import headline, write_report
from wattlock_api.base import ObjectRef
from wattlock_api.constants import Mode, Role
from wattlock_api.nodeenergy import Order, PolicyRef

HERE = Path(__file__).parent
_NAMESPACE = "hardware-tier"
_UIDS = {name: f"00000000-0000-0000-0000-00000000000{n}" for n, name in enumerate(("decode", "prefill", "mislabelled"))}
_START_SECONDS = 60.0
#: The first that fits into the GPU's memory is run. A sequence takes 0.6 GB, so 128 take 77 GB besides 7 GB of weights.
_SMALL_BATCHES, _LARGE_BATCHES = (32, 16), (128, 112, 96, 64, 48)
_DECODE = "decode decode {batches} 4096 {seconds}"


@dataclass(frozen=True)
class Step:
    """A phase to be measured."""

    name: str
    """With {batch} where the load chooses it."""
    pod: str | None
    """Who holds the GPU: a key of ``_UIDS``."""
    command: str
    """For load.py, with {batches} and {seconds}; empty: no work."""
    seconds: float
    batches: tuple[int, ...] = ()
    """To choose from, the largest first."""


def _plan(scale: float, loaded: bool) -> list[Step]:
    idle = Step("idle", None, "", 20 * scale)
    if not loaded:
        return [idle, Step("idle, held", "decode", "", 40 * scale)]
    return [
        idle,
        Step("decode B{batch} L4096", "decode", _DECODE, 60 * scale, _SMALL_BATCHES),
        Step("decode B{batch} L4096", "decode", _DECODE, 45 * scale, _LARGE_BATCHES),
        Step("prefill T4096", "prefill", "prefill prefill 4096 {seconds}", 45 * scale),
        # The pod says Decode, its work says prefill: the agent must believe the work.
        Step("prefill T4096, labelled Decode", "mislabelled", "prefill prefill 4096 {seconds}", 80 * scale),
        Step("idle, context alive", "decode", "", 20 * scale),
    ]


def _orders(port: int | None) -> list[Order]:
    def order(pod: str, role: Role, page: str) -> Order:
        return Order(
            policy=PolicyRef(namespace=_NAMESPACE, name="observe", uid="00000000-0000-0000-0000-0000000000aa"),
            pool=pod,
            role=role,
            pod=ObjectRef(namespace=_NAMESPACE, name=f"{pod}-0", uid=_UIDS[pod]),
            pod_uid=_UIDS[pod],
            instance=f"{_NAMESPACE}/{pod}-0",
            mode=Mode.OBSERVE,
            cap_mhz=1200 if role is Role.DECODE else None,  # a cap that Observe must not apply
            metrics_url=f"http://127.0.0.1:{port}/{page}/metrics" if port else None,
        )

    return [
        order("decode", Role.DECODE, "decode"),
        order("prefill", Role.PREFILL, "prefill"),
        order("mislabelled", Role.DECODE, "prefill"),
    ]


class Load:
    """The process that works on the GPU."""

    def __init__(self, python: str, gpu_uuid: str) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu_uuid}
        # Only the machine's own packages: what the agent needs must not get in PyTorch's way.
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(HERE / "load.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hello = self.answer()

    def order(self, command: str) -> None:
        """Give a command."""
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer. Raises RuntimeError when the process has died."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load has ended with status {self._process.wait()}; its messages are above")
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        self.order("quit")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def _process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *command])
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def find_load_python(wanted: str | None) -> str | None:
    """Return a Python that has PyTorch with a GPU, or None."""
    for python in [wanted] if wanted else [sys.executable, "python3"]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        try:
            done = subprocess.run([python, "-c", code], env=environment, capture_output=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return python
    return None


def measure(directory: Path, load_python: str | None, gpu_index: int, scale: float) -> Recording:
    """Run all phases; returns what was recorded. Raises RuntimeError with what to do."""
    log = guard(pynvml)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(gpu_index)
    uuid, product = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    versions = {"driver": pynvml.nvmlSystemGetDriverVersion(), "nvml": pynvml.nvmlSystemGetNVMLVersion()}
    limit_watts = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    pynvml.nvmlShutdown()
    assert not log.refused
    (directory / "token").write_text("none")
    (directory / "ca.crt").write_text("")
    api, kubelet = ApiServer("this-machine"), Kubelet(directory / "kubelet.sock")
    samples = directory / "observer.csv"
    phases: list[Phase] = []
    overhead: list[tuple[bool, float, float]] = []
    progress: list[tuple[float, int]] = []
    load: Load | None = None
    try:
        with (
            _process(str(HERE / "agent_process.py"), str(directory), api.url) as agent,
            _process(str(HERE / "observer.py"), uuid, str(samples)) as observer,
        ):
            api.give(_orders(None))
            deadline = now_seconds() + _START_SECONDS
            while not api.wait_for_report(api.generation, 1.0):
                if agent.poll() is not None or now_seconds() > deadline:
                    raise RuntimeError("the agent gave no report; its messages are above")
            for step in _plan(scale, load_python is not None):
                if step.command and load is None:
                    assert load_python
                    _say("starting the load")
                    load = Load(load_python, uuid)
                    api.give(_orders(int(load.hello["port"])))
                kubelet.say((_NAMESPACE, f"{step.pod}-0") if step.pod else None, uuid)
                _say(f"{step.name.format(batch=_joined(step.batches))}: {step.seconds:.0f} s")
                phases.append(_run_phase(step, load))
            if load is not None:
                kubelet.say((_NAMESPACE, "decode-0"), uuid)
                _say("effect of the agent on the load: the agent runs and stands still in turn")
                overhead, progress = _interleave(load, agent, observer, scale)
            if agent.poll() is not None or observer.poll() is not None:
                raise RuntimeError("agent or observer ended early; its messages are above")
    finally:
        if load is not None:
            load.close()
        kubelet.close()
        api.close()
    return Recording(
        product=product,
        versions=versions,
        limit_watts=limit_watts,
        uuid=uuid,
        torch=str(load.hello["torch"]) if load else None,
        phases=phases,
        turns=overhead,
        progress=progress,
        published=[json.loads(line) for line in (directory / "agent.jsonl").read_text().splitlines()],
        samples=samples.read_text(),
        calls=json.loads((directory / "calls.json").read_text()),
        reports=len(api.statuses),
    )


def _run_phase(step: Step, load: Load | None) -> Phase:
    if not step.command:
        began = now_seconds()
        time.sleep(step.seconds)  # what is measured is the passing of time
        return Phase(step.name, step.pod, began, now_seconds(), 0, [])
    assert load is not None
    load.order(step.command.format(batches=_joined(step.batches), seconds=step.seconds))
    answer = load.answer()
    if "error" in answer:
        _say(f"  {answer['error']}")
        now = now_seconds()
        name = step.name.format(batch=step.batches[-1] if step.batches else None)
        return Phase(name, step.pod, now, now, 0, [], note=str(answer["error"]))
    progress = [(float(at), int(steps)) for at, steps in answer["progress"]]
    tokens, note = int(answer["tokensPerStep"]), str(answer["note"])
    if note:
        _say(f"  {note}")
    # Named by what ran: in decode a step is one token for each sequence.
    return Phase(step.name.format(batch=tokens), step.pod, progress[0][0], progress[-1][0], tokens, progress, note)


def _joined(batches: Sequence[int]) -> str:
    return ",".join(map(str, batches))


def _interleave(
    load: Load, agent: subprocess.Popen[bytes], observer: subprocess.Popen[bytes], scale: float
) -> tuple[list[tuple[bool, float, float]], list[tuple[float, int]]]:
    """Let the agent run and stand still in turn (in the order on off off on ...) while the load decodes."""
    pairs, turn_seconds, lead_seconds = 12, 4.0 * scale, 6.0
    seconds = 2 * pairs * turn_seconds + lead_seconds + 2
    load.order(_DECODE.format(batches=_joined(_SMALL_BATCHES), seconds=f"{seconds:.1f}"))
    observer.send_signal(signal.SIGSTOP)
    time.sleep(lead_seconds)
    turns = []
    for pair in range(pairs):
        for running in (True, False) if pair % 2 == 0 else (False, True):
            agent.send_signal(signal.SIGCONT if running else signal.SIGSTOP)
            began = now_seconds()
            time.sleep(turn_seconds)
            turns.append((running, began, now_seconds()))
    agent.send_signal(signal.SIGCONT)
    observer.send_signal(signal.SIGCONT)
    answer = load.answer()
    return turns, [(float(at), int(steps)) for at, steps in answer.get("progress", ())]


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    """Measure, judge, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "docs" / "hardware")
    parser.add_argument("--load-python", default=os.environ.get("LOAD_PYTHON") or None, help="a Python with PyTorch")
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU to load (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the length of the phases")
    options = parser.parse_args()
    load_python = find_load_python(options.load_python)
    if load_python is None:
        _say("no Python with PyTorch and CUDA here: only the idle GPU is measured. Set LOAD_PYTHON=/path/to/python")
    try:
        with tempfile.TemporaryDirectory(prefix="wattlock-hardware-") as directory:
            recording = measure(Path(directory), load_python, options.gpu, options.scale)
    except (RuntimeError, pynvml.NVMLError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    if raw := os.environ.get("RECORDING"):
        Path(raw).write_text(json.dumps(asdict(recording)), encoding="utf-8")
    findings = evaluate(recording)
    path = write_report(findings, options.output)
    for check in findings.checks:
        print(f"{ {True: 'ok', False: 'FAIL', None: 'not made'}[check.holds]:8}  {check.text}")
    print(headline(findings))
    print(f"report: {path}")
    return 0 if all(check.holds is not False for check in findings.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
