"""How much each token counts: ``w_te = rho_m(t) * g_te^q * phi_t``.

rho balances text against vision (MBQ, arXiv 2412.19509), g is the expert's final combine weight, phi the token's part in
cross-modal attention. Every weight is a factor on squared or absolute output errors, never on activations.
"""

from __future__ import annotations

from typing import Literal

import torch

Weighting = Literal["none", "rho", "g", "rho_g", "rho_p", "rho_g_phi"]
WEIGHTINGS: tuple[Weighting, ...] = ("rho_g", "none", "rho", "rho_g_phi")
"""What FAQ chooses from, what it takes unless another one is clearly better first; ``g`` alone is MoEQuant's and ``rho_p``, with the
router's probability, VEQ-MA's."""

TEXT, VISION = 0, 1

SINK_FACTOR = 20.0
"""A token whose cross-modal attention exceeds this many medians of its modality is a sink, not content."""

MASS_LIMIT = 4.0


def text_weight(gamma: float, num_text: int, num_vision: int) -> float:
    """rho of text tokens (vision has 1): ``clip(gamma, 1, 32)``, then total text:vision mass brought within [1/4, 4].

    Args:
        gamma: ratio of mean absolute loss gradients, text over vision.
        num_text, num_vision: tokens of each kind; with none of a kind there is nothing to balance.
    """
    rho = min(max(gamma, 1.0), 32.0)
    if num_text and num_vision:
        ratio = num_vision / num_text
        rho = min(max(rho, ratio / MASS_LIMIT), ratio * MASS_LIMIT)
    return rho


def cross_modal_scores(probs: torch.Tensor, types: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Each token's cross-modal attention.

    A vision token gets the mean, over heads and the text rows that can see it, of its attention probability; a text token gets
    the sum over vision columns of its own row, averaged over heads.

    Args:
        probs: float [B, heads, S, S], causal attention probabilities (rows are queries).
        types: int [B, S], 0 text, 1 vision.
        valid: bool [B, S], False at padding.

    Returns:
        float32 [B, S], 0 at padding.
    """
    mean = probs.float().mean(1)
    text = ((types == TEXT) & valid).float()
    vision = ((types == VISION) & valid).float()
    given = (mean * vision.unsqueeze(1)).sum(-1) * text
    length = types.shape[1]
    sees = torch.tril(torch.ones(length, length)) * text.unsqueeze(2)
    received = (mean * sees).sum(1) / sees.sum(1).clamp_min(1.0) * vision
    return given + received


def vision_attention_mass(probs: torch.Tensor, types: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Share of text rows' attention that goes to vision columns, averaged over heads and text rows: float32 [B]."""
    given = cross_modal_scores(probs, types, valid)
    text = (types == TEXT) & valid
    return (given * text).sum(-1) / text.sum(-1).clamp_min(1)


def fusion_weight(scores: torch.Tensor, types: torch.Tensor, valid: torch.Tensor, strength: float) -> torch.Tensor:
    """phi = (1 - lambda) + lambda * clip(normalized score, 1/4, 4), sample by sample.

    Scores are normalized to mean 1 within each modality of a sample, without sinks (:data:`SINK_FACTOR`), and clipped at the
    upper Tukey fence (third quartile + 1.5 interquartile ranges). Sinks and samples of one modality get the neutral 1: their
    attention says nothing about fusion.

    Args:
        scores: float [B, S] of :func:`cross_modal_scores`.
        strength: lambda in [0, 1].

    Returns:
        float32 [B, S], 0 at padding.
    """
    phi = torch.ones_like(scores)
    mixed = ((types == TEXT) & valid).any(1) & ((types == VISION) & valid).any(1)
    for modality in (TEXT, VISION):
        inside = (types == modality) & valid & mixed.unsqueeze(1)
        values = torch.where(inside, scores, torch.full_like(scores, float("nan")))
        median = values.nanmedian(1, keepdim=True).values
        content = inside & ~(scores > SINK_FACTOR * median.nan_to_num(float("inf")).clamp_min(1e-12))
        values = torch.where(content, scores, torch.full_like(scores, float("nan")))
        values = values / values.nanmean(1, keepdim=True).clamp_min(1e-12)
        low, high = torch.nanquantile(values, torch.tensor([0.25, 0.75]), dim=1, keepdim=True)
        clipped = torch.minimum(values, high + 1.5 * (high - low)).clamp(0.25, 4.0)
        # A modality whose scores are all zero (text that comes before every image) is not down-weighted as a whole.
        usable = content & (scores.mul(content).sum(1, keepdim=True) > 0)
        phi = torch.where(usable, (1.0 - strength) + strength * clipped, phi)
    return phi * valid


def combine(
    kind: Weighting, rho: torch.Tensor, gate: torch.Tensor, phi: torch.Tensor, power: float = 1.0,
    probability: torch.Tensor | None = None,
) -> torch.Tensor:
    """w of one weighting.

    Args:
        rho, gate, phi: aligned float [P].
        power: q, of the gate.
        probability: float [P], the router's score of the pair's expert before renormalization; needed for ``rho_p`` only.
    """
    if kind == "none":
        return torch.ones_like(rho)
    if kind == "rho_p":
        if probability is None:
            raise ValueError("weighting rho_p needs the router's probabilities")
        return rho * probability
    weight = torch.ones_like(rho) if kind == "g" else rho
    if kind in ("g", "rho_g", "rho_g_phi"):
        weight = weight * gate.pow(power)
    return weight * phi if kind == "rho_g_phi" else weight
