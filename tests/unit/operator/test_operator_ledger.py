"""Pairs of pods that are gone stay in the estimate, once."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Verification
from wattlock_api.nodeenergy import Moments, PairStats
from wattlock_operator.decide import Memory, decide
from wattlock_operator.ledger import Ledger, Tally, advance, opening, published
from wattlock_operator.reports import NodeGpu, NodeInstance, PoolReport
from wattlock_operator.savings import find_saving


def stats(pairs: int, mean: float = -0.2, cap_mhz: int = 1590) -> PairStats:
    moments = Moments(total=f"{pairs * mean:.9f}", squares=f"{pairs * (mean**2 + 0.001):.9f}")
    return PairStats(cap_mhz=cap_mhz, pairs=pairs, energy=moments, latency_pairs=pairs, latency=moments)


def report(**pairs: int | PairStats) -> PoolReport:
    """A report with these instances: their pairs."""
    entries = {name: [each if isinstance(each, PairStats) else stats(each)] for name, each in pairs.items()}
    return PoolReport(
        gpus=(),
        instances=tuple(NodeInstance("n1", instance(name, pair_stats=each), False) for name, each in entries.items()),
    )


def follow(*reports: PoolReport, ledger: Ledger | None = None) -> Ledger:
    ledger = ledger or Ledger()
    for each in reports:
        ledger = advance(ledger, each)
    return ledger


def total(ledger: Ledger) -> int:
    everything = [*ledger.present.values(), ledger.departed]
    return sum(tally.pairs for tallies in everything for tally in tallies.values())


def test_pairs_of_a_pod_that_goes_stay():
    ledger = follow(report(a=10, b=5), report(b=6))
    assert ledger.departed[1590].pairs == 10
    assert ledger.departed[1590].energy[0] == pytest.approx(-2.0)
    savings = find_saving(Verification(), Mode.ENFORCE, report(b=6), ledger.departed).savings
    assert (savings.pairs, savings.instances, savings.verdict.value) == (16, 1, "Verified")
    assert [each.pairs for each in savings.departed] == [10]


def test_a_pool_of_new_pods_keeps_what_was_measured_under_the_same_cap():
    departed = {1590: Tally(20, (-4.0, 0.82)), 1200: Tally(50, (-10.0, 2.05))}
    fresh = PoolReport(
        gpus=(NodeGpu("n1", gpu(0, "new", requested_mhz=1590), False),),
        instances=(NodeInstance("n1", instance("new"), False),),
    )
    assert find_saving(Verification(), Mode.ENFORCE, fresh, departed).savings.pairs == 20


def test_a_node_that_was_away_is_not_counted_twice():
    assert total(follow(report(a=10, b=5), report(b=6), report(a=12, b=6))) == 18
    assert follow(report(a=10), report(), report(a=12)).departed == {}


def test_an_agent_that_begins_anew_takes_nothing_away():
    ledger = follow(report(a=10), report(a=2), report(a=3))
    assert (total(ledger), ledger.departed[1590].pairs) == (13, 10)
    away = follow(report(a=10), report(), report(a=2))
    assert (total(away), away.departed[1590].pairs) == (12, 10)


def test_each_cap_is_counted_by_itself():
    ledger = follow(report(a=stats(10, cap_mhz=1200)), report(a=stats(4, cap_mhz=1590)))
    assert {cap: tally.pairs for cap, tally in ledger.departed.items()} == {1200: 10}


def test_status_has_room_for_the_caps_with_most_pairs_and_memory_for_all():
    """Whoever counts what came since the last look would count a cap anew that was left out for a while."""
    ledger = follow(*[report(a=stats(20, cap_mhz=cap_mhz)) for cap_mhz in range(700, 925, 15)], report())
    assert len(ledger.departed) == 15
    ledger = follow(report(a=stats(5)), report(), ledger=ledger)
    assert 1590 not in ledger.departed
    assert ledger.gone[1590].pairs == 5
    ledger = follow(*[report(**{name: stats(20)}) for name in "bc"], report(), ledger=ledger)
    assert (len(ledger.departed), ledger.departed[1590].pairs, ledger.gone[1590].pairs) == (15, 45, 45)


def test_a_restarted_operator_goes_on_from_the_status():
    ledger = follow(report(a=10, b=5), report(b=6))
    again = follow(report(b=6), report(), ledger=opening(published(ledger.departed)))
    assert total(again) == 16


STEPS = st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5), max_size=4), max_size=12)


@given(STEPS, st.integers(0, 12))
def test_whatever_comes_and_goes_each_pair_counts_once(steps, restart_at):
    """Instances leave, come back with their sums, and grow; the operator restarts while none is away."""
    grown: dict[str, int] = dict.fromkeys("abcd", 0)
    ledger, seen = Ledger(), dict.fromkeys("abcd", 0)
    for number, step in enumerate(steps):
        for name, more in step.items():
            grown[name] += more
            seen[name] = grown[name]
        if number == restart_at and not ledger.absent:
            ledger = opening(published(ledger.departed))
            ledger = advance(ledger, report(**{name: grown[name] for name in seen}))
            seen = dict(grown)
        ledger = advance(ledger, report(**{name: grown[name] for name in step}))
    assert total(ledger) == sum(seen.values())


@given(STEPS, st.sets(st.integers(0, 12)))
def test_each_pair_counts_once_whenever_the_operator_restarts_if_who_was_away_begins_at_zero(steps, restarts):
    """As agents do it: sums that were told no more are not told again."""
    told: dict[str, int] = {}
    ledger, measured = Ledger(), 0
    for number, step in enumerate(steps):
        if number in restarts:
            ledger = follow(report(**told), ledger=opening(published(ledger.departed)))
        told = {name: told.get(name, 0) for name in step}  # reported at once, before there can be another pair
        ledger = advance(ledger, report(**told))
        told = {name: before + step[name] for name, before in told.items()}
        measured += sum(step.values())
        ledger = advance(ledger, report(**told))
    assert total(ledger) == measured


def whole_world(names, pairs):
    labels = {"app": "m"}
    pods = [pod(name, DECODE | labels) for name in names] + [pod("p", PREFILL | labels), agent_pod("n1")]
    gpus = [gpu(index, name) for index, name in enumerate(names)]
    instances = [instance(name, tokens_per_second="100", pair_stats=[stats(pairs)]) for name in names]
    return pods, [node_energy(gpus=gpus, instances=instances)]


def test_the_operator_publishes_and_takes_up_what_left():
    first = decide(world([policy()], *whole_world(("a", "b"), 8)), None, Memory(), NOW)
    second = decide(world([policy()], *whole_world(("b",), 8)), None, first.memory, NOW + 60)
    (status,) = second.statuses.values()
    savings = status.pools[0].savings
    assert (savings.pairs, savings.instances, savings.departed[0].pairs) == (16, 1, 8)
    restarted = decide(world([replace(policy(), status=status)], *whole_world(("b",), 9)), None, Memory(), NOW + 120)
    (after,) = restarted.statuses.values()
    assert after.pools[0].savings.pairs == 17
