"""Make this folder's compressed-tensors checkpoints with llm-compressor, and the logits that its own weights give.

    python -m venv /tmp/llmcompressor && /tmp/llmcompressor/bin/pip install llmcompressor==0.14.0.1
    PYTHONPATH=. /tmp/llmcompressor/bin/python tests/interop/make_llmcompressor.py

As make_checkpoints.py, which tells what the files hold: the same random model, quantized by GPTQ with the library's schemes ``W4A16``,
``W4A16_ASYM`` and ``W4A8``. Logits are those of transformers' model in float32 with every quantized layer's weight as the library
decompresses it; activations are not quantized for them, in ``W4A8`` neither.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLMoeForConditionalGeneration

from tests.tiny_models import make_qwen3_vl_moe, random_sample

DATA = Path(__file__).resolve().parent / "data"
SHARED = re.compile(r"^lm_head|visual|embed_tokens|norm|mlp\.gate\.weight")
RANDOM = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4, "num_experts": 4, "num_hidden_layers": 1}
KEPT_POSITIONS = 12
SCHEMES = {"llmcompressor_w4a16": "W4A16", "llmcompressor_w4a16_asym": "W4A16_ASYM", "llmcompressor_w4a8": "W4A8"}


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        source = make_qwen3_vl_moe(Path(work) / "random", seed=7, dtype=torch.bfloat16, **RANDOM)
        samples = [random_sample(seed, grids, text=6) for seed, grids in enumerate([(), ((1, 4, 6),), ((1, 4, 4), (1, 6, 4))])]
        for name, scheme in SCHEMES.items():
            make(name, scheme, source, samples, Path(work) / name)


def load(source: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its experts one by one."""
    with load_quantizable_moe(Qwen3VLMoeForConditionalGeneration):
        return Qwen3VLMoeForConditionalGeneration.from_pretrained(source, dtype=dtype, attn_implementation="eager")


def make(name: str, scheme: str, source: Path, samples: list, out: Path) -> None:
    """Quantize `source`, run `samples`, write ``data/NAME.safetensors``."""
    model = load(source, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 250, (64,), generator=generator).tolist() for _ in range(16)]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 64] * len(ids)})
    recipe = GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*visual.*", "re:.*mlp.gate$"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=64, num_calibration_samples=len(ids),
            processor=AutoTokenizer.from_pretrained(source))  # fmt: skip
    model.save_pretrained(out, save_compressed=True)
    written, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = {key: value for key, value in written.items() if SHARED.search(key) is None or not torch.equal(value, original[key])}
    for index, logits in enumerate(own_logits(source, written, quantization, samples)):
        sample = samples[index]
        tensors[f"logits.{index}"] = logits[-KEPT_POSITIONS:].contiguous()
        tensors[f"input_ids.{index}"] = torch.from_numpy(sample.input_ids)
        if sample.pixel_values is not None:
            tensors[f"pixel_values.{index}"] = torch.from_numpy(sample.pixel_values)
            tensors[f"image_grid_thw.{index}"] = torch.from_numpy(sample.image_grid_thw)
    library = f"llmcompressor {importlib.metadata.version('llmcompressor')}"
    metadata = {"format": "pt", "library": library, "transformers": transformers.__version__,
                "quantization_config": json.dumps(quantization)}
    save_file(tensors, DATA / f"{name}.safetensors", metadata)
    print(name, sum(t.nbytes for t in tensors.values()), "bytes")


def own_logits(source: Path, written: dict[str, torch.Tensor], quantization: dict, samples: list) -> list[torch.Tensor]:
    """Float32 logits [tokens, vocab] of transformers' model with the weights as the library decompresses them."""
    (group,) = quantization["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    model = load(source, torch.float32).eval()
    for key in [key for key in written if key.endswith(".weight_scale")]:
        module = key.removesuffix(".weight_scale")
        state = {part.removeprefix(f"{module}."): value for part, value in written.items() if part.startswith(f"{module}.weight")}
        state["weight_scale"] = state["weight_scale"].float()  # it multiplies in the scale's dtype
        model.get_submodule(module).weight.data = compressor.decompress(state, scheme)["weight"].float()
    out = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)[None]
        given = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
        if sample.pixel_values is not None:
            given |= {"pixel_values": torch.from_numpy(sample.pixel_values), "image_grid_thw": torch.from_numpy(sample.image_grid_thw)}
        with torch.no_grad():
            out.append(model(**given).logits[0].float())
    return out


if __name__ == "__main__":
    main()
