"""Pools with a ClockProfile in the operator's decision: rows follow the work, slowly, through rollouts and restarts."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from operator_worlds import (
    DECODE,
    NOW,
    PREFILL,
    agent_pod,
    as_kept,
    gpu,
    instance,
    node_energy,
    pod,
    policy,
    two_pools,
    world,
)
from wattlock_api.base import timestamp
from wattlock_api.clockprofile import ClockProfileSpec
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus, ProfileStatus
from wattlock_operator.decide import Decision, Memory, decide
from wattlock_operator.work import FIRST_SECONDS, MOVED_SECONDS

PODS = ("d0", "d1", "d2")
H200 = "NVIDIA H200"


def row(mhz: int, **regime: float) -> dict[str, Any]:
    evidence = {"kind": "Measured", "date": "2026-11-01T00:00:00Z", "driverVersion": "580.1", "samples": 100}
    found = {"product": H200, "phase": "Decode", "maxSMClockMHz": mhz, "evidence": evidence}
    return found | ({"regime": regime} if regime else {})


BY_BATCH = (row(810, maxBatch=32), row(1200, minBatch=32))


@dataclass
class Site:
    """A cluster whose agents do at once what they are told."""

    rows: tuple[dict[str, Any], ...] = BY_BATCH
    batch: float | None = 20.0
    latency_ms: float = 8.0
    rollout: dict[str, Any] | None = None
    clock: dict[str, Any] = field(default_factory=lambda: {"profile": "mine"})
    mode: str = "Enforce"
    now: float = NOW
    memory: Memory = field(default_factory=Memory)
    status: EnergyPolicyStatus | None = None
    written: tuple[Any, ...] = ()
    events: list[tuple[str, str]] = field(default_factory=list)

    def look(self, seconds: float = 15.0) -> Decision:
        self.now += seconds
        caps = {order.instance: order.cap_mhz for order in self.written if order.role == "Decode"}
        holds = {order.instance: order.hold.reason for order in self.written if order.hold is not None}
        gpus = [
            gpu(at, name, requested_mhz=cap)
            if (cap := caps.get(name))
            else gpu(at, name, state="Released", reason=holds.get(name, "NoOrder"), requested_mhz=None)
            for at, name in enumerate(PODS)
        ]
        rate = None if self.batch is None else f"{self.batch / self.latency_ms * 1000:.3f}"
        served = [
            instance(name, tokens_per_second=rate, inter_token_latency_ms=f"{self.latency_ms:.3f}") for name in PODS
        ]
        entry = node_energy("n1", self.written, gpus=gpus, instances=served)
        told = entry.status.model_copy(update={"reported_at": timestamp(self.now - 2)})
        spec = {"mode": self.mode, "pools": two_pools(self.clock), "rollout": self.rollout}
        here = world(
            [policy(spec=spec, status=self.status)],
            [*(pod(name, DECODE) for name in PODS), pod("p0", PREFILL), agent_pod("n1")],
            [replace(entry, status=told)],
            profiles={"mine": ClockProfileSpec.model_validate({"rows": list(self.rows)})},
        )
        decision = decide(here, None, self.memory, self.now)
        self.memory = decision.memory
        for orders in decision.write_orders.values():
            self.written = orders
        for _, status in decision.write_statuses:
            self.status = as_kept(status)
        self.events += [(telling.reason, telling.message) for telling in decision.tellings]
        return decision

    def looks(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.look()

    @property
    def caps(self) -> list[int | None]:
        return [order.cap_mhz for order in self.written if order.role == "Decode"]

    @property
    def pool(self) -> PoolStatus:
        return self.status.pools[0]

    @property
    def profile(self) -> ProfileStatus:
        assert self.pool.profile is not None
        return self.pool.profile

    @property
    def reasons(self) -> dict[str, str]:
        return {entry.reason: entry.message for entry in self.pool.reasons}


def settled(**changes: Any) -> Site:
    site = Site(**changes)
    site.looks(FIRST_SECONDS + 45)
    return site


def test_the_row_is_that_of_the_work():
    assert settled().caps == [810] * 3
    assert settled(batch=60.0).caps == [1200] * 3


def test_until_the_work_is_known_only_rows_without_a_regime_hold():
    site = Site()
    site.looks(FIRST_SECONDS - 15)
    assert site.caps == [None] * 3
    assert "what the pool does is not known" in site.reasons["NoProfileRow"]
    assert site.profile.rows == []
    general = Site(rows=(*BY_BATCH, row(1590)))
    general.looks(30)
    assert general.caps == [1590] * 3
    general.looks(FIRST_SECONDS)
    assert general.caps == [810] * 3
    without = settled(batch=None)
    assert without.caps == [None] * 3


def test_a_pool_at_the_border_stays_and_other_work_that_lasts_moves_it():
    site = settled(batch=30.0)
    for batch in (33, 29, 36, 31, 37):
        site.batch = batch
        site.looks(MOVED_SECONDS)
        assert site.caps == [810] * 3
    site.batch = 60.0
    site.looks(MOVED_SECONDS - 60)
    assert site.caps == [810] * 3
    assert site.profile.work_changed_at is not None
    site.looks(180)
    assert site.caps == [1200] * 3
    (told,) = [text for reason, text in site.events if reason == "ProfileRow"]
    assert told.startswith(
        "pool decode: ClockProfile mine asks for 1200 MHz instead of 810 MHz for NVIDIA H200 (row 2)"
    )
    assert [(each.row, each.cap_mhz) for each in site.profile.rows] == [(2, 1200)]
    # On the other side of the border it stays just as well.
    site.batch = 49.0
    site.looks(4 * MOVED_SECONDS)
    assert site.caps == [1200] * 3
    assert [reason for reason, _ in site.events].count("ProfileRow") == 1


def test_a_restarted_operator_has_the_same_row_and_the_same_patience():
    site = settled(batch=30.0)
    site.batch = 35.0  # the other row's, for whoever sees it for the first time
    for _ in range(100):
        site.memory = Memory()
        site.look()
    assert site.caps == [810] * 3
    site.batch, began = 60.0, site.now
    while site.caps == [810] * 3:
        site.memory = Memory()
        site.look()
    assert site.now - began == pytest.approx(MOVED_SECONDS, abs=60)


def test_beyond_all_rows_nothing_is_locked():
    site = settled(rows=(row(810, maxBatch=32),))
    site.batch = 90.0
    site.looks(MOVED_SECONDS + 120)
    assert site.caps == [None] * 3
    assert "no row for NVIDIA H200 at batch 90 and 8.0 ms between tokens" in site.reasons["NoProfileRow"]
    assert "clock.tune" in site.reasons["NoProfileRow"]


def test_a_pool_that_rests_keeps_its_row():
    site = settled()
    site.batch = None
    site.looks(3600)
    assert site.caps == [810] * 3


@pytest.mark.parametrize("restarted", [False, True])
def test_from_a_profile_to_a_number_and_back_nobody_loses_the_clock_of_before(restarted):
    site = settled(rows=(row(810),), rollout={"steps": [1, "100%"], "holdSeconds": 300})
    site.looks(1200)
    assert site.caps == [810] * 3

    def ask(clock):
        site.clock = clock
        site.memory = Memory() if restarted else site.memory
        site.look()
        return sorted(site.caps, key=lambda mhz: mhz or 0)

    assert ask({"maxSMClockMHz": 810}) == [810] * 3
    assert ask({"maxSMClockMHz": 1200}) == [810, 810, 1200]
    assert ask({"profile": "mine"}) == [810] * 3
    assert ask({"maxSMClockMHz": 1200}) == [810, 810, 1200]
    site.looks(1200)
    assert site.caps == [1200] * 3
    assert ask({"profile": "mine"}) == [810, 1200, 1200]


def test_another_row_is_rolled_out_like_any_change_of_clock():
    rollout = {"steps": [1, "100%"], "holdSeconds": 300}
    site = settled(rollout=rollout)
    site.looks(1200)
    assert site.caps == [810] * 3
    site.batch = 60.0
    site.looks(MOVED_SECONDS + 75)
    assert sorted(site.caps) == [810, 810, 1200]
    assert site.pool.rollout is not None
    assert site.pool.rollout.phase == "Progressing"
    site.looks(1200)
    assert site.caps == [1200] * 3


def test_the_rest_of_the_profile_may_change_at_any_time():
    site = settled()
    site.rows = (row(780, maxBatch=32), BY_BATCH[1])
    site.look()
    assert site.caps == [780] * 3


def test_mode_observe_tells_the_row_and_locks_nothing():
    site = settled(mode="Observe")
    assert site.caps == [None] * 3
    assert [(each.row, each.cap_mhz) for each in site.profile.rows] == [(1, 810)]


def test_conditions_do_not_change_with_every_report():
    site = settled(rows=(row(810, maxBatch=10),), batch=30.0)
    told = []
    for at in range(60):
        site.batch = 28.0 + at % 5
        site.look()
        told.append({(each.type, each.reason, each.message) for each in site.status.conditions})
    assert all(each == told[0] for each in told)
