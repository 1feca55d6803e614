"""The state file on disk: opening, creating and the meaning of its codes."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from wattlock_simulator import layout, physics
from wattlock_simulator.physics import Architecture, Phase, Product, Workload

STATE_NAME = "state.bin"
LOG_NAME = "writes.log"
BOOT_ID_NAME = "boot_id"
"""What the agent reads in place of the kernel's boot id: simulated nodes share a kernel and reboot on their own."""

DEFAULT_DIRECTORY = Path("/var/lib/wattlock-simulator")
"""Host directory of state file, library and write log; the same path in every container."""

ARCHITECTURE_CODES: dict[Architecture, int] = {a: i for i, a in enumerate(Architecture, start=1)}
PHASE_CODES: dict[Phase, int] = {p: i for i, p in enumerate(Phase, start=1)}
ARCHITECTURES = {code: a for a, code in ARCHITECTURE_CODES.items()}
PHASES = {code: p for p, code in PHASE_CODES.items()}

LIMITER_CODES = {"none": 0, "sw-thermal": 1, "hw-thermal": 2, "power-brake": 3}
"""Limiters on request, by the name that the control command takes."""

VIRTUALIZATION_CODES = {"none": 0, "passthrough": 1, "vgpu": 2, "host-vgpu": 3}
"""NVML virtualization modes by name."""

_MEMORY_MIB = {Product.H200: 143771, Product.H100: 81559}
_NAMES = {Product.H200: "NVIDIA H200", Product.H100: "NVIDIA H100 80GB HBM3"}


class StateError(Exception):
    """The state file is absent or not ours; the message says what to do."""


def gpu_uuid(node_name: str, index: int) -> str:
    """UUID of a simulated GPU: the same for the same node name and index, for ever."""
    digest = hashlib.sha256(f"wattlock-simulator/{node_name}/{index}".encode()).hexdigest()
    return f"GPU-{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"


