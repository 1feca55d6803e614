"""The statistics behind a saving."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_operator.pooling import Effect, Sample, change_percent, pool, saving_percent, t_quantile_975

#: Two-sided 95 % points of Student's t as printed in statistical tables.
T_TABLE = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980, 100000: 1.960,
}  # fmt: skip


@pytest.mark.parametrize(("degrees", "expected"), T_TABLE.items())
def test_students_t_agrees_with_the_tables(degrees, expected):
    assert t_quantile_975(degrees) == pytest.approx(expected, abs=6e-4)


def test_students_t_falls_towards_the_normal_quantile():
    quantiles = [t_quantile_975(degrees) for degrees in range(1, 300)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] > 1.959964


def test_students_t_between_whole_degrees():
    assert t_quantile_975(7.5) == pytest.approx(2.3326, abs=1e-3)  # by numerical integration
    assert t_quantile_975(1e9) == pytest.approx(1.95996, abs=3e-3)


def test_students_t_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="at least one degree"):
        t_quantile_975(0)


def sample(values: list[float]) -> Sample:
    return Sample(len(values), math.fsum(values), math.fsum(value * value for value in values))


def test_one_instance_is_a_t_interval_over_its_pairs():
    effect = pool([sample([-0.20, -0.22, -0.18, -0.24, -0.21, -0.19])])
    assert effect is not None
    # mean -0.2066667, standard deviation 0.0216025, t(5) 2.570582
    assert effect.mean == pytest.approx(-0.2066667, abs=1e-6)
    assert effect.high - effect.mean == pytest.approx(2.570582 * 0.0216025 / math.sqrt(6), abs=1e-5)
    assert (effect.pairs, effect.instances) == (6, 1)


def test_instances_may_differ_in_their_effect():
    """The interval is about the instances that were measured: that they differ is no error."""
    agree = pool([sample([-0.2, -0.1] * 50), sample([-0.2, -0.1] * 50), sample([-0.2, -0.1] * 50)])
    differ = pool([sample([-0.1, 0.0] * 50), sample([-0.2, -0.1] * 50), sample([-0.3, -0.2] * 50)])
    assert agree is not None
    assert differ is not None
    assert differ.mean == pytest.approx(agree.mean)
    assert differ.high - differ.low == pytest.approx(agree.high - agree.low)


def test_a_pool_is_a_stratified_mean():
    effect = pool([sample([-0.20, -0.22, -0.18, -0.24]), sample([-0.1, -0.3, 0.1])])
    # n s^2 of the instances: 4 * 0.00066667 and 3 * 0.04; Welch: 0.12266667^2 / (0.00266667^2/5 + 0.12^2/4) - 2 = 2.179
    assert effect is not None
    assert effect.mean == pytest.approx(-1.14 / 7)
    quantile = t_quantile_975(0.12266667**2 / (0.00266667**2 / 5 + 0.12**2 / 4) - 2)
    assert effect.high - effect.mean == pytest.approx(quantile * math.sqrt(0.12266667) / 7, rel=1e-6)


def test_instances_with_one_pair_share_a_variance():
    apart, one = pool([sample([value]) for value in (-0.2, -0.22, -0.18)]), pool([sample([-0.2, -0.22, -0.18])])
    assert (apart.mean, apart.low, apart.high) == pytest.approx((one.mean, one.low, one.high))
    alone, joined = pool([sample([-0.2, -0.22, -0.18]), sample([-0.3])]), pool([sample([-0.2, -0.22, -0.18, -0.3])])
    assert (alone.low, alone.high) == pytest.approx((joined.low, joined.high))


@pytest.mark.parametrize(
    ("samples", "known"), [([], False), ([Sample(0, 0, 0)], False), ([Sample(1, -0.2, 0.04)], True)]
)
def test_too_little_data_gives_no_interval(samples, known):
    effect = pool(samples)
    assert (effect is not None) is known
    assert effect is None or not effect.bounded


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.floats(-1e6, 1e6), st.floats(0, 1e9)).map(lambda entry: Sample(*entry)),
        max_size=20,
    )
)
def test_any_report_gives_an_ordered_interval_or_none(samples):
    effect = pool(samples)
    if effect is not None:
        assert effect.low <= effect.mean <= effect.high
        for percent in (saving_percent(effect), change_percent(effect)):
            assert percent.low <= percent.value <= percent.high


def test_a_saving_has_the_sign_that_people_expect():
    effect = Effect(mean=math.log(0.8), low=math.log(0.75), high=math.log(0.85), pairs=10, instances=1)
    saving, change = saving_percent(effect), change_percent(effect)
    assert (saving.value, saving.low, saving.high) == pytest.approx((20, 15, 25))
    assert (change.value, change.low, change.high) == pytest.approx((-20, -25, -15))


@pytest.mark.parametrize("instances", [1, 4, 12])
def test_the_interval_holds_the_truth_in_95_of_100_pools(instances):
    chance, hits, pools = random.Random(20261123 + instances), 0, 1000
    for _ in range(pools):
        samples = []
        owns = [chance.gauss(-0.2, 0.05) for _ in range(instances)]
        for index, own in enumerate(owns):
            noise = 0.05 * (1 + 3 * (index == 1))
            samples.append(sample([own + chance.gauss(0, noise) for _ in range(10)]))
        effect = pool(samples)
        assert effect is not None
        hits += effect.low <= math.fsum(owns) / instances <= effect.high
    assert 0.93 <= hits / pools <= 0.97
