"""Fixtures of the benchmarks."""

from installed import install, simulator, wattlock, workload

__all__ = ["install", "simulator", "wattlock", "workload"]
