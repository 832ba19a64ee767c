"""One decoder layer quantized: floating-point and quantized activations side by side, Hessians, weights, the layer's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ecmfq_export.config import QuantConfig
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer
from ecmfq_export.quant.activation import fake_quantize_per_token
from ecmfq_export.quant.eaquant import CLIP_RULES, routing_divergence
from ecmfq_export.quant.faq import FaqSettings
from ecmfq_export.quant.hessian import WeightedHessian
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rounding import RoundingSettings, quantize_weight, relative_error
from ecmfq_export.quant.token_weights import Weighting, combine, cross_modal_scores, fusion_weight
from ecmfq_export.stages import attention_view, mlp_view
from ecmfq_export.stages.attention_view import LinearGroup
from ecmfq_export.stages.expert_chunks import ChunkSettings, RoutedBatch, round_down, round_gate_up
from ecmfq_export.stages.methods import resolve
from ecmfq_export.stages.ranks import ALONE, Ranks
from ecmfq_export.stages.recipes import attention_bits, mlp_bits, mlp_group_size
from ecmfq_export.stages.streams import ActivationStore, Batch, add_deepstack

SPREAD_TOKENS = 256
"""Tokens that every expert computes to estimate what its down projection reads from tokens that are not its own."""


@dataclass(frozen=True)
class Stream:
    """One side of the samples (search or held-out) and its activations.

    The store holds, by batch, ``fp`` and ``q``: the hidden states that enter the layer in the floating-point and in the
    quantized model.
    """

    batches: list[Batch]
    store: ActivationStore


class LayerQuantizer:
    """Quantizes one layer with each of several weightings.

    Args:
        layer: floating point, smoothing folded in.
        index: its number.
        train, heldout: streams; only `train` enters Hessians until :meth:`refit`.
        rho: float [2], weight of text and vision tokens.
        config: settings.
        ranks: processes that share the routed experts.

    Attributes:
        errors: by weighting, then by group (the attention's, ``gate_up``, ``down``): each expert's relative output error on the
            samples in the Hessians, float32 [E], see :func:`ecmfq_export.quant.rounding.relative_error`.
        tokens: int64 [E, 2], text and vision tokens in the Hessians that each expert computed; filled by the first weighting.
    """

    def __init__(
        self, layer: DecoderLayer, index: int, train: Stream, heldout: Stream, rho: torch.Tensor, config: QuantConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self._layer, self._index, self._rho, self._config = layer, index, rho, config
        self._parts, self._ranks = resolve(config), ranks
        self._cross = self._parts.cross_strength > 0.0
        self.errors: dict[Weighting, dict[str, torch.Tensor]] = {}
        self.tokens = torch.zeros(mlp_view.num_experts(layer), 2, dtype=torch.int64)
        self._train, self._heldout = train, heldout
        self._fitted: tuple[Stream, ...] = (train,)
        self._groups = attention_view.groups(layer.spec.attention)
        self._attention: dict[Weighting, dict[str, QTensor]] = {}
        self._attention_errors: dict[Weighting, dict[str, torch.Tensor]] = {}
        self._reference_pass()

    def quantize(self, weighting: Weighting) -> DecoderLayer:
        """The layer with every weight that its recipes name quantized under `weighting`."""
        attention = self._quantize_attention(weighting)
        layer = mlp_view.with_quantized(self._layer, attention)
        errors = self.errors[weighting] = dict(self._attention_errors[_attention_kind(weighting)])
        bits = mlp_bits(layer.spec, self._config)
        if bits is None:
            return layer
        if not bool(self.tokens.any()):
            self._count_tokens(layer, weighting)
        gate_up, down = mlp_view.stacked_weights(self._layer)
        shrinks = self._parts.rounding == "gptq" and self._parts.kappa > 0.0
        settings = ChunkSettings(self._settings(bits, mlp_group_size(layer.spec, self._config)), self._cross, shrinks,
                                 int(self._config.expert_memory_gb * 1e9), self._ranks)
        attended = layer

        def batches() -> Iterator[RoutedBatch]:
            for store, batch, x, reference in self._moe_inputs(attended, self._middle_name(weighting)):
                routed = mlp_view.route(attended, x, batch.valid_router_types)
                yield RoutedBatch(x, reference, routed, self._weights(weighting, batch, store, routed))

        quantized, errors["gate_up"] = round_gate_up(layer, gate_up, batches, settings)
        layer = mlp_view.with_quantized(layer, mlp_view.named_gate_up(layer, quantized))
        inputs = (x for _, _, x, _ in self._moe_inputs(attended, self._middle_name(weighting)))
        spread = self._spread(torch.cat(list(inputs))) if shrinks else None
        quantized, errors["down"] = round_down(layer, self._layer, down, batches, spread, settings)
        return mlp_view.with_quantized(layer, mlp_view.named_down(layer, quantized))

    def refit(self, weighting: Weighting, layer: DecoderLayer) -> DecoderLayer:
        """As :meth:`quantize`, of the same floating-point `layer`, which may have been dropped in between, with the held-out samples in
        the Hessians too: once a choice has been judged on them they need not be kept out, and more tokens make a better Hessian."""
        self._layer = layer
        self._fitted = (self._train, self._heldout)
        self._attention.clear()
        self.tokens.zero_()
        return self.quantize(weighting)

    def outputs(self, layer: DecoderLayer, weighting: Weighting, side: str, into: str) -> None:
        """Write the quantized layer's outputs of one side (``"train"`` or ``"heldout"``), DeepStack included, to ``{into}/{i}``."""
        stream = self._train if side == "train" else self._heldout
        for batch in stream.batches:
            middle = stream.store.get(f"{self._middle_name(weighting)}/{batch.index}")
            out = middle + layer.mlp(layer.moe_input(middle), batch.router_types)
            stream.store.put(f"{into}/{batch.index}", add_deepstack(out, self._index, batch, stream.store))

    def drop_weights(self) -> None:
        """Let go of the floating-point layer; nothing can be quantized any more, outputs can be asked for."""
        del self._layer

    def release(self) -> None:
        """Drop everything that was kept for this layer alone."""
        for stream in (self._train, self._heldout):
            for name in stream.store.names():
                if name.startswith("layer."):
                    stream.store.drop(name)

    def _reference_pass(self) -> None:
        """Floating-point attention context, residual stream between attention and MLP, phi, and the layer's output."""
        layer, strength = self._layer, self._config.fusion_lambda
        for stream in (self._train, self._heldout):
            for batch in stream.batches:
                hidden = stream.store.get(f"fp/{batch.index}")
                read, probs = attention_view.taps(layer, hidden, batch)
                context = read[self._groups[-1].name]
                middle = hidden + layer.linear(context, "self_attn.o_proj")
                out = middle + layer.mlp(layer.moe_input(middle), batch.router_types)
                stream.store.put(f"fp.next/{batch.index}", add_deepstack(out, self._index, batch, stream.store))
                if stream is self._train or self._parts.chooses_weighting:
                    scores = cross_modal_scores(probs, batch.types, batch.valid)
                    phi = fusion_weight(scores, batch.types, batch.valid, strength)
                    for name, value in (("phi", phi), ("context", context), ("middle", middle)):
                        stream.store.put(f"layer.{name}/{batch.index}", value)

    def _quantize_attention(self, weighting: Weighting) -> dict[str, QTensor]:
        """The attention's projections, group after group, each reading what the quantized groups before it computed; leaves the
        residual stream after attention in the store, under the name of the attention's weighting."""
        kind = _attention_kind(weighting)
        if kind in self._attention:
            return self._attention[kind]
        bits = attention_bits(self._config)
        weights: dict[str, QTensor] = {}
        self._attention_errors[kind] = {}
        layer = self._layer
        for group in self._groups:
            if group is self._groups[-1]:
                self._contexts(layer)
            if bits is not None:
                weights |= self._quantize_group(layer, group, kind, bits)
                layer = mlp_view.with_quantized(self._layer, weights)
        for stream in (self._train, self._heldout):
            for batch in stream.batches:
                context = stream.store.get(f"layer.context.q/{batch.index}")
                middle = stream.store.get(f"q/{batch.index}") + layer.linear(context, "self_attn.o_proj")
                stream.store.put(f"layer.middle.{kind}/{batch.index}", middle)
        self._attention[kind] = weights
        return weights

    def _contexts(self, layer: DecoderLayer) -> None:
        """What the output projection reads behind the quantized groups, kept because attention is the dear part of a layer."""
        for stream in (self._train, self._heldout):
            for batch in stream.batches:
                context = attention_view.tap(layer, stream.store.get(f"q/{batch.index}"), batch, self._groups[-1].name)
                stream.store.put(f"layer.context.q/{batch.index}", context)

    def _quantize_group(self, layer: DecoderLayer, group: LinearGroup, kind: Weighting, bits: int) -> dict[str, QTensor]:
        """One group of projections; in `layer` the groups before it are quantized."""
        weight = attention_view.stacked_weight(self._layer, group)
        hessian = WeightedHessian(1, weight.shape[-1], self._cross, "operators")
        for store, batch in self._in_hessians():
            if group is self._groups[-1]:
                x, reference = (store.get(f"layer.{name}/{batch.index}") for name in ("context.q", "context"))
            else:
                x, reference = (attention_view.tap(side, store.get(f"{stream}/{batch.index}"), batch, group.name)
                                for side, stream in ((layer, "q"), (self._layer, "fp")))
            self._add_dense(hessian, x, reference, kind, batch, store)
        settings = self._settings(bits, -1)
        settings = replace(settings, faq=replace(settings.faq, threads="operators"))
        if self._parts.align_routing and group is self._groups[-1] and isinstance(layer.spec.mlp, MoESpec):
            quantized = self._aligned(layer, group, weight, hessian, settings)
        else:
            quantized = quantize_weight(weight, hessian, settings)
        self._attention_errors[kind][group.name] = relative_error(weight, quantized, hessian.matrix, threads="operators")
        return attention_view.named_weights(self._layer, group, mlp_view.unstack(quantized))

    def _aligned(
        self, layer: DecoderLayer, group: LinearGroup, weight: torch.Tensor, hessian: WeightedHessian, settings: RoundingSettings
    ) -> QTensor:
        """The output projection by the clip rule whose router probabilities diverge least from the floating-point model's (EAQuant)."""
        tried = [quantize_weight(weight, hessian, replace(settings, clip=clip)) for clip in CLIP_RULES]
        return min(tried, key=lambda output: self._divergence(layer, group, output))

    def _divergence(self, layer: DecoderLayer, group: LinearGroup, output: QTensor) -> float:
        store = self._train.store
        tried = mlp_view.with_quantized(layer, attention_view.named_weights(self._layer, group, mlp_view.unstack(output)))
        logits: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for batch in self._train.batches:
            middle = store.get(f"q/{batch.index}") + tried.linear(store.get(f"layer.context.q/{batch.index}"), "self_attn.o_proj")
            for found, hidden in zip(logits, (store.get(f"layer.middle/{batch.index}"), middle), strict=True):
                found.append(layer.route(layer.moe_input(hidden[batch.valid]), batch.valid_router_types).logits)
        return routing_divergence(torch.cat(logits[0]), torch.cat(logits[1]), layer.spec.mlp.top_k)

    def _add_dense(
        self, hessian: WeightedHessian, x: torch.Tensor, reference: torch.Tensor, kind: Weighting, batch: Batch, store: ActivationStore
    ) -> None:
        valid = batch.valid
        rho, phi = self._rho[batch.types][valid], store.get(f"layer.phi/{batch.index}")[valid]
        ones = torch.ones_like(rho)
        hessian.add(fake_quantize_per_token(x[valid]), torch.zeros(len(rho), dtype=torch.int64), combine(kind, rho, ones, phi),
                    reference=reference[valid] if self._cross else None)

    def _in_hessians(self) -> Iterable[tuple[ActivationStore, Batch]]:
        """Every batch that enters Hessians, with the store that holds its activations."""
        return ((stream.store, batch) for stream in self._fitted for batch in stream.batches)

    def _moe_inputs(
        self, layer: DecoderLayer, middle: str
    ) -> Iterable[tuple[ActivationStore, Batch, torch.Tensor, torch.Tensor]]:
        """By batch in the Hessians: MLP inputs [T, d] of the quantized and of the floating-point model, without padding."""
        for store, batch in self._in_hessians():
            x, reference = (layer.moe_input(store.get(f"{name}/{batch.index}")[batch.valid]) for name in (middle, "layer.middle"))
            yield store, batch, x, reference

    def _weights(self, weighting: Weighting, batch: Batch, store: ActivationStore, routed: mlp_view.Routed) -> torch.Tensor:
        valid = batch.valid
        rho, phi = self._rho[batch.types][valid], store.get(f"layer.phi/{batch.index}")[valid]
        return combine(weighting, rho[routed.token], routed.gate, phi[routed.token], self._config.gate_power,
                       mlp_view.probability(routed))

    def _count_tokens(self, layer: DecoderLayer, weighting: Weighting) -> None:
        for _, batch, x, _ in self._moe_inputs(layer, self._middle_name(weighting)):
            routed = mlp_view.route(layer, x, batch.valid_router_types)
            types = batch.types[batch.valid][routed.token]
            self.tokens += torch.bincount(2 * routed.expert + types, minlength=self.tokens.numel()).view_as(self.tokens)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """A sample of all the layer's tokens."""
        generator = torch.Generator().manual_seed(self._config.seed * 104729 + self._index)
        return x[torch.randperm(len(x), generator=generator, device="cpu")[:SPREAD_TOKENS].to(x.device)]

    def _settings(self, bits: int, group_size: int) -> RoundingSettings:
        config, parts = self._config, self._parts
        # The output clip belongs to rounding to nearest, which reads nothing of FAQ's settings but the grid.
        clip = "mse" if parts.clip == "output" else parts.clip
        faq = FaqSettings(bits, group_size, config.percdamp, parts.kappa, parts.cross_strength, clip, config.activation_order)
        return RoundingSettings(parts.rounding, parts.clip, faq)

    def _middle_name(self, weighting: Weighting) -> str:
        return f"layer.middle.{_attention_kind(weighting)}"


def _attention_kind(weighting: Weighting) -> Weighting:
    """Attention has no router: what is left of a weighting without it."""
    kinds: dict[Weighting, Weighting] = {"g": "none", "rho_g": "rho", "rho_p": "rho"}
    return kinds.get(weighting, weighting)
