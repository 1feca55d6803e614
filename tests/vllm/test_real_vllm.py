"""A real vLLM, prefill and decode, through the whole product. Only the GPUs are simulated.

Gauges mostly read 0 between the batches of a toy model, so counters are asked.
"""

import time
from itertools import pairwise

import pytest
from vllm_pods import OUTPUT_TOKENS, PROMPT_TOKENS, clients, read_page
from vllm_watch import WINDOW_SECONDS, gpu_of, latency_ms, over_windows, rate, recorded, report
from workloads import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

#: Capped in every epoch, and short epochs of both kinds.
ALWAYS = {"method": "None"}
SHORT_EPOCHS = {"controlShare": 0.5, "epochSeconds": 20}
CLEAR_SECONDS = 300


@pytest.fixture
def enforce(pair, good_policy):
    """Return a function that applies the policy; it stays for the next test."""
    good_policy["spec"]["groupBy"] = ["llm-d.ai/model"]
    good_policy["spec"]["pools"][0]["architecture"] = "GQA"

    def apply(verification):
        good_policy["spec"]["verification"] = verification
        pair.workload.kubectl.apply(good_policy)

    return apply


def test_decode_is_locked_and_prefill_left_alone(pair, simulator, enforce):
    decode, prefill = pair.workload.gpus("decode"), pair.workload.gpus("prefill")
    assert len(decode) == len(prefill) == 1
    enforce(ALWAYS)
    with clients(pair.address("prefill"), pair.address("decode")) as traffic:
        eventually("the driver has a lock on the decode GPU", lambda: simulator.locked() == decode, 60)
        status = eventually(
            "decode is measured",
            lambda: {"tokensPerSecond", "observedMHz"} <= (pool := pair.workload.pool("decode")).keys() and pool,
            90,
        )
        eventually("enough requests", lambda: traffic.requests >= 30, 240)
    assert traffic.failures == 0
    assert status["gpus"] == status["locked"] == status["instances"] == 1
    assert status["requestedMHz"] == status["observedMHz"] == 1590
    assert pair.workload.pool("prefill")["locked"] == 0
    assert pair.workload.condition("Enforced")["status"] == "True"
    writes = simulator.writes()
    assert {write.uuid for write in writes} == decode, "a GPU of another role was written to"
    assert {write.arguments for write in writes if write.locks} == {(345, 1590)}


def test_kv_data_is_real(pair):
    before = {role: read_page(pair.address(role)) for role in ("prefill", "decode")}
    with clients(pair.address("prefill"), pair.address("decode"), number=1) as traffic:
        eventually("some requests", lambda: traffic.requests >= 5, 120)
    assert traffic.failures == 0
    after = {role: read_page(pair.address(role)) for role in ("prefill", "decode")}

    def grown(role, name):
        return getattr(after[role], name) - getattr(before[role], name)

    requests = traffic.requests
    assert grown("prefill", "computed_tokens") == requests * PROMPT_TOKENS
    assert grown("prefill", "generated_tokens") == requests
    assert grown("decode", "transferred_tokens") == requests * (PROMPT_TOKENS - 2)
    assert grown("decode", "computed_tokens") == requests * 2
    assert grown("decode", "generated_tokens") == requests * OUTPUT_TOKENS


