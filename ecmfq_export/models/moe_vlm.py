"""A checkpoint under canonical names: every tensor accounted for before the first one is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.checkpoint import Checkpoint, preview
from ecmfq_export.models.float_source import ExpertPart, ExpertsSource, FloatSource, JoinedSource, check_one_half_type, check_source
from ecmfq_export.models.quantized_reader import QuantizationInfo, QuantizedSource, read_quantization
from ecmfq_export.models.registry import Family, family_of, read_config
from ecmfq_export.models.spec import DecoderLayerSpec, GqaSpec, MlaSpec, ModelSpec, MoESpec
from ecmfq_export.models.weight_only_config import WeightOnlyForm, read_weight_only
from ecmfq_export.models.weight_only_source import WeightOnlySource, linear_parts, weight_only_source
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.weight_only import WeightOnly, of_qtensor

ExpertLayout = Literal["auto", "transformers", "published"]
"""How fused experts lie on disk: ``transformers`` [E, out, in] (what 5.x saves), ``published`` [E, in, out] (the Hub's
Qwen3-VL-MoE checkpoints), ``auto`` by shape."""

Source = FloatSource | ExpertsSource | JoinedSource | QuantizedSource | WeightOnlySource

_MAX_EXPERTS = 1 << 17
"""Five times as many as any model published so far has; a damaged count must not keep the machine naming modules."""


def open_model(path: Path, expert_layout: ExpertLayout = "auto") -> MoEVLM:
    """Open a Hugging Face directory, reading its config and headers only: floating-point, quantized with its activations
    (compressed-tensors), or weight-only int4 of another quantizer (GPTQ, AWQ, compressed-tensors).

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
    form = read_weight_only(config)
    quantization = None if form else read_quantization(config, shapes, family.disk_name, spec.num_shared_experts)
    sources: dict[str, Source] = {}
    for name, shape in shapes.items():
        quantized = quantization.source(name) if quantization else None
        if quantized is not None:
            sources[name] = quantized
        else:
            modules = linear_parts(family, spec, name, shape) if form else ()
            sources[name] = _float_source(checkpoint, family, spec, name, shape, expert_layout, modules)
            if form and modules:
                sources[name] = weight_only_source(form, checkpoint, modules, shape, sources[name]) or sources[name]
    unused = {name: part for name in checkpoint.names() for part in family.unused if name.startswith(part)}
    _check_complete(checkpoint, sources, unused, spec.tie_word_embeddings)
    for source in sources.values():
        if isinstance(source, QuantizedSource | WeightOnlySource):
            source.check(checkpoint)
        else:
            check_source(checkpoint, source)
    floats = [source for source in sources.values() if isinstance(source, FloatSource | ExpertsSource | JoinedSource)]
    check_one_half_type(checkpoint, [disk for source in floats for disk in source.disk_shapes()])
    return MoEVLM(path, config, family, spec, checkpoint, shapes, sources, quantization, tuple(unused), form)


