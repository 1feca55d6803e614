"""The fitted curves: their form. The numbers are in ``fitted.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeCurve:
    """Decode of one architecture on one product at 1980 MHz.

    Attributes:
        fixed_seconds: time of a step that does not depend on the load (weights, launches), in s.
        sequence_seconds: time per sequence in the batch (recurrent state), in s.
        cache_seconds: time per token of KV cache that is read, in s.
        fixed_watts: board power while only the fixed part runs, in W.
        stream_watts: what the board draws more while state or cache is streamed, in W.
    """

    fixed_seconds: float
    sequence_seconds: float
    cache_seconds: float
    fixed_watts: float
    stream_watts: float

    def seconds(self, batch: float, context: float) -> float:
        """Step time in s at 1980 MHz."""
        return self.fixed_seconds + self.sequence_seconds * batch + self.cache_seconds * batch * context

    def watts(self, batch: float, context: float, joules_per_token: float, exponent: float) -> float:
        """Board power in W at 1980 MHz.

        Args:
            batch: sequences per step.
            context: tokens per sequence.
            joules_per_token: energy of the arithmetic of one token, in J.
            exponent: how power rises with the share of time that streams.
        """
        seconds = self.seconds(batch, context)
        streaming = 1.0 - self.fixed_seconds / seconds
        return self.fixed_watts + self.stream_watts * float(streaming**exponent) + joules_per_token * batch / seconds


@dataclass(frozen=True)
class PrefillCurve:
    """Prefill of one architecture on one product.

    Attributes:
        cycles_per_token: SM clock cycles per prompt token.
        cycles_per_token_and_token: further cycles per prompt token for each token of the prompt (attention).
        watts: board power at 1980 MHz with no power limit, in W.
    """

    cycles_per_token: float
    cycles_per_token_and_token: float
    watts: float
