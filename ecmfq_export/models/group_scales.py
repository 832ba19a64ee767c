"""Two-level scales in one: ``weight_scale[n, g] = scale[n] * multiplier[n, g]``, and back.

compressed-tensors knows one floating scale a group. The product of a float16 scale and a multiplier of 7 bits needs 18 bits,
so float32 holds it exactly, and the two factors can be found again up to a common divisor of a channel's multipliers.
"""

from __future__ import annotations

import torch

from ecmfq_export.errors import CheckpointError

_LARGEST = 127


def join_scales(scale: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """scale float32 [..., N] (float16 values) and multiplier int8 [..., N, G] to float32 [..., N, G], exactly."""
    return scale.float().unsqueeze(-1) * multiplier.float()


def split_scales(joined: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`join_scales`, with the smallest multipliers whose channel scale is a float16 value.

    Args:
        joined: [N, G], positive.
        name: of the tensor, for errors.

    Returns:
        scale float32 [N], multiplier int8 [N, G]; their product is `joined` bit for bit.

    Raises:
        CheckpointError: scales that are no float16 value times integers of at most 127.
    """
    wide = joined.double()
    if not bool((torch.isfinite(wide) & (wide > 0)).all()):
        raise CheckpointError(f"'{name}' holds scales that are not finite and positive")
    # In units of 2^(exponent - 24) of a channel's smallest scale, every float32 here is an integer below 2^31.
    unit = torch.exp2(torch.frexp(wide.amin(-1, keepdim=True)).exponent.double() - 24)
    counts = (wide / unit).round()
    if not bool((counts < 2**31).all()):
        raise CheckpointError(f"'{name}' holds scales of one channel that differ by more than a factor of {_LARGEST}")
    counts = counts.long()
    divisor = counts[:, 0]
    for group in range(1, counts.shape[1]):
        divisor = torch.gcd(divisor, counts[:, group])
    multiplier, largest = counts // divisor[:, None], divisor.double() * unit[:, 0]
    scale, factor = torch.zeros_like(largest), torch.ones_like(divisor)
    for extra in range(1, _LARGEST + 1):
        candidate = (largest / extra).half().double()
        fits = (scale == 0) & (candidate * extra == largest) & (multiplier.amax(-1) * extra <= _LARGEST)
        scale, factor = torch.where(fits, candidate, scale), torch.where(fits, torch.tensor(extra), factor)
    if not bool((scale > 0).all()):
        row = int((scale == 0).nonzero()[0])
        raise CheckpointError(
            f"'{name}': the group scales of channel {row} are no float16 value times integers up to {_LARGEST}",
            "only two-level scales run on integer kernels; quantize with ecmfq-export, or with one scale a channel",
        )
    return scale.float(), (multiplier * factor[:, None]).to(torch.int8)
