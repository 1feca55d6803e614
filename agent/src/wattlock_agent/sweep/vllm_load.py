"""vLLM's own benchmark client as the load: ``vllm bench serve``.

It makes a fixed number of requests and ends, and needs some seconds to begin. So it is started anew before it ends, and
windows in which that happened are measured again. Its own numbers are over all of its run, whatever the clock was: what
counts are the engine's counters over each window.
"""

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from wattlock_api import boottime

from wattlock_agent.sweep.endpoint import Endpoint, EndpointError, EngineRestartedError, MetricsTokens, Tokens
from wattlock_agent.sweep.load import LoadError
from wattlock_agent.sweep.plan import Shape, Workload

_PROGRAM = "vllm"
#: Prompts are made before the first one is sent: so many tokens take it some seconds.
_PROMPT_TOKENS = 2_000_000
#: A run that is over sooner has twice as many prompts the next time, up to so many times the first number.
_LONG_RUN_SECONDS = 300.0
_MOST_TIMES = 16
#: All but the last token are shared. Then prompts of 1024 tokens, and one, end just after a block of the prefix cache,
#: and one token is computed. With a longer end it would be up to a block of each request (16 tokens, on CPU 128).
_SUFFIX_TOKENS = 1
_STOP_SECONDS = 10.0
_SHOWN_BYTES = 600
#: So many pages of the engine in a row may come too late; each may take 10 s.
_MAX_LATE_PAGES = 10
_FAILED_REQUEST = re.compile(rb"^Error [0-9]+: (.+)$", re.MULTILINE)


def installed() -> bool:
    """Return whether the program is on the PATH."""
    return shutil.which(_PROGRAM) is not None


@dataclass(frozen=True)
class Run:
    """One run of the program."""

    workload: Workload
    prompts: int
    generated_before: float
    """The engine's counter when it began."""
    began_seconds: float

    def ends(self, generated: float) -> bool:
        """Return whether fewer requests than wanted may be on the way, as no prompts are left.

        The program lives on after that, to compute its statistics.
        """
        return self._made(generated) >= (self.prompts - self.workload.concurrency) * self.workload.output_tokens

    def failed(self, generated: float) -> bool:
        """Return whether a run that is over made far less than it should have: it ends well if its requests failed."""
        return self._made(generated) < self.prompts * self.workload.output_tokens / 2

    def all_run(self, generated: float, running: float, waiting: float) -> bool:
        """Return whether all requests are on the way.

        Of prompts an engine computes a few at a time, whatever its limit of requests, and all others wait. Where they
        are short the page seldom meets them: then the tokens made tell that more requests have ended than may be on the
        way. Requests that decode run all at a time; if some wait, the engine does not take so many.
        """
        wanted = self.workload.concurrency
        if self.workload.shape is Shape.DECODE:
            return running >= wanted
        return running + waiting >= wanted or self._made(generated) > 2 * wanted * self.workload.output_tokens

    def _made(self, generated: float) -> float:
        return generated - self.generated_before


