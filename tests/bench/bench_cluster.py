"""Figures of the whole system on the local cluster: reaction times, cost of the agent, load on the API server.

Run with ``make bench``. Checks nothing: it prints what it measured, all in one run on the same machine. Times are
taken from the simulated driver's own log of writes.
"""

import statistics
import time

import pytest
from wattlock_api.constants import LEASE_RENEW_SECONDS
from workloads import AGENT_LABEL, SYSTEM, Workload, eventually, serving

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

REPEATS = 5
STEADY_SECONDS = 90
JIFFIES_PER_SECOND = 100
ALWAYS = {"verification": {"method": "None"}}


def line(what: str, value: str, aim: str = "") -> None:
    print(f"  {what:<74} {value:>22}   {aim}", flush=True)


def spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.1f} s, max {max(seconds):.1f} s"


def edited(policy, **spec):
    return policy | {"spec": policy["spec"] | ALWAYS | spec}


def applied_to_locked_seconds(workload: Workload, policy, gpus: set[str]) -> float:
    started = time.time()
    workload.kubectl.apply(policy)
    eventually("all decode GPUs are locked", lambda: workload.simulator.locked() == gpus, 60)
    return max(write.at_seconds for write in workload.simulator.writes() if write.locks) - started


def delete_policy(workload: Workload) -> None:
    workload.kubectl.run("delete", "epol", "--all", "--timeout=60s", timeout_seconds=70)


def bench_reaction_times(workload, good_policy, capsys):
    workload.deploy(serving("decode", 6), serving("prefill", 2))
    gpus = workload.gpus("decode")
    with capsys.disabled():
        print(f"\n\nReaction, {len(gpus)} decode GPUs on two nodes, {REPEATS} repeats")
        cold, warm, breach = [], [], []
        for _ in range(REPEATS):
            cold.append(applied_to_locked_seconds(workload, edited(good_policy), gpus))
            delete_policy(workload)
            eventually("the agents are gone", lambda: not workload.agents(), 60)
        line("kubectl apply to all decode GPUs locked, no agent running before", spread(cold), "aim: under 5 s")

        # A policy about nothing keeps enforcing agents on the nodes.
        nobody = {"name": "nobody", "role": "Prefill", "selector": {"matchLabels": {"serves": "nobody"}}}
        keeper = edited(good_policy, pools=[nobody]) | {"metadata": {"name": "keeper"}}
        workload.kubectl.apply(keeper)
        eventually("agents run", lambda: len(workload.agents()) == 2, 60)
        for _ in range(REPEATS):
            warm.append(applied_to_locked_seconds(workload, edited(good_policy), gpus))
            workload.kubectl.run("delete", "epol", "qwen", "--timeout=60s", timeout_seconds=70)
        line("kubectl apply to all decode GPUs locked, agents running", spread(warm), "aim: under 5 s")

        guarded = edited(good_policy, guardrail={"maxInterTokenLatencyMs": 40, "cooldownSeconds": 10})
        workload.kubectl.apply(guarded)
        slow = workload.pods("decode")[0]
        victim = workload.gpus_of(slow)
        for _ in range(REPEATS):
            eventually("all decode GPUs are locked", lambda: workload.simulator.locked() == gpus, 120)
            started = time.time()
            workload.simulate(slow, extraLatencyMs=100)
            eventually("it is released", lambda: not victim & workload.simulator.locked(), 60)
            resets = [w.at_seconds for w in workload.simulator.writes() if w.resets and w.uuid in victim]
            breach.append(max(resets) - started)
            workload.simulate(slow, extraLatencyMs=0)
        line("guardrail breach to release", spread(breach), "aim: under 10 s")


def agent_usage(kubectl) -> dict[str, tuple[float, float]]:
    """Return CPU seconds and resident MiB of each agent, from its own /proc."""
    usage = {}
    for pod in kubectl.within(SYSTEM).get("pods", "-l", AGENT_LABEL)["items"]:
        name = pod["metadata"]["name"]
        # The agent's image has Python and no other program.
        code = "print(open('/proc/1/stat').read() + open('/proc/1/status').read())"
        text = kubectl.within(SYSTEM).run("exec", name, "--", "python", "-c", code).stdout
        fields = text.splitlines()[0].rsplit(")", 1)[1].split()
        resident = next(row for row in text.splitlines() if row.startswith("VmRSS:")).split()[1]
        usage[name] = ((int(fields[11]) + int(fields[12])) / JIFFIES_PER_SECOND, int(resident) / 1024)
    return usage


def requests(kubectl) -> dict[str, float]:
    """Return the API server's own count of requests about our resources, and of reads of leases, by verb."""
    counts: dict[str, float] = {}
    for row in kubectl.run("get", "--raw", "/metrics").stdout.splitlines():
        if not row.startswith("apiserver_request_total{"):
            continue
        labels, value = row.rsplit(" ", 1)
        ours = 'group="wattlock.dev"' in labels
        lease_read = 'resource="leases"' in labels and 'verb="GET"' in labels
        if ours or lease_read:
            verb = labels.split('verb="')[1].split('"')[0]
            key = f"{'lease ' if lease_read else ''}{verb}"
            counts[key] = counts.get(key, 0) + float(value)
    return counts


def bench_steady_state(kubectl, workload, good_policy, capsys):
    workload.deploy(serving("decode", 12), serving("prefill", 4))
    workload.kubectl.apply(good_policy)
    eventually("all decode GPUs are locked", lambda: len(workload.simulator.locked()) >= 9, 90)
    with capsys.disabled():
        print(f"\nSteady state over {STEADY_SECONDS} s: 8 simulated GPUs a node at 1 Hz, 8 serving pods a node")
        before, counted = agent_usage(kubectl), requests(kubectl)
        started = time.monotonic()
        time.sleep(STEADY_SECONDS)
        elapsed = time.monotonic() - started
        after, counts = agent_usage(kubectl), requests(kubectl)
        for name, (cpu, resident) in after.items():
            percent = (cpu - before[name][0]) / elapsed * 100
            line(f"CPU of {name}", f"{percent:.2f} % of a core", "aim: under 2 %")
            line(f"memory of {name}", f"{resident:.0f} MiB", "aim: under 80 MiB")
        grown = {key: counts[key] - counted.get(key, 0) for key in counts if counts[key] > counted.get(key, 0)}
        # The API server counts renewals of all leases in one, so ours are told by their period.
        grown["lease PUT"] = elapsed / LEASE_RENEW_SECONDS
        per_minute = sum(grown.values()) / elapsed * 60 / len(after)
        line("requests to the API server for each node and minute", f"{per_minute:.1f}", "aim: under 10")
        print(f"    {', '.join(f'{key} {value:.0f}' for key, value in sorted(grown.items()))} in {elapsed:.0f} s")
