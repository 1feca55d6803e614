"""How a Prometheus metric is declared: the pages, the table in docs/metrics.md and the tests all read these."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricSpec:
    """A metric of the operator or of the agent.

    Names follow https://prometheus.io/docs/practices/naming: base units, ``_total`` on counters alone, ``_info`` on
    gauges that are always 1.
    """

    name: str
    """As on the page."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """Unit for people; empty for plain numbers."""
    help: str
    """One sentence, without a full stop where it stands alone in a table."""
    labels: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Name of the family, as client libraries count it: without ``_total``."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name
