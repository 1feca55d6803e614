"""The guardrail's cool-down: it outlives the order that it began under, and the operator's tuner waits for it."""

import pytest
from wattlock_agent.report import build_status
from wattlock_operator.tuning.model import Goal, Observation, Outcome, Phase, Regime, Trial, Tuning
from wattlock_operator.tuning.step import step

COOLDOWN_SECONDS = 600
BOUNDS = {"maxInterTokenLatencyMs": 50, "cooldownSeconds": COOLDOWN_SECONDS}
RELEASED = {"capMHz": None, "hold": {"reason": "NoPrefillPeer", "message": "no ready prefill pod"}}


class TrippedNode:
    """A node whose only instance has just tripped under 1600 MHz, by a burst of load that is over."""

    def __init__(self, make_node, make_order):
        self.node, self._make_order, self._generation = make_node(gpus=1), make_order, 0
        self.order()
        self.node.run(21)
        assert self.node.locked() == {"GPU-0"}
        self.node.latency_seconds = 0.080
        while not self.told.guardrail_tripped:
            self.node.run(1)
        assert self.node.reasons()["GPU-0"] == "Guardrail"
        self.node.latency_seconds = 0.010
        self.end_seconds = self.node.now_seconds + COOLDOWN_SECONDS

    def order(self, **changes):
        self._generation += 1
        self.node.order(self._make_order(**{"guardrail": BOUNDS} | changes), generation=self._generation)
        return self

    def run(self, seconds):
        self.node.run(seconds)
        return self

    def restart(self):
        node = self.node
        node.start(build_status(node.agent.outlook, node.agent.tracks, node.agent.instances, "1", "a", False).to_api())
        self.end_seconds = node.now_seconds + COOLDOWN_SECONDS  # when it began is not known to the new agent
        return self

    @property
    def told(self):
        (instance,) = self.node.agent.instances.values()
        return instance.status(self.node.now_seconds, None)

    @property
    def stands(self):
        """Whether the cool-down is told, and whether it is told that the cap was withdrawn since."""
        return self.told.guardrail_tripped, self.told.guardrail_withdrawn


@pytest.fixture
def tripped(make_node, make_order):
    return TrippedNode(make_node, make_order)


@pytest.mark.parametrize("away", [RELEASED, {"mode": "Observe", "capMHz": None}], ids=["held", "observe"])
def test_a_cap_that_is_withdrawn_for_a_moment_does_not_end_the_cool_down(tripped, away):
    assert tripped.stands == (True, False)
    tripped.order(**away).run(10)
    assert tripped.stands == (True, True)
    assert "80.0 ms" in tripped.told.guardrail_message
    assert tripped.node.reasons()["GPU-0"] == ("NoPrefillPeer" if away is RELEASED else "ObserveMode")
    tripped.order().run(tripped.end_seconds - tripped.node.now_seconds - 15)
    assert tripped.node.locked() == set()
    assert (tripped.node.reasons()["GPU-0"], tripped.stands) == ("Guardrail", (True, True))
    tripped.run(40)
    assert tripped.node.locked() == {"GPU-0"}
    assert (tripped.stands, tripped.told.guardrail_trips) == ((False, False), 1)


def test_without_a_cap_the_cool_down_ends_as_well(tripped):
    tripped.order(**RELEASED).run(COOLDOWN_SECONDS + 1)
    assert tripped.stands == (False, False)
    assert tripped.told.guardrail_message == ""


def test_a_breach_after_a_withdrawn_cap_came_back_is_one_of_the_present_order_and_a_relapse(tripped):
    tripped.order(**RELEASED).run(10)
    tripped.order().run(COOLDOWN_SECONDS + 30)
    assert tripped.node.locked() == {"GPU-0"}
    tripped.node.latency_seconds = 0.080
    tripped.run(30)
    assert tripped.stands == (True, False)
    assert f"released for {2 * COOLDOWN_SECONDS} s" in tripped.told.guardrail_message


