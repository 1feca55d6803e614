"""The control plane and the operator."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from chaos.fault import Hold, Released, Stage, fault
from chaos.nodes import api_server_pids, pids_of_container, signal_all
from chaos.site import STALE_SECONDS, Site, until


@contextmanager
def api_server_stopped(site: Site) -> Iterator[None]:
    """Stop the API server's process, and let it go on afterwards."""
    pids = api_server_pids()
    signal_all(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(pids, signal.SIGCONT)
        until("the API server answers", lambda: site.kube.get("/api/v1/namespaces/default"), 60)


@fault("operator killed", "operator")
def killed(site: Site, rng: Random) -> Iterator[Stage]:
    """The operator's process is killed; the kubelet starts it anew."""
    for body in site.operators():
        site.will_restart(body)
        for container_id in site.container_ids(body):
            signal_all(pids_of_container(container_id)[:1], signal.SIGKILL)
    yield Hold(rng.uniform(0, 2))


@fault("operator's pod deleted", "operator", in_tests=False)
def pod_deleted(site: Site, rng: Random) -> Iterator[Stage]:
    """The operator's pod is deleted, with or without time to stop."""
    grace_seconds = rng.choice([None, 0])
    for body in site.operators():
        site.delete_pod(body, grace_seconds)
    yield Hold(rng.uniform(0, 2))


@fault("operator down", "operator", in_tests=False)
def down(site: Site, rng: Random) -> Iterator[Stage]:
    """The operator is scaled to zero for some seconds."""
    with site.operator_down():
        yield Hold(rng.uniform(2, 12))


@fault("operator's lease stale", "operator", 0.15)
def lease_stale(site: Site, rng: Random) -> Iterator[Stage]:
    """No operator for longer than agents follow old orders: they release every GPU."""
    with site.operator_down():
        yield Released(frozenset(site.nodes), within_seconds=STALE_SECONDS + 60)


@fault("API server stopped", "api", in_tests=False)
def api_stopped(site: Site, rng: Random) -> Iterator[Stage]:
    """The API server stops answering for some seconds: locks stay."""
    with api_server_stopped(site):
        yield Hold(rng.uniform(3, 20))


@fault("API server silent for long", "api", 0.15)
def api_silent(site: Site, rng: Random) -> Iterator[Stage]:
    """The API server stops answering for longer than agents follow old orders: they release every GPU."""
    with api_server_stopped(site):
        yield Released(frozenset(site.nodes), within_seconds=STALE_SECONDS + 60)


@fault("API server killed", "api")
def api_killed(site: Site, rng: Random) -> Iterator[Stage]:
    """The API server's process is killed and comes back: watches break, connections are refused meanwhile."""
    signal_all(api_server_pids(), signal.SIGKILL)
    yield Hold(rng.uniform(1, 3))
    until("the API server answers", lambda: site.kube.get("/api/v1/namespaces/default"), 60)
