"""Verdicts on savings, and the sums that grow from them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import NOW, gpu, instance, node_energy, world
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Cost, Verification
from wattlock_api.nodeenergy import ArmTotals, Moments, PairStats
from wattlock_operator.accounting import Account, Sums, advance, opening
from wattlock_operator.reports import PoolReport, collect
from wattlock_operator.savings import find_saving, with_totals

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
        (report(instance(**SERVING, pair_stats=[pair_stats(40, 0.05, 0.02)])), ("Verified", "IntervalExcludesZero")),
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
    assert (savings.energy_percent, savings.pairs, savings.instances) == ("20.0", 30, 1)
    assert savings.ci95 == ["19.4", "20.6"]
    assert (savings.throughput_change_percent, savings.inter_token_latency_change_percent) == ("1.0", "1.0")
    assert finding.verified_log_effect == pytest.approx(LOG_08)


def test_only_the_pairs_of_the_cap_in_force_count():
    stats = [pair_stats(100, LOG_08, cap=1200), pair_stats(3, -0.1)]
    assert verdict(report(instance(**SERVING, pair_stats=stats))) == ("Inconclusive", "TooFewPairs")
    assert find_saving(Verification(), Mode.ENFORCE, report(instance(pair_stats=stats))).savings.pairs == 3


def test_instances_on_several_nodes_are_left_out_and_counted():
    entry = instance(**SERVING, pair_stats=[pair_stats(50, LOG_08)])
    nodes = [node_energy(name, gpus=[gpu()], instances=[entry]) for name in ("n1", "n2")]
    pool_report = collect(world([], [], nodes, ("n1", "n2")), NOW)[KEY]
    finding = find_saving(Verification(), Mode.ENFORCE, pool_report)
    assert (finding.savings.verdict.value, finding.savings.pairs) == ("Unknown", 0)
    assert "several nodes" in finding.savings.message


def test_a_cap_that_costs_energy_is_told_as_such():
    savings = find_saving(
        Verification(), Mode.ENFORCE, report(instance(**SERVING, pair_stats=[pair_stats(40, 0.05)]))
    ).savings
    assert savings.energy_percent == "-5.1"
    assert "costs energy" in savings.message


def counted(energy: float, capped: float = 0.0, name: str = "d0") -> PoolReport:
    arms = [ArmTotals(cap_mhz=0, joules="50"), ArmTotals(cap_mhz=1590, joules=f"{capped:.1f}")]
    return report(instance(name, energy_joules=f"{energy:.1f}", arms=arms))


def run(account: Account, *reports: PoolReport, effect: float | None = None) -> Account:
    for entry in reports:
        account = advance(account, entry, effect)
    return account


def test_energy_grows_by_what_counters_grow():
    assert run(Account(), counted(100), counted(100), counted(130)).energy_joules == 130


def test_a_counter_that_restarts_counts_from_zero():
    assert run(Account(), counted(100), counted(20)).energy_joules == 120


def test_a_pod_that_goes_takes_nothing_away():
    gone = run(Account(), counted(100), report(), counted(30, name="d1"))
    assert gone.energy_joules == 130


def test_a_pool_that_was_never_measured_is_unknown_not_zero():
    account = run(Account(), report())
    assert (account.energy_joules, account.saved_joules) == (None, None)


def test_savings_grow_with_the_capped_energy_only_while_verified():
    unverified = run(Account(), counted(100, 80))
    assert unverified.saved_joules is None
    verified = advance(unverified, counted(200, 160), LOG_08)
    # 80 J under the cap, at 0.8 of what the same tokens need when released: 100 J
    assert verified.saved_joules == pytest.approx(20)
    assert advance(verified, counted(300, 240), None).saved_joules == pytest.approx(20)


def test_an_arm_that_begins_anew_never_takes_savings_back():
    account = run(Account(), counted(100, 80), counted(200, 30), effect=LOG_08)
    assert account.saved_joules == pytest.approx((80 + 30) * 0.25)


def test_an_account_goes_on_after_a_restart():
    sums = Sums(energy_kwh=2.0, saved_kwh=0.5, counted_joules=100)
    account = run(opening(counted(130, 90), sums), counted(130, 90), counted(140, 95), effect=LOG_08)
    assert account.energy_joules == pytest.approx(2 * 3.6e6 + 40)
    assert account.saved_joules == pytest.approx(0.5 * 3.6e6 + 5 * 0.25)


def test_what_was_lost_during_a_restart_is_never_counted_twice():
    sums = Sums(energy_kwh=2.0, counted_joules=1000)
    assert opening(counted(30), sums).energy_joules == pytest.approx(2 * 3.6e6)


@given(st.lists(st.floats(0, 1e6).map(lambda joules: round(joules, 1)), min_size=1, max_size=20))
def test_energy_never_falls(counters):
    account, last = Account(), 0.0
    for joules in counters:
        account = advance(account, counted(joules), None)
        assert account.energy_joules is not None
        assert account.energy_joules >= last
        last = account.energy_joules


def test_money_and_carbon_follow_from_energy_and_pue():
    base = find_saving(Verification(), Mode.ENFORCE, report()).savings
    cost = Cost(price_per_kwh="0.25", grams_co2_per_kwh=380, pue="1.2")
    savings = with_totals(base, 3.41 * 3.6e6, cost)
    assert (savings.saved_kwh, savings.saved_cost, savings.saved_kg_co2) == ("3.410000", "1.0230", "1.5550")
    assert with_totals(base, 3.6e6, Cost()).saved_cost is None
    assert with_totals(base, None, cost).saved_kwh is None