class MoEVLM:
    """A mixture-of-experts vision-language model on disk; build it with :func:`open_model`.

    Attributes:
        path: its directory.
        config: config.json.
        family: what is particular to its family.
        spec: what it is made of.
        checkpoint: its files.
        quantization: None for a checkpoint that computes in floating point.
        unused: tensors on disk that text and images do not need (``Family.unused``), which nothing here reads.
        weight_only: how another quantizer's int4 weights are stored, None without such. They compute in floating point: every
            method takes them dequantized, but :meth:`weight_only_tensor`.
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
        unused: tuple[str, ...] = (),
        weight_only: WeightOnlyForm | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.family = family
        self.spec = spec
        self.checkpoint = checkpoint
        self.quantization = quantization
        self.unused = unused
        self.weight_only = weight_only
        self._shapes = shapes
        self._sources = sources

    def names(self) -> list[str]:
        """Every canonical name, the vision tower's among them, decoder first and in layer order."""
        return list(self._shapes)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def unused_parts(self) -> dict[str, str]:
        """What of the checkpoint is not run, by prefix of its names: what it is for, and how much it is; empty where all of it is run."""
        parts: dict[str, str] = {}
        for prefix, purpose in self.family.unused.items():
            names = [name for name in self.unused if name.startswith(prefix)]
            if names:
                size = sum(self.checkpoint.entry(name).num_bytes for name in names)
                parts[f"{prefix}*"] = f"{purpose}: {len(names)} tensors, {size / 1e6:.1f} MB"
        return parts

    def unused_note(self, what: str) -> str:
        """A line that names :meth:`unused_parts` and says `what` happens to them; empty where all is run."""
        parts = "; ".join(f"{prefix} ({purpose})" for prefix, purpose in self.unused_parts().items())
        return f"text and images do not need {parts}: {what}" if parts else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the memory layout of spec.py, quantized or not."""
        self._source(name)
        return self._shapes[name]

    def recipe(self, name: str) -> Literal["float", "w8a8", "w4a8"]:
        """How the weight `name` takes part in computation."""
        source = self._source(name)
        return source.recipe if isinstance(source, QuantizedSource) and self.quantization is not None else "float"

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of :meth:`tensor`: as stored, float32 where quantized."""
        source = self._source(name)
        return torch.float32 if isinstance(source, QuantizedSource | WeightOnlySource) else self.checkpoint.dtype(source.name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the memory layout of spec.py and its stored dtype; dequantized to float32 where quantized.

        Raises:
            CheckpointError: NaN or infinity in it, or its file changed since it was opened.
        """
        source = self._source(name)
        if isinstance(source, QuantizedSource):
            return source.load(self.checkpoint).dequantize()
        return source.dequantize(self.checkpoint) if isinstance(source, WeightOnlySource) else source.load(self.checkpoint)

    def tensor_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """``tensor(name)[start:stop]`` reading only these rows of the first axis (experts, vocabulary); errors alike."""
        source = self._source(name)
        if isinstance(source, QuantizedSource):
            return source.load(self.checkpoint, start, stop).dequantize()
        if isinstance(source, WeightOnlySource):
            return source.dequantize(self.checkpoint, start, stop)
        return source.load_rows(self.checkpoint, start, stop)

    def float_source(self, name: str) -> FloatSource | ExpertsSource | JoinedSource:
        """Where a floating tensor lies on disk, or would lie where it is weight-only.

        Raises:
            ValueError: it is quantized.
        """
        source = self._source(name)
        if isinstance(source, QuantizedSource):
            raise ValueError(f"'{name}' is quantized")
        return source.float_source if isinstance(source, WeightOnlySource) else source

    def disk_part(self, name: str, part: str) -> torch.Tensor:
        """The tensor `part` on disk, one of those that make the floating tensor `name` (``float_source(name).disk_shapes()``)."""
        source = self._source(name)
        if isinstance(source, WeightOnlySource) and isinstance(source.float_source, ExpertsSource):
            return source.float_source.part(part, lambda start, stop: source.dequantize(self.checkpoint, start, stop))
        return self.checkpoint.load(part)

    def has_int4(self, name: str) -> bool:
        """Whether :meth:`weight_only_tensor` gives the weight `name`."""
        source = self._source(name)
        return isinstance(source, WeightOnlySource) or isinstance(source, QuantizedSource) and source.recipe == "w4a8"

    def stored_bytes(self, name: str) -> int:
        """Bytes on disk of the tensors that hold `name`, scales among them."""
        source = self._source(name)
        parts = source.disk_shapes() if isinstance(source, FloatSource | ExpertsSource | JoinedSource) else source.disk_names()
        return sum(self.checkpoint.entry(part).num_bytes for part in parts)

    def has_int8(self, name: str) -> bool:
        """Whether :meth:`qtensor` gives the weight `name` with 8 bits."""
        source = self._source(name)
        return isinstance(source, QuantizedSource) and source.recipe == "w8a8"

    def with_float_activations(self) -> MoEVLM:
        """The same weights computing in floating point, each dequantized (W4A16, W8A16): what a weight-only graph is compared with.

        Raises:
            UnsupportedError: down projections that read rotated inputs, which only the integer reference applies.
        """
        for name in self.quantization.blocks if self.quantization is not None else ():
            raise UnsupportedError(f"'{name}' reads its inputs behind a Hadamard", "quantize with rotate = 'residual' or 'none'")
        return MoEVLM(self.path, self.config, self.family, self.spec, self.checkpoint, self._shapes, self._sources, None, self.weight_only)

    def weight_only_tensor(self, name: str, start: int | None = None, stop: int | None = None) -> WeightOnly:
        """An int4 weight for floating-point activations; experts stacked [E, N, K], of which `start` to `stop` may be chosen.

        Raises:
            CheckpointError: damaged integers, scales or group indices.
            UnsupportedError: an expert's projections of the same inputs with columns in different orders.
            ValueError: not :meth:`has_int4`.
        """
        source = self._source(name)
        if isinstance(source, WeightOnlySource):
            return source.load(self.checkpoint, start, stop)
        return of_qtensor(self.qtensor(name, start, stop))

    def qtensor(self, name: str, start: int | None = None, stop: int | None = None) -> QTensor:
        """The quantized weight; experts stacked [E, N, K], of which `start` to `stop` may be chosen.

        Raises:
            CheckpointError: values outside the integer grid, or scales that are not finite and positive.
            ValueError: it is not quantized by us.
        """
        source = self._source(name)
        if not isinstance(source, QuantizedSource):
            raise ValueError(f"'{name}' is not quantized")
        return source.load(self.checkpoint, start, stop)

    def vision_module(self) -> torch.nn.Module:
        """transformers' own vision tower with its weights, float32, in eval mode.

        ``module(patches, grid_thw=...)`` gives ``pooler_output`` [merged patches, hidden_size] and, where the tower has some,
        ``deepstack_features``.
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
        shapes["mlp.router.weight"] = (mlp.router_rows, hidden)
        if mlp.router.selection_bias:
            shapes["mlp.router.selection_bias"] = (mlp.router_rows,)
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
        if spec.output_bias if name == "o" else spec.bias:
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


def _float_source(
    checkpoint: Checkpoint, family: Family, spec: ModelSpec, name: str, shape: tuple[int, ...], layout: ExpertLayout,
    modules: tuple[ExpertPart, ...],
) -> FloatSource | ExpertsSource | JoinedSource:
    """Where a tensor lies in floating point; `modules` are those of its linear weights where a quantizer took experts apart."""
    disk = family.disk_name(name)
    if not name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
        published = family.published_name(disk)
        return family.joined(spec, name) or FloatSource(published if disk not in checkpoint and published in checkpoint else disk, shape)
    parts = family.expert_parts(spec, name)
    if not parts and modules and disk not in checkpoint:
        parts = modules
    return ExpertsSource(parts, shape) if parts else _experts_source(checkpoint, disk, shape, layout)


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


def _check_complete(checkpoint: Checkpoint, sources: Mapping[str, Source], unused: Iterable[str], tied: bool) -> None:
    wanted: set[str] = set()
    for source in sources.values():
        wanted.update(source.disk_names() if isinstance(source, QuantizedSource | WeightOnlySource) else source.disk_shapes())
    there = set(checkpoint.names())
    missing, extra = sorted(wanted - there), sorted(there - wanted - set(unused))
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
