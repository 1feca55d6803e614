"""Watches drivers, kubelets and API server from outside, all the time, and judges every lock that is written."""

import threading
import time
from contextlib import suppress
from typing import Any

from chaos.site import NAMESPACE, Site
from chaos.truth import HOLDER_LAG_SECONDS, History, Pod, Policy, World, parse_pod, parse_policy, wrong_lock
from wattlock_operator.kube import POLICIES, KubeError, connect

DRIVER_SECONDS = 0.25
API_SECONDS = 1.0
_LOCK = "nvmlDeviceSetGpuLockedClocks"
_FOREIGN = "foreign-writer"


class Recorder:
    """A thread that looks, and what it saw. Its own connection: one that hangs holds nobody up."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._kube = connect()
        self._history = History()
        self._decode: set[str] = set()
        self._pods: dict[str, Pod] = {}
        self._policies: tuple[Policy, ...] = ()
        self._pending: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.wrong: list[str] = []
        """Locks that should never have been written, a sentence each."""
        self.locks_written = 0
        self.failure: BaseException | None = None
        self._api = threading.Thread(target=self._guard, args=(self._follow_api, API_SECONDS), daemon=True)
        self._driver = threading.Thread(target=self._guard, args=(self._follow_drivers, DRIVER_SECONDS), daemon=True)

    def start(self) -> None:
        """Begin; what the drivers logged before does not count."""
        for node in self._site.nodes.values():
            node.new_writes()
        self._api.start()
        self._driver.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._driver.join(5)

    def _guard(self, look: Any, every_seconds: float) -> None:
        try:
            while not self._stop.wait(every_seconds):
                look()
        except BaseException as error:
            self.failure = error

    def _follow_api(self) -> None:
        with suppress(KubeError):
            pods, policies = _read(self._kube)
            with self._lock:
                self._pods, self._policies = pods, policies
                self._decode |= {uid for uid, pod in pods.items() if pod.labels.get("llm-d.ai/role") == "decode"}

    def _follow_drivers(self) -> None:
        now = time.time()
        holders: dict[str, str] = {}
        writes: list[dict[str, Any]] = []
        for node in self._site.nodes.values():
            holders |= node.holders()
            writes += node.new_writes()
        with self._lock:
            self._history.see(now, holders)
            self._pending += [
                write
                for write in writes
                if write["function"] == _LOCK and write["result"] == 0 and write["comm"] != _FOREIGN
            ]
            # Judged a while later, when kubelet and API server have told who it was.
            due = [write for write in self._pending if now - write["timeNs"] / 1e9 > HOLDER_LAG_SECONDS]
            self._pending = [write for write in self._pending if write not in due]
            for write in due:
                self._judge(write)

    def _judge(self, write: dict[str, Any]) -> None:
        self.locks_written += 1
        at_seconds = write["timeNs"] / 1e9
        against = wrong_lock(self._history, frozenset(self._decode), write["uuid"], at_seconds)
        if against:
            self.wrong.append(f"{write['uuid']} was locked to {write['args']} at {at_seconds:.3f}, but {against}")

    def world(self) -> World:
        """Return all as it is now, read anew.

        Raises:
            KubeError: the API server does not answer.
        """
        pods, policies = _read(self._site.kube)
        locks: dict[str, int] = {}
        holders: dict[str, str] = {}
        for node in self._site.nodes.values():
            locks |= {gpu.uuid: gpu.lock_mhz for gpu in node.gpus()}
            holders |= node.holders()
        return World(time.time(), locks, holders, pods, policies, frozenset(self._site.foreign))

    def locked_on(self, node: str) -> set[str]:
        """Return the locked GPUs of a node, but for those that somebody else has locked."""
        locked = {gpu.uuid for gpu in self._site.nodes[node].gpus() if gpu.lock_mhz}
        return locked - self._site.foreign


def _read(kube: Any) -> tuple[dict[str, Pod], tuple[Policy, ...]]:
    pods = [parse_pod(body) for body in kube.list_all(f"/api/v1/namespaces/{NAMESPACE}/pods")]
    policies: list[Policy] = []
    try:
        policies = [parse_policy(body) for body in kube.list_all(POLICIES)]
    except KubeError as error:
        if error.status != 404:  # the kind itself may be gone
            raise
    return {pod.uid: pod for pod in pods}, tuple(policies)
