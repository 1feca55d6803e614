"""Faults done to a whole cluster with simulated GPUs, and what must be true after each.

``truth`` holds the promises (pure), ``recorder`` watches the driver from outside, ``faults_*`` are the catalogue,
``engine`` does one step, ``run`` is the command (``make chaos``). tests/e2e/test_restores.py goes through them all.
"""
