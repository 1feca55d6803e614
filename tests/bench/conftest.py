"""Fixtures of the benchmarks."""

from installed import install, serving_pods, shared_workload, simulator, wattlock, workload

__all__ = ["install", "serving_pods", "shared_workload", "simulator", "wattlock", "workload"]
