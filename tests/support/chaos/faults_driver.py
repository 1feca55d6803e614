"""The driver, the journal's disk, other writers, and metrics pages."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random

from chaos.fault import Hold, Settled, Stage, fault, some_node
from chaos.faults_agent import end_agent
from chaos.nodes import JOURNAL, Node, read_only
from chaos.site import Site, journal
from wattlock_simulator import control

_LOCK, _RESET = "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"


@fault("driver reloaded", "driver")
def reloaded(site: Site, rng: Random) -> Iterator[Stage]:
    """A driver reload: locks are gone, counters begin anew, sessions may end."""
    with site.nodes[some_node(site, rng)].driver() as file:
        control.reload_driver(file, end_sessions=rng.random() < 0.5)
    yield Hold(0)


@contextmanager
def _driver_fails(node: Node, function: str, code: int, gpus: list[int] | None = None) -> Iterator[None]:
    with node.driver() as file:
        for index, gpu in enumerate(file.gpus):
            if gpus is None or index in gpus:
                control.inject_fault(gpu.faults, function, code)
    try:
        yield
    finally:
        with node.driver() as file:
            for gpu in file.gpus:
                control.clear_faults(gpu.faults)


@fault("GPU lost", "driver", in_tests=False)
def gpu_lost(site: Site, rng: Random) -> Iterator[Stage]:
    """A GPU answers nothing but GPU_IS_LOST or an unknown error for some seconds."""
    node = site.nodes[some_node(site, rng)]
    with _driver_fails(node, "*", rng.choice([15, 999]), [rng.randrange(4)]):
        yield Hold(rng.uniform(2, 12))
    site.touch_policies()


@fault("driver refuses to lock", "driver policies", in_tests=False)
def refuses_to_lock(site: Site, rng: Random) -> Iterator[Stage]:
    """The driver refuses new locks while caps change; once it is well, a changed order is carried out."""
    node = site.nodes[some_node(site, rng)]
    with _driver_fails(node, _LOCK, rng.choice([4, 999])):
        site.touch_policies()
        yield Hold(rng.uniform(2, 12))
    site.touch_policies()


@fault("driver refuses to reset", "driver policies")
def refuses_to_reset(site: Site, rng: Random) -> Iterator[Stage]:
    """Resets fail while a policy is deleted; they are tried until they succeed."""
    name = rng.choice(["steady", "measured"])
    node = site.nodes[some_node(site, rng)]
    with _driver_fails(node, _RESET, rng.choice([15, 999])):
        site.delete_policy(name)
        yield Hold(rng.uniform(2, 8))
    yield Settled()
    site.apply_policies()


@fault("foreign writer", "driver policies")
def foreign_writer(site: Site, rng: Random) -> Iterator[Stage]:
    """Somebody sets and resets clocks of a capped GPU, then stops; a person then changes the policy."""
    node = site.nodes[some_node(site, rng)]
    with node.driver() as file:
        locked = [gpu for gpu in file.gpus if gpu.request.lock_range_mhz]
        if locked:
            gpu = rng.choice(locked)
            control.foreign_lock(file, gpu, 345, 1905)
            yield Hold(rng.uniform(1, 10))
            control.foreign_unlock(file, gpu)
    yield Hold(rng.uniform(0, 2))
    site.touch_policies()


@fault("foreign lock on a GPU that is not ours", "driver agents")
def foreign_lock_stays(site: Site, rng: Random) -> Iterator[Stage]:
    """Somebody locks a GPU that no order names, and an agent is killed: that lock is not ours to undo."""
    name = some_node(site, rng)
    node = site.nodes[name]
    held = node.holders()
    decode = {body["metadata"]["uid"] for body in site.decode_pods()}
    free = [gpu.uuid for gpu in node.gpus() if held.get(gpu.uuid) not in decode and not gpu.lock_mhz]
    if not free:
        return
    uuid = rng.choice(free)
    site.foreign.add(uuid)
    with node.driver() as file:
        (gpu,) = file.find(uuid)
        control.foreign_lock(file, gpu, 1200, 1200)
        try:
            end_agent(site, name, signal.SIGKILL)
            yield Settled()
            kept = gpu.request.lock_range_mhz
        finally:
            control.foreign_unlock(file, gpu)
            site.foreign.discard(uuid)
            del gpu
    assert kept == 1200 << 32 | 1200, f"the lock that somebody else had on {uuid} was changed to {kept:#x}"


@fault("journal's disk full", "journal policies", in_tests=False)
def disk_full(site: Site, rng: Random) -> Iterator[Stage]:
    """The disk of the journal is full while caps change: nothing is locked without a record."""
    node = site.nodes[some_node(site, rng)]
    filler = journal(node) / "filler"
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        site.touch_policies()
        yield Hold(rng.uniform(2, 8))
    finally:
        filler.unlink()
    site.apply_policies()


@fault("journal read-only", "journal policies")
def disk_read_only(site: Site, rng: Random) -> Iterator[Stage]:
    """The disk of the journal becomes read-only while caps change, and writable again."""
    with read_only(site.nodes[some_node(site, rng)], JOURNAL):
        site.touch_policies()
        yield Hold(rng.uniform(2, 8))
    site.apply_policies()


@fault("journal damaged", "journal agents")
def damaged(site: Site, rng: Random) -> Iterator[Stage]:
    """Records are damaged, then the agent is killed: the next one takes them for unknown locks."""
    name = some_node(site, rng)
    records = sorted(journal(site.nodes[name]).glob("*.json"))
    for record in records:
        content = bytearray(record.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        record.write_bytes(bytes(content[: rng.choice([len(content), len(content) // 2])]))
    end_agent(site, name, signal.SIGKILL)
    yield Hold(rng.uniform(0, 2))


@fault("metrics pages broken", "pods", in_tests=False)
def metrics_broken(site: Site, rng: Random) -> Iterator[Stage]:
    """Serving pods answer the agent with rubbish: caps stay, only the proof is missing."""
    pods = site.decode_pods()
    for body in pods:
        kind = rng.choice(["garbage", "huge", "endless", "nan", "backwards", "slow"])
        site.simulate(body, {"metricsFault": kind})
    yield Settled()
    for body in pods:
        site.simulate(body, {"metricsFault": "none"})
