"""The sweep on a real vLLM, with both clients, as processes of this machine. Only the GPU is simulated."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from vllm_process import ADDRESS, LIMIT_MW, VllmSite, grown, rates, until, watch
from wattlock_agent.sweep.endpoint import parse_endpoint
from wattlock_agent.sweep.load import ClientLoad
from wattlock_agent.sweep.plan import Shape, Workload
from wattlock_agent.sweep.record import read_run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CLIENTS = ("own", "vllm")
OUTPUT_TOKENS = 64
LOAD = ("--concurrency", "4", "--lengths", "512", "--output-tokens", str(OUTPUT_TOKENS))
POINTS = ("--clocks", "1590", "--power-limits", "500")
FILES = {"windows.csv", "run.json", "points.csv", "report.md", "pareto.png"}
#: Of 8 s: both ends of the sweep's window are of a page that may take 0.16 s, and the test's own pages 0.1 s.
TOLERANCE = 0.05


@pytest.fixture(autouse=True)
def no_crash_loop():
    """In place of the one that looks at pods: there is no cluster here."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSite]:
    """One vLLM for all tests."""
    site = VllmSite(tmp_path_factory.mktemp("vllm"))
    yield site
    site.stop()


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_sweep_reports_is_what_vllm_counted(site, tmp_path, client):
    out = tmp_path / "out"
    before = len(site.writes())
    with site.recorded() as pages:
        swept = watch(site.sweep(out, client, *LOAD, *POINTS, "--window-seconds", "8"))
        time.sleep(1)
    assert swept.status == 0, swept.errors

    _, windows = read_run(out)
    assert len(windows) == 8
    for window, ends in zip(windows, swept.ends(windows), strict=True):
        generated, computed, sent = (
            rates(pages, name, ends, window.seconds)
            for name in ("generated_tokens", "computed_tokens", "prompt_tokens")
        )
        print(
            f"{client}, {window.workload}, {window.setting}: generated {window.generated_per_second:.0f}/s, vLLM's own "
            f"{generated[0]:.0f} to {generated[1]:.0f}; computed prompt tokens {window.prompt_per_second:.0f}/s, "
            f"vLLM's own {computed[0]:.0f} to {computed[1]:.0f}, of {sent[0]:.0f} to {sent[1]:.0f} sent"
        )
        if window.workload.shape is Shape.PREFILL:
            # No look at generated tokens: after the last window decode begins, and makes them 10 times as quickly.
            check(window.prompt_per_second, computed)
            assert computed[1] > 0.98 * sent[1], "prompts came again"
            assert window.tokens_per_second == window.prompt_per_second
        else:
            check(window.generated_per_second, generated)
            assert computed[1] < 0.01 * sent[1], "the prefix cache did not have the prompts"
            # One for each request of 64 tokens; prompts of vLLM's client are text, of which a token more may become.
            assert window.prompt_per_second < 0.05 * window.generated_per_second
            assert window.tokens_per_second == window.generated_per_second
    clocks = {window.observed_mhz for window in windows if window.setting.lever == "clock"}
    assert max(clocks) <= 1590

    names = {path.name for path in out.iterdir()}
    assert names == FILES | ({"vllm-bench.log"} if client == "vllm" else set())
    assert "tokens counted by the engine's metrics" in (out / "report.md").read_text()
    restored(site, before)


def test_a_second_sweep_finds_no_prompt_of_the_first_in_the_cache(site, tmp_path):
    short = ("--shapes", "prefill", "--clocks", "1590", "--power-limits", "none", "--window-seconds", "1")
    before = site.page()
    for number in range(2):
        assert watch(site.sweep(tmp_path / str(number), "own", *LOAD, *short)).status == 0
    after = site.page()
    computed, sent = (getattr(after, each) - getattr(before, each) for each in ("computed_tokens", "prompt_tokens"))
    print(f"of {sent:.0f} prompt tokens {computed:.0f} were computed")
    assert computed > 0.98 * sent


