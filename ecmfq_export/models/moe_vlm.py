"""A checkpoint under canonical names: every tensor accounted for before the first one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.checkpoint import Checkpoint, preview
from ecmfq_export.models.float_source import ExpertsSource, FloatSource, check_source
from ecmfq_export.models.quantized_reader import QuantizationInfo, QuantizedSource, read_quantization
from ecmfq_export.models.registry import Family, family_of, read_config
from ecmfq_export.models.spec import DecoderLayerSpec, GqaSpec, MlaSpec, ModelSpec, MoESpec
from ecmfq_export.quant.qtensor import QTensor

ExpertLayout = Literal["auto", "transformers", "published"]
"""How fused experts lie on disk: ``transformers`` [E, out, in] (what 5.x saves), ``published`` [E, in, out] (the Hub's
Qwen3-VL-MoE checkpoints), ``auto`` by shape."""

Source = FloatSource | ExpertsSource | QuantizedSource

_MAX_EXPERTS = 1 << 17
"""Five times as many as any model published so far has; a damaged count must not keep the machine naming modules."""


def open_model(path: Path, expert_layout: ExpertLayout = "auto") -> MoEVLM:
    """Open a Hugging Face directory, floating-point or quantized by us, reading its config and headers only.

    Raises:
        UnsupportedError: a family, config field or quantization that is not handled, or experts whose layout shapes cannot
            tell (then `expert_layout` must).
        CheckpointError: damaged files, or tensors missing, left over, or of a wrong shape or dtype.
    """
    path = Path(path)
    config = read_config(path)
    family = family_of(config)
    spec = family.read_spec(config)
    experts = sum(layer.mlp.total_experts for layer in spec.layers if isinstance(layer.mlp, MoESpec))
    if experts > _MAX_EXPERTS:
        raise CheckpointError(f"{path}: config.json implies {experts} experts in {len(spec.moe_layers)} layers", f"at most {_MAX_EXPERTS}")
    checkpoint = Checkpoint.open(path)
    shapes = decoder_shapes(spec) | family.vision_shapes(config)
    quantization = read_quantization(config, shapes, family.disk_name, spec.num_shared_experts)
    sources: dict[str, Source] = {}
    for name, shape in shapes.items():
        quantized = quantization.source(name) if quantization else None
        if quantized is not None:
            sources[name] = quantized
        elif name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
            parts = family.expert_parts(spec, name)
            sources[name] = ExpertsSource(parts, shape) if parts else _experts_source(
                checkpoint, family.disk_name(name), shape, expert_layout)
        else:
            sources[name] = FloatSource(family.disk_name(name), shape)
    _check_complete(checkpoint, sources, spec.tie_word_embeddings)
    for source in sources.values():
        if isinstance(source, QuantizedSource):
            source.check(checkpoint)
        else:
            check_source(checkpoint, source)
    return MoEVLM(path, config, family, spec, checkpoint, shapes, sources, quantization)


class MoEVLM:
    """A mixture-of-experts vision-language model on disk; build it with :func:`open_model`.

    Attributes:
        path: its directory.
        config: config.json.
        family: what is particular to its family.
        spec: what it is made of.
        checkpoint: its files.
        quantization: None for a floating-point checkpoint.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        family: Family,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        shapes: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, Source],
        quantization: QuantizationInfo | None,
    ) -> None:
        self.path = path
        self.config = config
        self.family = family
        self.spec = spec
        self.checkpoint = checkpoint
        self.quantization = quantization
        self._shapes = shapes
        self._sources = sources

    def names(self) -> list[str]:
        """Every canonical name, the vision tower's among them, decoder first and in layer order."""
        return list(self._shapes)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the memory layout of spec.py, quantized or not."""
        self._source(name)
        return self._shapes[name]

    def recipe(self, name: str) -> Literal["float", "w8a8", "w4a8"]:
        """How the weight `name` takes part in computation."""
        source = self._source(name)
        return source.recipe if isinstance(source, QuantizedSource) else "float"

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of :meth:`tensor`: as stored, float32 where quantized."""
        source = self._source(name)
        return torch.float32 if isinstance(source, QuantizedSource) else self.checkpoint.dtype(source.name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the memory layout of spec.py and its stored dtype; dequantized to float32 where quantized.

        Raises:
            CheckpointError: NaN or infinity in it, or its file changed since it was opened.
        """
        source = self._source(name)
        if isinstance(source, QuantizedSource):
            return source.load(self.checkpoint).dequantize()
        return source.load(self.checkpoint)

    def tensor_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """``tensor(name)[start:stop]`` reading only these rows of the first axis (experts, vocabulary); errors alike."""
        source = self._source(name)
        if isinstance(source, QuantizedSource):
            return source.load(self.checkpoint, start, stop).dequantize()
        return source.load_rows(self.checkpoint, start, stop)

    def float_source(self, name: str) -> FloatSource | ExpertsSource:
        """Where a floating tensor lies on disk.

        Raises:
            ValueError: it is quantized.
        """
        source = self._source(name)
        if isinstance(source, QuantizedSource):
            raise ValueError(f"'{name}' is quantized")
        return source

    def disk_part(self, name: str, part: str) -> torch.Tensor:
        """The tensor `part` on disk, one of those that make the floating tensor `name` (``float_source(name).disk_shapes()``)."""
        return self.checkpoint.load(part)

    def qtensor(self, name: str, start: int | None = None, stop: int | None = None) -> QTensor:
        """The quantized weight; experts stacked [E, N, K], of which `start` to `stop` may be chosen.

        Raises:
            CheckpointError: values outside the integer grid, or scales that are not finite and positive.
            ValueError: its recipe is ``float``.
        """
        source = self._source(name)
        if not isinstance(source, QuantizedSource):
            raise ValueError(f"'{name}' is not quantized")
        return source.load(self.checkpoint, start, stop)

    def vision_module(self) -> torch.nn.Module:
        """transformers' own vision tower with its weights, float32, in eval mode.

        ``module(patches, grid_thw=...)`` gives ``pooler_output`` [merged patches, hidden_size] and ``deepstack_features``.
        """
        module = self.family.build_vision(self.config)
        state = {name.removeprefix("vision."): self.tensor(name).float() for name in self._shapes if name.startswith("vision.")}
        module.load_state_dict(self.family.vision_state(module, state), assign=True)
        self.family.finish_vision(module)
        return module.requires_grad_(False).eval()

    def _source(self, name: str) -> Source:
        try:
            return self._sources[name]
        except KeyError:
            raise ValueError(f"'{name}' is no canonical name of this model; names() lists them") from None


def decoder_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of everything but the vision tower, in layer order."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for layer in spec.layers:
        shapes.update({f"layers.{layer.index}.{suffix}": shape for suffix, shape in layer_shapes(spec, layer).items()})
    shapes["norm.weight"] = (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_shapes(spec: ModelSpec, layer: DecoderLayerSpec) -> dict[str, tuple[int, ...]]:
    """Canonical suffixes (after ``layers.{i}.``) and shapes of one decoder layer."""
    hidden, attention, mlp = spec.hidden_size, layer.attention, layer.mlp
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    parts = _gqa_shapes(attention, hidden) if isinstance(attention, GqaSpec) else _mla_shapes(attention, hidden)
    shapes |= {f"self_attn.{name}": shape for name, shape in parts.items()}
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if isinstance(mlp, MoESpec):
        shapes["mlp.router.weight"] = (mlp.num_experts, hidden)
        if mlp.router.selection_bias:
            shapes["mlp.router.selection_bias"] = (mlp.num_experts,)
        shapes["mlp.experts.gate_up_proj"] = (mlp.total_experts, 2 * mlp.intermediate_size, hidden)
        shapes["mlp.experts.down_proj"] = (mlp.total_experts, hidden, mlp.intermediate_size)
    else:
        shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (mlp.intermediate_size, hidden)
        shapes["mlp.down_proj.weight"] = (hidden, mlp.intermediate_size)
    return shapes


def _gqa_shapes(spec: GqaSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
        shapes[f"{name}_proj.weight"] = (rows, columns)
        if spec.bias:
            shapes[f"{name}_proj.bias"] = (rows,)
    if spec.qk_norm:
        shapes["q_norm.weight"] = shapes["k_norm.weight"] = (spec.head_dim,)
    return shapes


def _mla_shapes(spec: MlaSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    query, rank = spec.num_heads * spec.qk_head_dim, spec.q_lora_rank
    shapes: dict[str, tuple[int, ...]] = {"q_proj.weight": (query, hidden)} if rank is None else {
        "q_a_proj.weight": (rank, hidden), "q_a_norm.weight": (rank,), "q_b_proj.weight": (query, rank)}
    shapes["kv_a_proj.weight"] = (spec.kv_lora_rank + spec.qk_rope_head_dim, hidden)
    shapes["kv_a_norm.weight"] = (spec.kv_lora_rank,)
    shapes["kv_b_proj.weight"] = (spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim), spec.kv_lora_rank)
    shapes["o_proj.weight"] = (hidden, spec.num_heads * spec.v_head_dim)
    return shapes


def _experts_source(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], layout: ExpertLayout) -> FloatSource:
    if layout != "auto" or name not in checkpoint:
        return FloatSource(name, shape, layout == "published")
    if shape[1] == shape[2]:
        raise UnsupportedError(
            f"'{name}' {list(shape)} has square experts, so its shape does not tell whether they are transposed on disk",
            "say expert_layout='transformers' (saved by transformers 5) or 'published' (as on the Hugging Face Hub)",
        )
    transposed = (shape[0], shape[2], shape[1])
    return FloatSource(name, shape, checkpoint.shape(name) == transposed)


def _check_complete(checkpoint: Checkpoint, sources: Mapping[str, Source], tied: bool) -> None:
    wanted: set[str] = set()
    for source in sources.values():
        wanted.update(source.disk_names() if isinstance(source, QuantizedSource) else source.disk_shapes())
    there = set(checkpoint.names())
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    if missing:
        hint = f"; {len(extra)} tensors are there that belong nowhere: {preview(extra)}" if extra else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of {len(wanted)} tensors: {preview(missing)}{hint}",
            "the checkpoint is incomplete or its config.json is another model's",
        )
    if extra:
        tie = tied and "lm_head.weight" in extra
        raise CheckpointError(
            f"{checkpoint.path} has {len(extra)} tensors that no part of the model takes: {preview(extra)}",
            "config.json says tie_word_embeddings = true; set it to false if lm_head.weight is a matrix of its own"
            if tie
            else "its config.json is another model's, or this model has parts that are not handled",
        )


__all__ = [
    "ExpertLayout",
    "MoEVLM",
    "decoder_shapes",
    "layer_shapes",
    "open_model",
]