def test_what_is_reported_is_what_vllm_counted(pair, enforce):
    enforce(ALWAYS)
    kubectl = pair.workload.kubectl
    names = {role: pair.name(role) for role in ("prefill", "decode")}
    addresses = {role: pair.address(role) for role in names}
    compared = {role: {} for role in names}
    with (
        clients(addresses["prefill"], addresses["decode"]) as traffic,
        recorded(addresses["prefill"]) as prefill,
        recorded(addresses["decode"]) as decode,
    ):
        began = time.time()

        def enough():
            for role, name in names.items():
                newest = report(kubectl, name)
                if newest and newest.unix_seconds > began + 30:
                    compared[role].setdefault(newest.unix_seconds, newest)
            return min(map(len, compared.values())) >= 3

        eventually("three reports about each instance", enough, 200, every_seconds=1)
        pool = pair.workload.pool("decode")
        last = max(compared["decode"].values(), key=lambda each: each.unix_seconds)
    assert traffic.failures == 0

    checks = [
        ("prefill", prefill, "promptTokensPerSecond", rate("computed_tokens")),
        ("prefill", prefill, "tokensPerSecond", rate("generated_tokens")),
        ("decode", decode, "promptTokensPerSecond", rate("computed_tokens")),
        ("decode", decode, "tokensPerSecond", rate("generated_tokens")),
        ("decode", decode, "interTokenLatencyMs", latency_ms),
    ]
    for role, pages, name, measure in checks:
        for each in compared[role].values():
            low, high = over_windows(pages, each.unix_seconds, measure)
            print(f"{role} {name}: reported {each.number(name)}, vLLM's own counters {low:.3f} to {high:.3f}")
            # Pages are read up to a second apart from the agent's, and the last digit is rounded.
            assert 0.97 * low - 0.1 <= each.number(name) <= 1.03 * high + 0.1
    # Roles are told apart: prefill computes every prompt, decode next to none of its tokens.
    for each in compared["prefill"].values():
        assert each.number("promptTokensPerSecond") > 100 * each.number("tokensPerSecond")
    for each in compared["decode"].values():
        assert each.number("promptTokensPerSecond") < 0.05 * each.number("tokensPerSecond")
        assert each.instance["computesPrompts"] is False
    # The policy passes on what the node reported, at once or one report later.
    reported = {each.number("tokensPerSecond") for each in compared["decode"].values()}
    newest = report(kubectl, names["decode"]) or last
    assert float(pool["tokensPerSecond"]) in reported | {newest.number("tokensPerSecond")}


def test_a_burst_is_reported_to_the_last_digit(pair, enforce):
    """Where the engine rests at both ends of the window it does not matter when exactly the agent read the page."""
    enforce(ALWAYS)
    kubectl, name, address = pair.workload.kubectl, pair.name("decode"), pair.address("decode")

    def burst():
        before = read_page(address)
        with clients(pair.address("prefill"), address, pause_seconds=0.0) as traffic:
            eventually("a few requests", lambda: traffic.requests >= 6, 60)
        assert traffic.failures == 0
        after = read_page(address)
        exact_ms = latency_ms(before, after)

        # Whether one report covers all of the burst is a matter of luck.
        until = time.monotonic() + 30
        while time.monotonic() < until:
            newest = report(kubectl, name)
            if abs(float(newest.instance.get("interTokenLatencyMs", "inf")) - exact_ms) < 0.0006:
                return newest, before, after
            time.sleep(1)
        return None

    found, before, after = eventually("a report covers a whole burst", burst, 400, every_seconds=0.1)
    seconds = (after.generated_tokens - before.generated_tokens) / found.number("tokensPerSecond")
    print(f"latency {found.number('interTokenLatencyMs')} ms, vLLM's own {latency_ms(before, after):.6f} ms")
    print(f"{found.number('tokensPerSecond')} tokens/s are vLLM's own tokens in {seconds:.1f} s")
    assert WINDOW_SECONDS[0] <= seconds <= WINDOW_SECONDS[1]
    computed = found.number("promptTokensPerSecond") * seconds
    assert computed == pytest.approx(after.computed_tokens - before.computed_tokens, abs=0.06 * seconds)


