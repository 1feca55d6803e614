"""What the recordings of a run say: figures for each phase, and checks that hold or do not. Pure.

Everything about the agent is taken from what it publishes; everything that it is compared with comes from the
observer's samples and the load's own record of its steps.
"""

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

#: Phases shorter than this say nothing about energy: two grids of 100 ms leave up to 3 % at the edges of 3 to 5 s.
_MIN_ENERGY_SECONDS = 10.0
#: The counter and the integral of instantaneous power differ by 0.1 % over minutes (H100, H200; driver 580).
MAX_ENERGY_ERROR_PERCENT = 1.5
MAX_TOKEN_ERROR_PERCENT = 2.0
#: The bit is sampled and trails the load by tenths of a second; the counter is exact.
MAX_CAP_ERROR_POINTS = 2.0
MAX_CPU_PERCENT = 2.0
MAX_MEMORY_MIB = 80.0
MAX_SLOWDOWN_PERCENT = 0.5
_POWER_CAP_BIT = 0x4
_PROMPT_EVIDENCE_SECONDS = 70.0
#: Over so long the agent averages what it reports.
_REPORT_SECONDS = 20.0


@dataclass(frozen=True)
class Phase:
    """A stretch of one kind of work."""

    name: str
    """After what ran: the batch that fitted, not the one that was wanted."""
    pod: str | None
    began_seconds: float
    ended_seconds: float
    tokens_per_step: int
    progress: list[tuple[float, int]]
    """Steps done so far, at seconds since boot."""
    note: str = ""


@dataclass(frozen=True)
class Recording:
    """Everything that was recorded. Contains the GPU's UUID, which no report does."""

    product: str
    versions: Mapping[str, str]
    limit_watts: float
    uuid: str
    torch: str | None
    phases: list[Phase]
    turns: list[tuple[bool, float, float]]
    """(agent runs, from, to) while the load decoded."""
    progress: list[tuple[float, int]]
    published: list[dict[str, Any]]
    samples: str
    calls: Mapping[str, Any]
    reports: int


@dataclass(frozen=True)
class Check:
    """A statement that must hold."""

    holds: bool | None
    """None: not made, because what it is about was not measured."""
    text: str


@dataclass(frozen=True)
class PhaseFigures:
    """One row of the report's table. Watts and joules are of the GPU board."""

    name: str
    seconds: float
    watts: float | None = None
    independent_watts: float | None = None
    energy_error_percent: float | None = None
    sm_mhz: float | None = None
    independent_sm_mhz: float | None = None
    power_cap_percent: float | None = None
    """Growth of the power-cap counter, as a share of the time."""
    independent_power_cap_percent: float | None = None
    """Share of the observer's samples that show the power-cap bit of the clock event reasons."""
    tokens_per_second: float | None = None
    """As published by the agent at the end of the phase: generated in decode, computed of prompts in prefill."""
    independent_tokens_per_second: float | None = None
    joules_per_token: float | None = None
    """As published: for each token of that kind."""
    independent_joules_per_token: float | None = None
    computes_prompts: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class CallFigures:
    """How an NVML function, or a field, answered."""

    name: str
    count: int
    supported: bool
    codes: Mapping[int, int]
    median_us: float | None = None
    p95_us: float | None = None
    max_us: float | None = None


@dataclass(frozen=True)
class Overhead:
    """What the agent costs."""

    cpu_percent: float
    """Of one core."""
    anonymous_mib: float
    """Resident memory of its own."""
    file_mib: float
    """Resident pages of libraries, the driver's among them."""
    pass_ms: float
    """Mean wall time of a pass of its loop."""
    slowdown_percent: float | None = None
    """Of the load's speed while the agent runs, against while it stands still."""
    slowdown_ci: tuple[float, float] | None = None
    """95 % interval over the pairs of turns."""
    pairs: int = 0


