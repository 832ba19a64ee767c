"""The floating-point and the quantized model side by side in PyTorch, one decoder layer of each in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ecmfq_export.heap import give_back
from ecmfq_export.models.inputs import DecoderInputs, prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.rotated import residual_rotation
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer, Routing, decoder_logits, load_layer
from ecmfq_export.models.torch_math import chosen
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.compare import Difference

_BATCH_TOKENS = 4096
"""Padded tokens of a batch."""


@dataclass
class LayerRecord:
    """What is kept of one decoder layer over all prompts.

    Attributes:
        hidden: the layer's output, quantized against floating point, in the basis of the model before rotation.
        text, vision: [num_experts] int64, how often the floating-point model picks each expert for such tokens; None for a
            dense layer.
        picks: expert slots seen; same: how many of them the quantized model fills with the same expert.
    """

    hidden: Difference = field(default_factory=Difference)
    text: np.ndarray | None = None
    vision: np.ndarray | None = None
    picks: int = 0
    same: int = 0


@dataclass
class _Batch:
    rows: list[int]
    floating: DecoderInputs
    quantized: DecoderInputs
    float_hidden: torch.Tensor
    quantized_hidden: torch.Tensor
    valid: torch.Tensor


class Lockstep:
    """Runs prompts through both models.

    Attributes:
        layers: one record a decoder layer, over everything run so far with ``record=True``.
    """

    def __init__(self, floating: MoEVLM, quantized: MoEVLM) -> None:
        self._float, self._quantized = floating, quantized
        self._rotations = residual_rotation(floating), residual_rotation(quantized)
        self.layers = [LayerRecord() for _ in floating.spec.layers]

    @torch.no_grad()
    def answer_logits(
        self, samples: Sequence[ProcessedSample], *, record: bool = False,
        on_hidden: Callable[[int, int, np.ndarray], None] | None = None,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:  # fmt: skip
        """Logits [answer tokens, vocab] float32 that predict each sample's answer: floating point, quantized.

        Args:
            record: gather :attr:`layers`.
            on_hidden: gets (layer, sample, the quantized model's output of the layer [S, hidden]).
        """
        batches = self._batches(samples)
        for index in range(self._float.spec.num_layers):
            # One model's layer after the other's: only one of them is in memory.
            layer = load_layer(self._float, index)
            picked = []
            for batch in batches:
                batch.float_hidden, routing = _run(layer, batch.float_hidden, batch.floating)
                picked.append(None if routing is None else routing.topk_ids)
            del layer
            give_back()
            layer = load_layer(self._quantized, index)
            for batch, ids in zip(batches, picked, strict=True):
                batch.quantized_hidden, routing = _run(layer, batch.quantized_hidden, batch.quantized)
                if record:
                    self._record(index, batch, ids, None if routing is None else routing.topk_ids)
                if on_hidden is not None:
                    for i, row in enumerate(batch.rows):
                        on_hidden(index, row, batch.quantized_hidden[i, : samples[row].length].numpy())
            del layer
            give_back()
        out: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for logits, model, which in zip(out, (self._float, self._quantized), ("float_hidden", "quantized_hidden"), strict=True):
            logits.extend(_answers(model, samples, batches, which))
            give_back()
        return out

    def _batches(self, samples: Sequence[ProcessedSample]) -> list[_Batch]:
        groups = batch_rows([s.length for s in samples], _BATCH_TOKENS)
        sides = []
        for model in (self._float, self._quantized):
            # A tower can be as large as a decoder layer: each is read when its turn comes.
            vision = model.vision_module() if any(s.pixel_values is not None for s in samples) else None
            sides.append([prepare_inputs(model, [samples[row] for row in rows], vision=vision) for rows in groups])
            del vision
            give_back()  # a tower is hundreds of tensors from the heap
        batches = []
        for rows, floating, quantized in zip(groups, *sides, strict=True):
            valid = torch.arange(floating.inputs_embeds.shape[1]) < floating.lengths[:, None]
            batches.append(_Batch(rows, floating, quantized, floating.inputs_embeds, quantized.inputs_embeds, valid))
        return batches

    def _record(self, index: int, batch: _Batch, floating: torch.Tensor | None, quantized: torch.Tensor | None) -> None:
        """`floating` and `quantized` are the ids of the experts that each token takes [T, slots]; None for a dense layer."""
        record, valid = self.layers[index], batch.valid
        states = (batch.float_hidden[valid], batch.quantized_hidden[valid])
        plain = (h if r is None else r.invert(h) for h, r in zip(states, self._rotations, strict=True))
        record.hidden.add(*(h.numpy() for h in plain))
        mlp = self._float.spec.layers[index].mlp
        if floating is None or quantized is None or not isinstance(mlp, MoESpec):
            return
        flat = valid.reshape(-1)
        taken = [chosen(ids[:, : mlp.top_k], mlp.num_experts)[flat] for ids in (floating, quantized)]
        vision = batch.floating.token_types[valid].bool()
        for name, members in (("text", ~vision), ("vision", vision)):
            counts = taken[0][members].sum(0).numpy()
            before = getattr(record, name)
            setattr(record, name, counts if before is None else before + counts)
        record.picks += int(taken[0].sum())
        record.same += int((taken[0] & taken[1]).sum())


def batch_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that a batch's padded size stays within `budget` tokens (one prompt at least); similar lengths meet."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (lengths[r], r)):
        # Ascending, so the newest row is the longest one of its batch.
        if batches and lengths[row] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _run(layer: DecoderLayer, hidden: torch.Tensor, inputs: DecoderInputs) -> tuple[torch.Tensor, Routing | None]:
    """DecoderLayer.forward with DeepStack added, and the routing it took."""
    out, _ = layer.attend(layer.attention_input(hidden), inputs.cos, inputs.sin, inputs.mask)
    hidden = hidden + out
    x, routing = layer.moe_input(hidden), None
    if isinstance(layer.spec.mlp, MoESpec):
        tokens = x.reshape(-1, x.shape[-1])
        routing = layer.route(tokens, None if inputs.router_types is None else inputs.router_types.reshape(-1))
        hidden = hidden + layer.experts(tokens, routing).view(x.shape)
    else:
        hidden = hidden + layer.mlp(x, inputs.router_types)
    if layer.spec.index < len(inputs.deepstack):
        hidden = hidden + inputs.deepstack[layer.spec.index]
    return hidden, routing


def _answers(model: MoEVLM, samples: Sequence[ProcessedSample], batches: list[_Batch], which: str) -> list[np.ndarray]:
    rows: dict[int, torch.Tensor] = {}
    for batch in batches:
        hidden = getattr(batch, which)
        for i, row in enumerate(batch.rows):
            rows[row] = hidden[i, torch.from_numpy(np.flatnonzero(samples[row].answer_mask) - 1)]
    # One call, so that the output projection is read once.
    ordered = [rows[i] for i in range(len(samples))]
    logits = decoder_logits(model, torch.cat(ordered)[None])[0]
    return [part.numpy() for part in logits.split([len(r) for r in ordered])]
