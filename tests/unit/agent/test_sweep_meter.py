"""One window: energy and tokens between the same two moments, and no number from what is no measurement."""

import pytest
from wattlock_agent.gpu.base import GpuReading, LimiterNanoseconds
from wattlock_agent.sweep.endpoint import EndpointError, Tokens
from wattlock_agent.sweep.meter import Edge, Meter, MeterError, combine


def reading(at, joules, uuid="GPU-0", mhz=1980, cap_ns=0, busy=100):
    return GpuReading(
        uuid=uuid,
        at_seconds=at,
        energy_mj=None if joules is None else round(1000 * joules),
        power_instant_mw=None,
        power_limit_mw=None,
        sm_mhz=mhz,
        memory_mhz=None,
        temperature_c=50,
        utilization_percent=busy,
        event_reasons=None,
        limiters=LimiterNanoseconds(power_cap=cap_ns),
    )


def test_power_is_summed_over_gpus_and_each_by_its_own_times():
    before = Edge((reading(0, 0), reading(1, 0, "GPU-1")), Tokens(0, 100, 10))
    after = Edge((reading(10, 5000, cap_ns=5_000_000_000), reading(12, 3300, "GPU-1")), Tokens(20, 8100, 2010))
    samples = [reading(5, 0, mhz=1800), reading(5, 0, mhz=1500), reading(6, 0, mhz=1600)]
    found = combine(before, after, samples)
    assert found.watts == pytest.approx(500 + 300)
    assert (found.generated_per_second, found.prompt_per_second) == (400, 100)
    assert found.observed_mhz == 1600
    assert found.cap_share == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (reading(0, None), reading(10, None), "no energy counter"),
        (reading(0, 100), reading(10, 50), "driver was reloaded"),
        (reading(0, 100), reading(0, 150), "driver was reloaded"),
    ],
)
def test_what_cannot_be_measured_is_no_number(old, new, sentence):
    with pytest.raises(MeterError, match=sentence):
        combine(Edge((old,), Tokens(0, 0, 0)), Edge((new,), Tokens(10, 1, 1)), [reading(5, 0)])


def test_gpus_that_did_nothing_are_the_wrong_ones():
    edges = Edge((reading(0, 0),), Tokens(0, 0, 0)), Edge((reading(10, 1000),), Tokens(10, 1, 1))
    with pytest.raises(MeterError, match="--gpus"):
        combine(*edges, [reading(5, 0, busy=0)])
    assert combine(*edges, [reading(5, 0, busy=0), reading(5, 0, busy=1)]).watts == 100


class Bench:
    """A GPU of 500 W whose counter moves every 100 ms, an endpoint of 1000 tokens/s, and their clock."""

    def __init__(self):
        self.now = 0.0
        self.slow = []
        """How long the next answers of the endpoint take, in s."""

    def pause(self, seconds):
        self.now += seconds

    def read(self, uuid=None):
        if uuid is None:
            took = self.slow.pop(0) if self.slow else 0.002
            at, self.now = self.now, self.now + took  # counted at once, told late
            return Tokens(at + took / 2, 1000 * at, 0.0, took)
        self.now += 0.004
        return reading(self.now, 500 * (int(self.now * 10) / 10))


def test_windows_begin_and_end_with_a_refresh_of_the_sensors():
    """Else a window of 2 s would be wrong by up to 5 %."""
    bench = Bench()
    meter = Meter(bench, ["GPU-0"], bench, bench.pause, lambda: bench.now)
    for start, seconds in ((0.0, 2.0), (0.013, 2.03), (0.077, 2.05), (0.05, 2.08)):
        bench.now = 10 + start
        found = meter.measure(seconds)
        assert found.watts == pytest.approx(500, rel=0.01)
        assert found.generated_per_second == pytest.approx(1000, rel=0.002)
        assert found.seconds >= seconds


def test_an_answer_that_comes_too_late_is_asked_for_again():
    """A page that is told 3 s late would put 3000 tokens onto the wrong side."""
    bench = Bench()
    meter = Meter(bench, ["GPU-0"], bench, bench.pause, lambda: bench.now)
    bench.slow = [3.0, 0.5, 0.002]
    found = meter.measure(2.0)
    assert found.generated_per_second == pytest.approx(1000, rel=0.01)
    bench.slow = [3.0] * 99
    with pytest.raises(EndpointError, match="--window-seconds"):
        meter.measure(2.0)