@dataclass(frozen=True)
class Findings:
    """The report's content."""

    product: str
    versions: Mapping[str, str]
    limit_watts: float
    torch: str | None
    phases: list[PhaseFigures]
    calls: list[CallFigures]
    fields: list[CallFigures]
    missing: list[str]
    overhead: Overhead
    checks: list[Check]
    series: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    """For the picture: (seconds since the start, value)."""
    spans: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Samples:
    times: list[float]
    watts: list[float]
    mhz: list[float]
    reasons: list[int]
    """Clock event reasons, a bit field."""

    def mean_watts(self, began: float, ended: float) -> float | None:
        """Return the mean instantaneous power by trapezoids; the sensor is sampled faster than it refreshes."""
        first, last = bisect_left(self.times, began), bisect_left(self.times, ended)
        if last - first < 10:
            return None
        joules = sum(
            (self.times[n + 1] - self.times[n]) * (self.watts[n] + self.watts[n + 1]) / 2
            for n in range(first, last - 1)
        )
        return joules / (self.times[last - 1] - self.times[first])

    def median_mhz(self, began: float, ended: float) -> float | None:
        """Return the median SM clock."""
        inside = self.mhz[bisect_left(self.times, began) : bisect_left(self.times, ended)]
        return median(inside) if inside else None

    def power_cap_percent(self, began: float, ended: float) -> float | None:
        """Return the share of samples under the software power cap."""
        inside = self.reasons[bisect_left(self.times, began) : bisect_left(self.times, ended)]
        return 100 * sum(bool(each & _POWER_CAP_BIT) for each in inside) / len(inside) if inside else None


def _read_samples(text: str) -> _Samples:
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["instant_mw"]]
    return _Samples(
        [float(row["t"]) for row in rows],
        [float(row["instant_mw"]) / 1000 for row in rows],
        [float(row["sm_mhz"]) for row in rows],
        [int(row["reasons"]) for row in rows],
    )


def _steps_at(progress: Sequence[tuple[float, int]], at: float) -> float:
    """Return the steps done by a time, interpolated."""
    n = bisect_left([each[0] for each in progress], at)
    if n == 0 or n == len(progress):
        return float(progress[min(n, len(progress) - 1)][1])
    (t0, s0), (t1, s1) = progress[n - 1], progress[n]
    return s0 + (s1 - s0) * (at - t0) / (t1 - t0)


def _gpu(line: Mapping[str, Any], uuid: str) -> Mapping[str, Any]:
    return next((gpu for gpu in line["status"].get("gpus", []) if gpu["uuid"] == uuid), {})


def _instance(line: Mapping[str, Any], pod: str) -> Mapping[str, Any]:
    return next((each for each in line["status"].get("instances", []) if each["pool"] == pod), {})


