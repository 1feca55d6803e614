"""One step: a fault, or two at once; what must be true meanwhile and afterwards; and how long that took."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from statistics import median

from chaos.fault import CATALOGUE, Fault, Hold, Released, Stage
from chaos.recorder import Recorder
from chaos.site import Site, TooLongError
from chaos.truth import World, Wrong, fell, wrong
from wattlock_operator.kube import KubeError

RESTORE_SECONDS = 60.0
#: The cluster's own work: starting pods, of which there may be ten at once on a busy machine.
COMPLETE_SECONDS = 120.0
POLL_SECONDS = 0.3
#: What is right must stay right for so long.
STEADY_SECONDS = 1.0
TWO_AT_ONCE_SHARE = 0.15
EVERYTHING = "everything"
API = "api"


class BrokenError(AssertionError):
    """A promise is broken. The message says which."""


@dataclass(frozen=True)
class Step:
    """A step of a sequence: the same for the same seed and number, whatever came before."""

    seed: int
    number: int
    faults: tuple[Fault, ...]

    @property
    def name(self) -> str:
        return " + ".join(fault.name for fault in self.faults)

    @property
    def rng(self) -> Random:
        return Random(f"{self.seed}/{self.number}/do")


def draw(seed: int, number: int, names: tuple[str, ...] = ()) -> Step:
    """Return step ``number`` (from 1) of the sequence of ``seed``; of the named faults alone, if any are named."""
    rng = Random(f"{seed}/{number}")
    faults = [CATALOGUE[name] for name in names or CATALOGUE]
    first = rng.choices(faults, [each.weight for each in faults])[0]
    if rng.random() >= TWO_AT_ONCE_SHARE or EVERYTHING in first.touches:
        return Step(seed, number, (first,))
    apart = [each for each in faults if not each.touches & first.touches and EVERYTHING not in each.touches]
    if not apart:
        return Step(seed, number, (first,))
    return Step(seed, number, (first, rng.choices(apart, [each.weight for each in apart])[0]))


@dataclass
class Row:
    """What became of a fault over all steps."""

    times: int = 0
    seconds: list[float] = field(default_factory=list)
    left: int = 0
    wrong: int = 0


@dataclass
class Result:
    """What a step found."""

    restore_seconds: float = 0.0
    left: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)


class Engine:
    """Does steps."""

    def __init__(self, site: Site, recorder: Recorder) -> None:
        self._site, self.recorder = site, recorder
        self._saved: dict[str, float] = {}
        self.rows: dict[str, Row] = {}

    def settle(self, within_seconds: float = RESTORE_SECONDS, *, healthy: bool = True) -> float:
        """Wait until every GPU is as it must be, and stays so for a moment; returns after how many seconds it was.

        ``healthy``: the workload is complete, operator and agents are ready again, and the journals name the locked
        GPUs and no other.

        Raises:
            BrokenError: it did not come to that in time.
        """
        began = time.monotonic()
        complete_at = right_since = None
        while True:
            now = time.monotonic()
            found, last = Wrong(), "the API server does not answer"
            try:
                world = self.recorder.world()
                self._take_savings(world)
                found = wrong(world)
                waits = self._site.incomplete() if healthy else {}
                complete_at = None if waits else complete_at or now
                waits = waits or found.missing or (self._site.unwell() if healthy else {})
                last = _told({**found.locked, **waits})
            except KubeError as error:
                last = str(error)
            if not last:
                right_since = right_since or now
                if now - right_since >= STEADY_SECONDS:
                    return right_since - began
            else:
                right_since = None
            limit = within_seconds + STEADY_SECONDS
            if found.locked and now - began > limit:
                raise BrokenError(f"after {within_seconds:.0f} s: {_told(found.locked)}")
            # What is wanted can be back only once the pods that want it are.
            if last and now - (complete_at or began + COMPLETE_SECONDS) > limit:
                raise BrokenError(f"after {now - began:.0f} s: {last}")
            time.sleep(POLL_SECONDS)

    def _take_savings(self, world: World) -> None:
        problems = fell(self._saved, world.policies)
        self._saved |= {each.uid: each.saved_kwh for each in world.policies if each.saved_kwh is not None}
        if problems:
            raise BrokenError("; ".join(problems))

    def released(self, stage: Released) -> float:
        """Wait until no GPU of these nodes is locked; returns after how many seconds.

        Raises:
            BrokenError: it did not come to that in time.
        """
        began = time.monotonic()
        while True:
            locked = {uuid for node in stage.nodes for uuid in self.recorder.locked_on(node)}
            if not locked:
                return time.monotonic() - began
            if time.monotonic() - began > stage.within_seconds:
                raise BrokenError(f"after {stage.within_seconds:.0f} s still locked: {', '.join(sorted(locked))}")
            time.sleep(POLL_SECONDS)

    def do(self, step: Step) -> Result:
        """Do a step, and judge it."""
        result = Result()
        wrong_before = len(self.recorder.wrong)
        seconds: list[float] = []
        try:
            self._do(step, seconds)
            seconds.append(self.settle())
        except (BrokenError, TooLongError, AssertionError) as error:
            result.problems.append(str(error))
            result.left = len(self._unwanted())
        result.restore_seconds = max(seconds, default=0.0)
        result.problems += self.recorder.wrong[wrong_before:]
        result.wrong = len(self.recorder.wrong) - wrong_before
        try:
            result.problems += self._site.unexpected_restarts()
        except KubeError as error:
            result.problems.append(str(error))
        if self.recorder.failure is not None:
            result.problems.append(f"the recorder failed: {self.recorder.failure!r}")
        row = self.rows.setdefault(step.name if len(step.faults) == 1 else "two at once", Row())
        row.times += 1
        row.seconds.append(result.restore_seconds)
        row.left += result.left
        row.wrong += result.wrong
        return result

    def _unwanted(self) -> set[str]:
        try:
            world = self.recorder.world()
        except KubeError:
            return set()
        return set(wrong(world).locked)

    def _do(self, step: Step, seconds: list[float]) -> None:
        """Let the faults happen side by side: each does its first part, then all wait, and so on.

        An outage of the API server comes and goes while the other fault lasts: most faults begin and end through it.
        """
        rng = step.rng
        outages = [fault.do(self._site, rng) for fault in step.faults if API in fault.touches]
        # What ends by waiting for the agents comes after what keeps them down.
        rest = sorted(step.faults, key=lambda fault: "policies" in fault.touches)
        others = [fault.do(self._site, rng) for fault in rest if API not in fault.touches]
        alone = len(step.faults) == 1
        try:
            running = list(others)
            while running or outages:
                stages = self._next(running)
                while during := self._next(outages):
                    self._wait(during, seconds, alone=alone)
                self._wait(stages, seconds, alone=alone)
        finally:
            for doing in (*outages, *others):
                doing.close()  # type: ignore[attr-defined]

    @staticmethod
    def _next(running: list[Iterator[Stage]]) -> list[Stage]:
        """Let each do its next part; those that are done leave the list."""
        stages: list[Stage] = []
        for doing in list(running):
            stage = next(doing, None)
            if stage is None:
                running.remove(doing)
            else:
                stages.append(stage)
        return stages

    def _wait(self, stages: list[Stage], seconds: list[float], *, alone: bool) -> None:
        for stage in stages:
            if isinstance(stage, Hold):
                time.sleep(stage.seconds)
            elif isinstance(stage, Released):
                took = self.released(stage)
                # How long nobody may have been heard of is no time of ours.
                seconds.append(took if stage.within_seconds <= RESTORE_SECONDS else 0.0)
            elif alone:
                seconds.append(self.settle(healthy=False))

    def table(self) -> str:
        """Return what happened, fault by fault."""
        lines = [f"{'fault':<48}{'times':>6}{'worst s':>9}{'median s':>9}{'locks left':>11}{'wrong GPUs':>11}"]
        total = Row()
        for name, row in sorted(self.rows.items()):
            lines.append(_line(name, row))
            total.times += row.times
            total.seconds += row.seconds
            total.left += row.left
            total.wrong += row.wrong
        return "\n".join([*lines, _line("all", total)])


def _told(found: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {text}" for name, text in sorted(found.items()))


def _line(name: str, row: Row) -> str:
    worst, middle = max(row.seconds, default=0.0), median(row.seconds or [0.0])
    return f"{name:<48}{row.times:>6}{worst:>9.1f}{middle:>9.1f}{row.left:>11}{row.wrong:>11}"
