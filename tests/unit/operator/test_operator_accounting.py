"""Sums of energy and of savings: what counts, what stays, how uncertainty adds up."""

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import DECODE, NOW, PREFILL, agent_pod, gpu, instance, node_energy, pod, policy, world
from wattlock_api.constants import Mode
from wattlock_api.energypolicy import Cost, Verification
from wattlock_api.nodeenergy import ArmTotals, Moments, PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, Savings
from wattlock_operator.accounting import (
    Account,
    Saved,
    Sums,
    Worth,
    advance,
    counted_capped_joules,
    open_or_advance,
    opening,
)
from wattlock_operator.decide import Memory, decide
from wattlock_operator.pooling import Effect
from wattlock_operator.reports import PoolReport, collect
from wattlock_operator.savings import find_saving, with_totals
from wattlock_operator.verdict import VERIFIED, Pooled, at_every_look, judge

KEY = ("uid-qwen", "decode")
KWH = 3.6e6


def worth(mean: float, half_width: float = 0.0, cap: int = 1590) -> Worth:
    return Worth(Effect(mean, mean - half_width, mean + half_width, 10, 1), frozenset({cap}))


#: Capped, a token needs 0.8 of what it needs when released: 80 J under the cap save 20 J.
FIFTH = worth(math.log(0.8))


def report(*instances, node: str = "n1") -> PoolReport:
    found = [gpu(index, entry.instance) for index, entry in enumerate(instances)]
    return collect(world([], [], [node_energy(node, gpus=found, instances=instances)], (node,)), NOW).get(
        KEY, PoolReport()
    )


def counting(energy: float, capped: float = 0.0, name: str = "d0", cap: int = 1590):
    arms = [ArmTotals(cap_mhz=0, joules="50"), ArmTotals(cap_mhz=cap, joules=f"{capped:.1f}")]
    return instance(name, energy_joules=f"{energy:.1f}", arms=arms)


def counted(energy: float, capped: float = 0.0, name: str = "d0", cap: int = 1590) -> PoolReport:
    return report(counting(energy, capped, name, cap))


def run(account: Account, *reports: PoolReport, effect: Worth | None = None) -> Account:
    for entry in reports:
        account = advance(account, entry, effect)
    return account


def open_(pool_report: PoolReport, sums: Sums, effect: Worth | None = None) -> Account:
    return opening(pool_report, sums, effect)


def test_energy_grows_by_what_counters_grow():
    assert run(Account(), counted(100), counted(100), counted(130)).energy_joules == 130


def test_a_counter_that_restarts_counts_from_zero():
    account = run(Account(), counted(100, 90), counted(20, 8), effect=FIFTH)
    assert account.energy_joules == 120
    assert account.saved.joules == pytest.approx(8 * 0.25)


def test_a_pod_that_goes_takes_nothing_away():
    gone = run(Account(), counted(100), report(), counted(30, name="d1"))
    assert gone.energy_joules == 130


def test_a_node_that_was_away_is_not_counted_twice():
    back = run(Account(), counted(100, 80), report(), counted(110, 90), effect=FIFTH)
    assert back.energy_joules == 110
    assert back.saved.joules == pytest.approx(10 * 0.25)


def test_a_counter_that_is_unknown_for_a_while_is_not_counted_twice():
    dark = report(instance("d0", energy_joules=None, arms=[ArmTotals(cap_mhz=1590, joules="80")]))
    account = run(Account(), counted(100, 80), dark, counted(110, 90), effect=FIFTH)
    assert account.energy_joules == 110
    assert account.saved.joules == pytest.approx(10 * 0.25)


def test_a_pool_that_was_never_measured_is_unknown_not_zero():
    account = run(Account(), report())
    assert (account.energy_joules, account.saved) == (None, None)


def test_savings_grow_with_the_capped_energy_only_while_verified():
    unverified = run(Account(), counted(100, 80))
    assert unverified.saved is None
    verified = advance(unverified, counted(200, 160), FIFTH)
    # 80 J under the cap, at 0.8 of what the same tokens need when released: 100 J
    assert verified.saved.joules == pytest.approx(20)
    assert advance(verified, counted(300, 240), None).saved.joules == pytest.approx(20)


