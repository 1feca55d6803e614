"""Power of an instance on its other nodes: what the operator hands from their agents to the one that counts tokens.

It travels in an annotation of the NodeEnergy (constants.PEER_POWER_ANNOTATION), as JSON of ``PeerPowers``.
"""

from typing import Annotated

from pydantic import Field

from wattlock_api.base import ApiModel, Uid
from wattlock_api.nodeenergy import EpochPower, InstanceName, NodeName

#: Longest annotation that is written or read; the API server allows 256 KiB for all annotations of an object.
MAX_PEER_POWER_BYTES = 128 * 1024


class PeerPower(ApiModel):
    """One instance."""

    policy_uid: Uid
    """The policy."""
    instance: InstanceName
    """The instance."""
    nodes: Annotated[list[NodeName], Field(max_length=64)]
    """The nodes whose power is summed: all of the instance's but the one that the annotation is on. Sorted."""
    epochs: Annotated[list[EpochPower], Field(max_length=8)] = []
    """Epochs that every one of these nodes has reported, with the sum of their watts."""


class PeerPowers(ApiModel):
    """All instances of a node."""

    instances: Annotated[list[PeerPower], Field(max_length=64)] = []
    """Those that count their tokens on this node and have GPUs on others."""
