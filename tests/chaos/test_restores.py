"""Faults of the catalogue, each once. ``make chaos`` does them all, in random sequences."""

import zlib

import pytest
from chaos.catalogue import CATALOGUE
from chaos.engine import Engine, Step

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.mark.parametrize("name", [fault.name for fault in CATALOGUE.values() if fault.in_tests])
def test_every_lock_is_undone_and_every_wanted_one_is_back(engine: Engine, name: str) -> None:
    result = engine.do(Step(zlib.crc32(name.encode()), 1, (CATALOGUE[name],)))
    assert not result.problems, "\n".join(result.problems)