def test_the_interval_is_carried_through_end_to_end():
    effect = worth(math.log(0.8), 0.02)
    account = run(Account(), counted(100, 80), counted(200, 160), effect=effect)
    low, high = (80 * math.expm1(-math.log(0.8) + side) for side in (-0.02, 0.02))
    assert account.saved.low_joules == pytest.approx(low)
    assert account.saved.high_joules == pytest.approx(high)


def test_a_later_estimate_values_later_energy_only():
    first = run(Account(), counted(20), counted(100, 80), effect=worth(math.log(0.8)))
    second = advance(first, counted(200, 160), worth(math.log(0.9)))
    assert second.saved.joules == pytest.approx(80 * 0.25 + 80 * (1 / 0.9 - 1))


def test_what_was_counted_stays_when_the_cap_changes():
    before = run(Account(), counted(20), counted(100, 80), effect=FIFTH)
    arms = [ArmTotals(cap_mhz=1590, joules="80"), ArmTotals(cap_mhz=1200, joules="40")]
    changed = report(instance("d0", energy_joules="150", arms=arms))
    unverified = advance(before, changed, None)
    assert unverified.saved == before.saved
    more = [ArmTotals(cap_mhz=1590, joules="90"), ArmTotals(cap_mhz=1200, joules="50")]
    later = report(instance("d0", energy_joules="170", arms=more))
    # Of the new cap alone: the last epoch of the old one is not what the new estimate is about.
    assert advance(unverified, later, worth(math.log(0.8), cap=1200)).saved.joules == pytest.approx(20 + 10 * 0.25)


def test_a_cap_that_costs_energy_takes_savings_back():
    account = run(Account(), counted(20), counted(100, 80), effect=FIFTH)
    assert advance(account, counted(200, 160), worth(math.log(1.25))).saved.joules == pytest.approx(20 - 80 * 0.2)


def test_an_arm_that_begins_anew_never_takes_savings_back():
    account = run(Account(), counted(20), counted(100, 80), counted(200, 30), effect=FIFTH)
    assert account.saved.joules == pytest.approx((80 + 30) * 0.25)


def test_an_account_goes_on_after_a_restart():
    saved = Saved(0.5 * KWH, 0.4 * KWH, 0.6 * KWH)
    sums = Sums(2 * KWH, saved, counted_joules=100, counted_capped_joules={1590: 80}, verified=True)
    account = run(open_(counted(130, 90), sums, FIFTH), counted(130, 90), counted(140, 95), effect=FIFTH)
    assert account.energy_joules == pytest.approx(2 * KWH + 40)
    assert account.saved.joules == pytest.approx(0.5 * KWH + (10 + 5) * 0.25)
    assert account.saved.low_joules == pytest.approx(0.4 * KWH + (10 + 5) * 0.25)


@pytest.mark.parametrize(("verified", "effect"), [(False, FIFTH), (True, None), (True, worth(math.log(0.8), cap=1200))])
def test_absence_is_counted_only_where_the_saving_was_and_is_verified(verified, effect):
    sums = Sums(KWH, Saved(10, 9, 11), 100, {1590: 80}, verified)
    assert open_(counted(130, 110), sums, effect).saved == Saved(10, 9, 11)


def test_without_a_former_sum_savings_count_from_now_and_energy_from_the_start():
    account = run(open_(counted(130, 90), Sums(), FIFTH), counted(130, 90), effect=FIFTH)
    assert account.energy_joules == 130
    assert account.saved.joules == 0


def test_what_was_lost_during_a_restart_is_never_counted_twice():
    sums = Sums(2 * KWH, Saved(5, 5, 5), counted_joules=1000, counted_capped_joules={1590: 800}, verified=True)
    account = open_(counted(30, 20), sums, FIFTH)
    assert account.energy_joules == pytest.approx(2 * KWH)
    assert account.saved == Saved(5, 5, 5)


@pytest.mark.parametrize("second", [{}, {("uid-qwen", "second"): Account(energy_joules=0.0)}])
def test_a_pod_that_moves_to_another_pool_is_not_counted_again(second):
    accounts = {KEY: run(Account(), counted(100, 80), effect=FIFTH)} | second
    moved = open_or_advance(accounts, ("uid-qwen", "second"), counted(130, 100), Sums(), FIFTH)
    assert moved.energy_joules == 30
    assert moved.saved.joules == pytest.approx(20 * 0.25)


