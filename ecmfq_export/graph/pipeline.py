"""The stage "onnx": a checkpoint in, graphs and everything that running them needs out.

OUT/decoder/model.onnx        no local function; EcmfqRoutedMoE (or EcmfqMoE) nodes, weights beside it; for ONNX Runtime alone (no
                              target): QMoE and MatMulNBits nodes, and no model.ref.onnx
OUT/decoder/model.ref.onnx    the same graph for ONNX Runtime, with functions for the custom nodes
OUT/decoder/weights.data      everything but quantized expert weights; both graphs read it
OUT/decoder/experts.<layout>.data   quantized expert weights; row_major is the reference's
OUT/vision/model.onnx, weights.data
OUT/embed_tokens.safetensors, runtime.json, tokenizer and processor files, manifest.json
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ecmfq_export import bundle
from ecmfq_export.config import ExportConfig
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.graph import ops
from ecmfq_export.graph.builder import graph_dtype, to_numpy
from ecmfq_export.graph.decoder import add_taps, emit_decoder
from ecmfq_export.graph.passes.decompose_attention import DecomposeAttentionPass
from ecmfq_export.graph.passes.prepack_experts import PrepackExpertsPass
from ecmfq_export.graph.passes.quantize_experts import QuantizeExpertsPass
from ecmfq_export.graph.passes.quantize_linears import QuantizeLinearsPass
from ecmfq_export.graph.passes.weight_only_experts import WeightOnlyExpertsPass
from ecmfq_export.graph.passes.weight_only_linears import WeightOnlyLinearsPass
from ecmfq_export.graph.runtime_json import FILE, PROCESSOR_FILES, eos_token_ids, runtime_facts
from ecmfq_export.graph.weights import externalize, save_embeddings
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.spec import MoESpec, VisionSpec
from ecmfq_export.progress import Progress
from ecmfq_export.target import Limits, Target

STAGE = "onnx"
ROW_MAJOR = "row_major"

ORT = "ort"
"""The flavour, and the weight layout, of graphs for ONNX Runtime alone."""

WEIGHT_ONLY = "W4A16: weights alone are int4, activations are floating point"

_ORT_LIMITS = Limits(max_batch=4, max_seq_len=4096, memory_bytes=1 << 40)
"""Where no target says how long a cache may be; ``max_seq_len`` of the settings is a smaller one."""


@dataclass(frozen=True)
class Sizes:
    """What the graphs and the engines are made for."""

    max_seq_len: int
    max_batch: int
    max_image_patches: int


def export_onnx(
    model_dir: Path,
    out_dir: Path,
    target: Target | None,
    config: ExportConfig,
    progress: Progress,
    *,
    dtype: str | None = None,
    taps: bool = False,
) -> Path:
    """Write the graphs of a floating-point or quantized checkpoint for `target`; nothing is done where they are current.

    Args:
        model_dir: a Hugging Face directory, as models.moe_vlm.open_model takes it.
        out_dir: replaced when everything is written.
        target: None for ONNX Runtime alone: weight-only int4 in com.microsoft's operators.
        dtype: type of the graphs, ``float16`` or ``float32``; None takes the target's, ``config.ort_dtype`` without one.
        taps: make the residual stream after each layer an output of the reference graph (``hidden_{l}``).

    Returns:
        `out_dir`.

    Raises:
        UserError: the model or an option is not supported, a weight does not fit the type, or the disk is full.
    """
    model = open_model(model_dir)
    require_plain_inputs(model)
    if model.unused:
        progress.note(model.unused_note("not exported"))
    dtype = dtype or (target.dtype if target is not None else config.ort_dtype)
    sizes = resolve_sizes(model, target, config)
    settings = {
        "export": dataclasses.asdict(config), "sizes": dataclasses.asdict(sizes), "dtype": dtype, "taps": taps,
        "attention": target.attention if target is not None else "onnx24",
        "weight_layout": target.kernel.weight_layout if target is not None else ORT,
    }  # fmt: skip
    if target is None:
        settings["flavour"] = ORT
    graph_dtype(dtype)
    inputs = {"model": bundle.fingerprint(model_dir)}
    if bundle.is_current(out_dir, STAGE, settings, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    with bundle.write_stage(out_dir, STAGE, settings, inputs) as (work, info):
        job = _Export(model, target, config, sizes, dtype, taps, work, info)
        for step in progress.track(job.steps(), "export graphs", total=len(job.steps())):
            step()
    return out_dir


def require_plain_inputs(model: MoEVLM) -> None:
    """Refuse a checkpoint whose down projections read rotated inputs.

    Raises:
        UnsupportedError: naming a tensor and its block.
    """
    for name, block in (model.quantization.blocks if model.quantization is not None else {}).items():
        raise UnsupportedError(
            f"'{name}' reads its inputs behind a Hadamard in blocks of {block}; the plugin has no such step",
            "quantize with rotate = 'residual' or 'none' to export; this checkpoint runs in PyTorch alone",
        )


def resolve_sizes(model: MoEVLM, target: Target | None, config: ExportConfig) -> Sizes:
    """What was asked for, or the largest that model and target allow; callable before any work is done.

    Raises:
        UserError: more was asked for than the model or the target allows.
    """
    longest, limits = model.spec.max_position_embeddings, target.limits if target is not None else _ORT_LIMITS
    if target is None and config.max_seq_len > longest:
        raise UserError(f"max_seq_len = {config.max_seq_len}, the model allows {longest}", f"use {longest} or less")
    if target is not None and config.max_seq_len > min(longest, limits.max_seq_len):
        raise UserError(
            f"max_seq_len = {config.max_seq_len}, the model allows {longest} and target {target.name} {limits.max_seq_len}",
            f"use {min(longest, limits.max_seq_len)} or less",
        )
    if target is not None and config.max_batch > limits.max_batch:
        raise UserError(f"max_batch = {config.max_batch}, target {target.name} allows {limits.max_batch}")
    unit = model.spec.vision.spatial_merge_size**2
    if config.max_image_patches < unit:
        raise UserError(f"max_image_patches = {config.max_image_patches} is less than one merged patch", f"use {unit} or more")
    # Images that fill a canvas cannot be made smaller, nor can tiles.
    canvas = max((patches for patches, _ in model.spec.vision.queries), default=_tile(model.spec.vision))
    return Sizes(
        config.max_seq_len or min(longest, limits.max_seq_len),
        config.max_batch or limits.max_batch,
        max(config.max_image_patches // unit * unit, canvas),
    )


@dataclass
class _Export:
    """One run of the stage."""

    model: MoEVLM
    target: Target | None
    config: ExportConfig
    sizes: Sizes
    dtype: str
    taps: bool
    work: Path
    info: dict[str, Any]

    def steps(self) -> list[Callable[[], None]]:
        return [self.decoder if self.target is not None else self.weight_only_decoder, self.vision, self.runtime]

    @property
    def group_size(self) -> int | None:
        """Of quantized experts; None where the first MoE layer's experts are floating point."""
        if self.target is None:
            return None
        layers = self.model.spec.moe_layers
        name = f"layers.{layers[0]}.mlp.experts.down_proj" if layers else ""
        if not layers or self.model.recipe(name) == "float":
            return None
        # One expert tells: all of a model share the group size, and the pass checks it.
        return self.model.qtensor(name, 0, 1).group_size

    def decoder(self) -> None:
        directory = self.work / "decoder"
        directory.mkdir()
        kind = graph_dtype(self.dtype)
        graph = emit_decoder(self.model, self.sizes.max_seq_len, kind, self.config.logits)
        QuantizeLinearsPass(self.model, kind)(graph)
        group_size = self.group_size
        if group_size is not None:
            QuantizeExpertsPass(self.model, group_size)(graph)
        if self.target.attention == "decomposed":
            DecomposeAttentionPass()(graph)
        written = externalize(graph, directory, lambda name: _data_file(name, ROW_MAJOR))
        reference = graph.clone()
        layout = self.target.kernel.weight_layout if group_size is not None else ROW_MAJOR
        PrepackExpertsPass(layout)(graph)
        written |= externalize(graph, directory, lambda name: _data_file(name, layout))
        ir.save(graph, directory / "model.onnx")
        ops.attach_reference_functions(reference)
        if self.taps:
            add_taps(reference)
        ir.save(reference, directory / "model.ref.onnx")
        routed = sum(node.op_type == ops.ROUTED_MOE for node in graph.graph)
        self.info |= {"num_plugin_nodes": routed, "decoder_nodes": len(list(graph.graph)), "decoder_bytes": written}
        self.info["weight_layout"] = layout

    def weight_only_decoder(self) -> None:
        """The decoder for ONNX Runtime alone."""
        directory = self.work / "decoder"
        directory.mkdir()
        kind = graph_dtype(self.dtype)
        graph = emit_decoder(self.model, self.sizes.max_seq_len, kind, self.config.logits)
        WeightOnlyLinearsPass(self.model, kind)(graph)
        WeightOnlyExpertsPass(self.model, kind)(graph)
        graph.graph.opset_imports.pop(ops.DOMAIN)
        written = externalize(graph, directory, lambda _: "weights.data")
        if self.taps:
            add_taps(graph)
        ir.save(graph, directory / "model.onnx")
        self.info |= {"num_plugin_nodes": 0, "decoder_nodes": len(list(graph.graph)), "decoder_bytes": written}
        self.info |= {"weight_layout": ORT, "computes": WEIGHT_ONLY}

    def vision(self) -> None:
        # Imported here: torch.onnx takes seconds, and only this step needs it.
        from ecmfq_export.graph.vision import trace_vision

        directory = self.work / "vision"
        directory.mkdir()
        graph = trace_vision(self.model.vision_module(), self.model.spec.vision, graph_dtype(self.dtype))
        if self.target is not None and self.target.attention == "decomposed":
            DecomposeAttentionPass()(graph)
        written = externalize(graph, directory, lambda _: "weights.data")
        ir.save(graph, directory / "model.onnx")
        self.info |= {"vision_nodes": len(list(graph.graph)), "vision_bytes": written}

    def runtime(self) -> None:
        spec, name, kind = self.model.spec, "embed_tokens.weight", graph_dtype(self.dtype)
        table = to_numpy(self.model.tensor(name), kind, name, (spec.vocab_size, spec.hidden_size))
        save_embeddings(self.work / "embed_tokens.safetensors", name, table)
        for file in PROCESSOR_FILES:
            if (self.model.path / file).is_file():
                shutil.copyfile(self.model.path / file, self.work / file)
        sizes = dataclasses.asdict(self.sizes)
        facts = runtime_facts(
            spec, dtype=self.dtype, logits=self.config.logits, weight_layout=self.info["weight_layout"],
            group_size=self.group_size, weight_only=self.target is None,
            eos_token_ids=eos_token_ids(self.model.path, self.model.config), **sizes,
        )  # fmt: skip
        bundle.write_json(self.work / FILE, facts)
        self.info |= {"dim_ranges": vision_ranges(self.sizes, spec.vision), "dtype": self.dtype}
        self.info["moe_layers"] = [layer.index for layer in spec.layers if isinstance(layer.mlp, MoESpec)]


