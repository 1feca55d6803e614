"""The NVIDIA driver through NVML. The only module that imports ``pynvml``: no NVML type leaves it.

Facts about the calls: header nvml.h 13.3 and https://docs.nvidia.com/deploy/nvml-api/ . The package to install is
``nvidia-ml-py``; its module is called ``pynvml``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pynvml
from wattlock_api import boottime

from wattlock_agent.gpu import faults, fields
from wattlock_agent.gpu.base import DriverInfo, GpuError, GpuFault, GpuIdentity, GpuReading
from wattlock_agent.gpu.capability import has_sys_admin
from wattlock_agent.gpu.faults import gpu_error

_log = logging.getLogger(__name__)

# Enumerations of the driver's ABI; see gpu.fields for why they are ours.
_CLOCK_SM = 1
_CLOCK_MEMORY = 2
_TEMPERATURE_GPU = 0
_MIG_ENABLED = 1
_VIRTUALIZATION_NONE = 0
_VIRTUALIZATION_PASSTHROUGH = 1

#: Failures of the whole driver: no GPU can be read, so they are not one GPU's failure.
_DRIVER_FAULTS = frozenset({GpuFault.NO_DRIVER, GpuFault.DRIVER_MISMATCH})
#: Answers that will not change while the driver is loaded.
_ABSENT_FAULTS = frozenset({GpuFault.NOT_SUPPORTED, GpuFault.INVALID_ARGUMENT})


@dataclass(frozen=True)
class _Read:
    """A value that a GPU may lack: the functions that give it, newest first, and their arguments."""

    functions: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


# Functions that CUDA 14 removes have their successor in front of them.
_ENERGY = _Read(("nvmlDeviceGetTotalEnergyConsumption",))
_SM_CLOCK = _Read(("nvmlDeviceGetClockInfo",), (_CLOCK_SM,))
_MEMORY_CLOCK = _Read(("nvmlDeviceGetClockInfo",), (_CLOCK_MEMORY,))
_TEMPERATURE = _Read(("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"), (_TEMPERATURE_GPU,))
_UTILIZATION = _Read(("nvmlDeviceGetUtilizationRates",))
_EVENT_REASONS = _Read(("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"))
_POWER_LIMIT = _Read(("nvmlDeviceGetEnforcedPowerLimit",))
_FIELDS = _Read(("nvmlDeviceGetFieldValues",), (fields.READING_FIELDS,))
_RECOVERY = _Read(("nvmlDeviceGetFieldValues",), ((fields.RECOVERY_ACTION,),))
_PRODUCT = _Read(("nvmlDeviceGetName",))
_MINOR = _Read(("nvmlDeviceGetMinorNumber",))
_MIG = _Read(("nvmlDeviceGetMigMode",))
_VIRTUALIZATION = _Read(("nvmlDeviceGetVirtualizationMode",))
_MEMORY_CLOCKS = _Read(("nvmlDeviceGetSupportedMemoryClocks",))


@dataclass
class _Gpu:
    """A GPU of the open driver: its handle dies with the driver."""

    uuid: str
    handle: Any
    identity: GpuIdentity | None = None
    functions: dict[_Read, str] = field(default_factory=dict)
    """The function that answers."""
    absent: set[_Read] = field(default_factory=set)
    """Reads that this GPU does not have."""


class NvmlDriver:
    """``GpuDriver`` on NVML. Not thread-safe.

    Which values a GPU has is found out once, when ``list_gpus`` first meets it, and remembered until ``close``; what
    it lacks is ``None`` in readings. GPUs are addressed by UUID: an index may mean another GPU after a reset.
    """

    def __init__(
        self,
        now_seconds: Callable[[], float] = boottime.now_seconds,
        proc_status: Path = Path("/proc/self/status"),
    ) -> None:
        self._now_seconds = now_seconds
        self._proc_status = proc_status
        self._open = False
        self._gpus: dict[str, _Gpu] = {}
        self._complaints: dict[int, str] = {}

    def open(self) -> DriverInfo:
        """Initialise; an open driver is closed before.

        Raises:
            GpuError: no driver, a library of another version, the wrong Python package ...
        """
        if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
            raise GpuError(
                GpuFault.NO_DRIVER,
                "import pynvml",
                None,
                "the module pynvml comes from the abandoned package 'pynvml'; "
                "uninstall it and install 'nvidia-ml-py' (the official image has it)",
            )
        self.close()
        _call("nvmlInit", None)
        self._open = True
        try:
            return DriverInfo(
                driver_version=_text(_call("nvmlSystemGetDriverVersion", None)),
                nvml_version=_text(_call("nvmlSystemGetNVMLVersion", None)),
            )
        except GpuError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the driver; never raises. Locks stay: they belong to the driver."""
        self._gpus = {}
        self._complaints = {}
        if not self._open:
            return
        self._open = False
        try:
            _call("nvmlShutdown", None)
        except GpuError as error:
            _log.warning("closing the driver: %s", error)

    def list_gpus(self) -> tuple[GpuIdentity, ...]:
        """Return the GPUs of the node as they are now; one that fails to answer is left out and logged once.

        Looks at the hardware anew: MIG mode may have changed, a lost GPU is gone. Must be called before ``read``.
        A GPU that was listed before keeps its handle while the driver is open, so that it can still be reset.

        Raises:
            GpuError: the driver as a whole does not answer.
        """
        gpus = dict(self._gpus)
        identities = []
        complaints: dict[int, str] = {}
        for index in range(_call("nvmlDeviceGetCount", None)):
            try:
                gpu, identity = self._meet(index)
            except GpuError as error:
                if error.fault in _DRIVER_FAULTS:
                    raise
                complaints[index] = str(error)
                if self._complaints.get(index) != str(error):
                    _log.error("GPU %d is left out: %s", index, error)
                continue
            gpus[identity.uuid] = gpu
            identities.append(identity)
        self._gpus, self._complaints = gpus, complaints
        return tuple(identities)

    def read(self, uuid: str) -> GpuReading:
        """Read one GPU: about 4 ms for the energy counter, and up to 4 ms for each value that is not cached.

        Raises:
            GpuError: with GPU_LOST also for a GPU that ``list_gpus`` has not returned since ``open``.
        """
        return self._read(self._find(uuid, "read"))

    def lock(self, uuid: str, low_mhz: int, high_mhz: int) -> None:
        """Limit the SM clock to [low, high] MHz, both from the supported clocks.

        Success means that the driver accepted it. It is refused here, before the driver sees it, for MIG and vGPU, for
        clocks off the list, and while the driver asks for a recovery of the GPU.

        Raises:
            GpuError: nothing was changed.
        """
        call = "nvmlDeviceSetGpuLockedClocks"
        gpu = self._find(uuid, call)
        identity = gpu.identity
        if identity is None or identity.mig_enabled or identity.virtual or not identity.supported_clocks_mhz:
            raise GpuError(
                GpuFault.NOT_SUPPORTED, call, uuid, f"{uuid} is in MIG mode, virtual or lists no clocks: never locked"
            )
        clocks = identity.supported_clocks_mhz
        if low_mhz not in clocks or high_mhz not in clocks or low_mhz > high_mhz:
            raise GpuError(
                GpuFault.INVALID_ARGUMENT,
                call,
                uuid,
                f"[{low_mhz}, {high_mhz}] MHz is no range of supported clocks of {uuid} "
                f"({clocks[0]} to {clocks[-1]} MHz): snap the cap onto the list first",
            )
        action = self._field_values(gpu, _RECOVERY).get(fields.RECOVERY_ACTION)
        if action:
            wanted = fields.RECOVERY_ACTIONS.get(action, f"recovery action {action}")
            raise GpuError(
                GpuFault.GPU_LOST, call, uuid, f"the driver asks for {wanted} of {uuid}: nothing is written before"
            )
        _call(call, uuid, gpu.handle, low_mhz, high_mhz)

    def reset(self, uuid: str) -> None:
        """Return the SM clock to default management; no error when it was there already.

        Also of a GPU that ``list_gpus`` had to leave out: its lock is the one that nobody sees.

        Raises:
            GpuError: a lock may still be in force; with GPU_LOST: the driver does not have the GPU (any more).
        """
        gpu = self._gpus.get(uuid)
        _call("nvmlDeviceResetGpuLockedClocks", uuid, gpu.handle if gpu is not None else _handle_of(uuid))

    def may_write(self) -> bool:
        """Return whether CAP_SYS_ADMIN is effective in this process; see ``capability.has_sys_admin``."""
        try:
            return has_sys_admin(self._proc_status.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return False

    def _ask(self, uuid: str, function: str, *arguments: Any) -> Any:
        """Call an NVML function on a GPU.

        Raises:
            GpuError: the call failed, or the GPU is not known.
        """
        return _call(function, uuid, self._find(uuid, function).handle, *arguments)

    def _find(self, uuid: str, call: str) -> _Gpu:
        gpu = self._gpus.get(uuid)
        if gpu is None:
            raise GpuError(GpuFault.GPU_LOST, call, uuid, f"{uuid} was not among the driver's GPUs since it was opened")
        return gpu

    def _meet(self, index: int) -> tuple[_Gpu, GpuIdentity]:
        """Return the GPU at an index of this moment, with all that was learned of it before."""
        handle = _call("nvmlDeviceGetHandleByIndex", f"GPU {index}", index)
        uuid = _text(_call("nvmlDeviceGetUUID", f"GPU {index}", handle))
        gpu = self._gpus.get(uuid)
        if gpu is None:
            gpu = _Gpu(uuid, handle)
            identity = self._identify(gpu, index)
            self._probe(gpu)
        else:
            gpu.handle = handle
            identity = gpu.identity or self._identify(gpu, index)
        mig = self._optional(gpu, _MIG)
        virtualization = self._optional(gpu, _VIRTUALIZATION)
        gpu.identity = replace(
            identity,
            index=index,
            mig_enabled=mig is not None and mig[0] == _MIG_ENABLED,
            virtual=virtualization not in (None, _VIRTUALIZATION_NONE, _VIRTUALIZATION_PASSTHROUGH),
        )
        return gpu, gpu.identity

    def _identify(self, gpu: _Gpu, index: int) -> GpuIdentity:
        clocks: dict[int, tuple[int, ...]] = {}
        for memory_mhz in self._optional(gpu, _MEMORY_CLOCKS) or ():
            read = _Read(("nvmlDeviceGetSupportedGraphicsClocks",), (memory_mhz,))
            clocks[int(memory_mhz)] = tuple(self._optional(gpu, read) or ())
        product = self._optional(gpu, _PRODUCT)
        return GpuIdentity(
            uuid=gpu.uuid,
            index=index,
            minor=self._optional(gpu, _MINOR),
            product="" if product is None else _text(product),
            supported_clocks_mhz=fields.supported_clocks(clocks),
            mig_enabled=False,
            virtual=False,
        )

    def _probe(self, gpu: _Gpu) -> None:
        """Find out which values the GPU has, by one reading."""
        try:
            reading = self._read(gpu)
        except GpuError as error:
            if error.fault is not GpuFault.TRANSIENT:
                raise
            _log.warning("first reading of %s: %s", gpu.uuid, error)
            return
        values = {**vars(reading), **{f"{name}_limiter": ns for name, ns in vars(reading.limiters).items()}}
        lacking = sorted(name for name, value in values.items() if value is None)
        _log.info("%s offers every reading%s", gpu.uuid, f" but {', '.join(lacking)}" if lacking else "")

    def _read(self, gpu: _Gpu) -> GpuReading:
        before_seconds = self._now_seconds()
        energy_mj = self._optional(gpu, _ENERGY)
        # The call takes about 4 ms: its middle is the best estimate of the moment.
        at_seconds = (before_seconds + self._now_seconds()) / 2
        values = self._field_values(gpu, _FIELDS)
        utilization = self._optional(gpu, _UTILIZATION)
        return GpuReading(
            uuid=gpu.uuid,
            at_seconds=at_seconds,
            energy_mj=energy_mj,
            power_instant_mw=values.get(fields.POWER_INSTANT),
            power_limit_mw=self._optional(gpu, _POWER_LIMIT),
            sm_mhz=self._optional(gpu, _SM_CLOCK),
            memory_mhz=self._optional(gpu, _MEMORY_CLOCK),
            temperature_c=self._optional(gpu, _TEMPERATURE),
            utilization_percent=None if utilization is None else int(utilization.gpu),
            event_reasons=self._optional(gpu, _EVENT_REASONS),
            limiters=fields.limiters(values),
        )

    def _optional(self, gpu: _Gpu, read: _Read) -> Any | None:
        """Return the value, or None where the GPU does not have it, which is remembered.

        Raises:
            GpuError: the GPU has it, or may have it, and did not give it now.
        """
        if read in gpu.absent:
            return None
        known = gpu.functions.get(read)
        for function in (known,) if known else read.functions:
            try:
                value = _call(function, gpu.uuid, gpu.handle, *read.arguments)
            except GpuError as error:
                if error.fault not in _ABSENT_FAULTS:
                    raise
            else:
                gpu.functions[read] = function
                return value
        gpu.absent.add(read)
        return None

    def _field_values(self, gpu: _Gpu, read: _Read) -> dict[int, int | None]:
        """Return field values by id, asked for in one call; see ``fields.limiters`` for absent ones.

        Raises:
            GpuError: the call failed, or a field tells that the GPU or the driver is gone.
        """
        values: dict[int, int | None] = {}
        for answer in self._optional(gpu, read) or ():
            code = int(answer.nvmlReturn)
            fault = None if code == faults.SUCCESS else faults.fault_of(code)
            if fault is None:
                member = fields.VALUE_MEMBERS.get(int(answer.valueType))
                values[int(answer.fieldId)] = fields.whole_number(getattr(answer.value, member)) if member else None
            elif fault is GpuFault.GPU_LOST or fault in _DRIVER_FAULTS:
                raise gpu_error(code, f"{read.functions[0]}[{answer.fieldId}]", gpu.uuid)
            elif fault not in _ABSENT_FAULTS:
                values[int(answer.fieldId)] = None
        return values


def _handle_of(uuid: str) -> Any:
    call = "nvmlDeviceGetHandleByUUID"
    try:
        return _call(call, uuid, uuid)
    except GpuError as error:
        if error.fault is not GpuFault.NOT_SUPPORTED:
            raise
        raise GpuError(GpuFault.GPU_LOST, call, uuid, f"{uuid} is not among the driver's GPUs") from None


def _call(function: str, uuid: str | None, *arguments: Any) -> Any:
    """Call NVML. Every call goes through here: the one place where its errors become ours.

    Raises:
        GpuError: the call failed; also when binding or library do not have the function.
    """
    try:
        return getattr(pynvml, function)(*arguments)
    except AttributeError:
        raise gpu_error(faults.FUNCTION_NOT_FOUND, function, uuid) from None
    except pynvml.NVMLError as error:
        raise gpu_error(error.value, function, uuid) from None
    except UnicodeDecodeError:
        raise gpu_error(faults.UNKNOWN, function, uuid) from None


def _text(value: str | bytes) -> str:
    """Return a string of the driver: old bindings give bytes; control characters have no place in a status."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return "".join(character for character in text if character.isprintable()).strip()
