"""The course of a sweep, its files, and what it says."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from wattlock_agent.sweep import plot
from wattlock_agent.sweep import run as run_module
from wattlock_agent.sweep.endpoint import EndpointError, EngineRestartedError
from wattlock_agent.sweep.estimates import Window, summarise
from wattlock_agent.sweep.findings import choose
from wattlock_agent.sweep.load import LoadError
from wattlock_agent.sweep.meter import Measured
from wattlock_agent.sweep.plan import STOCK, Lever, Plan, Setting, Shape, Workload, interleaved
from wattlock_agent.sweep.record import COLUMNS, RecordError, Run, csv_line, encode_run, read_run, window_line
from wattlock_agent.sweep.report import comparison, page, points_csv, profile
from wattlock_agent.sweep.run import Sweep, duration
from wattlock_agent.sweep.stop import Interrupted, Stop
from wattlock_api.clockprofile import ClockProfileSpec

ROOT = Path(__file__).parents[3]
POINTS = [Setting(Lever.CLOCK, 1590), Setting(Lever.CLOCK, 780), Setting(Lever.POWER, 650), Setting(Lever.POWER, 400)]
LOADS = tuple(
    Workload(shape, 32, length, 1 if shape is Shape.PREFILL else 256) for shape in Shape for length in (1024, 4096)
)
RUN = Run(
    *("GQA", "GQA", "qwen | 4b", "NVIDIA H200", 2, "580.1", "2026-01-02T03:04:05Z", "its own client", "the client"),
    *(5.0, 20.0, 3, "wattlock", 700.0),
)


def measured(setting, workload, noise=0.0):
    """Decode does not care for the clock, prefill follows it; 650 W is above what decode draws."""
    watts = {1590: 430.0, 780: 360.0, 400: 400.0}.get(setting.value, 500.0)
    rate = 50_000.0 if workload.shape is Shape.PREFILL else 4000.0
    if setting.value == 400 or (setting.value == 780 and workload.shape is Shape.PREFILL):
        rate *= 0.5
    return Measured(
        seconds=20.0,
        watts=watts * math.exp(noise) * (workload.length_tokens / 1024) ** 0.2,
        generated_per_second=rate,
        prompt_per_second=rate,
        observed_mhz=float(setting.value if setting.lever is Lever.CLOCK else 1980),
        cap_share=0.9 if setting == Setting(Lever.POWER, 400) else 0.0,
        celsius=None,
    )


def windows():
    found = []
    for workload in LOADS:
        for number, setting in enumerate(interleaved(POINTS, 3, 4, "s")):
            values = measured(setting, workload, noise=0.002 * (-1) ** (number // 2))
            found.append(Window(workload, setting, 25.0 * number, **vars(values)))
    return tuple(found)


class Bench:
    """Levers, load and meter in one, which note what is asked of them."""

    def __init__(self, gaps=()):
        self.events = []
        self.setting = STOCK
        self.gaps = list(gaps)
        self.workload = LOADS[0]

    def apply(self, setting):
        self.events.append(str(setting))
        self.setting = setting

    def start(self, workload):
        self.events.append(f"start {workload}")
        self.workload = workload

    def ready(self):
        return True

    def steady(self):
        return not (self.gaps and self.gaps.pop(0))

    def stop(self):
        self.events.append("stop")

    def measure(self, seconds):
        self.events.append("measure")
        return measured(self.setting, self.workload)


def a_sweep(bench, directory, said, pause=lambda _: None, loads=LOADS[:2]):
    plan = Plan(loads, interleaved(POINTS[:1], 1, 4, ""), 5.0, 20.0)
    return Sweep(plan, bench, bench, bench, directory, pause, said.append)


def test_each_load_runs_through_all_points_under_one_load(tmp_path):
    bench, said = Bench(), []
    found = a_sweep(bench, tmp_path, said).run()
    one = ["stock", "measure", "clock 1590 MHz", "measure", "stock", "measure", "stop"]
    assert bench.events == ["stock", "start decode 32 x 1024", *one, "stock", "start decode 32 x 4096", *one]
    assert len(found) == 6
    assert "[6/6] decode 32 x 4096, stock: 1980 MHz, " in said[-1]
    assert said[-1].endswith("0 s left")
    assert len((tmp_path / "windows.csv").read_text().splitlines()) == 7


def test_a_window_with_a_gap_of_the_load_is_measured_again(tmp_path):
    # asked before and after each window: a gap before the first, and one after the second try
    bench, said = Bench(gaps=[True, False, True]), []
    found = a_sweep(bench, tmp_path, said, loads=LOADS[:1]).run()
    assert len(found) == 3
    assert bench.events.count("measure") == 4
    assert sum("gap" in line for line in said) == 2


def test_a_page_that_comes_too_late_is_asked_for_again_but_not_for_ever(tmp_path):
    bench, said = Bench(), []
    answers = iter([EndpointError("late")] * 3)
    whole = bench.measure

    def measure(seconds):
        if (error := next(answers, None)) is not None:
            raise error
        return whole(seconds)

    bench.measure = measure
    assert len(a_sweep(bench, tmp_path, said, loads=LOADS[:1]).run()) == 3
    assert sum("late; measuring again" in line for line in said) == 3
    answers = iter([EndpointError("late")] * 4)
    with pytest.raises(EndpointError):
        a_sweep(bench, tmp_path, said).run()
    answers = iter([EngineRestartedError("restarted")])
    with pytest.raises(EngineRestartedError):
        a_sweep(bench, tmp_path, said).run()


def test_a_load_that_never_stands_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "READY_SECONDS", 0.0)
    bench = Bench()
    bench.ready = lambda: False
    with pytest.raises(LoadError, match="lower --concurrency"):
        a_sweep(bench, tmp_path, []).run()


def test_what_was_measured_before_a_signal_is_on_the_disk(tmp_path):
    bench, stop = Bench(), Stop()

    def pause(_):
        if bench.events.count("measure") == 2:
            stop._note(signal.SIGTERM, None)
        stop.check()

    with pytest.raises(Interrupted, match="SIGTERM"):
        a_sweep(bench, tmp_path, [], pause).run()
    assert len((tmp_path / "windows.csv").read_text().splitlines()) == 3


def test_a_signal_ends_a_pause_and_raises_nowhere_else():
    code = """
