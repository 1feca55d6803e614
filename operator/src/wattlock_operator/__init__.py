"""Wattlock's operator: decides what clock each pool should have. It never talks to a GPU."""