def _phase(recording: Recording, phase: Phase, samples: _Samples) -> PhaseFigures:
    """Judge a phase by the lines that the agent published inside it while it knew the phase's holder."""
    holder = f"{phase.pod}-0" if phase.pod else None
    lines = [
        line
        for line in recording.published
        if phase.began_seconds <= line["atSeconds"] <= phase.ended_seconds
        and _gpu(line, recording.uuid).get("holder", {}).get("name") == holder
    ]
    seconds = phase.ended_seconds - phase.began_seconds
    lines = lines[1:]  # the pass that notes the new holder comes between two readings: its time is not theirs
    if len(lines) < 2:
        reason = "too short for two readings" if seconds < _MIN_ENERGY_SECONDS else "the agent published nothing of it"
        return PhaseFigures(phase.name, seconds, note=phase.note or reason)
    first, last = lines[0], lines[-1]
    began, ended = first["atSeconds"], last["atSeconds"]
    gpus = _gpu(first, recording.uuid), _gpu(last, recording.uuid)
    joules = float(gpus[1]["energyJoules"]) - float(gpus[0]["energyJoules"])
    watts, independent = joules / (ended - began), samples.mean_watts(began, ended)
    capped = [float(gpu.get("limiters", {}).get("powerCapSeconds", 0)) for gpu in gpus]
    clocks = [line["smMHz"][recording.uuid] for line in lines if recording.uuid in line["smMHz"]]
    instance = _instance(last, phase.pod) if phase.pod else {}
    own_rate = own_joules_per_token = rate = joules_per_token = None
    if phase.progress:
        window = max(began, ended - _REPORT_SECONDS), ended
        steps = _steps_at(phase.progress, window[1]) - _steps_at(phase.progress, window[0])
        own_rate = steps * phase.tokens_per_step / (window[1] - window[0])
        decodes = phase.name.startswith("decode")
        rate = instance.get("tokensPerSecond" if decodes else "promptTokensPerSecond")
        if decodes or phase.pod == "prefill":  # a Decode pod's energy is never counted by its prompt tokens
            recent = samples.mean_watts(*window)
            own_joules_per_token = recent / own_rate if recent and own_rate else None
            joules_per_token = instance.get("joulesPerGeneratedToken" if decodes else "joulesPerPromptToken")
    return PhaseFigures(
        name=phase.name,
        seconds=seconds,
        watts=watts,
        independent_watts=independent,
        energy_error_percent=100 * (watts / independent - 1) if independent else None,
        sm_mhz=median(clocks) if clocks else None,
        independent_sm_mhz=samples.median_mhz(began, ended),
        power_cap_percent=100 * (capped[1] - capped[0]) / (ended - began),
        independent_power_cap_percent=samples.power_cap_percent(began, ended),
        tokens_per_second=float(rate) if rate is not None else None,
        independent_tokens_per_second=own_rate,
        joules_per_token=float(joules_per_token) if joules_per_token is not None else None,
        independent_joules_per_token=own_joules_per_token,
        computes_prompts=instance.get("computesPrompts", False) if phase.pod else None,
        note=phase.note,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _calls(functions: Mapping[str, Any]) -> list[CallFigures]:
    figures = []
    for name, calls in functions.items():
        codes = {int(code): int(count) for code, count in calls["codes"].items()}
        times = calls["latenciesMicroseconds"]
        figures.append(
            CallFigures(
                name,
                sum(codes.values()),
                0 in codes,
                codes,
                *((median(times), _quantile(times, 0.95), times[-1]) if times else ()),
            )
        )
    return figures


def _overhead(recording: Recording) -> Overhead:
    first, last = recording.published[0], recording.published[-1]
    running = last["writtenSeconds"] - first["writtenSeconds"]
    running -= sum(ended - began for runs, began, ended in recording.turns if not runs)
    cpu_percent = 100 * (last["cpuSeconds"] - first["cpuSeconds"]) / running
    pass_ms = 1000 * (last["passSeconds"] - first["passSeconds"]) / max(1, last["passes"] - first["passes"])
    memory = last["memoryMiB"]
    speeds = []
    for runs, began, ended in recording.turns if recording.progress else ():
        margin = 0.3  # the signal and the step in progress
        steps = _steps_at(recording.progress, ended) - _steps_at(recording.progress, began + margin)
        speeds.append((runs, steps / (ended - began - margin)))
    ratios = []
    for one, two in zip(speeds[::2], speeds[1::2], strict=True):
        on, off = (one, two) if one[0] else (two, one)
        ratios.append(100 * (1 - on[1] / off[1]))
    if len(ratios) < 2:
        return Overhead(cpu_percent, memory["anonymous"], memory["file"], pass_ms)
    # Student's t for 11 degrees of freedom, 2.201: twelve pairs are measured.
    margin_percent = 2.201 * stdev(ratios) / math.sqrt(len(ratios))
    mean = fmean(ratios)
    interval = (mean - margin_percent, mean + margin_percent)
    return Overhead(cpu_percent, memory["anonymous"], memory["file"], pass_ms, mean, interval, len(ratios))


def _promised(phase: PhaseFigures) -> Sequence[str]:
    """Return what is checked of a phase, for one that could not be measured."""
    if phase.name.startswith("idle"):
        return ()
    if "labelled" in phase.name:
        return "tokens per second", "recognised as prefill by its metrics"
    return "tokens per second", "joules per token", "no false alarm about its role"


def _checks(recording: Recording, phases: Sequence[PhaseFigures], overhead: Overhead) -> list[Check]:
    calls = recording.calls
    refused = list(calls["refused"])
    writes = max((line["clockWrites"] for line in recording.published), default=0)
    checks = [
        Check(
            not refused, f"no NVML function that may write was looked up{': ' + ', '.join(refused) if refused else ''}"
        ),
        Check(not calls["mayWrite"], "the agent's process had no capability, so the driver would have refused a write"),
        Check(writes == 0, "the agent counts no clock write, although its orders name a cap of 1200 MHz"),
    ]
    states = {_gpu(line, recording.uuid).get("state") for line in recording.published}
    checks.append(Check("Locked" not in states, f"states of the GPU: {', '.join(sorted(filter(None, states)))}"))
    longs = [each for each in phases if each.seconds >= _MIN_ENERGY_SECONDS and each.energy_error_percent is not None]
    worst = max((abs(each.energy_error_percent or 0) for each in longs), default=math.inf)
    checks.append(
        Check(
            worst <= MAX_ENERGY_ERROR_PERCENT,
            f"energy: counter against integrated power, worst phase {worst:.2f} % "
            f"(at most {MAX_ENERGY_ERROR_PERCENT} %)",
        )
    )
    gaps = [
        abs(each.power_cap_percent - each.independent_power_cap_percent)
        for each in phases
        if each.power_cap_percent is not None and each.independent_power_cap_percent is not None
    ]
    checks.append(
        Check(
            bool(gaps) and max(gaps) <= MAX_CAP_ERROR_POINTS,
            f"time at the power cap: counter against sampled bit, worst phase {max(gaps, default=math.inf):.1f} points "
            f"(at most {MAX_CAP_ERROR_POINTS:.0f})",
        )
    )
    for each in phases:
        if each.watts is None:
            # Work that ran and of which the agent tells nothing is the agent's fault.
            holds = False if each.seconds >= _MIN_ENERGY_SECONDS else None
            checks += [Check(holds, f"{each.name}: {what}") for what in _promised(each)]
            continue
        for what, published, own in (
            ("tokens per second", each.tokens_per_second, each.independent_tokens_per_second),
            ("joules per token", each.joules_per_token, each.independent_joules_per_token),
        ):
            if own is None:
                continue
            error = 100 * (published / own - 1) if published is not None else math.inf
            checks.append(
                Check(
                    abs(error) <= MAX_TOKEN_ERROR_PERCENT,
                    f"{each.name}: {what} differ by {error:+.2f} % from the load's own steps"
                    f"{' and power' if 'joules' in what else ''} (at most {MAX_TOKEN_ERROR_PERCENT} %)",
                )
            )
        if each.computes_prompts is not None and each.tokens_per_second is not None:
            mislabelled = "labelled" in each.name
            if mislabelled and each.seconds >= _PROMPT_EVIDENCE_SECONDS:
                checks.append(Check(each.computes_prompts, f"{each.name}: recognised as prefill by its metrics"))
            elif not mislabelled:
                checks.append(Check(not each.computes_prompts, f"{each.name}: no false alarm about its role"))
    checks.append(
        Check(overhead.cpu_percent <= MAX_CPU_PERCENT, f"agent: {overhead.cpu_percent:.2f} % of a core (at most 2 %)")
    )
    checks.append(
        Check(
            overhead.anonymous_mib <= MAX_MEMORY_MIB,
            f"agent: {overhead.anonymous_mib:.0f} MiB of its own memory (at most {MAX_MEMORY_MIB:.0f} MiB) "
            f"and {overhead.file_mib:.0f} MiB of libraries in memory",
        )
    )
    if overhead.slowdown_percent is not None and overhead.slowdown_ci is not None:
        checks.append(
            Check(
                overhead.slowdown_percent <= MAX_SLOWDOWN_PERCENT,
                f"decode is {overhead.slowdown_percent:+.3f} % slower while the agent runs "
                f"(95 % interval {overhead.slowdown_ci[0]:+.3f} to {overhead.slowdown_ci[1]:+.3f}; at most 0.5 %)",
            )
        )
    elif recording.turns:
        checks.append(Check(None, "decode is not slower while the agent runs"))
    return checks


def evaluate(recording: Recording) -> Findings:
    """Return what the recording says."""
    samples = _read_samples(recording.samples)
    phases = [_phase(recording, each, samples) for each in recording.phases]
    overhead = _overhead(recording)
    start = recording.phases[0].began_seconds
    agent_watts = []
    for zero, one, two in zip(recording.published, recording.published[1:], recording.published[2:], strict=False):
        gpus = [_gpu(line, recording.uuid) for line in (zero, one, two)]
        # The pass that notes a new holder comes between two readings, so no power follows from its time.
        same = all(gpu and gpu.get("holder") == gpus[0].get("holder") for gpu in gpus)
        if same and two["atSeconds"] > one["atSeconds"]:
            joules = float(gpus[2]["energyJoules"]) - float(gpus[1]["energyJoules"])
            agent_watts.append((two["atSeconds"] - start, joules / (two["atSeconds"] - one["atSeconds"])))
    spans = [(each.name, each.began_seconds - start, each.ended_seconds - start) for each in recording.phases]
    if recording.turns:
        spans.append(("agent on, off, on ...", recording.turns[0][1] - start, recording.turns[-1][2] - start))
    fields = [
        CallFigures(number, sum(codes.values()), "0" in codes, {int(code): count for code, count in codes.items()})
        for number, codes in recording.calls["fields"].items()
    ]
    return Findings(
        product=recording.product,
        versions=recording.versions,
        limit_watts=recording.limit_watts,
        torch=recording.torch,
        phases=phases,
        calls=_calls(recording.calls["functions"]),
        fields=fields,
        missing=list(recording.calls["missing"]),
        overhead=overhead,
        checks=_checks(recording, phases, overhead),
        series={
            "integrated": [(t - start, w) for t, w in zip(samples.times, samples.watts, strict=True)],
            "agent": agent_watts,
            "sm": [(t - start, f) for t, f in zip(samples.times, samples.mhz, strict=True)],
        },
        spans=spans,
    )