def check(reported, own):
    low, high = own
    assert (1 - TOLERANCE) * low <= reported <= (1 + TOLERANCE) * high


def restored(site, writes_before):
    """Check by the driver's own log that everything is as it was, that nobody works, and that it was changed at all."""
    writes = site.writes()[writes_before:]
    clocks = [each for each in writes if each[0].endswith("GpuLockedClocks")]
    limits = [each for each in writes if each[0].endswith("PowerManagementLimit")]
    assert ("nvmlDeviceSetGpuLockedClocks", [345, 1590]) in clocks
    assert clocks[-1][0] == "nvmlDeviceResetGpuLockedClocks"
    if limits:
        assert limits[-1][1] == [LIMIT_MW]
    assert site.is_untouched()
    assert site.bench_processes() == []
    time.sleep(1)  # requests that were given up
    generated = site.page().generated_tokens
    time.sleep(2)
    assert site.page().generated_tokens == generated, "some load goes on"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_signal_in_the_middle_restores_everything(site, tmp_path, client):
    before = len(site.writes())
    many = ("--window-seconds", "2", "--shapes", "decode", "--repeats", "50")
    process = site.sweep(tmp_path / "out", client, *LOAD, *POINTS, *many)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(watch(process)))
    thread.start()
    try:
        until("both levers were used", lambda: locks(site, before) and limits(site, before), 200)
    finally:
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        thread.join(60)
    print(
        f"{client}: ended {time.monotonic() - sent:.1f} s after the signal, after {len(site.writes()) - before} writes"
    )
    (swept,) = ended
    assert swept.status == 1
    assert "stopped by SIGTERM; everything is as it was before" in swept.errors
    assert (tmp_path / "out" / "windows.csv").read_text().count("decode") >= 1
    restored(site, before)


def locks(site, before):
    return [args for name, args in site.writes()[before:] if name == "nvmlDeviceSetGpuLockedClocks"]


def limits(site, before):
    return [args for name, args in site.writes()[before:] if name == "nvmlDeviceSetPowerManagementLimit"]


@pytest.mark.parametrize("client", CLIENTS)
def test_prompts_that_vllm_refuses_end_the_sweep_with_its_words(site, tmp_path, client):
    lengths = ("--lengths", "2000", "--concurrency", "4", *POINTS, "--window-seconds", "2")
    swept = watch(site.sweep(tmp_path / "out", client, *lengths))
    print(f"{client}: {swept.errors}")
    assert swept.status == 1
    assert ("maximum context length is 1024" if client == "own" else "--max-model-len") in swept.errors
    assert site.is_untouched()
    assert site.bench_processes() == []


@pytest.mark.parametrize(
    "workload", [Workload(Shape.DECODE, 4, 512, OUTPUT_TOKENS), Workload(Shape.PREFILL, 4, 512, 1)], ids=str
)
def test_our_client_counts_what_vllm_counts(site, workload):
    """For endpoints without metrics."""
    load = ClientLoad(parse_endpoint(f"http://{ADDRESS}:{site.port}"), "tiny", seed=7)
    load.start(workload)
    try:
        until("all requests run", load.ready)
        with site.recorded() as pages:
            time.sleep(1)
            first, first_seconds = load.read(), time.time()
            time.sleep(6)
            last, last_seconds = load.read(), time.time()
            time.sleep(1)
    finally:
        load.stop()
    names = ("generated_tokens", "prompt_tokens")
    generated, prompt = (grown(pages, name, first_seconds, last_seconds) for name in names)
    print(
        f"{workload}: the client counted {last.generated - first.generated:.0f} generated and "
        f"{last.prompt - first.prompt:.0f} prompt tokens, vLLM {generated:.0f} and {prompt:.0f}"
    )
    assert last.generated - first.generated == pytest.approx(generated, rel=TOLERANCE)
    assert last.prompt - first.prompt == pytest.approx(prompt, rel=TOLERANCE)