@pytest.mark.parametrize("before", [{}, RELEASED], ids=["at once", "after a while without a cap"])
@pytest.mark.parametrize("other", [{"capMHz": 1700}, {"guardrail": BOUNDS | {"maxInterTokenLatencyMs": 90}}])
def test_another_cap_and_other_bounds_are_tried_at_once(tripped, before, other):
    tripped.order(**before).run(10)
    tripped.order(**other).run(30)
    assert tripped.node.locked() == {"GPU-0"}
    assert (tripped.stands, tripped.told.guardrail_trips) == ((False, False), 1)


def test_other_bounds_end_the_cool_down_without_a_cap_as_well(tripped):
    """A tuner gives no cap before it: the pool would wait for a cool-down of bounds that nobody asks for any more."""
    tripped.order(**RELEASED).run(10)
    tripped.order(**RELEASED, guardrail=BOUNDS | {"maxInterTokenLatencyMs": 90}).run(10)
    assert tripped.stands == (False, False)


def test_only_the_cool_down_outlives_the_cap(make_node, make_order):
    """A slow window of an hour ago and one of now are not two in a row."""
    node = make_node(gpus=1)
    node.order(make_order(guardrail=BOUNDS))
    node.run(21)
    (instance,) = node.agent.instances.values()
    node.latency_seconds = 0.080
    while not instance._guardrail.suspicious:
        node.run(1)
    node.order(make_order(guardrail=BOUNDS, capMHz=None), generation=2)
    node.run(3600)
    assert not instance._guardrail.suspicious


@pytest.mark.parametrize("ordered", [{}, RELEASED], ids=["capped", "held"])
def test_a_restarted_agent_goes_on_with_the_cool_down(tripped, ordered):
    tripped.order(**ordered).run(10).restart().run(20)
    assert tripped.stands == (True, ordered is RELEASED)
    tripped.order().run(tripped.end_seconds - tripped.node.now_seconds - 15)
    assert (tripped.node.locked(), tripped.stands) == (set(), (True, ordered is RELEASED))
    tripped.run(40)
    assert tripped.node.locked() == {"GPU-0"}


def test_a_tuner_keeps_the_pool_released_until_the_cool_down_is_over(tripped):
    """Operator and agent together: one burst of load ends one arm, not one arm after the other."""
    regime = Regime(16, 0.02, "k")
    clocks = tuple(range(1980, 344, -15))
    state = Tuning(
        phase=Phase.SEARCHING,
        since_seconds=0.0,
        looked_seconds=0.0,
        began_seconds=0.0,
        searches=1,
        trials=(Trial(1600),),
        current_mhz=1600,
        top_mhz=1980,
        regime=regime,
    )
    while tripped.node.now_seconds < tripped.end_seconds + 60:
        seen = Observation(
            tripped.node.now_seconds, 1, {}, int(tripped.told.guardrail_tripped), regime, 1980, supported_mhz=clocks
        )
        state = step(state, Goal(), seen)
        # As the agent's clock counts: the last look at which it held the instance.
        assert (state.cap_mhz is None) is (tripped.node.now_seconds < tripped.end_seconds)
        tripped.order(capMHz=state.cap_mhz).run(15)
    assert [(trial.cap_mhz > 1600, trial.outcome) for trial in state.trials] == [
        (False, Outcome.BREACH),
        (True, Outcome.OPEN),
    ]
    assert state.guardrail_arms == 1
    assert tripped.node.locked() == {"GPU-0"}


def test_an_instance_that_returns_is_not_held_longer_than_its_cool_down(make_node, make_order):
    node = make_node(gpus=1)
    order = make_order(guardrail={"maxInterTokenLatencyMs": 50, "cooldownSeconds": 600})
    node.order(order)
    node.run(30)
    node.latency_seconds = 0.080
    node.run(15)
    assert node.reasons() == {"GPU-0": "Guardrail"}
    node.latency_seconds = 0.010
    for generation in range(2, 14, 2):  # its pod is replaced again and again
        node.order(generation=generation)
        node.run(5)
        node.order(order, generation=generation + 1)
        node.run(45)
        assert node.locked() == set(), "the cool-down goes on"
    node.run(360)
    assert node.locked() == {"GPU-0"}
    node.order(generation=20)
    node.run(1200)
    node.order(order, generation=21)
    node.run(30)
    assert node.locked() == {"GPU-0"}
