"""Odd inputs through the real parsers: no crash, bounded time and memory, always a reason.

150 inputs for each parser by default, always the same ones; ``make fuzz`` makes 3,000 for each from a seed of its own
and prints the counts. WATTLOCK_FUZZ_SEED repeats a run.
"""

import os
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from odd_inputs import as_the_api_server_sends_it, odd_bytes, odd_json
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.devices import find_holders
from wattlock_agent.holders.podresources import parse_claims
from wattlock_agent.holders.podresources_pb2 import ListPodResourcesResponse
from wattlock_agent.journal import LockRecord
from wattlock_agent.journal_file import FileJournal, encode
from wattlock_agent.orders import parse_orders, parse_peers
from wattlock_agent.serving.base import ScrapeFailure
from wattlock_agent.serving.pages import parse_page
from wattlock_api.base import timestamp
from wattlock_api.constants import PEER_POWER_ANNOTATION, Reason
from wattlock_api.nodeenergy import ArmTotals, DroppedEpochs, Moments, PairStats
from wattlock_api.policystatus import Limiters
from wattlock_operator.decide import Decision, Memory, decide
from wattlock_operator.parse import parse_node, parse_node_energy, parse_pod, parse_policy

INPUTS = int(os.environ.get("WATTLOCK_FUZZ_INPUTS", "150"))
SEED = int(os.environ.get("WATTLOCK_FUZZ_SEED") or (time.time_ns() % 10**9 if INPUTS > 150 else 1))
#: CPU seconds of one input; the largest is some 100 kB. A parser that is not linear takes far longer.
MAX_CPU_SECONDS = 2.0
MAX_GROWTH_BYTES = 300 * 2**20
#: A reason is for a status field.
MAX_REASON = 2_000

