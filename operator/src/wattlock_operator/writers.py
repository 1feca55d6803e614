"""Other programs that set clocks or power of GPUs: how they are recognised, and whom a conflict suspects. Pure.

Two tables, one source a row. They name what is known; a program that is in neither is still noticed by what it does to
the clock, and then nobody is named. Names and labels are anybody's to write: a suspicion decides nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

MAX_NAMED = 3
#: Of a container's command line: start scripts may be long. A tenant's pod may have hundreds of containers of them.
_MAX_COMMAND = 4096
_MAX_CONTAINERS = 16


@dataclass(frozen=True)
class Controller:
    """A controller that an annotation asks to set the power or clock of a pod's GPUs."""

    annotation: str
    name: str
    does: str


CONTROLLERS = (
    # https://github.com/ai-dynamo/dynamo deploy/power-agent/power_agent.py: whole watts, applied every 15 s.
    Controller("dynamo.nvidia.com/gpu-power-limit", "NVIDIA Dynamo's Power Agent", "caps the power of the pod's GPUs"),
    # Written by that agent on pods that it caps: https://github.com/ai-dynamo/dynamo deploy/power-agent/pod_report.py
    Controller(
        "dynamo.nvidia.com/gpu-power-enforcement-report",
        "NVIDIA Dynamo's Power Agent",
        "reports there the power cap that it has set",
    ),
)


@dataclass(frozen=True)
class _Known:
    """A program that sets clocks or power, and what its pods look like. One sign is enough."""

    name: str
    label: tuple[str, str] | None = None
    image: str = ""
    """Last part of the image's name, without tag."""
    command: re.Pattern[str] | None = None


_KNOWN = (
    # Its configuration falls back to locked clocks and is applied anew after a GPU reset (modules/config of
    # https://github.com/NVIDIA/DCGM); label of https://github.com/NVIDIA/gpu-operator assets/state-dcgm/0400_dcgm.yml,
    # image nvcr.io/nvidia/cloud-native/dcgm. dcgm-exporter sets nothing.
    _Known("DCGM host engine", ("app", "nvidia-dcgm"), "dcgm", re.compile(r"\bnv-hostengine\b")),
    # https://github.com/ai-dynamo/dynamo deploy/helm/charts/power-agent/templates/daemonset.yaml
    _Known(
        "NVIDIA Dynamo's Power Agent",
        ("app.kubernetes.io/component", "power-agent"),
        "power-agent",
        re.compile(r"\bpower_agent\.py\b"),
    ),
    # Sets locked clocks and power limits over HTTP, last writer wins: https://github.com/ml-energy/zeus zeusd/
    _Known("zeusd", image="zeusd", command=re.compile(r"\bzeusd\b")),
    # Hand-written DaemonSets, e.g. https://github.com/mitchross/talos-argocd-proxmox
    # infrastructure/controllers/nvidia-gpu-operator/powerlimit-daemonset.yaml; the options are nvidia-smi's own.
    _Known(
        "nvidia-smi in a pod",
        command=re.compile(
            r"\bnvidia-smi\b[^\n;&|]{0,200}\s(-lgc|-rgc|-lmc|-rmc|-pl|-ac|-rac|--lock-gpu-clocks|--reset-gpu-clocks|--power-limit"
            r"|--applications-clocks|--reset-applications-clocks)\b"
        ),
    ),
)


def claims_of(annotations: Mapping[str, object]) -> tuple[str, ...]:
    """Return the annotations by which another controller claims a pod's GPUs, in the table's order."""
    return tuple(each.annotation for each in CONTROLLERS if each.annotation in annotations)


def controller_of(annotation: str) -> Controller:
    """Return the row of an annotation that ``claims_of`` has returned."""
    return next(each for each in CONTROLLERS if each.annotation == annotation)


def writer_of(labels: Mapping[str, str], images: Iterable[str], commands: Iterable[str]) -> str:
    """Return which known writer a pod looks like; empty: none.

    ``images`` are as in the manifest; ``commands`` are the command lines of its containers.
    """
    names = {re.split(r"[:@]", image.rpartition("/")[2])[0] for image in images}
    texts = [command[:_MAX_COMMAND] for command in islice(commands, _MAX_CONTAINERS)]
    for known in _KNOWN:
        labelled = known.label is not None and labels.get(known.label[0]) == known.label[1]
        started = known.command is not None and any(known.command.search(text) for text in texts)
        if labelled or started or (known.image and known.image in names):
            return known.name
    return ""


def suspects_sentence(suspects: Sequence[str], nodes: Sequence[str]) -> str:
    """Return who may have set the clocks on these nodes (at least one), as a sentence."""
    shown = ", ".join(nodes[:MAX_NAMED]) + (" and more" if len(nodes) > MAX_NAMED else "")
    if not suspects:
        return (
            f"No pod of a known clock writer runs on {shown}: suspect a person with nvidia-smi or a program outside "
            "Kubernetes"
        )
    more = f" and {len(suspects) - MAX_NAMED} more" if len(suspects) > MAX_NAMED else ""
    return f"Suspected on {shown}: {', '.join(suspects[:MAX_NAMED])}{more}"