def prompts_of(workload: Workload, times: int) -> int:
    """Return how many prompts a run has."""
    some = max(10 * workload.concurrency, min(1000 * workload.concurrency, _PROMPT_TOKENS // workload.length_tokens))
    return some * times


def arguments(
    endpoint: Endpoint, model: str, tokenizer: str | None, workload: Workload, prompts: int, seed: int
) -> list[str]:
    """Return the command.

    Prompts of decode share all but their end, so that the prefix cache has them. Those of prefill share nothing: each
    has a "repeated" prefix of its own. (The dataset "random" makes only as many prompts as the vocabulary has tokens,
    each of them numbers in a row, so they come again and are cached.)
    """
    if workload.shape is Shape.DECODE:
        dataset = "random"
        numbers = {
            "--random-prefix-len": workload.length_tokens,
            "--random-input-len": _SUFFIX_TOKENS,
            "--random-output-len": workload.output_tokens,
        }
    else:
        dataset = "prefix_repetition"
        numbers = {
            "--prefix-repetition-prefix-len": workload.length_tokens - 1,
            "--prefix-repetition-suffix-len": 1,
            "--prefix-repetition-num-prefixes": prompts,
            "--prefix-repetition-output-len": workload.output_tokens,
        }
    numbers |= {
        "--num-prompts": prompts,
        "--max-concurrency": workload.concurrency,
        "--temperature": 0,  # as our own client; newer versions leave it to the engine
        "--seed": seed,
    }
    return [
        *(_PROGRAM, "bench", "serve", "--backend", "openai", "--base-url", endpoint.url),
        *("--endpoint", "/v1/completions", "--dataset-name", dataset, "--ignore-eos", "--disable-tqdm"),
        *("--model", model, *(("--tokenizer", tokenizer) if tokenizer else ())),
        *(text for name, value in numbers.items() for text in (name, str(value))),
    ]


class VllmLoad:
    """Load by ``vllm bench serve``."""

    def __init__(
        self, endpoint: Endpoint, model: str, tokenizer: str | None, metrics: MetricsTokens, seed: int, log_path: Path
    ) -> None:
        """What the program prints goes to ``log_path``."""
        self._endpoint = endpoint
        self._model = model
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._seed = seed
        self._log_path = log_path
        self._run: Run | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._times = 1
        self._gap = False
        self._late_pages = 0

    def start(self, workload: Workload) -> None:
        """As Load."""
        self._times = 1
        self._launch(workload, self._metrics.read())

    def ready(self) -> bool:
        """As Load: the engine says that as many requests are on the way as shall be."""
        self.steady()
        try:
            page = self._metrics.page()
        except EngineRestartedError:
            raise
        except EndpointError as error:
            self._late(error)
            return False
        self._late_pages = 0
        if self._run is None or page.running_requests is None:
            return self._run is not None
        return self._run.all_run(page.generated_tokens or 0.0, page.running_requests, page.waiting_requests or 0.0)

    def steady(self) -> bool:
        """As Load; starts the program anew when it has ended or is about to."""
        if (run := self._run) is not None and (process := self._process) is not None:
            status = process.poll()
            try:
                now = self._metrics.read()
            except EngineRestartedError:
                raise
            except EndpointError as error:
                self._late(error)
                return False
            self._late_pages = 0
            if status is not None and (status != 0 or run.failed(now.generated)):
                raise LoadError(self._complaint(status))
            if status is not None or run.ends(now.generated):
                self._end()
                if boottime.now_seconds() - run.began_seconds < _LONG_RUN_SECONDS:
                    self._times = min(2 * self._times, _MOST_TIMES)
                self._launch(run.workload, now)
        gap, self._gap = self._gap, False
        return not gap

    def stop(self) -> None:
        """As Load."""
        self._run = None
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=_STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _launch(self, workload: Workload, before: Tokens) -> None:
        """Begin a run. ``before`` is what the engine just counted: another page might come too late, under load."""
        self._gap = True
        self._seed += 1  # else prompts of prefill would come again, and be cached
        prompts = prompts_of(workload, self._times)
        command = arguments(self._endpoint, self._model, self._tokenizer, workload, prompts, self._seed)
        try:
            with self._log_path.open("wb") as log:  # of the newest run alone: it may be one of hundreds
                # A session of its own: Ctrl-C reaches the sweep alone, which then ends it.
                self._process = subprocess.Popen(  # noqa: S603 - the user's own program, no shell
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise LoadError(f"cannot start vllm bench serve: {error}; use --client own") from error
        self._run = Run(workload, prompts, before.generated, before.at_seconds)

    def _late(self, error: EndpointError) -> None:
        """Note that a page did not come: no reason to end under load, unless it goes on.

        Raises:
            LoadError: it does.
        """
        self._late_pages += 1
        if self._late_pages >= _MAX_LATE_PAGES:
            raise LoadError(str(error)) from None

    def _complaint(self, status: int) -> str:
        try:
            words = self._log_path.read_bytes()
        except OSError:
            words = b""
        if failed := _FAILED_REQUEST.findall(words):
            return (
                f"the requests of vllm bench serve failed: {failed[0].decode(errors='replace')}; if the engine refuses "
                f"such prompts (vLLM: --max-model-len) shorten --lengths, and see the engine's log and {self._log_path}"
            )
        return (
            f"vllm bench serve ended with status {status}; if it misses a tokenizer, give its folder (--tokenizer), or "
            f"use --client own. The end of {self._log_path}: {words[-_SHOWN_BYTES:].decode(errors='replace').strip()}"
        )