PAGES = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "data").glob("vllm-*.txt"))]
#: The same pages without the lines that no parser looks at, so that more changes hit what matters.
_READ = re.compile(rb"(?:vllm:.*(?:_total|_sum|_count|running|waiting|perc|_created)|process_start)[{ ].*\n")
PAGES += [b"".join(_READ.findall(page)) for page in PAGES]
POLICY = {
    "metadata": {
        "namespace": "llm",
        "name": "qwen",
        "uid": "uid-qwen",
        "generation": 3,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "finalizers": ["wattlock.dev/release"],
        "annotations": {"wattlock.dev/force-release": "false"},
    },
    "spec": {
        "mode": "Enforce",
        "pools": [
            {
                "name": "decode",
                "role": "Decode",
                "selector": {"matchLabels": DECODE, "matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]},
                "clock": {"maxSMClockMHz": 1590},
                "metrics": {"port": 8000, "path": "/metrics"},
                "guardrail": {"maxInterTokenLatencyMs": 50, "cooldownSeconds": 60},
            },
            {"name": "prefill", "role": "Prefill", "selector": {"matchLabels": PREFILL}},
        ],
        "verification": {"controlShare": 0.2, "epochSeconds": 60},
        "cost": {"pricePerKWh": "0.25", "gramsCO2PerKWh": 380, "pue": "1.3"},
        "placement": {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "x", "operator": "Exists"}]},
    },
}
PODS = (pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1"))


def _statistics() -> dict[str, Any]:
    moments = Moments(total="-3.5", squares="1.5")
    return {
        "energy_joules": "5000.5",
        "tokens_per_second": "1000",
        "guardrail_trips": 1,
        "dropped": DroppedEpochs(),
        "arms": [ArmTotals(cap_mhz=1590)],
        "pair_stats": [PairStats(cap_mhz=1590, pairs=20, energy=moments, throughput=moments)],
    }


def _good_node_energy() -> dict[str, Any]:
    given = decide(world([policy()], PODS, [node_energy()]), None, Memory(), NOW).write_orders["n1"]
    numbers = {"power_watts": 500, "energy_joules": "1000.5", "observed_mhz": 1590, "limiters": Limiters()}
    status = node_energy(gpus=[gpu(**numbers), gpu(1)], instances=[instance(**_statistics())]).status
    return {
        "metadata": {"name": "n1", "uid": "u", "generation": 1, "annotations": {PEER_POWER_ANNOTATION: "{}"}},
        "spec": {"orders": [order.to_api() for order in given]},
        "status": status.to_api() | {"reportedAt": timestamp(NOW - 5), "agent": {"version": "1", "canWrite": True}},
    }


NODE_ENERGY = _good_node_energy()


def _explained(decision: Decision) -> None:
    assert decision.failures == ()
    for status in decision.statuses.values():
        assert status.conditions
        for condition in status.conditions:
            assert condition.reason
            assert len(condition.message) <= 32_768
        status.to_api()


def _decided(*arguments: Any, **named: Any) -> None:
    seen = world(*arguments, **named)
    first = decide(seen, None, Memory(), NOW)
    _explained(first)
    _explained(decide(seen, None, first.memory, NOW + 30))


def _object(good: dict[str, Any], random: Random) -> dict[str, Any]:
    """An odd object; its identity is what the API server vouches for."""
    body = as_the_api_server_sends_it(odd_json(good, random))
    body = body if isinstance(body, dict) else {}
    metadata = body.get("metadata")
    identity = {key: good["metadata"][key] for key in ("namespace", "name", "uid") if key in good["metadata"]}
    return body | {"metadata": (metadata if isinstance(metadata, dict) else {}) | identity}


def fuzz_policy(random: Random, _: Path) -> bool:
    body = _object(POLICY, random)
    view = parse_policy(body)
    assert view.spec is not None or 0 < len(view.problem) <= MAX_REASON
    _decided([view, policy("other")], PODS, [parse_node_energy(NODE_ENERGY)])
    return view.spec is not None


def fuzz_node_energy(random: Random, _: Path) -> bool:
    body = _object(NODE_ENERGY, random)
    view = parse_node_energy(body)
    _decided([policy()], PODS, [view, parse_node_energy(NODE_ENERGY)])
    return view.status is not None and view.readable


POD = {
    "metadata": {
        "namespace": "llm",
        "name": "d0",
        "uid": "uid-d0",
        "labels": DECODE,
        "annotations": {"prometheus.io/port": "8000"},
    },
    "spec": {
        "nodeName": "n1",
        "containers": [
            {"resources": {"limits": {"nvidia.com/gpu": "1"}}, "ports": [{"name": "http", "containerPort": 8000}]}
        ],
    },
    "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}]},
}


def fuzz_pod(random: Random, _: Path) -> bool:
    body = _object(POD, random)
    view = parse_pod(body)
    _decided([policy()], [view, *PODS[1:]], [parse_node_energy(NODE_ENERGY)])
    parse_node(body)
    return view.wants_gpu


def fuzz_orders(random: Random, _: Path) -> bool:
    spec = odd_json(NODE_ENERGY["spec"], random)
    orders = parse_orders(1, spec)
    raw = spec.get("orders", []) if isinstance(spec, dict) else None
    whole = isinstance(raw, list) and len(orders.orders) == len(raw)
    assert whole or orders.unreadable
    assert all(len(each) <= MAX_REASON for each in orders.unreadable)
    parse_peers(odd_json({PEER_POWER_ANNOTATION: '{"instances": []}'}, random))
    return whole


def fuzz_journal(random: Random, directory: Path) -> bool:
    names = ["GPU-0.json", "GPU-1.json", "GPU-2.json"]
    good = [encode(LockRecord(name[:-5], 1590, "p", "q", "boot", "t")) for name in names]
    contents = [odd_bytes(each, random) if random.random() < 0.7 else each for each in good]
    odd_name = random.choice(
        ["GPU-3.json.tmp", "x", "-.json", "a" * 200 + ".json", "GPU-\udcff.json", ".json", "GPU-4.json"]
    )
    for name, content in zip([*names, odd_name], [*contents, random.randbytes(50)], strict=True):
        (directory / name).write_bytes(content)
    journal = FileJournal(directory, "boot")
    journal.acquire()
    records, problems = journal.records(), journal.problems
    journal.release()
    for name, content, whole in zip(names, contents, good, strict=True):
        uuid = name[:-5]
        assert uuid in records, "a damaged record must not hide that the GPU is to be reset"
        if content != whole and records[uuid].cap_mhz == 0:
            assert any(name in problem for problem in problems)
        assert records[uuid].cap_mhz in (0, 1590)
    assert all(len(each) <= MAX_REASON and each.encode() for each in problems)
    return all(records[name[:-5]].cap_mhz == 1590 for name in names)


def fuzz_page(random: Random, _: Path) -> bool:
    result = parse_page(odd_bytes(random.choice(PAGES), random), 1.0)
    if isinstance(result, ScrapeFailure):
        assert result.reason in set(Reason)
        assert 0 < len(result.message) <= MAX_REASON
        result.message.encode()
        return False
    assert result.generated_tokens is None or result.generated_tokens >= 0
    return True


def _pod_resources() -> bytes:
    response = ListPodResourcesResponse()
    for number in range(4):
        each = response.pod_resources.add(name=f"decode-{number}", namespace="llm")
        container = each.containers.add(name="c")
        container.devices.add(
            resource_name="nvidia.com/gpu", device_ids=[f"GPU-{number}", f"nvidia{number}", str(number)]
        )
        container.devices.add(resource_name="nvidia.com/gpu.shared", device_ids=[f"GPU-{number}::0"])
    return response.SerializeToString()


GPUS = [GpuIdentity(f"GPU-{number}", number, number, "H200", (345, 1980), False, False) for number in range(4)]


def fuzz_pod_resources(random: Random, _: Path) -> bool:
    try:
        claims = parse_claims(odd_bytes(_pod_resources(), random))
    except DecodeError:  # told as KubeletError with the socket's path
        return False
    holders = find_holders(claims, GPUS)
    assert set(holders.pods) <= {each.uuid for each in GPUS}
    assert holders.shared <= {each.uuid for each in GPUS}
    return True


PARSERS: dict[str, Callable[[Random, Path], bool]] = {
    "policies": fuzz_policy,
    "node-energies": fuzz_node_energy,
    "pods": fuzz_pod,
    "orders": fuzz_orders,
    "journals": fuzz_journal,
    "metrics-pages": fuzz_page,
    "pod-resources": fuzz_pod_resources,
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PARSERS)
def test_no_input_crashes_a_parser_and_each_refusal_has_a_reason(name: str, tmp_path: Path) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = Counter[bool]()
    slowest_seconds = 0.0
    for number in range(INPUTS):
        directory = tmp_path / "input"
        directory.mkdir()
        began_seconds = time.process_time()
        try:
            taken[PARSERS[name](Random(f"{SEED}/{name}/{number}"), directory)] += 1
        except Exception as error:
            raise AssertionError(f"{name}: input {number} of WATTLOCK_FUZZ_SEED={SEED}: {error!r:.2000}") from error
        slowest_seconds = max(slowest_seconds, time.process_time() - began_seconds)
        assert slowest_seconds < MAX_CPU_SECONDS, f"{name}: input {number} of WATTLOCK_FUZZ_SEED={SEED} takes too long"
        shutil.rmtree(directory)
    growth_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
    print(
        f"{name}: {INPUTS} inputs, seed {SEED}: {taken[True]} understood, {taken[False]} not wholly, "
        f"slowest {1000 * slowest_seconds:.0f} ms of CPU, memory grew by {growth_bytes / 2**20:.0f} MiB"
    )
    assert growth_bytes < MAX_GROWTH_BYTES
    assert taken[True], "no input was understood: the good one is not good"
    assert taken[False], "every input was understood: they are not odd"