class StateFile:
    """A mapped state file. Use as a context manager, or call ``close``.

    Attributes:
        directory: where the file lies.
        state: the mapped structure; reading and assigning its fields reads and writes the file.
    """

    def __init__(self, directory: Path, mapping: mmap.mmap) -> None:
        self.directory = directory
        self._mapping = mapping
        self.state = layout.State.from_buffer(mapping)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Maps an existing state file.

        Raises:
            StateError: there is none, or it has another layout.
        """
        path = directory / STATE_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StateError(f"cannot open {path} ({error.strerror}): is `wattlock-simulator node` running?") from error
        try:
            size = os.fstat(descriptor).st_size
            if size != ctypes.sizeof(layout.State):
                raise StateError(f"{path} has {size} bytes: written by another version of the simulator")
            file = cls(directory, mmap.mmap(descriptor, size))
        finally:
            os.close(descriptor)
        if (file.state.magic, file.state.version) != (layout.MAGIC, layout.VERSION):
            file.close()
            raise StateError(f"{path} is not a state file of this version")
        return file

    @classmethod
    def create(cls, directory: Path, node_name: str, product: Product, gpus: int) -> Self:
        """Opens the state file of a node, or makes it; locks, energy and faults of an existing one are kept.

        The file keeps its inode, so that clients that have it mapped go on reading. It is world-writable, as a real
        driver's device file is: what a caller may do is the library's decision.

        Args:
            directory: made if absent.
            node_name: together with the index it gives the UUIDs.
            product: product of all GPUs.
            gpus: 1 to 16.

        Raises:
            ValueError: ``gpus`` out of range.
        """
        if not 1 <= gpus <= layout.MAX_GPUS:
            raise ValueError(f"{gpus} GPUs: choose 1 to {layout.MAX_GPUS}")
        directory.mkdir(parents=True, exist_ok=True)
        for name in (STATE_NAME, LOG_NAME):
            descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with suppress(PermissionError):  # made by another user, who has set it
                os.fchmod(descriptor, 0o666)
            if name == STATE_NAME:
                os.ftruncate(descriptor, ctypes.sizeof(layout.State))
                mapping = mmap.mmap(descriptor, ctypes.sizeof(layout.State))
            os.close(descriptor)
        if not (directory / BOOT_ID_NAME).exists():
            write_boot_id(directory)
        file = cls(directory, mapping)
        state = file.state
        if (state.magic, state.version, state.size) != (layout.MAGIC, layout.VERSION, ctypes.sizeof(layout.State)):
            ctypes.memset(ctypes.addressof(state), 0, ctypes.sizeof(layout.State))
        for index in range(gpus):
            _identify(state.gpus[index], node_name, product, index)
        state.node_name = node_name.encode()
        state.version, state.size, state.gpu_count = layout.VERSION, ctypes.sizeof(layout.State), gpus
        state.magic = layout.MAGIC  # last: without it no client takes the file for a driver
        return file

    @property
    def gpus(self) -> tuple[layout.Gpu, ...]:
        """The GPUs, by index."""
        return tuple(self.state.gpus[i] for i in range(self.state.gpu_count))

    def find(self, name: str) -> tuple[layout.Gpu, ...]:
        """GPUs by UUID, by index, or all of them for ``all``.

        Raises:
            StateError: no such GPU.
        """
        if name == "all":
            return self.gpus
        found = tuple(g for i, g in enumerate(self.gpus) if name in (str(i), g.identity.uuid.decode()))
        if not found:
            raise StateError(f"no GPU {name!r}: give a UUID, an index below {self.state.gpu_count}, or all")
        return found

    def close(self) -> None:
        """Unmaps the file; ``state`` and the GPUs must not be used any more."""
        del self.state
        with suppress(BufferError):  # someone still holds a GPU: the mapping then goes with the last of them
            self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_boot_id(directory: Path) -> None:
    """Gives the node a new boot id. It is replaced as a whole: nobody reads half of one."""
    unfinished = directory / f".{BOOT_ID_NAME}.{os.getpid()}"
    unfinished.write_text(f"{uuid4()}\n")
    unfinished.chmod(0o644)
    unfinished.replace(directory / BOOT_ID_NAME)


def _identify(gpu: layout.Gpu, node_name: str, product: Product, index: int) -> None:
    identity = gpu.identity
    uuid = gpu_uuid(node_name, index).encode()
    if identity.uuid != uuid or identity.product != product.encode():
        ctypes.memset(ctypes.addressof(gpu), 0, ctypes.sizeof(layout.Gpu))
        gpu.request.power_limit_mw = int(physics.DEFAULT_LIMIT_WATTS * 1000)
        gpu.request.persistence_mode = 1
    identity.uuid, identity.product = uuid, product.encode()
    identity.name = _NAMES[product].encode()
    identity.serial = str(1_650_000_000_000 + int(uuid[4:12], 16)).encode()
    identity.index, identity.pci_bus = index, 0x0A + 0x10 * index
    identity.max_clock_mhz, identity.min_clock_mhz = physics.MAX_CLOCK_MHZ, physics.MIN_CLOCK_MHZ
    identity.clock_step_mhz = physics.CLOCK_STEP_MHZ
    identity.memory_clocks_mhz[:] = physics.MEMORY_CLOCKS_MHZ[product]
    identity.min_limit_mw = int(physics.MIN_LIMIT_WATTS * 1000)
    identity.max_limit_mw = int(physics.DEFAULT_LIMIT_WATTS * 1000)
    identity.memory_bytes = _MEMORY_MIB[product] << 20


def set_workload(
    gpu: layout.Gpu, workload: Workload | None, *, extra_step_seconds: float = 0.0, lease_until_ns: int = 0
) -> None:
    """Registers what a GPU works on.

    Args:
        gpu: the GPU.
        workload: what runs; None for a loaded model without requests.
        extra_step_seconds: idle time added to each step, in s.
        lease_until_ns: on the monotonic clock in ns; after it the GPU counts as left. 0 for never.
    """
    slot = gpu.workload
    slot.extra_step_seconds = extra_step_seconds
    slot.lease_until_ns = lease_until_ns
    if workload is None:
        slot.batch = 0.0
        slot.architecture = slot.architecture or 1
        return
    slot.phase = PHASE_CODES[workload.phase]
    slot.batch, slot.context = workload.batch, workload.context
    slot.architecture = ARCHITECTURE_CODES[workload.architecture]


def clear_workload(gpu: layout.Gpu) -> None:
    """Removes model and context from a GPU."""
    gpu.workload.architecture = 0


def read_sensors(gpu: layout.Gpu) -> layout.Sensors:
    """A consistent copy of the sensors: read again while the node process writes."""
    for _ in range(100):
        before = gpu.sensors.sequence
        copy = layout.Sensors.from_buffer_copy(gpu.sensors)
        if before == gpu.sensors.sequence and not before & 1:
            break
    return copy
