"""A small part of ``make bench-decision``: its world is the simulator's, and the tuner keeps its bounds in it."""

import decision_bench
import numpy as np
import pytest
from decision_levers import compare
from decision_world import REGIMES, Cell, Levers
from wattlock_simulator.physics import Architecture, Phase, Product, Workload, operating_point

LONG = next(regime for regime in REGIMES if regime.name == "long context")
DEEP = next(regime for regime in REGIMES if regime.name == "deep in the power cap")


@pytest.mark.parametrize("cap_mhz", [None, 1900, 1590, 700])
@pytest.mark.parametrize("limit_watts", [700.0, 520.0, 300.0])
def test_the_world_of_the_bench_is_the_simulators(cap_mhz, limit_watts):
    cell = Cell(Product.H200, Architecture.GQA, LONG)
    grid = cell.physics.grid[::8]
    watts, seconds, clock = cell.physics.tables(grid, np.ones_like(grid)).under(cap_mhz, limit_watts)
    for row, log_batch in enumerate(grid):
        work = Workload(cell.architecture, Phase.DECODE, float(np.exp(log_batch)), LONG.context)
        point = operating_point(cell.product, work, cap_mhz, limit_watts)
        found = (watts[row], seconds[row], clock[row])
        assert found == pytest.approx((point.watts, point.step_seconds, point.clock_mhz), rel=1e-6)


def test_the_oracle_is_within_the_guardrail_and_nobody_within_it_saves_more():
    cell = Cell(Product.H200, Architecture.MAMBA2, LONG)
    levers = Levers(cell, epochs=10)
    found = compare(cell, levers)
    assert found.oracle.within
    below = levers.effect(found.oracle_mhz - 15)
    assert not below.within or below.saving <= found.oracle.saving
    assert found.oracle.saving > found.power.saving > found.published.saving > 10
    assert found.power_at(found.oracle.throughput) < found.oracle.saving
    # A cap that costs as much throughput saves what the best one does, or less.
    assert found.power_at(found.power.throughput) == pytest.approx(found.power.saving, abs=0.2)


def test_one_cell_with_a_saving_and_one_without():
    rows = [
        decision_bench.work(Cell(Product.H100, Architecture.GATED_DELTA_NET, LONG), 1),
        decision_bench.work(Cell(Product.H200, Architecture.GQA, DEEP), 1),
    ]
    assert decision_bench.failures_of(rows) == []
    assert rows[0].alternatives.exists
    assert not rows[1].alternatives.exists
