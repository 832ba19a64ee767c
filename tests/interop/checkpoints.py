"""The fixtures of data/ as Hugging Face directories (see make_checkpoints.py), and the logits that the library's own weights give."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import qwen3_vl_moe_config, write_processor_files

DATA = Path(__file__).resolve().parent / "data"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm" / "checkpoint"
SHARED = re.compile(r"^lm_head|visual|embed_tokens|norm|mlp\.gate\.weight")
"""As in make_checkpoints.py, which only runs where the library is installed."""
_RECORDED = ("logits", "input_ids", "pixel_values", "image_grid_thw")
_RANDOM = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4, "num_experts": 4, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Fixture:
    """A quantized checkpoint, prompts, and the library's logits [kept positions, vocab] of each."""

    path: Path
    samples: list[ProcessedSample]
    logits: list[torch.Tensor]
    library: str

    def compare(self, model: MoEVLM) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits of `model` in PyTorch beside the library's, prompt by prompt."""
        vision = model.vision_module()
        with torch.no_grad():
            ours = [run_decoder(model, prepare_inputs(model, [sample], vision=vision))[0] for sample in self.samples]
        return [(mine[-len(theirs) :], theirs) for mine, theirs in zip(ours, self.logits, strict=True)]


def make(name: str, directory: Path) -> Fixture:
    """Write the fixture `name` as a checkpoint."""
    tensors = load_file(DATA / f"{name}.safetensors")
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
    directory.mkdir()
    weights = {key: value for key, value in tensors.items() if key.split(".")[0] not in _RECORDED}
    if name.startswith("example"):
        rest = {key: value for key, value in load_file(EXAMPLE / "model.safetensors").items() if SHARED.search(key)}
        config = json.loads((EXAMPLE / "config.json").read_text())
        for file in EXAMPLE.iterdir():
            if file.suffix in (".json", ".jinja") and file.name != "config.json":
                shutil.copyfile(file, directory / file.name)
    else:
        rest = load_file(DATA / "base.safetensors")
        with safe_open(DATA / "base.safetensors", framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        write_processor_files(directory, qwen3_vl_moe_config(**_RANDOM))
    save_file(rest | weights, directory / "model.safetensors", {"format": "pt"})
    quantization = json.loads(metadata["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    count = sum(key.startswith("logits.") for key in tensors)
    logits = [tensors[f"logits.{i}"] for i in range(count)]
    return Fixture(directory, [_sample(tensors, i) for i in range(count)], logits, metadata["library"])


def _sample(tensors: dict[str, torch.Tensor], index: int) -> ProcessedSample:
    ids = tensors[f"input_ids.{index}"].numpy()
    patches, grids = (tensors.get(f"{kind}.{index}") for kind in ("pixel_values", "image_grid_thw"))
    mask = np.arange(len(ids)) >= max(1, len(ids) - len(tensors[f"logits.{index}"]))
    return ProcessedSample(ids, None if patches is None else patches.numpy(), None if grids is None else grids.numpy(), mask)
