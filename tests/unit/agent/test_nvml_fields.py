"""Field values, clock lists and the capability, as plain values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.gpu.base import LimiterNanoseconds
from wattlock_agent.gpu.capability import has_sys_admin
from wattlock_agent.gpu.fields import limiters, supported_clocks, whole_number

HOPPER = {74: 11, 75: 99, 77: 4, 79: 3, 186: 512_000, 269: 20, 270: 5, 271: 7}


def test_the_counters_of_a_hopper_gpu() -> None:
    assert limiters(HOPPER) == LimiterNanoseconds(power_cap=11, thermal=25, power_brake=7, reliability=3, board_limit=4)


def test_an_older_gpu_counts_thermal_time_in_one_field() -> None:
    assert limiters({74: 11, 75: 99}) == LimiterNanoseconds(power_cap=11, thermal=99)


def test_one_of_the_two_thermal_counters_is_used_alone_where_the_other_does_not_exist() -> None:
    assert limiters({75: 99, 269: 20}).thermal == 20


def test_a_thermal_sum_is_unknown_while_a_part_does_not_answer() -> None:
    # The other part alone, or the old counter, would look like a restarted driver.
    assert limiters({**HOPPER, 270: None}).thermal is None


def test_a_gpu_without_counters_has_none() -> None:
    assert limiters({}) == LimiterNanoseconds()


@given(st.dictionaries(st.sampled_from(sorted(HOPPER)), st.none() | st.integers(0, 2**64 - 1)))
def test_a_counter_is_never_made_up(values: dict[int, int | None]) -> None:
    result = limiters(values)
    for name, ids in (("power_cap", {74}), ("thermal", {75, 269, 270}), ("power_brake", {271})):
        if all(values.get(field) is None for field in ids):
            assert getattr(result, name) is None


LIST = tuple(range(1980, 344, -15))


def test_clocks_are_ascending_and_the_same_for_equal_lists() -> None:
    assert supported_clocks({3201: LIST, 2201: LIST}) == tuple(range(345, 1981, 15))


def test_lists_of_working_memory_clocks_are_intersected() -> None:
    assert supported_clocks({3201: LIST, 2201: (1980, 1965, 1000)}) == (1965, 1980)


def test_idle_memory_clocks_do_not_narrow_the_list() -> None:
    # A cap snapped down onto {300, 420} would cripple the GPU.
    assert supported_clocks({9001: LIST, 405: (420, 300)}) == tuple(sorted(LIST))


def test_no_list_is_no_clocks() -> None:
    assert supported_clocks({}) == ()
    assert supported_clocks({3201: ()}) == ()


@pytest.mark.parametrize(("value", "number"), [(3.9, 3), (0, 0), (-1, None), (math.nan, None), (math.inf, None)])
def test_values_that_no_counter_can_have_are_unknown(value: float, number: int | None) -> None:
    assert whole_number(value) == number


@pytest.mark.parametrize(
    ("status", "allowed"),
    [
        ("Name:\tx\nCapPrm:\t0\nCapEff:\t0000000000200000\n", True),
        ("CapEff:\t000001ffffffffff\n", True),
        ("CapEff:\t00000000a80425fb\n", False),
        ("CapPrm:\t0000000000200000\nCapEff:\t0000000000000000\n", False),
        ("CapEff:\tzz\n", False),
        ("", False),
    ],
)
def test_the_capability_is_bit_21_of_the_effective_set(status: str, allowed: bool) -> None:
    assert has_sys_admin(status) is allowed
