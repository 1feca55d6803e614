"""A status never shows one pod with the numbers of another. Found on a real H200 (docs/hardware)."""

from wattlock_agent.holders.base import PodName
from wattlock_agent.report import build_status


def test_holder_and_numbers_change_in_the_same_pass(make_node, make_order):
    node = make_node(gpus=1)
    first, second = make_order("decode-0"), make_order("decode-1")
    node.order(first, second)
    node.run(60)
    seen = {}

    def look():
        gpu = build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "agent", False).gpus[0]
        name = gpu.holder.name if gpu.holder else ""
        seen.setdefault(name, []).append((float(gpu.energy_joules), float(gpu.busy_seconds)))

    look()
    node.pods["GPU-0"] = (PodName("llm", "decode-1"),)
    for _ in range(20):
        node.run(1)
        look()
    assert set(seen) == {"decode-0", "decode-1"}
    assert seen["decode-0"][0][0] > 20_000
    assert seen["decode-1"][0] == (0.0, 0.0)
    for values in seen.values():
        assert values == sorted(values)
