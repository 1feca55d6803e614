"""What comes to the loop from its threads."""

from dataclasses import dataclass

from wattlock_agent import kube
from wattlock_agent.holders.base import Holders
from wattlock_agent.orders import InstanceKey
from wattlock_agent.serving.base import ScrapeFailure, ServingCounters


@dataclass(frozen=True)
class HoldersSeen:
    """The kubelet answered, or did not."""

    asked_at_seconds: float
    """Monotonic time of the question."""
    holders: Holders | None
    problem: str = ""


@dataclass(frozen=True)
class ScrapeDone:
    """A metrics page was read, or not."""

    instance: InstanceKey
    url: str
    result: ServingCounters | ScrapeFailure
    took_seconds: float


@dataclass(frozen=True)
class ThreadFailed:
    """A thread ended by an exception that nobody expected."""

    error: BaseException


Event = kube.Event | HoldersSeen | ScrapeDone | ThreadFailed
