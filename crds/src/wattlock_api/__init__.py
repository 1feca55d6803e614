"""Wattlock's API group ``wattlock.dev``: the contract between people, operator and agents."""
