"""The simulated nodes from the machine's side: their files, processes and driver, with no way through the cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from wattlock_simulator import control, layout, state
from wattlock_simulator.state import StateFile

ROOT = Path(__file__).parents[3]
DRIVER = state.DEFAULT_DIRECTORY
JOURNAL = Path("/var/lib/wattlock")
KUBELET_SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
_CHECKPOINT = Path("/var/lib/kubelet/device-plugins/kubelet_internal_checkpoint")


def cluster_name() -> str:
    """Name of the cluster that this process was started in (``dev/cluster run``)."""
    return os.environ["WATTLOCK_CLUSTER"]


def _in_kind() -> bool:
    return os.environ.get("WATTLOCK_KIND_MODE") == "yes"


def _command_line(pid: str) -> str:
    with suppress(OSError):
        return Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdecimal()]


def pids_of_container(container_id: str) -> list[int]:
    """Return the processes of a container, by this machine's numbers; its first process comes first."""
    found = []
    for pid in _pids():
        with suppress(OSError):
            if container_id in Path("/proc", pid, "cgroup").read_text():
                status = Path("/proc", pid, "status").read_text()
                inside = next(line.split() for line in status.splitlines() if line.startswith("NSpid:"))
                found.append((inside[-1] != "1", int(pid)))
    return [pid for _, pid in sorted(found)]


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes, as far as they are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


_EAT = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
eaten = []
while True:
    eaten.append(b"x" * (1 << 22))
"""


def exhaust_memory(pid: int) -> bool:
    """Use up the memory of the container that a process is in, until the kernel has ended the process; return whether.

    The kernel is told to take it first. What eats the memory is a process of ours that joins the container's group.
    """
    Path("/proc", str(pid), "oom_score_adj").write_text("1000")
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc", str(pid), "cgroup").read_text().splitlines())
    tree, group = ("memory", groups["memory"]) if "memory" in groups else ("", groups[""])
    procs = Path("/sys/fs/cgroup", tree, group.lstrip("/"), "cgroup.procs")
    eater = subprocess.Popen([sys.executable, "-c", _EAT, str(procs)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while Path("/proc", str(pid)).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not Path("/proc", str(pid)).exists()
    finally:
        eater.kill()
        eater.wait()


def api_server_pids() -> list[int]:
    """Return the processes of this cluster's API server, and of no other's."""
    if _in_kind():
        container = f"wattlock-{cluster_name()}-control-plane"
        command = ["docker", "top", container, "-eo", "pid,comm"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        return [int(line.split()[0]) for line in lines if "kube-apiserver" in line]
    needle = f"/{cluster_name()}/"
    lines = [(int(pid), _command_line(pid)) for pid in _pids()]
    return [pid for pid, line in lines if line.split(" ", 1)[0].endswith("/kube-apiserver") and needle in line]


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver has it."""

    uuid: str
    lock_mhz: int
    """Upper end of the locked range; 0 without a lock."""


class Node:
    """One simulated node."""

    def __init__(self, name: str, ours: str) -> None:
        """``name`` is Kubernetes', ``ours`` is that of dev/cluster (node0, node1)."""
        self.name, self._ours = name, ours
        self._pid = self._find()
        self.root = Path("/proc", str(self._pid), "root")
        """The node's files, with its own mounts."""
        self._log_read = 0

    def _find(self) -> int:
        if _in_kind():
            command = ["docker", "inspect", "-f", "{{.State.Pid}}", self.name]
            return int(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
        number = self._ours.removeprefix("node")
        for pid in sorted(_pids(), key=int):
            words = _command_line(pid).split()
            if len(words) > 5 and words[1].endswith("/node.sh") and words[4:6] == [cluster_name(), number]:
                return int(pid)
        raise RuntimeError(f"node {self._ours} of cluster {cluster_name()} does not run on this machine")

    def path(self, path: Path) -> Path:
        """Return where a path of the node is for this process."""
        return self.root / path.relative_to("/")

    # --- the driver --------------------------------------------------------------------------------------------------

    def gpus(self) -> list[Gpu]:
        """Return the GPUs; none before the simulator has made them."""
        try:
            content = self.path(DRIVER / state.STATE_NAME).read_bytes()
            read = layout.State.from_buffer_copy(content)
        except (OSError, ValueError):
            return []
        if read.magic != layout.MAGIC:
            return []
        gpus = [read.gpus[index] for index in range(read.gpu_count)]
        return [Gpu(gpu.identity.uuid.decode(), gpu.request.lock_range_mhz & 0xFFFFFFFF) for gpu in gpus]

    def driver(self) -> StateFile:
        """Open the driver's state, to change it as ``wattlock-simulator control`` does; use it as a context."""
        return StateFile.open(self.path(DRIVER))

    def new_writes(self) -> list[dict[str, object]]:
        """Return what was written to the driver's log since the last call."""
        try:
            with self.path(DRIVER / state.LOG_NAME).open("rb") as log:
                log.seek(self._log_read)
                content = log.read()
        except OSError:
            return []
        complete = content.rpartition(b"\n")[0]
        self._log_read += len(complete) + bool(complete)
        return [json.loads(line) for line in complete.splitlines() if line]

    def holders(self) -> dict[str, str]:
        """Return the UID of the pod to which the kubelet gave each GPU; of pods that have ended, too."""
        try:
            content = json.loads(self.path(_CHECKPOINT).read_text())
        except (OSError, ValueError):
            return {}
        entries = content.get("Data", {}).get("PodDeviceEntries") or []
        return {uuid: entry["PodUID"] for entry in entries for group in entry["DeviceIDs"].values() for uuid in group}

    # --- its processes -----------------------------------------------------------------------------------------------

    def run(self, *command: str) -> str:
        """Run a command inside the node."""
        return _dev_cluster("node-exec", "--name", cluster_name(), self._ours, "--", *command)

    @contextmanager
    def kubelet_down(self) -> Iterator[None]:
        """Kill the kubelet, and start it again afterwards; the containers go on."""
        _dev_cluster("stop-kubelet", "--name", cluster_name(), self._ours)
        try:
            yield
        finally:
            _dev_cluster("start-kubelet", "--name", cluster_name(), self._ours)

    def boot(self) -> None:
        """Give the node a new boot id and its GPUs the state after a boot."""
        with self.driver() as file:
            control.reboot(file)


def _dev_cluster(*arguments: str) -> str:
    result = subprocess.run(
        [str(ROOT / "dev/cluster"), *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    if result.returncode != 0:
        raise RuntimeError(f"dev/cluster {' '.join(arguments)}: {result.stdout}{result.stderr}")
    return result.stdout


_REMOUNT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
where = os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY)
if libc.setns(where, 0x20000) or libc.mount(None, sys.argv[2].encode(), None, int(sys.argv[3]), None):
    sys.exit(os.strerror(ctypes.get_errno()))
"""
_MS_RDONLY, _MS_REMOUNT = 1, 32


@contextmanager
def read_only(node: Node, path: Path) -> Iterator[None]:
    """Make a file system of a node read-only for everybody who has it mounted, and writable again afterwards."""
    _remount(node, path, _MS_RDONLY)
    try:
        yield
    finally:
        _remount(node, path, 0)


def _remount(node: Node, path: Path, flag: int) -> None:
    command = [sys.executable, "-c", _REMOUNT, node.root.parent.name, str(path), str(_MS_REMOUNT | flag)]
    subprocess.run(command, capture_output=True, timeout=20, check=True)