class Pools:
    """Two pools of a policy, between which the pod d0 moves."""

    def __init__(self):
        self.accounts: dict[tuple[str, str], Account] = {}

    def look(self, where: str, energy: float = 0.0, capped: float = 0.0, worths: tuple[str, ...] = ("a", "b")):
        """Look at a report that has the pod in this pool; "": in none."""
        self.accounts = {
            ("uid", pool): open_or_advance(
                self.accounts,
                ("uid", pool),
                counted(energy, capped) if pool == where else report(),
                Sums(),
                FIFTH if pool in worths else None,
            )
            for pool in "ab"
        }
        return self

    @property
    def energy(self) -> float:
        return sum(each.energy_joules or 0 for each in self.accounts.values())

    @property
    def saved(self) -> float:
        return sum(each.saved.joules for each in self.accounts.values() if each.saved is not None)


@pytest.mark.parametrize("away", [0, 1, 3])
def test_a_pod_that_moves_to_another_pool_and_back_is_counted_once(away):
    pools = Pools().look("a", 100, 80)
    for pool, energy in (("b", 1100), ("b", 1200), ("a", 1300), ("b", 1400), ("a", 1500)):
        for _ in range(away):
            pools.look("")  # it is in neither for a while
        pools.look(pool, energy, energy - 20)
    assert pools.energy == 1500
    assert pools.saved == pytest.approx((1480 - 80) * 0.25)
    assert pools.accounts["uid", "b"].energy_joules == 1200


def test_what_a_pool_without_a_verdict_counted_is_not_saved_by_another_afterwards():
    pools = Pools().look("a", 100, 80, ("a",)).look("b", 1100, 1080, ("a",)).look("a", 1200, 1180, ("a",))
    assert pools.saved == pytest.approx(100 * 0.25)


MOVES = st.lists(
    st.tuples(st.sampled_from(["a", "b", ""]), st.floats(0, 1000).map(lambda joules: round(joules, 1))), max_size=20
)


@given(MOVES)
def test_however_a_pod_moves_its_energy_is_counted_once(moves):
    pools, total, seen = Pools(), 0.0, 0.0
    for where, joules in moves:
        total += joules
        seen = total if where else seen
        pools.look(where, total, total)
    assert pools.energy == pytest.approx(seen, abs=0.1)


def test_an_account_that_is_open_goes_on_whatever_status_says():
    accounts = {KEY: run(Account(), counted(100))}
    stale = Sums(energy_joules=50.0, counted_joules=50.0)
    assert open_or_advance(accounts, KEY, counted(30, name="d1"), stale, None).energy_joules == 130


@given(st.lists(st.floats(0, 1e6).map(lambda joules: round(joules, 1)), min_size=1, max_size=20))
def test_energy_never_falls(counters):
    account, last = Account(), 0.0
    for joules in counters:
        account = advance(account, counted(joules), None)
        assert account.energy_joules is not None
        assert account.energy_joules >= last
        last = account.energy_joules


looks = st.tuples(
    st.lists(st.floats(0, 1e6), max_size=3),  # capped joules of the instances present
    st.sampled_from([None, 1590, 1200]),  # cap of the verified effect
    st.floats(-0.5, 0.0),
    st.booleans(),  # whether the operator restarts before it
)


@given(st.lists(looks, min_size=1, max_size=12))
def test_a_verified_saving_never_falls_whatever_comes_and_goes(history):
    account, last = Account(), Saved()
    for joules, cap, mean, restarts in history:
        found = report(*(counting(each, each, f"d{index}") for index, each in enumerate(joules)))
        effect = None if cap is None else worth(mean, min(0.02, -mean), cap)
        if restarts:
            sums = Sums(account.energy_joules, account.saved, 0.0, {1590: 0.0}, True)
            account = open_(found, sums, effect)
        account = advance(account, found, effect)
        now = account.saved or Saved()
        assert now.joules >= last.joules
        assert now.low_joules >= last.low_joules
        assert now.low_joules <= now.joules <= now.high_joules
        last = now


