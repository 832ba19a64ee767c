"""What the model takes on disk: its quantized layers alone, and everything. Both are reported, always.

The reference is the same tensor at two bytes a value (float16), whatever the checkpoint held.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

from ecmfq_export.quant.qtensor import GROUP

BITS = {"w4a8": 4, "w8a8": 8}
LABELS = {"w4a8": "W4A8 layers", "w8a8": "W8A8 layers", "w4a16": "W4A16 layers", "w8a16": "W8A16 layers"}
"""Recipes whose bytes are shown, with their names for people."""
SCALE_BYTES = 2


class SizedModel(Protocol):
    """The part of models.moe_vlm.MoEVLM that is read here."""

    checkpoint: Any
    quantization: Any

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def recipe(self, name: str) -> str: ...

    def has_int4(self, name: str) -> bool: ...

    def has_int8(self, name: str) -> bool: ...

    def stored_bytes(self, name: str) -> int: ...


def checkpoint_bytes(model: SizedModel) -> dict[str, Any]:
    """Bytes of a quantized checkpoint's tensors, file headers not counted.

    Returns:
        ``layers``: for each recipe in use, and for ``quantized`` (all of them): float16 and stored bytes and their ratio;
        stored counts integers, scales and group multipliers. ``whole``: the same for every tensor. ``by_precision``: stored
        bytes as int4, int8, scales (with group multipliers) and float (everything kept in floating point, and shapes that
        the format notes). ``group_size``.
    """
    group_size = model.quantization.group_size if model.quantization else -1
    layers: dict[str, dict[str, float]] = {}
    by_precision = {"int4": 0, "int8": 0, "scales": 0, "float": 0}
    float16_whole = 0
    for name in model.names():
        shape = model.shape(name)
        count = math.prod(shape)
        float16_whole += 2 * count
        recipe = model.recipe(name)
        if recipe == "float":
            if not (model.has_int4(name) or model.has_int8(name)):
                continue
            recipe = "w4a16" if model.has_int4(name) else "w8a16"
            integers = count * (4 if recipe == "w4a16" else 8) // 8
            scales = model.stored_bytes(name) - integers  # zero points and group indices too
        else:
            integers = count * BITS[recipe] // 8
            # Only four-bit weights have groups; eight-bit ones are always per channel.
            scales = SCALE_BYTES * count // shape[-1] + (count // GROUP if recipe == "w4a8" and group_size != -1 else 0)
        by_precision["int4" if recipe in ("w4a8", "w4a16") else "int8"] += integers
        by_precision["scales"] += scales
        for key in (recipe, "quantized"):
            row = layers.setdefault(key, {"float16": 0, "stored": 0})
            row["float16"] += 2 * count
            row["stored"] += integers + scales
    stored_whole = sum(model.checkpoint.entry(name).num_bytes for name in model.checkpoint.names())
    by_precision["float"] = stored_whole - sum(by_precision.values())
    whole = {"float16": float16_whole, "stored": stored_whole}
    for row in (*layers.values(), whole):
        row["ratio"] = row["stored"] / row["float16"]
    return {"layers": layers, "whole": whole, "by_precision": by_precision, "group_size": group_size}


def artifact_bytes(onnx_dir: Path, engines_dir: Path | None) -> dict[str, int]:
    """Bytes of what is shipped: graphs with their weights by part, embeddings, and engines by file.

    A weight file that several graphs share is counted once. What only the reference copy for ONNX Runtime reads (its graph, and
    row-major experts where the target's kernels take another layout) is not shipped and not counted.
    """
    sizes: dict[str, int] = {}
    expert_files = {p.name for p in (onnx_dir / "decoder").glob("experts.*.data")}
    reference_only = {"model.ref.onnx", "manifest.json"}
    if len(expert_files) > 1:
        reference_only.add("experts.row_major.data")
    for file in sorted(p for p in onnx_dir.rglob("*") if p.is_file()):
        name = file.relative_to(onnx_dir)
        if file.name in reference_only:
            continue
        part = f"onnx/{name.parts[0]}" if len(name.parts) > 1 else (
            "onnx/embeddings" if file.suffix == ".safetensors" else "onnx/tokenizer and settings")  # fmt: skip
        sizes[part] = sizes.get(part, 0) + file.stat().st_size
    sizes["onnx, all"] = sum(sizes.values())
    if engines_dir is not None:
        for file in sorted(engines_dir.glob("*.engine")):
            sizes[f"engines/{engines_dir.name}/{file.name}"] = file.stat().st_size
    return sizes
