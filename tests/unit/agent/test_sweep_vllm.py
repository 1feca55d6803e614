"""vLLM's own client as the load: begun anew in time, and every window one in which all requests were on the way."""

import stat
import time
from itertools import pairwise
from pathlib import Path

import pytest
from wattlock_agent.serving.base import ScrapeFailure, no_tokens
from wattlock_agent.serving.pages import parse_page
from wattlock_agent.sweep import vllm_load
from wattlock_agent.sweep.endpoint import EngineRestartedError, MetricsTokens, parse_endpoint
from wattlock_agent.sweep.load import LoadError
from wattlock_agent.sweep.plan import Shape, Workload
from wattlock_agent.sweep.vllm_load import Run, VllmLoad, arguments, prompts_of

DATA = Path(__file__).parents[2] / "data"
DECODE = Workload(Shape.DECODE, 8, 1024, 16)
PREFILL = Workload(Shape.PREFILL, 8, 1024, 1)
THERE = parse_endpoint("http://127.0.0.1:8000")

#: What vllm bench serve of vLLM 0.32.0 printed for prompts that the engine refused, before it ended with status 0.
ALL_FAILED = """\
Maximum request concurrency: 4
/opt/vllm/env/lib/python3.11/site-packages/vllm/benchmarks/serve.py:1165: UserWarning: All requests failed. This is \
likely due to a misconfiguration on the benchmark arguments.
  metrics, actual_output_lens = calculate_metrics(
Failed requests during benchmark run detected (capping to 10):
Error 0: Bad Request
Error 1: Bad Request
============ Serving Benchmark Result ============
Successful requests:                     0
Failed requests:                         40
"""
#: And the end of what it printed for a model name that is neither a folder nor known to the hub, with status 1.
NO_TOKENIZER = """\
  File "/opt/vllm/env/lib/python3.11/site-packages/transformers/utils/hub.py", line 620, in cached_files
    raise OSError(
OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.
"""


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_prompts_of_decode_share_all_but_one_token():
    """With an end of 16 tokens vLLM 0.32.0 computed a block of 128 again each time: 25 % of 512."""
    command = arguments(THERE, "m", None, Workload(Shape.DECODE, 8, 4096, 256), 99, seed=3)
    assert command[:3] == ["vllm", "bench", "serve"]
    options = dict(pairwise(command))
    assert options["--dataset-name"] == "random"
    assert (options["--random-prefix-len"], options["--random-input-len"]) == ("4096", "1")
    assert (options["--max-concurrency"], options["--base-url"]) == ("8", "http://127.0.0.1:8000")
    assert (options["--num-prompts"], options["--temperature"]) == ("99", "0")
    assert "--tokenizer" not in command
    assert "--disable-tqdm" in command  # else the log is a progress bar, and so are the words quoted from it


def test_prompts_of_prefill_share_nothing():
    """The dataset "random" of vLLM 0.32.0 has as many prompts as tokens: with 509, 85 % of the tokens were cached."""
    command = arguments(THERE, "m", "t", Workload(Shape.PREFILL, 8, 4096, 1), 99, seed=3)
    options = dict(pairwise(command))
    assert options["--dataset-name"] == "prefix_repetition"
    assert (options["--prefix-repetition-prefix-len"], options["--prefix-repetition-suffix-len"]) == ("4095", "1")
    assert options["--prefix-repetition-num-prefixes"] == options["--num-prompts"] == "99"
    assert options["--prefix-repetition-output-len"] == "1"
    assert options["--tokenizer"] == "t"


