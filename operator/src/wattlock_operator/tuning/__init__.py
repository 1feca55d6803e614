"""Finds the clock of a Decode pool by sequential experiments; see docs/tuning.md. Pure."""
