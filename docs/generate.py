"""Generates docs/metrics.md from the declarations in the code: ``python docs/generate.py [--check]``."""

import argparse
import sys
from pathlib import Path

from wattlock_agent import metric_specs as agent
from wattlock_api.metricspec import MetricSpec
from wattlock_operator import metric_specs as operator

PAGE = Path(__file__).resolve().with_name("metrics.md")

_HEAD = """\
<!-- Generated from operator/src/wattlock_operator/metric_specs.py and agent/src/wattlock_agent/metric_specs.py by
     "make generate". Do not edit. -->

# Metrics

Operator and agents serve Prometheus metrics at `/metrics`. Names follow Prometheus' own
[practices](https://prometheus.io/docs/practices/naming): base units, `_total` on counters alone. A value that was not
measured has no sample: an absent series is unknown, never zero. Energy and power are those of the GPU boards alone.

Series are bounded. The operator has a fixed number for each policy and pool, and none for pods or GPUs; the agent has
them for at most 32 GPUs and 256 serving instances of its node. When a pod, policy or GPU goes, its series go with the
next scrape; counters with a `pod` label begin anew with the next holder of the GPU.

With a scrape configuration of your own set `honor_labels: true`, as the chart's PodMonitors do: else Prometheus puts
the namespace and pod of whoever is scraped in the place of ours, which become `exported_namespace` and `exported_pod`.
"""

_OPERATOR = """\
## Operator

`namespace`, `policy`, `pool` and `role` name a pool of an `EnergyPolicy`. Each number that was estimated comes with the
ends of its 95 % interval, as series that end in `_low` and `_high`.
"""

_AGENT = """\
## Agent

`gpu` is the GPU's UUID. `namespace`, `pod`, `policy` and `pool` are those of the pod that holds it, empty where no
policy selects one. `serving_instance` is the unit that serves tokens: a pod, or a group of pods.
"""


def table(specs: tuple[MetricSpec, ...]) -> str:
    """Return the metrics as a Markdown table."""
    rows = ["| metric | type | labels | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for spec in specs:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        rows.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.unit} | {spec.help} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """Return the page."""
    return "\n".join((_HEAD, _OPERATOR, table(operator.SPECS), _AGENT, table(agent.SPECS)))


def main(arguments: list[str] | None = None, path: Path = PAGE) -> int:
    """Write the page, or with --check tell whether it is out of date."""
    parser = argparse.ArgumentParser(prog="python docs/generate.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when the page is out of date")
    options = parser.parse_args(arguments)
    text = page()
    if path.exists() and path.read_text() == text:
        return 0
    if options.check:
        sys.stderr.write(f"out of date, run 'make generate': {path.parent.name}/{path.name}\n")
        return 1
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