import os, signal, sys
from wattlock_agent.sweep.stop import Interrupted, Stop
stop = Stop()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "SIGHUP" else signal.SIG_DFL)
stop.install()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
print("alive")
try:
    stop.pause(60)
except Interrupted as error:
    print(error)
"""
    for names, noted in (
        (("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"), "SIGTERM"),
        (("SIGINT",), "SIGINT"),
        (("SIGQUIT", "SIGHUP"), "SIGQUIT"),
        (("SIGHUP", "SIGQUIT"), "SIGQUIT"),  # nohup: ignored stays ignored
    ):
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout.split() == ["alive", noted]


def test_a_run_reads_back_as_it_was_written(tmp_path):
    text = csv_line(COLUMNS) + "".join(map(window_line, windows()))
    (tmp_path / "windows.csv").write_text(text)
    (tmp_path / "run.json").write_text(encode_run(RUN))
    run, found = read_run(tmp_path)
    assert run == RUN
    assert [(each.workload, each.setting) for each in found] == [(each.workload, each.setting) for each in windows()]
    assert [each.watts for each in found] == pytest.approx([each.watts for each in windows()], rel=1e-5)
    assert {each.celsius for each in found} == {None}


def test_a_sweep_that_was_stopped_is_no_finished_run(tmp_path):
    run = replace(RUN, planned_windows=len(windows()))
    (tmp_path / "run.json").write_text(encode_run(run))
    lines = list(map(window_line, windows()))
    (tmp_path / "windows.csv").write_text(csv_line(COLUMNS) + "".join(lines))
    assert read_run(tmp_path)[0] == run
    (tmp_path / "windows.csv").write_text(csv_line(COLUMNS) + "".join(lines[:-1]))
    with pytest.raises(RecordError, match=f"no finished sweep: {len(lines) - 1} of {len(lines)} measurements"):
        read_run(tmp_path)
    document = json.loads(encode_run(run))
    del document["planned_windows"]  # as written before it was
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert len(read_run(tmp_path)[1]) == len(lines) - 1


def test_the_runs_of_this_repository_are_finished():
    found = [read_run(path.parent) for path in (ROOT / "docs" / "sweep").glob("*/run.json")]
    assert len(found) == 4
    assert all(run.planned_windows == len(run_windows) for run, run_windows in found)


@pytest.mark.parametrize(
    ("name", "text"),
    [("run.json", "{"), ("run.json", "{}"), ("windows.csv", "a,b\n1,2\n"), ("windows.csv", None)],
)
def test_a_run_that_cannot_be_read_is_told(tmp_path, name, text):
    (tmp_path / "windows.csv").write_text(csv_line(COLUMNS) + window_line(windows()[0]))
    (tmp_path / "run.json").write_text(encode_run(RUN))
    (tmp_path / name).write_text(text) if text is not None else (tmp_path / name).unlink()
    with pytest.raises(RecordError):
        read_run(tmp_path)


def test_the_profile_is_what_the_api_takes(tmp_path):
    rows = summarise(windows())
    choice = choose(rows, 1.0)
    document = yaml.safe_load(profile(RUN, choice))
    (row,) = ClockProfileSpec.model_validate(document["spec"]).rows
    assert (row.product, row.phase, row.architecture) == ("NVIDIA H200", "Decode", "GQA")
    assert row.max_sm_clock_mhz == choice.cap_mhz == 780
    assert float(row.expected_saving_percent) == pytest.approx(28, abs=0.5)
    evidence = row.evidence
    assert (evidence.kind, evidence.date, evidence.driver_version) == ("Measured", RUN.date, "580.1")
    assert evidence.samples == choice.pairs == 3
    crd = yaml.safe_load((ROOT / "crds" / "clockprofiles.wattlock.dev.yaml").read_text())
    jsonschema.validate(document, crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def test_the_report_says_what_was_found():
    text = page(RUN, summarise(windows()), 1.0)
    assert "| 32 x 1024 | limit 650 W | 1980 | 0 % Inert |" in text
    assert "| 32 x 1024 | limit 400 W | 1980 | 90 % Binding |" in text
    assert "| decode 32 x 1024 | 0.000 | insensitive |" in text
    assert "**780 MHz** saves 28" in text
    assert text.index("## Decode") < text.index("## Prefill")
    assert "None: no clock saves" in page(RUN, summarise(windows()[:1]), 1.0)


def test_the_points_are_one_line_each():
    lines = points_csv(summarise(windows())).splitlines()
    assert len(lines) == 1 + len(LOADS) * (len(POINTS) + 1)
    assert all(line.count(",") == lines[0].count(",") for line in lines)


def test_several_runs_are_put_beside_each_other_with_their_crossing():
    def scaled(short, long):
        return summarise(
            [
                Window(**{**vars(each), "watts": each.watts * (short if each.workload.length_tokens == 1024 else long)})
                for each in windows()
            ]
        )

    text = comparison([(RUN, scaled(1.0, 1.0)), (Run(**{**vars(RUN), "label": "MLA"}), scaled(1.25, 0.8))])
    assert "a generated token, 32 at a time: GQA takes less up to about 2,000 prompt tokens, MLA from there on" in text
    assert "| 1,024 | 32 | MLA |" in text


def test_answers_of_different_lengths_have_no_crossing():
    """MLA takes more for every token, and its answers are so much shorter that its short requests take less."""

    def answering(label, tokens, factor):
        found = []
        for each in windows():
            work = each.workload
            if work.shape is Shape.DECODE:
                work = replace(work, output_tokens=tokens)
            found.append(replace(each, workload=work, watts=each.watts * factor(work.length_tokens)))
        return replace(RUN, label=label), summarise(found)

    one = answering("GQA", 256, lambda _: 1.0)
    other = answering("MLA", 64, lambda length: 1.1 if length == 1024 else 2.0)
    text = comparison([one, other])
    assert "takes less up to" not in text
    assert "Answers of 64, 256 tokens" in text
    assert text.count("| GQA |") == text.count("| MLA |") == 2
    same = comparison([one, answering("MLA", 256, lambda length: 0.9 if length == 1024 else 2.0)])
    assert "a whole request, 32 at a time: MLA takes less up to" in same
    assert "Answers of" not in same


def test_the_plot_is_the_same_file_for_the_same_rows(tmp_path):
    rows = summarise(windows())
    for name in ("one.png", "two.png"):
        plot.draw(tmp_path / name, RUN, rows)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").stat().st_size > 20_000


def test_times_for_people():
    assert [duration(seconds) for seconds in (5, 89, 120, 7300)] == ["5 s", "89 s", "2 min", "2 h 2 min"]


def test_encoded_runs_are_json():
    assert json.loads(encode_run(RUN))["version"] == 1
