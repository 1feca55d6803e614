"""``wattlock-agent sweep``: measures what SM clocks and power limits do to a live serving endpoint, then undoes all.

A tool for people, apart from the agent: the agent never imports it. It is the only part of Wattlock that changes power
limits. ``plan``, ``estimates``, ``findings`` and ``report`` are pure; the rest is the shell.
"""
