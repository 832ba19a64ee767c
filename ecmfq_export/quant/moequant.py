"""MoEQuant (arXiv 2505.03804): expert-balanced calibration samples and affinity-guided quantization.

AGQ weighs each token's part of an expert's Hessian by its gate, ``H_e = sum_t g_te x_t x_t^T`` (the authors' code
multiplies inputs by the square root of the routing score): that is the weighting ``g`` of :mod:`token_weights` in GPTQ.

EBSS lets the model generate its own calibration text, branch by branch, keeping the branches with the least
``log perplexity + sigma / tau``, sigma the standard deviation of the experts' usage and tau = 1.2. A vision-language model cannot
generate its images, so here the same criterion chooses samples from the pool, one after the other.
"""

from __future__ import annotations

import torch

from ecmfq_export.errors import UserError

TAU = 1.2


def balanced_samples(tokens: torch.Tensor, loss: torch.Tensor, predicted: torch.Tensor, count: int, tau: float = TAU) -> list[int]:
    """Greedily pick `count` samples with the least ``log perplexity + sigma / tau`` of the selection; ties to the smaller index.

    sigma is the standard deviation over experts of their usage relative to the average, averaged over layers.

    Args:
        tokens: int64 [N, L, E], tokens of each sample routed to each expert.
        loss: float [N], sum of the negative log likelihoods of the sample's text tokens, in nats.
        predicted: int64 [N], how many text tokens that is.

    Raises:
        UserError: NaN or infinity in `loss`.
    """
    if not bool(torch.isfinite(loss).all()):
        raise UserError("the pool's perplexities hold NaN or infinity", "check that the floating-point model is finite on the pool")
    usage, losses, lengths = tokens.float(), loss.double(), predicted.double()
    gathered, total, length = torch.zeros_like(usage[0]), 0.0, 0.0
    available = torch.ones(len(tokens), dtype=torch.bool)
    picked: list[int] = []
    for _ in range(min(count, len(tokens))):
        criterion = (total + losses) / (length + lengths).clamp_min(1.0) + usage_deviation(gathered + usage).double() / tau
        best = int(criterion.masked_fill(~available, float("inf")).argmin())
        picked.append(best)
        available[best] = False
        gathered, total, length = gathered + usage[best], total + float(losses[best]), length + float(lengths[best])
    return picked


def usage_deviation(tokens: torch.Tensor) -> torch.Tensor:
    """sigma of token counts [..., L, E]: standard deviation over experts of count / mean, averaged over layers."""
    relative = tokens.float() / tokens.float().mean(-1, keepdim=True).clamp_min(1e-30)
    return relative.std(-1, correction=0).mean(-1)
