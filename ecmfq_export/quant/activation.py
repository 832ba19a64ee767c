"""Dynamic per-token int8 quantization of activations: the definition that kernels, graphs and references share."""

from __future__ import annotations

import torch

from ecmfq_export.errors import UserError

TINY = 1e-30
"""Floor of a token's largest magnitude: a zero token gets a finite scale, far above float32's subnormals."""


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row symmetrically.

    ``scale = max(absmax, 1e-30) / 127`` and ``qx = round_half_even(x / scale)``, in [-127, 127].

    Args:
        x: floating [..., K]; computed in float32.

    Returns:
        qx int8 [..., K], scale float32 [..., 1].

    Raises:
        UserError: a NaN or an infinity in `x`.
    """
    x = x.float()
    scale = _token_scale(x)
    return torch.round(x / scale).clamp_(-127, 127).to(torch.int8), scale


def fake_quantize_per_token(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``qx * scale`` of :func:`quantize_per_token`, float32 [..., K], into `out` where it is given (which may be `x`)."""
    x = x.float()
    scale = _token_scale(x)
    return torch.div(x, scale, out=out).round_().clamp_(-127, 127).mul_(scale)


def _token_scale(x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return torch.full((*x.shape[:-1], 1), TINY / 127.0)
    # Two passes that make nothing: the magnitudes themselves would be a tensor of x's size.
    absmax = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    finite = torch.isfinite(absmax)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise UserError(f"activations hold NaN or infinity in {bad} of {absmax.numel()} tokens",
                        "run the floating-point model on the same input; if it is finite there, report this as a bug")
    return absmax.clamp_min(TINY) / 127.0
