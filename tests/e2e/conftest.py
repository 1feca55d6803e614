"""Fixtures of the end-to-end tier."""

from installed import install, no_crash_loop, serving_pods, shared_workload, simulator, wattlock, workload

__all__ = ["install", "no_crash_loop", "serving_pods", "shared_workload", "simulator", "wattlock", "workload"]
