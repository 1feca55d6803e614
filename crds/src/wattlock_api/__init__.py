"""Wattlock's API group ``wattlock.dev``: the contract between people, operator and agents.

The custom resource definitions in ``crds/*.yaml`` are generated from these models
(``python -m wattlock_api.generate``), and operator and agent read and write the
resources through them, so there is one place where a field is named and described.
"""
