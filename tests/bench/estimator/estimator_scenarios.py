"""The scenarios that the estimator is judged by, and what is fixed in advance for each."""

from dataclasses import dataclass, replace

from estimator_world import Scenario

#: Coverage must lie between these, in percent.
LOWEST, HIGHEST = 93.0, 97.0
#: False verdicts at no effect, in percent.
MOST_FALSE = 5.0
#: Looks in hours after the beginning, fixed in advance: 6, 24, 72 and 144 pairs of each instance by default.
HOURS = (1.0, 4.0, 12.0, 24.0)

#: Load of a service with ordinary traffic: the running batch wanders by 15 % over ten minutes, and by 10 % within one.
BUSY = Scenario("busy", fast=0.1, slow=0.15)


@dataclass(frozen=True)
class Case:
    """A scenario and how it is judged."""

    scenario: Scenario
    pools: int = 2000
    hours: tuple[float, ...] = HOURS
    wide: str = ""
    """Why its intervals may be too wide: then only the lower bound of the coverage holds."""


def _busy(name: str, **changes: object) -> Scenario:
    return replace(BUSY, name=name, **changes)  # type: ignore[arg-type]


STEADY = Scenario("steady load")
SWING = _busy("daily swing x4", batch=24.0, slow=0.2, swing=4.0)
BURSTS = _busy("bursts x3 of 15 s", bursts=0.08)
ONE = _busy("one instance", instances=1)
MANY = _busy("64 instances", instances=64)
SICK = _busy("sick: one of 8 throttles", instances=8, throttling=1)
NOISY = _busy("noisy sensor, 5 %", sensor=0.05)
SHARED = _busy("correlated load", shared=0.35, shared_fast=0.2)
BEAT = _busy("every other epoch busier", beat=0.3)
NONE = _busy("true effect zero", effect="none")
COSTS = _busy("true effect -5 %", effect="costs")
DIFFER = _busy("effects differ by 4 points", differ=0.04)
UNEVEN = _busy("instances join over the day", uneven=True)
QUICK = _busy("20 s epochs, half released", instances=6, epoch_seconds=20, control_share=0.5)
STALLS = _busy("rare stalls of one of 8", instances=8, stalling=1)
LIMIT = _busy("daily swing into power limit", batch=32.0, slow=0.2, swing=4.0)

COVERAGE = (
    Case(STEADY),
    Case(SWING),
    Case(BURSTS),
    Case(ONE),
    Case(_busy("two instances", instances=2)),
    Case(_busy("three instances", instances=3)),
    Case(_busy("four instances")),
    Case(_busy("eight instances", instances=8)),
    Case(MANY, pools=1000),
    Case(SICK),
    Case(NOISY),
    Case(SHARED),
    Case(BEAT),
    Case(NONE),
    Case(COSTS),
    Case(DIFFER),
    Case(UNEVEN),
    Case(replace(QUICK, hours=1), hours=(0.1, 0.25, 0.5, 1.0)),
    Case(STALLS, wide="few pairs with heavy tails"),
    Case(LIMIT, wide="the effect itself moves from pair to pair"),
)

#: The cap does nothing, under every kind of load and noise.
WATCH = tuple(
    replace(scenario, effect="none")
    for scenario in (
        *(
            STEADY,
            SWING,
            BURSTS,
            ONE,
            replace(ONE, name="two instances", instances=2),
            BUSY,
            MANY,
            SICK,
            NOISY,
            SHARED,
            BEAT,
        ),
        *(UNEVEN, QUICK, STALLS),
    )
)
WATCHED_POOLS = 1000
#: Pods are replaced after an hour on average: six pairs each by default.
CHURN = replace(BUSY, name="pods live for an hour", effect="none")
CHURN_LIFE_SECONDS = 3600.0

#: Where the instance as the unit goes wrong: few, unlike, or unequal.
COMPARED = (
    *(_busy(f"{count} instances", instances=count) for count in (2, 3, 4, 8)),
    *(DIFFER, SICK, UNEVEN),
)
COMPARED_POOLS = 1000
COMPARED_HOUR = 4.0

#: Of which the plot shows the half-width.
PLOTTED = (STEADY, BUSY, SWING, BURSTS, SHARED, NOISY)
PLOTTED_POOLS = 500
PLOTTED_HOURS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
EVERY_LOOK = (STEADY, BUSY)
EVERY_LOOK_HOURS = tuple(float(hour) for hour in range(1, 25))
EVERY_LOOK_POOLS = 1000
