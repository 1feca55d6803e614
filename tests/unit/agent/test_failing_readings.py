"""GPUs that cannot be read, or are not listed by the driver, though their locks can be undone."""

import pytest
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.journal import LockRecord, NoJournal

GUARDRAIL = {"maxInterTokenLatencyMs": 50, "cooldownSeconds": 600}


@pytest.fixture
def silent(make_node, make_order):
    """Two locked GPUs of two pods; the readings of the first fail from now on, the other calls of the driver do not."""
    node = make_node(gpus=2)
    node.order(make_order(guardrail=GUARDRAIL, idle={"afterSeconds": 10}), make_order("decode-1"))
    node.run(10)
    assert node.locked() == {"GPU-0", "GPU-1"}
    node.driver.faults["GPU-0"] = GpuFault.TRANSIENT
    return node


def test_one_whose_readings_fail_is_released_and_says_so(silent):
    silent.run(10)
    assert silent.locked() == {"GPU-1"}
    assert silent.reasons()["GPU-0"] == "NVMLError"
    assert set(silent.journal.disk) == {"GPU-1"}


def test_a_failing_reset_of_it_is_tried_again_and_nothing_is_settled_before(silent):
    silent.driver.faults["reset"] = GpuFault.TRANSIENT
    silent.order(generation=2)
    silent.run(20)
    assert silent.agent.outlook.settled_generation < 2
    del silent.driver.faults["reset"]
    silent.run(10)
    assert silent.locked() == set()
    assert silent.agent.outlook.settled_generation == 2


def test_the_lower_cap_of_an_idle_one_goes(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order(idle={"afterSeconds": 10}))
    node.rest()
    node.run(30, 0.25)
    assert node.driver.locks == {"GPU-0": (345, 345)}
    node.driver.faults["GPU-0"] = GpuFault.TRANSIENT
    node.run(20, 0.25)
    assert node.locked() == set()


def test_one_that_is_lost_is_left_to_its_reset_and_holds_nothing_up(make_node, make_order):
    node = make_node(gpus=1)
    node.order(make_order())
    node.run(10)
    node.driver.faults |= {"GPU-0": GpuFault.GPU_LOST, "reset": GpuFault.GPU_LOST}
    node.order(generation=2)
    node.run(20)
    assert node.agent.outlook.settled_generation == 2
    assert set(node.journal.disk) == {"GPU-0"}


# --- not listed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unlisted(make_node, make_order):
    """Two locked GPUs, of which the driver lists one at its next listing."""
    node = make_node(gpus=2)
    node.order(make_order(), make_order("decode-1"))
    node.run(10)
    node.listed = list(node.driver.gpus)
    node.driver.gpus = node.driver.gpus[:1]
    return node


def test_one_that_is_not_listed_any_more_is_released_and_locked_again_when_it_is(unlisted):
    unlisted.run(70)
    assert unlisted.locked() == {"GPU-0"}
    assert set(unlisted.journal.disk) == {"GPU-0"}
    unlisted.driver.gpus = unlisted.listed
    unlisted.run(70)
    assert unlisted.locked() == {"GPU-0", "GPU-1"}


@pytest.mark.parametrize(
    ("fault", "settled"),
    [
        (GpuFault.TRANSIENT, False),  # the lock may stand
        (GpuFault.GPU_LOST, True),  # it comes back without it
    ],
)
def test_while_it_cannot_be_reset_nothing_is_settled_unless_it_is_lost(unlisted, fault, settled):
    unlisted.driver.faults["reset"] = fault
    unlisted.run(70)
    unlisted.order(*unlisted.agent.outlook.world.orders.orders[:1], generation=2)
    unlisted.run(10)
    assert (unlisted.agent.outlook.settled_generation == 2) is settled
    assert set(unlisted.journal.disk) == {"GPU-0", "GPU-1"}
    del unlisted.driver.faults["reset"]
    unlisted.run(10)
    assert unlisted.locked() == {"GPU-0"}
    assert unlisted.agent.outlook.settled_generation == 2


def test_a_journal_that_cannot_be_opened_confirms_nothing(make_node):
    node = make_node(gpus=1)
    node.journal.disk["GPU-0"] = LockRecord("GPU-0", 1200, "policy-1", "uid-decode-0", "boot-1", "")
    node.driver.locks["GPU-0"] = (345, 1200)
    node.agent.open_journal(NoJournal("input/output error"))
    node.order(generation=5)
    node.run(60)
    assert node.agent.outlook.settled_generation < 5
    node.agent.open_journal(node.journal)
    node.run(40)
    assert node.locked() == set()
    assert node.agent.outlook.settled_generation == 5


def test_a_journal_that_opens_late_confirms_nothing_before_gpus_that_are_not_listed_were_looked_at(make_node):
    node = make_node(gpus=1)
    node.journal.disk["GPU-9"] = LockRecord("GPU-9", 1200, "policy-1", "uid", "boot-1", "")
    node.driver.locks["GPU-9"] = (345, 1200)
    node.driver.faults["reset"] = GpuFault.TRANSIENT
    node.agent.open_journal(NoJournal("input/output error"))
    node.order(generation=5)
    node.run(40)
    node.agent.open_journal(node.journal)
    node.run(1, 0.25)
    node.run(20)
    assert node.agent.outlook.settled_generation < 5
    del node.driver.faults["reset"]
    node.run(10)
    assert node.locked() == set()
    assert node.agent.outlook.settled_generation == 5
