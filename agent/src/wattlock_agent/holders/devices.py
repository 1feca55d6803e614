"""Which GPU a device id of the kubelet means. Pure, and the only place where such ids are read.

| id | meaning |
| --- | --- |
| ``GPU-<uuid>`` | whole GPU |
| ``GPU-<uuid>::N`` | share N of a GPU (time-slicing, MPS) |
| ``MIG-<uuid>`` | MIG device; the id does not tell of which GPU |
| ``MIG-GPU-<uuid>/<gi>/<ci>`` | MIG device, as old drivers wrote it |
| ``nvidia0``, ``nvidia0/gi1``, ``nvidia0/vgpu0`` | GKE: device file /dev/nvidia0, a MIG instance of it, a share of it |
| ``0``, ``0::N``, ``0:1`` | device plugin with the index strategy: GPU, share of it, MIG device of it |
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, PodName

_WHOLE = "nvidia.com/gpu"
_SHARED = "nvidia.com/gpu.shared"
_MIG_PREFIX = "nvidia.com/mig-"
_UUID_PREFIXES = ("GPU-", "MIG-")

_SHARE = re.compile(r"(?P<device>.+)::[0-9]+")
_OLD_MIG = re.compile(r"MIG-(?P<uuid>GPU-[^/]+)/[0-9]+/[0-9]+")
_DEVICE_FILE = re.compile(r"nvidia(?P<minor>[0-9]{1,4})(?P<part>/(?:gi|vgpu)[0-9]+)?(?P<subpart>/vgpu[0-9]+)?")
_INDEX = re.compile(r"(?P<index>[0-9]{1,4})(?P<mig>:[0-9]+)?")


@dataclass(frozen=True)
class DeviceClaim:
    """Devices of one resource that one container of a pod was given."""

    pod: PodName
    resource: str
    device_ids: tuple[str, ...]


@dataclass(frozen=True)
class _Device:
    uuid: str
    shared: bool


def find_holders(claims: Iterable[DeviceClaim], gpus: Sequence[GpuIdentity]) -> Holders:
    """Return who holds which of ``gpus``.

    A GPU counts as shared when an id or a resource name says so, and when it is in MIG mode. Resources that are not
    NVIDIA GPUs are left out, unless a device id is a UUID of the form that NVIDIA uses: resources can be renamed.
    What names none of ``gpus`` ends in ``unknown``: an id of another form, a GPU that NVML does not show, or a
    MIG UUID. Nothing is guessed, so the order of a pod with an unknown device must not be carried out.
    """
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    by_minor = {gpu.minor: gpu for gpu in gpus if gpu.minor is not None}
    by_index = {gpu.index: gpu for gpu in gpus}
    pods: dict[str, set[PodName]] = {}
    shared = {gpu.uuid for gpu in gpus if gpu.mig_enabled}
    unknown: dict[PodName, set[str]] = {}

    def resolve(device_id: str) -> _Device | None:
        share = _SHARE.fullmatch(device_id)
        text = share["device"] if share else device_id
        gpu: GpuIdentity | None = None
        part = share is not None
        if match := _OLD_MIG.fullmatch(text):
            gpu, part = by_uuid.get(match["uuid"]), True
        elif match := _DEVICE_FILE.fullmatch(text):
            gpu, part = by_minor.get(int(match["minor"])), part or match["part"] is not None
        elif match := _INDEX.fullmatch(text):
            gpu, part = by_index.get(int(match["index"])), part or match["mig"] is not None
        else:
            gpu = by_uuid.get(text)
        return None if gpu is None else _Device(gpu.uuid, part)

    for claim in claims:
        partial = claim.resource == _SHARED or claim.resource.startswith(_MIG_PREFIX)
        for device_id in claim.device_ids:
            if not (claim.resource == _WHOLE or partial or device_id.startswith(_UUID_PREFIXES)):
                continue
            device = resolve(device_id)
            if device is None:
                unknown.setdefault(claim.pod, set()).add(device_id)
                continue
            pods.setdefault(device.uuid, set()).add(claim.pod)
            if device.shared or partial:
                shared.add(device.uuid)
    return Holders(
        pods={uuid: tuple(sorted(names, key=_pod_key)) for uuid, names in sorted(pods.items())},
        shared=frozenset(shared),
        unknown={pod: tuple(sorted(ids)) for pod, ids in sorted(unknown.items(), key=lambda item: _pod_key(item[0]))},
    )


def _pod_key(pod: PodName) -> tuple[str, str]:
    return pod.namespace, pod.name
