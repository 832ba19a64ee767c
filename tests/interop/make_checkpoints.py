"""Make the quantized checkpoints of this folder's tests with GPTQModel, and the logits that its own weights give.

    python -m venv /tmp/gptqmodel && /tmp/gptqmodel/bin/pip install gptqmodel==7.7.0 torchvision
    GPTQMODEL_CPU_WORKERS=2 PYTHONPATH=. /tmp/gptqmodel/bin/python tests/interop/make_checkpoints.py

Two models are quantized: the trained example (examples/tiny_vlm/checkpoint), and a small random one of the same family that is wide
enough for several groups a row. ``data/NAME.safetensors`` holds the tensors that the library changed or added, ``data/base.safetensors``
what the random model's checkpoints share, and the metadata the library, its version and its ``quantization_config``.

Logits are those of transformers' own model in float32 with every quantized layer replaced by the weight that the library's layer
dequantizes itself to (in float16, as it computes with).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, __version__
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file, save_file

from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_models import make_qwen3_vl_moe, random_sample

HERE = Path(__file__).resolve().parent
DATA, EXAMPLE = HERE / "data", HERE.parents[1] / "examples" / "tiny_vlm"
SHARED = re.compile(r"^lm_head|visual|embed_tokens|norm|mlp\.gate\.weight")
"""Tensors that are in the base where they stay as they were."""

KEPT_POSITIONS = 12
"""Of each prompt's logits, the last so many are kept."""

RANDOM = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4, "num_experts": 4, "num_hidden_layers": 1}
VARIANTS = {
    "gptq_groups": dict(group_size=128, desc_act=False, act_group_aware=False),
    "gptq_group_aware": dict(group_size=128, desc_act=False, act_group_aware=True),
    "gptq_act_order": dict(group_size=128, desc_act=True, act_group_aware=False),
    "gptq_v2_zero_points": dict(group_size=32, desc_act=False, act_group_aware=False, sym=False, format="gptq_v2"),
    # Its search takes q_norm for what o_proj reads, and fails on its size: the attention stays as it is.
    "awq": dict(group_size=128, method="awq", format="gemm", sym=True, dynamic={r"-:.*self_attn.*": {}}),
    "awq_zero_points": dict(group_size=128, method="awq", format="gemm", sym=False, dynamic={r"-:.*self_attn.*": {}}),
}
"""The random model's checkpoints by name."""


def main(names: list[str]) -> None:
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        source = make_qwen3_vl_moe(Path(work) / "random", seed=7, dtype=torch.bfloat16, **RANDOM)
        samples = [random_sample(seed, grids, text=6) for seed, grids in enumerate([(), ((1, 4, 6),), ((1, 4, 4), (1, 6, 4))])]
        for name, options in VARIANTS.items():
            if not names or name in names:
                make(name, source, 250, options, samples, Path(work))
        write_base(source)
        if not names or "example_gptq" in names:
            example = dict(group_size=-1, desc_act=False, act_group_aware=False)
            make("example_gptq", EXAMPLE / "checkpoint", 490, example, example_samples(), Path(work))


def example_samples() -> list[ProcessedSample]:
    """Four held-out questions with their answers."""
    processor, root = Processor(EXAMPLE / "checkpoint"), EXAMPLE / "heldout"
    questions = [json.loads(line) for line in (root / "questions.jsonl").open()][:200:50]
    return [processor.sample(q["question"], [root / q["image"]], q["answer"]) for q in questions]


def make(name: str, source: Path, vocabulary: int, options: dict, samples: list[ProcessedSample], work: Path) -> None:
    """Quantize `source`, run `samples`, write ``data/NAME.safetensors``."""
    out = work / name
    config = QuantizeConfig(bits=4, offload_to_disk=False, device="cpu", **options)
    model = GPTQModel.load(str(source), config)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, vocabulary, (1, 64), generator=generator) for _ in range(16)]
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    model.save(str(out))
    written = load_file(out / "model.safetensors")
    original = load_file(source / "model.safetensors")
    # AWQ changes norms too, and a module that is not quantized need not be in the base.
    tensors = {key: value for key, value in written.items() if key not in original or not torch.equal(value, original[key])
               or SHARED.search(key) is None}
    for index, logits in enumerate(own_logits(out, samples)):
        sample = samples[index]
        tensors[f"logits.{index}"] = logits[-KEPT_POSITIONS:].contiguous()
        tensors[f"input_ids.{index}"] = torch.from_numpy(sample.input_ids)
        if sample.pixel_values is not None:
            tensors[f"pixel_values.{index}"] = torch.from_numpy(sample.pixel_values)
            tensors[f"image_grid_thw.{index}"] = torch.from_numpy(sample.image_grid_thw)
    saved = json.loads((out / "config.json").read_text())
    metadata = {"format": "pt", "library": f"gptqmodel {__version__}", "transformers": transformers.__version__,
                "quantization_config": json.dumps(saved.pop("quantization_config"))}
    save_file(tensors, DATA / f"{name}.safetensors", metadata)
    print(name, sum(t.nbytes for t in tensors.values()), "bytes")


def write_base(source: Path) -> None:
    """``data/base.safetensors``: what no quantizer of linear layers changes."""
    tensors = {key: value for key, value in load_file(source / "model.safetensors").items() if SHARED.search(key)}
    save_file(tensors, DATA / "base.safetensors", {"format": "pt", "config": (source / "config.json").read_text()})


def own_logits(directory: Path, samples: list[ProcessedSample]) -> list[torch.Tensor]:
    """Float32 logits [tokens, vocab] of transformers' model with the library's dequantized weights."""
    model = GPTQModel.load(str(directory), device="cpu", backend=BACKEND.AWQ_TORCH if directory.name == "awq" else BACKEND.TORCH,
                           dtype=torch.float16).model
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseQuantLinear):
            # What it multiplies the unit vectors to is the weight that it uses, whatever its packing.
            weight = dequantized(module)
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.contiguous()
            model.set_submodule(name, linear)
    model = model.float().eval()
    model.set_attn_implementation("eager")
    out = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)[None]
        given = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
        if sample.pixel_values is not None:
            given |= {"pixel_values": torch.from_numpy(sample.pixel_values), "image_grid_thw": torch.from_numpy(sample.image_grid_thw)}
        with torch.no_grad():
            out.append(model(**given).logits[0].float())
    return out


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The weight [out, in] in float32."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().t().float()
    with torch.no_grad():
        return module(torch.eye(module.in_features, dtype=torch.float16)).t().float()


if __name__ == "__main__":
    main(sys.argv[1:])
