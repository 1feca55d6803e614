"""vLLM's own benchmark client as the load: ``vllm bench serve``.

It makes a fixed number of requests and ends, and needs some seconds to begin. So it is started anew when it ends, and
windows in which that happened are measured again. Its own numbers are over all of its run, whatever the clock was: what
counts are the engine's counters over each window.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

from wattlock_agent.sweep.endpoint import Endpoint, EndpointError, MetricsTokens
from wattlock_agent.sweep.load import LoadError
from wattlock_agent.sweep.plan import Shape, Workload

_PROGRAM = "vllm"
#: Prompts are made before the first one is sent: so many tokens take it some seconds.
_PROMPT_TOKENS = 2_000_000
_SUFFIX_TOKENS = 16
_STOP_SECONDS = 10.0
_SHOWN_BYTES = 600


def installed() -> bool:
    """Return whether the program is on the PATH."""
    return shutil.which(_PROGRAM) is not None


def arguments(endpoint: Endpoint, model: str, tokenizer: str | None, workload: Workload, seed: int) -> list[str]:
    """Return the command. Prompts of decode share all but their last 16 tokens, so that the prefix cache has them."""
    shared = workload.length_tokens - _SUFFIX_TOKENS if workload.shape is Shape.DECODE else 0
    shared = max(0, shared)
    prompts = max(10 * workload.concurrency, min(1000 * workload.concurrency, _PROMPT_TOKENS // workload.length_tokens))
    numbers = {
        "--random-prefix-len": shared,
        "--random-input-len": workload.length_tokens - shared,
        "--random-output-len": workload.output_tokens,
        "--num-prompts": prompts,
        "--max-concurrency": workload.concurrency,
        "--seed": seed,
    }
    return [
        *(_PROGRAM, "bench", "serve", "--backend", "openai", "--base-url", endpoint.url),
        *("--endpoint", "/v1/completions", "--dataset-name", "random", "--ignore-eos", "--model", model),
        *(("--tokenizer", tokenizer) if tokenizer else ()),
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
        self._workload: Workload | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gap = False

    def start(self, workload: Workload) -> None:
        """As Load."""
        self._workload = workload
        self._launch()

    def ready(self) -> bool:
        """As Load: the engine says that as many requests run as shall run at a time."""
        self.steady()
        try:
            return self._workload is not None and self._metrics.running() >= self._workload.concurrency
        except EndpointError as error:
            raise LoadError(str(error)) from None

    def steady(self) -> bool:
        """As Load; starts the program anew when it has ended."""
        if self._process is not None and (status := self._process.poll()) is not None:
            if status != 0:
                raise LoadError(f"vllm bench serve ended with status {status}: {self._last_words()}")
            self._launch()
        gap, self._gap = self._gap, False
        return not gap

    def stop(self) -> None:
        """As Load."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=_STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _launch(self) -> None:
        if self._workload is None:
            return
        self._gap = True
        self._seed += 1  # else prompts of prefill would come again, and be cached
        command = arguments(self._endpoint, self._model, self._tokenizer, self._workload, self._seed)
        try:
            with self._log_path.open("ab") as log:
                # A session of its own: Ctrl-C reaches the sweep alone, which then ends it.
                self._process = subprocess.Popen(  # noqa: S603 - the user's own program, no shell
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise LoadError(f"cannot start vllm bench serve: {error}; use --client own") from error

    def _last_words(self) -> str:
        try:
            with self._log_path.open("rb") as log:
                log.seek(max(0, self._log_path.stat().st_size - _SHOWN_BYTES))
                return log.read(_SHOWN_BYTES).decode(errors="replace").strip()
        except OSError:
            return f"see {self._log_path}"