def _tile(vision: VisionSpec) -> int:
    """Patches of a tile; 0 where images are not cut into some."""
    return vision.num_position_embeddings if vision.class_token else 0


def vision_ranges(sizes: Sizes, vision: VisionSpec) -> dict[str, list[int]]:
    """:func:`dim_ranges` of a model with this tower."""
    ranges, counts = dim_ranges(sizes, vision.spatial_merge_size), [count for _, count in vision.queries]
    if counts:  # of one image
        ranges["num_queries"] = [min(counts), max(counts), max(counts)]
    if vision.class_token:
        most = sizes.max_image_patches // _tile(vision)
        ranges["num_frames"] = [1, max(1, ranges["num_patches"][1] // _tile(vision)), most]
    return ranges


def dim_ranges(sizes: Sizes, spatial_merge_size: int) -> dict[str, list[int]]:
    """Smallest, usual and largest value of each symbolic dimension of the graphs' inputs, for engine profiles."""
    unit = spatial_merge_size**2
    usual_patches = min(1024 // unit * unit or unit, sizes.max_image_patches)
    return {
        "batch": [1, 1, sizes.max_batch],
        "seq": [1, min(256, sizes.max_seq_len), sizes.max_seq_len],
        "num_patches": [unit, usual_patches, sizes.max_image_patches],
    }


def _data_file(name: str, layout: str) -> str:
    return f"experts.{layout}.data" if name.endswith(".qweight") else "weights.data"
