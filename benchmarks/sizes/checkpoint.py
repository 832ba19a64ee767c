"""A checkpoint with the exact shapes of Qwen3-VL-30B-A3B and any number of decoder layers, random weights, written layer by layer.

    python benchmarks/sizes/checkpoint.py /tmp/sizes/4 --layers 4

Names, shapes, dtype and the experts' transposed layout are those of Qwen/Qwen3-VL-30B-A3B-Instruct; each decoder layer is a shard
of 1.25 GB, embeddings, output projection and vision tower (2.4 GB) are another. The tokenizer and its few hundred tokens are
the bundled example's: ids beyond them never occur in a prompt, which changes no shape.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file, not as a module

import torch  # noqa: E402

from ecmfq_export.models.moe_vlm import decoder_shapes, layer_shapes  # noqa: E402
from ecmfq_export.models.registry import family_of  # noqa: E402
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors  # noqa: E402

EXAMPLE = ROOT / "examples" / "tiny_vlm" / "checkpoint"
TRANSPOSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 498, "decoder_sparse_step": 1,
        "dtype": "bfloat16", "eos_token_id": 500, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 5000000, "use_cache": True, "vocab_size": 151936,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_vl_moe",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
"""config.json of Qwen/Qwen3-VL-30B-A3B-Instruct; token ids are filled in from the example's."""


SMALL = {
    "text_config": {"hidden_size": 512, "num_experts": 32, "moe_intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2,
                    "head_dim": 64, "vocab_size": 32768,
                    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}},
    "vision_config": {"depth": 4, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "out_hidden_size": 512,
                      "deepstack_visual_indexes": [0, 1, 2]},
}  # fmt: skip
"""A layer of a thirtieth of the size (38 MB in 16 bits): how memory depends on the number of layers, on a busy machine."""


def config_of(layers: int, small: bool = False) -> dict[str, Any]:
    """The published config with `layers` decoder layers; DeepStack keeps at most as many features as there are layers."""
    config = json.loads(json.dumps(CONFIG))
    for section, values in SMALL.items() if small else ():
        config[section] |= values
    ids = json.loads((EXAMPLE / "config.json").read_text())
    config |= {name: ids[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config["text_config"]["num_hidden_layers"] = layers
    vision = config["vision_config"]
    vision["deepstack_visual_indexes"] = vision["deepstack_visual_indexes"][:layers]
    return config


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bfloat16 values that keep activations at a usual size, made a few million at a time; `seed` and `name` alone decide them."""
    generator = torch.Generator().manual_seed(seed)
    if name.endswith("bias"):
        center, scale = 0.0, 0.02
    elif "norm" in name:
        center, scale = 1.0, 0.1
    elif "embed" in name and "patch_embed.proj" not in name:
        center, scale = 0.0, 0.5
    else:
        # Experts are [E, in, out] on disk; everything else has its inputs behind the first axis. Router logits spread.
        fan_in = shape[-2] if name.endswith(TRANSPOSED) else math.prod(shape[1:])
        center, scale = 0.0, (2.0 if name.endswith("mlp.gate.weight") else 1.0) / fan_in**0.5
    flat = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    for part in flat.split(1 << 22):
        part.copy_(torch.randn(len(part), generator=generator) * scale + center)
    return flat.view(shape)


def write_checkpoint(directory: Path, layers: int, seed: int = 0, small: bool = False) -> Path:
    """Write the checkpoint; memory is that of one tensor."""
    directory.mkdir(parents=True)
    config = config_of(layers, small)
    family = family_of(config)
    spec = family.read_spec(config)
    groups = [{f"layers.{layer.index}.{suffix}": shape for suffix, shape in layer_shapes(spec, layer).items()} for layer in spec.layers]
    known = {name for group in groups for name in group}
    everything = decoder_shapes(spec) | family.vision_shapes(config)
    groups.append({name: shape for name, shape in everything.items() if name not in known})
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups):
        shard = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, TensorToWrite] = {}
        for place, (name, shape) in enumerate(group.items()):
            disk = family.disk_name(name)
            if name.endswith(TRANSPOSED):
                shape = (shape[0], shape[2], shape[1])
            one = seed * 1_000_003 + 1000 * number + place

            def make(disk: str = disk, shape: tuple[int, ...] = shape, one: int = one) -> torch.Tensor:
                return random_tensor(disk, shape, one)

            tensors[disk] = TensorToWrite(torch.bfloat16, shape, make)
            weight_map[disk] = shard
        total += write_safetensors(directory / shard, tensors)
        print(f"{shard}: {total / 1e9:.1f} GB so far", flush=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EXAMPLE / file, directory / file)
    images = json.loads((EXAMPLE / "preprocessor_config.json").read_text())
    images |= {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    (directory / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="layers of a thirtieth of the size")
    args = parser.parse_args()
    write_checkpoint(args.directory, args.layers, args.seed, args.small)


if __name__ == "__main__":
    main()
