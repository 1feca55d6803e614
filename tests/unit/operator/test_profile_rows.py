"""Which row of a ClockProfile is for a pool: total, and the same whatever the order of the rows."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_worlds import policy
from wattlock_api.clockprofile import PUBLISHED, ClockProfileSpec, Evidence, ProfileRegime, ProfileRow
from wattlock_api.constants import Architecture
from wattlock_operator.clocks import Cap, cap_for
from wattlock_operator.rows import find_row, holds, rank, regime_text, rows_in_use, width
from wattlock_operator.tuning.model import Regime

H200 = "NVIDIA H200"
PUBLISHED_EVIDENCE = Evidence(kind="Published", source="a paper")
MEASURED = Evidence(kind="Measured", date="2026-11-01T00:00:00Z", driver_version="580.1", samples=100)


def row(mhz: int, measured: bool = True, architecture: str | None = None, **bounds: float) -> ProfileRow:
    return ProfileRow(
        product=H200,
        phase="Decode",
        architecture=Architecture(architecture) if architecture else None,
        regime=ProfileRegime(**bounds) if bounds else None,
        max_sm_clock_mhz=mhz,
        evidence=MEASURED if measured else PUBLISHED_EVIDENCE,
    )


def mhz(rows: list[ProfileRow], regime: Regime | None = None, architecture: str | None = None) -> int | None:
    found = find_row(ClockProfileSpec(rows=rows), H200, Architecture(architecture) if architecture else None, regime)
    return found.row.max_sm_clock_mhz if found else None


BATCH_32 = Regime(32, 0.008)
BETTER_FIRST = {
    "the architecture before any regime": (row(1000, False, "GQA"), row(1100, True, None, min_batch=30, max_batch=34)),
    "a regime before a measured row": (row(1000, False, min_batch=1), row(1100, True)),
    "measured before published": (row(1000, True, max_batch=1000), row(1100, False, min_batch=30, max_batch=34)),
    "the narrower regime": (row(1000, min_batch=20, max_batch=51), row(1100, min_batch=1, max_batch=64)),
    "two bounds before one": (row(1000, min_batch=1, max_batch=64), row(1100, max_batch=64)),
    "a latency narrows too": (
        row(1000, min_batch=1, max_batch=64, max_inter_token_latency_ms=20),
        row(1100, min_batch=1, max_batch=64),
    ),
}


@pytest.mark.parametrize(("better", "other"), BETTER_FIRST.values(), ids=BETTER_FIRST)
def test_precedence(better, other):
    for rows in ([better, other], [other, better]):
        assert mhz(rows, BATCH_32, "GQA") == 1000


def test_of_equals_the_first_in_the_list():
    assert mhz([row(1000), row(1100)]) == 1000
    # The same band elsewhere is as wide, however its bounds round.
    assert mhz([row(1000, max_batch=51.2, min_batch=20), row(1100, min_batch=20 * 1.5, max_batch=51.2 * 1.5)], BATCH_32)


@pytest.mark.parametrize(
    ("bounds", "held"),
    [
        ({"min_batch": 32}, True),
        ({"max_batch": 32}, True),
        ({"min_batch": 32.1}, False),
        ({"max_batch": 31.9}, False),
        ({"min_inter_token_latency_ms": 8}, True),
        ({"max_inter_token_latency_ms": 8}, True),
        ({"min_inter_token_latency_ms": 8.1}, False),
        ({"max_inter_token_latency_ms": 7.9}, False),
        ({"min_batch": 16, "max_batch": 64, "min_inter_token_latency_ms": 9}, False),
    ],
)
def test_bounds_are_part_of_a_regime(bounds, held):
    assert holds(ProfileRegime(**bounds), BATCH_32) is held
    assert (mhz([row(1000, **bounds)], BATCH_32) == 1000) is held


def test_work_that_is_not_known_has_only_rows_without_a_regime():
    assert mhz([row(1000, min_batch=1), row(1100)]) == 1100
    assert mhz([row(1000, min_batch=1)]) is None


def test_other_products_and_architectures_have_no_row():
    assert find_row(PUBLISHED, "NVIDIA H100", None) is None
    assert mhz([row(1000, architecture="MLA")], BATCH_32, "GQA") is None
    assert mhz([row(1000, architecture="MLA")], BATCH_32) is None


bounds = st.none() | st.sampled_from([0.5, 8.0, 16.0, 32.0, 33.0, 64.0, 512.0])
regimes = st.none() | st.builds(
    ProfileRegime,
    min_batch=bounds,
    max_batch=bounds,
    min_inter_token_latency_ms=bounds,
    max_inter_token_latency_ms=bounds,
)
rows = st.builds(
    ProfileRow,
    product=st.sampled_from([H200, "NVIDIA H100 80GB HBM3"]),
    phase=st.just("Decode"),
    architecture=st.none() | st.sampled_from(Architecture),
    regime=regimes,
    max_sm_clock_mhz=st.integers(100, 5000),
    evidence=st.sampled_from([MEASURED, PUBLISHED_EVIDENCE]),
)
works = st.none() | st.builds(Regime, st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))


@given(st.lists(rows, min_size=1, max_size=12), works, st.none() | st.sampled_from(Architecture), st.randoms())
def test_a_row_is_found_whatever_the_order_of_the_list(listed, work, architecture, chance: random.Random):
    found = find_row(ClockProfileSpec(rows=listed), H200, architecture, work)
    fitting = [
        each
        for each in listed
        if each.product == H200 and each.architecture in (None, architecture) and holds(each.regime, work)
    ]
    assert (found is None) == (not fitting)
    shuffled = list(listed)
    chance.shuffle(shuffled)
    again = find_row(ClockProfileSpec(rows=shuffled), H200, architecture, work)
    if found is None or again is None:
        assert found is again
        return
    assert listed[found.place - 1] is found.row
    assert rank(again.row) == rank(found.row) == min(rank(each) for each in fitting)
    if sum(rank(each) == rank(found.row) for each in fitting) == 1:
        assert again.row is found.row


@given(regimes.filter(bool), regimes.filter(bool))
def test_a_regime_within_another_is_not_wider(one, other):
    fields = ("batch", "inter_token_latency_ms")

    def span(regime, name):
        low, high = getattr(regime, f"min_{name}"), getattr(regime, f"max_{name}")
        return (0 if low is None else low, math.inf if high is None else high)

    if all(
        span(other, name)[0] <= span(one, name)[0] and span(one, name)[1] <= span(other, name)[1] for name in fields
    ):
        assert width(one) <= width(other) + 1e-9


def pool_with(profile: str, architecture: str | None = None):
    decode = {"name": "decode", "role": "Decode", "selector": {"matchLabels": {"role": "decode"}}}
    spec = {
        "pools": [decode | {"clock": {"profile": profile}, "architecture": architecture}],
        "requirePrefillPeer": False,
    }
    return policy(spec=spec).spec.pools[0]


def said(listed: list[ProfileRow], regime: Regime | None, architecture: str | None = None) -> str:
    profile = ClockProfileSpec(rows=listed)
    found = cap_for(pool_with("mine", architecture), frozenset({H200}), {"mine": profile}, None, regime)
    if isinstance(found, Cap):
        return f"{found.mhz} MHz"
    assert found.reason == "NoProfileRow"
    return found.message


def test_no_row_says_why_and_what_to_do():
    small, large = row(1000, max_batch=16), row(1300, min_batch=17, max_batch=64, max_inter_token_latency_ms=20)
    assert said([small, large], BATCH_32) == "1300 MHz"
    beyond = said([small, large], Regime(90, 0.0123))
    assert "at batch 90 and 12.3 ms between tokens" in beyond
    assert "only for batch at most 16; batch 17 to 64, at most 20 ms between tokens" in beyond
    assert "clock.tune in pool decode" in beyond
    unknown = said([small, large], None)
    assert "what the pool does is not known" in unknown
    assert "metrics.port" in unknown
    assert "only rows with a regime" in unknown
    other = said([row(1000, architecture="MLA")], BATCH_32, "GQA")
    assert "no row for NVIDIA H200 with architecture GQA, and a cap is never guessed" in other


def test_a_regime_in_words():
    assert regime_text(ProfileRegime(min_batch=16)) == "batch at least 16"
    assert regime_text(ProfileRegime(min_inter_token_latency_ms=2.5, max_inter_token_latency_ms=9)) == (
        "2.5 to 9 ms between tokens"
    )


def test_the_rows_in_use_are_told_by_product():
    profile = ClockProfileSpec(rows=[row(1000), row(900, min_batch=20)])
    told = rows_in_use(profile, {H200, "NVIDIA H100"}, None, BATCH_32)
    assert [(each.product, each.row, each.cap_mhz) for each in told] == [(H200, 2, 900)]
