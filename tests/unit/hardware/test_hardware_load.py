"""Which batch the load runs, and what its phase is called. PyTorch is not here, so a stand-in is imported."""

import sys
from unittest.mock import MagicMock

import pytest
from measure import Step, _run_phase

GB = 10**9
BATCHES = (128, 112, 96, 64, 48)


@pytest.fixture
def load(monkeypatch):
    for name in ("torch", "torch.nn", "torch.nn.functional"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.delitem(sys.modules, "load", raising=False)
    import load

    yield load
    del sys.modules["load"]


@pytest.mark.parametrize(
    ("free_gb", "batch"),
    [(142 - 8, 128), (85 - 8, 112), (80, 128), (79, 112), (60, 64), (32, 48), (31, None), (0, None)],
)
def test_the_largest_batch_that_fits_with_room_to_spare_is_run(load, free_gb, batch):
    assert load.fitting_batch(BATCHES, 4096, 36, free_gb * GB) == batch


class Answers:
    def __init__(self, answer):
        self._answer, self.ordered = answer, []

    def order(self, command):
        self.ordered.append(command)

    def answer(self):
        return self._answer


STEP = Step("decode B{batch} L4096", "decode", "decode decode {batches} 4096 {seconds}", 45.0, BATCHES)


def test_a_phase_is_named_by_the_batch_that_ran():
    note = "batch 128 does not fit into the GPU's memory"
    answers = Answers({"tokensPerStep": 96, "progress": [[10.0, 0], [55.0, 900]], "note": note})
    phase = _run_phase(STEP, answers)
    assert answers.ordered == ["decode decode 128,112,96,64,48 4096 45.0"]
    assert (phase.name, phase.tokens_per_step, phase.note) == ("decode B96 L4096", 96, note)
    assert (phase.began_seconds, phase.ended_seconds) == (10.0, 55.0)


def test_a_phase_that_does_not_fit_is_named_by_the_smallest_batch_that_was_tried():
    phase = _run_phase(STEP, Answers({"error": "does not fit into the GPU's memory"}))
    assert (phase.name, phase.note, phase.progress) == ("decode B48 L4096", "does not fit into the GPU's memory", [])