def test_a_run_ends_with_its_last_prompt_and_not_with_its_last_token():
    run = Run(DECODE, 80, 1000.0, 0.0)
    assert not run.ends(1000 + 72 * 16 - 1)
    assert run.ends(1000 + 72 * 16)
    assert run.failed(1000 + 20 * 16)
    assert not run.failed(1000 + 80 * 16)
    assert prompts_of(DECODE, 2) == 2 * prompts_of(DECODE, 1) == 2 * (2_000_000 // 1024)


def test_all_requests_decode_at_a_time_but_prompts_are_computed_one_by_one():
    page = parse_page((DATA / "vllm-0.32.0-overload.txt").read_bytes(), 0.0)
    assert not isinstance(page, ScrapeFailure)
    running, waiting = page.running_requests, page.waiting_requests
    assert (running, waiting) == (5, 10)
    both = round(running + waiting)

    def all_run(shape, concurrency, generated=0.0, requests=(running, waiting)):
        return Run(Workload(shape, concurrency, 1024, 1), 1000, 0.0, 0.0).all_run(generated, *requests)

    assert all_run(Shape.PREFILL, both)
    assert not all_run(Shape.PREFILL, both + 1)
    assert all_run(Shape.DECODE, round(running))
    assert not all_run(Shape.DECODE, round(running) + 1), "the engine does not take so many"
    # A toy's page read "0 running, 0 waiting" 40 times of 40 under a full load of short prompts.
    assert not all_run(Shape.PREFILL, 4, 8.0, (0.0, 0.0))
    assert all_run(Shape.PREFILL, 4, 9.0, (0.0, 0.0))


class Bench:
    """A program named vllm that notes its arguments and does what a line of shell says, and the engine's page."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.generated = 0.0
        self.failing: Exception | None = None
        self.late = 0
        self.late_after: int | None = None
        """After so many more pages one is late."""
        self.log = directory / "vllm.log"

    def load(self, line: str) -> VllmLoad:
        program = self.directory / "bin" / "vllm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$$ $*" >> {self.directory}/calls\n{line}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        metrics = MetricsTokens("http://127.0.0.1/metrics", self._page)
        return VllmLoad(parse_endpoint("http://127.0.0.1:1"), "m", None, metrics, 1, self.log)

    def _page(self, _):
        if self.late_after is not None:
            self.late_after -= 1
            if self.late_after < 0:
                self.late_after, self.late = None, 1
        if self.late > 0:
            self.late -= 1
            return ScrapeFailure(1.0, "MetricsUnreachable", "no complete answer within 10 s")
        values = {**vars(no_tokens(1.0)), "running_requests": 8.0, "generated_tokens": self.generated}
        return type(no_tokens(1.0))(**values)

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def option(self, name: str) -> list[str]:
        return [line.rpartition(f"{name} ")[2].split()[0] for line in self.calls()]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return Bench(tmp_path)


def test_it_runs_until_stopped_with_all_its_children(bench, tmp_path):
    load = bench.load("sleep 1000 & echo $! > " + str(tmp_path / "child") + "; wait")
    load.start(DECODE)
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    assert load.ready()
    load.stop()
    child = int((tmp_path / "child").read_text())
    until(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())
    load.stop()


def test_it_is_started_anew_with_other_prompts_and_the_gap_is_told(bench):
    load = bench.load("exit 0")
    load.start(PREFILL)

    def began_anew():
        bench.generated += 100_000
        return not load.steady() and len(bench.calls()) >= 3

    until(began_anew)
    load.stop()
    seeds = bench.option("--seed")
    assert len(set(seeds)) == len(seeds)


def test_it_is_started_anew_before_its_last_requests_with_more_prompts(bench):
    """It lives on without any request, while it computes its statistics; and runs of seconds would hold no window."""
    load = bench.load("exec sleep 1000")
    load.start(DECODE)
    until(bench.calls)
    assert not load.steady()  # it has just begun
    assert load.steady()
    bench.generated = 1945 * 16 - 1
    assert load.steady()
    bench.generated += 1
    assert not load.steady()
    until(lambda: len(bench.calls()) == 2)
    assert load.steady()
    load.stop()
    assert bench.option("--num-prompts") == ["1953", "3906"]
    first = int(bench.calls()[0].split()[0])
    assert not Path(f"/proc/{first}").exists()
    load.start(DECODE)
    until(lambda: len(bench.calls()) == 3)
    load.stop()
    assert bench.option("--num-prompts")[-1] == "1953"


def test_requests_that_all_failed_end_the_sweep_though_the_status_is_0(bench):
    load = bench.load(f"cat <<'X'\n{ALL_FAILED}X")
    load.start(DECODE)
    with pytest.raises(LoadError, match=r"failed: Bad Request; .*--max-model-len.*--lengths.*vllm\.log"):
        until(lambda: load.ready() and False)
    load.stop()


def test_a_failure_is_quoted_and_what_to_write_is_said(bench):
    load = bench.load(f"cat >&2 <<'X'\n{NO_TOKENIZER}X\nexit 1")
    load.start(DECODE)
    with pytest.raises(LoadError, match=r"(?s)status 1; .*--tokenizer.*huggingface\.co"):
        until(lambda: load.steady() and False)
    load.stop()


def test_pages_that_come_too_late_are_no_end_unless_it_goes_on(bench):
    load = bench.load("exec sleep 1000")
    load.start(DECODE)
    load.steady()
    bench.late = 5
    assert not load.steady()
    assert not load.ready()
    assert bench.late == 2
    until(load.ready)
    bench.late = 99
    with pytest.raises(LoadError, match="no complete answer"):
        until(lambda: load.steady() and False, 5)
    load.stop()
    assert bench.late == 99 - vllm_load._MAX_LATE_PAGES


def test_a_page_that_comes_too_late_when_it_is_started_anew_is_no_end(bench):
    load = bench.load("exec sleep 1000")
    load.start(DECODE)
    load.steady()
    until(bench.calls)
    bench.generated, bench.late_after = 1945.0 * 16, 1
    assert not load.steady()
    until(lambda: len(bench.calls()) == 2)
    assert not load.steady()  # that page
    assert load.steady()
    load.stop()


def test_an_engine_that_began_anew_is_told_as_such(bench):
    load = bench.load("exec sleep 1000")
    bench.generated = 1000.0
    load.start(DECODE)
    load.steady()
    bench.generated = 5.0
    with pytest.raises(EngineRestartedError):
        load.steady()
    load.stop()
