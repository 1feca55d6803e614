"""Verdicts on savings."""

import math

import pytest
from operator_worlds import NOW, gpu, instance, node_energy, world
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Verification
from wattlock_api.nodeenergy import DroppedEpochs, EpochPower, Moments, PairStats
from wattlock_operator.reports import PoolReport, collect
from wattlock_operator.savings import find_saving

KEY = ("uid-qwen", "decode")
LOG_08 = math.log(0.8)


def pair_stats(pairs: int, mean: float, spread: float = 0.0, cap: int = 1590) -> PairStats:
    """Statistics of pairs that lie ``spread`` above and below a mean in turn."""
    squares = pairs * (mean**2 + spread**2)
    moments = Moments(total=f"{pairs * mean:.9f}", squares=f"{squares:.9f}")
    still = Moments(total=f"{pairs * 0.01:.9f}", squares=f"{pairs * 0.0001:.9f}")
    return PairStats(cap_mhz=cap, pairs=pairs, energy=moments, throughput=still, latency_pairs=pairs, latency=still)


def report(*instances, gpus=None) -> PoolReport:
    found = [gpu(index, entry.instance) for index, entry in enumerate(instances)] if gpus is None else gpus
    return collect(world([], [], [node_energy(gpus=found, instances=instances)]), NOW).get(KEY, PoolReport())


def verdict(pool_report: PoolReport, method: str = "Switchback", mode: Mode = Mode.ENFORCE) -> tuple[str, str]:
    savings = find_saving(Verification(method=method), mode, pool_report).savings
    assert savings.message
    return savings.verdict.value, savings.reason


SERVING = {"tokens_per_second": "100"}


@pytest.mark.parametrize(
    ("pool_report", "expected"),
    [
        (report(), ("Unknown", "NothingLocked")),
        (report(instance(**SERVING), gpus=[gpu(requested_mhz=None)]), ("Unknown", "NothingLocked")),
        (report(instance()), ("Unknown", "NoServingMetrics")),
        (report(instance(**SERVING)), ("Inconclusive", "TooFewPairs")),
        (report(instance(**SERVING, pair_stats=[pair_stats(5, LOG_08)])), ("Inconclusive", "TooFewPairs")),
        (report(instance(**SERVING, pair_stats=[pair_stats(6, LOG_08)])), ("Verified", "IntervalExcludesZero")),
        (report(instance(**SERVING, pair_stats=[pair_stats(6, LOG_08, 0.1)])), ("Inconclusive", "IntervalTooWide")),
        (
            report(instance(**SERVING, pair_stats=[pair_stats(40, 0.001, 0.02)])),
            ("Inconclusive", "IntervalIncludesZero"),
        ),
        (report(instance(**SERVING, pair_stats=[pair_stats(40, 0.05, 0.02)])), ("Verified", "CapCostsEnergy")),
        (
            report(instance(**SERVING, pair_stats=[pair_stats(40, 0.02, 0.05)])),
            ("Inconclusive", "NeedsMoreEvidence"),
        ),
    ],
)
def test_verdicts(pool_report, expected):
    assert verdict(pool_report) == expected


def test_verification_can_be_off():
    assert verdict(report(instance(**SERVING)), "None") == ("Unknown", "VerificationOff")


def test_the_numbers_of_a_verified_saving():
    finding = find_saving(
        Verification(), Mode.ENFORCE, report(instance(**SERVING, pair_stats=[pair_stats(30, LOG_08, 0.02)]))
    )
    savings = finding.savings
    assert (savings.energy_percent, savings.pairs, savings.instances) == ("20.00", 30, 1)
    assert savings.ci95 == ["19.39", "20.61"]
    assert (savings.throughput_change_percent, savings.throughput_change_ci95) == ("1.01", ["1.01", "1.01"])
    assert savings.inter_token_latency_change_percent == "1.01"
    assert savings.inter_token_latency_change_ci95 == ["1.01", "1.01"]
    low, high = map(float, savings.ci95_every_look)
    assert low < 19.39 < 20.61 < high
    assert finding.worth is not None
    assert finding.worth.effect.mean == pytest.approx(LOG_08)
    assert finding.worth.caps_mhz == {1590}
    # The sum is right only with an interval that is right whenever counting begins.
    assert finding.always is not None
    assert (finding.worth.effect.low, finding.worth.effect.high) == (finding.always.low, finding.always.high)
    assert float(savings.evidence) > 20


def test_only_the_pairs_of_the_cap_in_force_count():
    stats = [pair_stats(100, LOG_08, cap=1200), pair_stats(3, -0.1)]
    assert verdict(report(instance(**SERVING, pair_stats=stats))) == ("Inconclusive", "TooFewPairs")
    assert find_saving(Verification(), Mode.ENFORCE, report(instance(pair_stats=stats))).savings.pairs == 3


def test_an_instance_on_several_nodes_counts_once_with_what_the_node_of_its_tokens_says():
    serves = instance(**SERVING, pair_stats=[pair_stats(50, LOG_08)], dropped=DroppedEpochs(peers=3))
    nodes = [
        node_energy("n1", gpus=[gpu()], instances=[serves]),
        node_energy("n2", gpus=[gpu(1)], instances=[instance(reason="", epochs=[EpochPower(epoch=7, watts="500")])]),
    ]
    pool_report = collect(world([], [], nodes, ("n1", "n2")), NOW)[KEY]
    finding = find_saving(Verification(), Mode.ENFORCE, pool_report)
    assert (finding.savings.verdict.value, finding.savings.pairs, finding.savings.instances) == ("Verified", 50, 1)
    assert finding.savings.dropped_epochs == 3


def test_a_cap_that_costs_energy_is_told_as_such():
    savings = find_saving(
        Verification(), Mode.ENFORCE, report(instance(**SERVING, pair_stats=[pair_stats(40, 0.05)]))
    ).savings
    assert savings.energy_percent == "-5.13"
    assert "costs energy" in savings.message
