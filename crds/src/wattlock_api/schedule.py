"""Arms over epochs: when an instance is capped and when it is released for comparison.

Agents on several nodes and the operator must agree on the arm of an instance without talking to
each other, so the schedule is a pure function of the policy's seed, the instance and the wall clock.

Epochs are grouped into blocks of ``round(1 / control_share)``. In every block a pair of neighbouring
epochs is drawn at random, and a coin decides which of the two is released (the control); all other
epochs of the block are capped. Drawing the order anew in every block keeps a drift of load or
temperature from looking like an effect, and pairs never share an epoch.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum


class Arm(StrEnum):
    """What an instance gets in an epoch."""

    CONTROL = "control"
    CAP = "cap"


@dataclass(frozen=True)
class Experiment:
    """The experiment that an instance takes part in."""

    seed: str
    epoch_seconds: int
    control_share: float

    @property
    def block_epochs(self) -> int:
        """Epochs in a block: one of them is released."""
        return max(2, round(1 / self.control_share))


@dataclass(frozen=True)
class Pair:
    """The two neighbouring epochs of a block that are compared."""

    control: int
    cap: int


def epoch_at(experiment: Experiment, unix_seconds: float) -> int:
    """Return the number of the epoch that ``unix_seconds`` falls into (0 began in 1970)."""
    return int(unix_seconds // experiment.epoch_seconds)


def epoch_start_seconds(experiment: Experiment, epoch: int) -> float:
    """Return when the epoch begins, in seconds since 1970."""
    return float(epoch * experiment.epoch_seconds)


def pair_of(experiment: Experiment, instance: str, epoch: int) -> Pair:
    """Return the pair of the block that ``epoch`` lies in."""
    length = experiment.block_epochs
    block = epoch // length
    digest = hashlib.sha256(f"{experiment.seed}/{instance}/{length}/{block}".encode()).digest()
    first = block * length + int.from_bytes(digest[:8]) % (length - 1)
    control_first = digest[8] & 1
    return Pair(control=first, cap=first + 1) if control_first else Pair(control=first + 1, cap=first)


def arm_of(experiment: Experiment, instance: str, epoch: int) -> Arm:
    """Return the arm of the instance in the epoch."""
    return Arm.CONTROL if pair_of(experiment, instance, epoch).control == epoch else Arm.CAP
