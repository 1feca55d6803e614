"""Holders of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PodName:
    """A pod as the kubelet names it: the PodResources API tells no UID."""

    namespace: str
    name: str


@dataclass(frozen=True)
class Holders:
    """Who holds what on this node, by GPU UUID. A GPU that nobody holds is absent."""

    pods: dict[str, tuple[PodName, ...]]
    """Pods that hold the whole GPU or a share of it; more than one means that it is shared."""
    shared: frozenset[str]
    """GPUs handed out in shares (time-slicing, MIG), even when one pod holds all of them now."""
    unknown: dict[PodName, tuple[str, ...]]
    """Device ids of pods that name no GPU of this node."""


class KubeletError(Exception):
    """The kubelet did not answer. The message says what to check."""
