"""MBQ's gamma: how much more the loss depends on a text token than on a vision token (arXiv 2412.19509)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import load_head, load_layer
from ecmfq_export.progress import Progress
from ecmfq_export.quant.token_weights import TEXT, VISION
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.stages.resources import DEFAULT, Resources
from ecmfq_export.stages.streams import ActivationStore, add_deepstack, advance, prepare_batches

NUM_SAMPLES = 32


def measure_gamma(
    model: MoEVLM, samples: Sequence[ProcessedSample], progress: Progress, resources: Resources = DEFAULT,
    scratch: Path | None = None,
) -> tuple[float, dict[str, object]]:
    """Median over layers of mean |dL/d output| of text tokens over that of vision tokens, L the loss of the answers.

    A layer's output is its MLP's; the report also has the ratio at its attention's output, which MBQ uses for the attention.

    At most 32 samples that have an image and an answer. Gradients go back one layer at a time, each layer's forward pass run
    again from its stored input, so that memory stays that of one layer.

    Returns:
        gamma, and for the report the ratios of each layer, ``gamma_by_layer`` (MLP) and ``gamma_by_layer_attention``; None where
        no answer depends on a vision token.

    Raises:
        UserError: no sample has both an image and an answer, or no gradient reaches a vision token.
    """
    measurable = (s for s in samples if s.pixel_values is not None and s.answer_mask.any())
    usable = list(itertools.islice(measurable, NUM_SAMPLES))
    if not usable:
        raise UserError("gamma_text = 0 measures loss gradients, but no calibration sample has both an image and an answer",
                        "give answers, or set gamma_text, e.g. to 10")
    layers = model.spec.num_layers
    sums = torch.zeros(2, layers, 2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    with ActivationStore(resources.activation_bytes, scratch) as store:
        batches = list(prepare_batches(model, usable, store, stream="input.0"))
        for index in range(layers):
            advance(load_layer(model, index), index, batches, store, f"input.{index}", into=f"input.{index + 1}")
        head = load_head(model)
        for batch in batches:
            hidden = store.get(f"input.{layers}/{batch.index}").clone().requires_grad_()
            length = batch.types.shape[1]
            ids = _padded([usable[i].input_ids for i in batch.samples], length)[:, 1:]
            answers = _padded([usable[i].answer_mask for i in batch.samples], length)[:, 1:].bool()
            logits = head(hidden)[:, :-1]
            loss = F.cross_entropy(logits[answers], ids[answers], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, hidden)
            store.put(f"gradient/{batch.index}", gradient)
            for modality in (TEXT, VISION):
                counts[modality] += int(((batch.types == modality) & batch.valid).sum())
        del head  # as large as the vocabulary
        for index in progress.track(reversed(range(layers)), "measure text and vision gradients", layers):
            layer = load_layer(model, index)
            for batch in batches:
                gradient = store.get(f"gradient/{batch.index}")
                hidden = store.get(f"input.{index}/{batch.index}").clone().requires_grad_()
                with torch.enable_grad():
                    attended, _ = layer.attend(layer.attention_input(hidden), batch.cos, batch.sin, batch.mask)
                    middle = hidden + attended
                    out = add_deepstack(middle + layer.mlp(layer.moe_input(middle), batch.router_types), index, batch, store)
                    earlier, inside = torch.autograd.grad(out, (hidden, middle), gradient)
                for modality in (TEXT, VISION):
                    rows = (batch.types == modality) & batch.valid
                    for place, values in enumerate((gradient, inside)):
                        sums[place, index, modality] += values[rows].abs().mean(-1).double().sum()
                store.put(f"gradient/{batch.index}", earlier)
            del layer  # before the next one is read
    ratios = (sums[..., TEXT] / counts[TEXT]) / (sums[..., VISION] / counts[VISION])
    # After the last attention no answer depends on a vision token: that layer has no ratio.
    known = ratios[0][torch.isfinite(ratios[0])]
    if not len(known):
        raise UserError("the loss depends on no vision token in any layer", "set gamma_text, e.g. to 10")
    mlp, attention = ([ratio if ratio < float("inf") else None for ratio in row] for row in ratios.tolist())
    return float(known.median()), {"gamma_by_layer": mlp, "gamma_by_layer_attention": attention, "gamma_samples": len(usable)}


def _padded(rows: list[np.ndarray], length: int) -> torch.Tensor:
    out = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(np.asarray(row, np.int64))
    return out
