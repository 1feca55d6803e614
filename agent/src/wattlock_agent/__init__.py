"""Wattlock's node agent: decides whether an order may be applied now, applies it, measures and undoes it."""