def test_the_interval_of_the_sum_holds_the_truth():
    """Pools that are looked at again and again, and counted from the first look that is verified."""
    chance, held, counting = random.Random(20261123), 0, 0
    truth_log, noise, pools = -0.02, 0.02, 100
    for _ in range(pools):
        pairs, total, squares, saved, truth = 0, 0.0, 0.0, Saved(), 0.0
        for _ in range(15):
            for _ in range(10):
                d = chance.gauss(truth_log, noise)
                pairs, total, squares = pairs + 1, total + d, squares + d * d
            half_width = 2 * math.sqrt((squares - total**2 / pairs) / (pairs - 1) / pairs)
            mean = total / pairs
            pooled = Pooled(Effect(mean, mean - half_width, mean + half_width, pairs, 1), total, squares)
            always = at_every_look(pooled)
            if judge(pooled) in VERIFIED and always is not None:
                saved += Worth(always, frozenset({1590})).of(1000)
                truth += 1000 * math.expm1(-truth_log)
        counting += truth > 0
        held += saved.low_joules <= truth <= saved.high_joules
    assert counting == pools
    assert held >= 0.95 * pools


def test_money_and_carbon_follow_from_energy_and_pue():
    base = find_saving(Verification(), Mode.ENFORCE, PoolReport()).savings
    cost = Cost(price_per_kwh="0.25", grams_co2_per_kwh=380, pue="1.2")
    saved = Saved(3.41 * KWH, 3 * KWH, 4 * KWH)
    savings = with_totals(base, saved, cost)
    assert (savings.saved_kwh, savings.saved_cost, savings.saved_kg_co2) == ("3.410000", "1.0230", "1.5550")
    assert savings.saved_kwh_ci95 == ["3.000000", "4.000000"]
    assert savings.saved_cost_ci95 == ["0.9000", "1.2000"]
    assert savings.saved_kg_co2_ci95 == ["1.3680", "1.8240"]
    without_pue = with_totals(base, saved, cost.model_copy(update={"pue": None}))
    assert (without_pue.saved_kwh, without_pue.saved_cost) == ("3.410000", "0.8525")
    assert with_totals(base, saved, Cost()).saved_cost is None
    assert with_totals(base, None, cost).saved_kwh is None


def test_the_sums_survive_a_restart_by_way_of_status():
    """What one operator writes another takes over: nothing is lost, nothing counted twice."""
    moments = Moments(total=f"{30 * math.log(0.8):.9f}", squares=f"{30 * math.log(0.8) ** 2 + 0.012:.9f}")
    stats = [PairStats(cap_mhz=1590, pairs=30, energy=moments)]
    pods = (pod("d0", DECODE), pod("p0", PREFILL), agent_pod("n1"))

    def look(capped_kwh: float, memory: Memory, before: EnergyPolicyStatus | None):
        joules = f"{capped_kwh * KWH:.1f}"
        serving = instance(
            tokens_per_second="100",
            energy_joules=joules,
            arms=[ArmTotals(cap_mhz=1590, joules=joules)],
            pair_stats=stats,
        )
        found = dataclasses.replace(policy(), status=before)
        decision = decide(world([found], pods, [node_energy(gpus=[gpu()], instances=[serving])]), None, memory, NOW)
        status = decision.statuses["uid-qwen"]
        return decision.memory, status, float(status.pools[0].savings.saved_kwh)

    memory, _, first = look(1, Memory(), None)
    assert first == 0, "what was used before the first look is not claimed"
    memory, status, second = look(2, memory, None)
    assert second == pytest.approx(0.25, abs=0.01)
    _, status, third = look(4, Memory(), status)
    assert third == pytest.approx(0.75, abs=0.01), "two more while no operator watched"
    low, high = map(float, status.pools[0].savings.saved_kwh_ci95)
    assert 0.6 < low < third < high < 0.9


def test_an_amount_of_money_or_carbon_never_has_more_digits_than_the_schema_allows():
    cost = Cost(price_per_kwh="9" * 15, grams_co2_per_kwh=5000, pue="9.9999")
    plain = find_saving(Verification(), Mode.ENFORCE, report()).savings
    total = with_totals(plain, Saved(1e15 * KWH, -2e15 * KWH, 3e15 * KWH), cost)
    assert Savings.model_validate(total.to_api()) == total
    assert total.saved_cost_ci95 == [f"-{'9' * 15}.0000", f"{'9' * 15}.0000"]


def test_an_arm_under_what_is_no_clock_is_not_counted():
    """No order may have it, and no status could hold it."""
    assert counted_capped_joules(counted(100, 80, cap=99)) == {}
    assert counted_capped_joules(counted(100, 80, cap=100)) == {100: 80}
