"""Small pools, planted outliers and settings that the stages' tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ecmfq_export.config import QuantConfig
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.stages.samples import load_pool

SETTINGS = QuantConfig(num_samples=10, seed=3, cross_strength=1.0)
"""The default method and the cross term, so that every part of it runs."""


def make_pool(directory: Path, size: int = 16, seed: int = 0) -> Path:
    """`size` samples: every fourth text-only, two questions an image, random 16 x 16 images."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(size):
        row = {"text": f"What is {i}?", "answer": "ab"[: 1 + i % 2] + str(i)}
        if i % 4:
            name = f"{i // 2}.png"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(directory / name)
            row["image"] = name
        rows.append(row)
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def plant_outliers(checkpoint: Path, factor: float = 32.0, channels: int = 6) -> None:
    """Multiply some channels of every norm of a saved model and divide what reads them: the function stays, in exact numbers."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    for name in sorted(tensors):
        if not name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            continue
        layer = name.rsplit(".", 2)[0]
        where = torch.randperm(len(tensors[name]), generator=generator)[:channels]
        scale = torch.ones(len(tensors[name]))
        scale[where] = factor
        tensors[name] = tensors[name] * scale
        readers = [f"{layer}.self_attn.{p}_proj.weight" for p in "qkv"] if "input_layernorm" in name else [
            f"{layer}.mlp.gate.weight", f"{layer}.mlp.experts.gate_up_proj"]
        for reader in readers:
            tensors[reader] = tensors[reader] / scale
    save_file(tensors, file, metadata={"format": "pt"})


def file_hashes(directory: Path) -> dict[str, str]:
    """What a finished stage says its files hash to."""
    return json.loads((directory / "manifest.json").read_text())["files"]


def divergence(model_dir: Path, quantized_dir: Path, pool: Path) -> float:
    """Mean final-logit KL at all text positions of `pool`."""
    processor = Processor(model_dir)
    samples = [sample.process(processor) for sample in load_pool(pool)]
    original, quantized = open_model(model_dir), open_model(quantized_dir)
    with torch.no_grad():
        # Each from its own embeddings: a rotated model has others.
        logits = []
        for model in (original, quantized):
            inputs = prepare_inputs(model, samples)
            seen = torch.arange(inputs.token_types.shape[1]) < inputs.lengths[:, None]
            logits.append(run_decoder(model, inputs)[seen].double().log_softmax(-1))
    p, q = logits
    return float((p.exp() * (p - q)).sum(-1).mean())
