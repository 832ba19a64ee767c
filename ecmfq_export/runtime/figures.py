"""What a run cost: time to the first token, tokens a second, memory."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

from ecmfq_export.runtime.generate import Generation, Session


@dataclass(frozen=True)
class Figures:
    """Of one prompt.

    Attributes:
        prompt_tokens, new_tokens: the end-of-turn token counts as new.
        first_token_seconds: vision tower and prefill; reading the images is not included.
        tokens_per_second: while decoding, the first token not counted; 0 where there was only that one.
        peak_bytes: largest resident memory of this process so far, weights included where the CPU computes.
        device_bytes: weights, scratch and buffers on the GPU; 0 where the CPU computes.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    peak_bytes: int
    device_bytes: int

    def __str__(self) -> str:
        rate = f"then {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else "no further token"
        device = f", {self.device_bytes / 2**20:.0f} MiB on the GPU" if self.device_bytes else ""
        return (f"prompt {self.prompt_tokens} tokens, first token after {self.first_token_seconds:.3f} s; {self.new_tokens} tokens, "
                f"{rate}; memory: {self.peak_bytes / 2**20:.0f} MiB peak{device}")


def figures(generation: Generation, session: Session) -> Figures:
    """Figures of a finished generation, and of this process as it is now."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Figures(generation.prompt_tokens, len(generation.token_ids), generation.first_token_seconds, generation.tokens_per_second,
                   peak, int(getattr(session, "device_bytes", 0)))
