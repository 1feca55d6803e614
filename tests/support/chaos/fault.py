"""What a fault is: a function that does it, waits as it says, and ends it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from chaos.site import Site


@dataclass(frozen=True)
class Hold:
    """The fault lasts so long. Meanwhile nothing is checked but that no wrong GPU is locked."""

    seconds: float


@dataclass(frozen=True)
class Settled:
    """While the fault lasts, the driver must come to have what the orders that live want."""


@dataclass(frozen=True)
class Released:
    """While the fault lasts, every GPU of these nodes must be released: nobody may follow the orders any longer."""

    nodes: frozenset[str]
    within_seconds: float = 60.0


Stage = Hold | Settled | Released
Doing = Callable[[Site, Random], Iterator[Stage]]


@dataclass(frozen=True)
class Fault:
    """An entry of the catalogue."""

    name: str
    text: str
    """What happens, and what it should cause."""
    do: Doing
    touches: frozenset[str]
    """What it takes hold of: two faults that share nothing may happen at once."""
    weight: float
    """How often, against others; 1 is usual, slow ones are rarer."""
    in_tests: bool = True
    """Whether ``make test`` does it, too. Left out is what others there do as well."""


CATALOGUE: dict[str, Fault] = {}


def fault(name: str, touches: str, weight: float = 1.0, *, in_tests: bool = True) -> Callable[[Doing], Doing]:
    """Enter a function into the catalogue; its docstring says what happens. It leaves nothing of the fault behind."""

    def enter(do: Doing) -> Doing:
        text = " ".join((do.__doc__ or "").split())
        CATALOGUE[name] = Fault(name, text, do, frozenset(touches.split()), weight, in_tests)
        return do

    return enter


def some_node(site: Site, rng: Random) -> str:
    """Draw a node."""
    return rng.choice(sorted(site.nodes))
