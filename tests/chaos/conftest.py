"""One cluster under test for all of this folder: Wattlock with serving pods of every kind, as ``make chaos`` has it."""

from collections.abc import Iterator

import pytest
from chaos.engine import Engine
from chaos.recorder import Recorder
from chaos.site import Site


@pytest.fixture(scope="session")
def site(kubeconfig: str) -> Iterator[Site]:
    site = Site()
    site.prepare()
    yield site
    site.take_down()


@pytest.fixture(scope="session")
def engine(site: Site) -> Iterator[Engine]:
    recorder = Recorder(site)
    recorder.start()
    engine = Engine(site, recorder)
    engine.settle(120)
    yield engine
    recorder.stop()
