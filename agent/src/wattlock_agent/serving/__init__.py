"""Metrics of the serving engines."""
