"""Pods that go and come back under the same name: agent and operator together count what was measured once.

An agent knows an instance by its name and an operator that restarted knows sums of pods that are gone without names.
So sums that were told as gone must not be told again.
"""

import pytest
from wattlock_agent.holders.base import PodName
from wattlock_agent.report import build_status
from wattlock_agent.roster import PARTED_SECONDS
from wattlock_operator import accounting, ledger
from wattlock_operator.reports import NodeInstance, PoolReport


class Operator:
    """Counts the pairs and joules of a pool; a restarted one has the policy's status alone."""

    def __init__(self):
        self.ledger, self.account = ledger.Ledger(), accounting.Account()
        self.report = PoolReport()

    def look(self, node):
        agent = node.agent
        status = build_status(agent.outlook, agent.tracks, agent.instances, "1", "agent", False, agent.parted)
        told = {each.instance: each for each in status.instances}
        self.report = PoolReport(instances=tuple(NodeInstance("n1", each, False) for each in status.instances))
        self.ledger = ledger.advance(self.ledger, self.report)
        self.account = accounting.advance(self.account, self.report, None)
        return told.get("a")

    def restart(self):
        counted = accounting.counted_joules(self.report)
        sums = accounting.Sums(self.account.energy_joules, self.account.saved, counted)
        self.ledger = ledger.opening(ledger.published(self.ledger.departed))
        self.account = accounting.opening(self.report, sums, None)

    @property
    def pairs(self):
        everything = [*self.ledger.present.values(), self.ledger.departed]
        return sum(tally.pairs for tallies in everything for tally in tallies.values())


def pairs_of(told):
    return sum(stats.pairs for stats in told.pair_stats)


@pytest.mark.parametrize("away_seconds", [5, PARTED_SECONDS - 2, PARTED_SECONDS + 5, 600])
@pytest.mark.parametrize("restarts", ["never", "while it is away", "when it is back"])
@pytest.mark.parametrize("agent_restarts", [False, True])
def test_a_pod_that_comes_back_is_counted_once(
    make_node, make_order, switchback, away_seconds, restarts, agent_restarts
):
    node, operator = make_node(gpus=1), Operator()
    orders = (make_order("a", experiment=switchback), make_order("b", experiment=switchback))

    def run(seconds):
        for _ in range(int(seconds)):
            node.run(1)
            told = operator.look(node)
        return told

    node.order(*orders)
    node.pods = {"GPU-0": (PodName("llm", "a"),)}
    run(400)
    node.order(orders[1], generation=2)
    node.pods = {}
    before = run(1)
    if agent_restarts:
        agent = node.agent
        node.start(
            build_status(agent.outlook, agent.tracks, agent.instances, "1", "agent", False, agent.parted).to_api()
        )
    run(away_seconds - 1)
    if restarts == "while it is away":
        operator.restart()
    node.order(*orders, generation=3)
    node.pods = {"GPU-0": (PodName("llm", "a"),)}
    back = run(1)
    if restarts == "when it is back":
        operator.restart()
    after = run(400)
    assert pairs_of(before) >= 3
    assert pairs_of(after) >= pairs_of(back) + 3
    assert operator.pairs == pairs_of(before) + pairs_of(after) - pairs_of(back)
    joules, since, now = (float(each.energy_joules) for each in (before, back, after))
    assert operator.account.energy_joules == pytest.approx(joules + now - since, abs=1000)  # two seconds