def test_a_restart_of_vllm_is_survived(pair, simulator, enforce):
    decode = pair.workload.gpus("decode")
    kubectl, name = pair.workload.kubectl, pair.name("decode")
    enforce(SHORT_EPOCHS)
    writes_before = len(simulator.writes())
    reports = {}

    def look(condition):
        newest = report(kubectl, name)
        if newest:
            reports[newest.unix_seconds] = newest
        return newest is not None and condition(newest.instance)

    def tokens(instance):
        return sum(float(arm["generatedTokens"]) for arm in instance["arms"])

    def lost(instance):
        # An engine that is away for longer than an epoch may come back in the first seconds of one, which are left out:
        # then all of its epochs were lost to missing scrapes, and none had two lives in it.
        return instance["dropped"]["restart"] + instance["dropped"]["samples"]

    def reported(key):
        return [each.number(key) for each in reports.values() if key in each.instance]

    with clients(pair.address("prefill"), pair.address("decode")), recorded(pair.address("decode")) as pages:
        counted = eventually("an epoch is counted", lambda: look(tokens), 180, every_seconds=1)
        eventually("tokens are reported", lambda: look(lambda _: reported("tokensPerSecond")), 60)
        dropped = lost(report(kubectl, name).instance)
        pair.kill("decode")
        eventually("the container is started again", lambda: look(lambda _: pair.restarts("decode") == 1), 60)
        eventually("the restart is noticed", lambda: look(lambda each: each["reason"] == "CountersRestarted"), 400)
        eventually("its epochs are dropped", lambda: look(lambda each: lost(each) > dropped), 120)
        eventually("epochs are counted again", lambda: look(lambda each: tokens(each) > counted + 100), 240)
        eventually("decode is locked again", lambda: simulator.locked() == decode, 180)
    assert pair.name("decode") == name, "another pod took its place"
    assert min(reported("tokensPerSecond") + reported("promptTokensPerSecond")) >= 0
    # No rate may be higher than the highest from one second to the next of vLLM's own counters.
    fastest = max(rate("generated_tokens")(first, last) for first, last in pairwise(pages))
    print(f"tokens/s reported {sorted(reported('tokensPerSecond'))}, fastest second {fastest:.0f}")
    assert max(reported("tokensPerSecond")) <= fastest + 0.1, "a counter that went back made a rate"
    assert {write.uuid for write in simulator.writes()[writes_before:]} <= decode


def make_it_compute_prompts(pair):
    """Send long prompts straight to decode until it is released for it; at once if it is already."""
    kubectl, name = pair.workload.kubectl, pair.name("decode")

    def held():
        gpu = gpu_of(kubectl, name)
        return gpu.get("reason") == "ComputesPrompts" and gpu

    if gpu := held():
        return gpu
    with clients(pair.address("prefill"), pair.address("decode"), skip_prefill=True):
        return eventually("decode is held released", held, 150, every_seconds=1)


def test_a_decode_pod_that_computes_prompts_is_released(pair, simulator, enforce):
    decode = pair.workload.gpus("decode")
    enforce(ALWAYS)
    eventually("decode is locked", lambda: simulator.locked() == decode, 90)
    gpu = make_it_compute_prompts(pair)
    assert simulator.locked() == set()
    assert gpu["state"] == "Released"
    assert f"released until it has not for {CLEAR_SECONDS} s" in gpu["message"]
    assert report(pair.workload.kubectl, pair.name("decode")).instance["computesPrompts"] is True
    reasons = eventually(
        "status says why", lambda: "ComputesPrompts" in (found := pair.workload.reasons("decode")) and found, 60
    )
    print(f"released: {reasons['ComputesPrompts']}")


def test_overload_is_seen_as_waiting_requests(pair, enforce):
    enforce(ALWAYS)
    kubectl, name, address = pair.workload.kubectl, pair.name("decode"), pair.address("decode")
    with (
        recorded(address) as pages,
        clients(pair.address("prefill"), address, number=16, pause_seconds=0.0) as traffic,
    ):
        seen = eventually(
            "requests are reported to wait",
            lambda: (newest := report(kubectl, name)) and newest.instance.get("waitingRequests"),
            180,
            every_seconds=1,
        )
        eventually("vLLM's own page has said so", lambda: max(page.waiting for page in pages) > 0, 60)
    print(f"{seen} waiting requests reported, vLLM's own page had up to {max(page.waiting for page in pages):.0f}")
    assert seen <= 16
    assert traffic.failures == 0


def test_it_is_locked_again_when_it_has_not_computed_prompts_for_five_minutes(pair, simulator, enforce):
    decode = pair.workload.gpus("decode")
    enforce(ALWAYS)
    make_it_compute_prompts(pair)
    with clients(pair.address("prefill"), pair.address("decode"), number=1):
        # The last window that had prompts in it ends a minute after the last prompt.
        eventually("decode is locked again", lambda: simulator.locked() == decode, CLEAR_SECONDS + 120, every_seconds=2)
    assert report(pair.workload.kubectl, pair.name("decode")) is not None
