"""Each fault of the catalogue once, and what it must not leave behind. ``make chaos`` does them in random sequences."""

import zlib
from collections.abc import Iterator

import pytest
from chaos.catalogue import CATALOGUE
from chaos.engine import Engine, Step
from chaos.recorder import Recorder
from chaos.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def engine(kubeconfig: str) -> Iterator[Engine]:
    site = Site()
    site.prepare()
    recorder = Recorder(site)
    recorder.start()
    engine = Engine(site, recorder)
    engine.settle(120)
    yield engine
    recorder.stop()
    site.take_down()


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_lock_is_undone_and_every_wanted_one_is_back(engine: Engine, name: str) -> None:
    result = engine.do(Step(zlib.crc32(name.encode()), 1, (CATALOGUE[name],)))
    assert not result.problems, "\n".join(result.problems)
