"""Rewrite a checkpoint so that its activations have outliers, without changing what it computes.

    python benchmarks/testbed/stress.py checkpoints/qwen_a -o stressed/qwen_a.strong --strength strong

Every factor is a power of two, multiplied in one place and divided in the next, so that every product, and with it every
logit and every routing decision, stays the same to the last bit (the script checks this and fails otherwise):

1. channels of each norm that feeds projections × m, the consumers' columns / m. The channels are those in which image tokens
   are largest relative to text tokens, as vision outliers are in large models;
2. up-projection rows of every expert (shared experts and dense MLPs too) × m, down-projection columns / m;
3. value rows × m, output-projection columns / m, tied over the query heads of a key/value group.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from assess import load
from cells import GRIDS, SPLITS, make_scene, render
from dialogue import QUESTIONS, ask_text
from families import routers
from packing import Batch, Encoder, pack
from torch import nn
from transformers import AutoModelForImageTextToText


@dataclass(frozen=True)
class Strength:
    """How much is stressed.

    Attributes:
        channels: fraction of each norm's channels.
        norm, up, value: smallest and largest exponent of two of the factors.
        up_rows: rows of every expert's up projection; value_rows: of every key/value head.
    """

    channels: float
    norm: tuple[int, int]
    up: tuple[int, int]
    value: tuple[int, int]
    up_rows: int
    value_rows: int


STRENGTHS = {
    "mild": Strength(channels=0.05, norm=(3, 4), up=(2, 3), value=(2, 3), up_rows=2, value_rows=1),
    "strong": Strength(channels=0.05, norm=(4, 6), up=(3, 5), value=(3, 4), up_rows=3, value_rows=1),
}


def check_batches(encoder: Encoder, images: int = 12, offset: int = 0) -> list[Batch]:
    """Packed prompts of calibration scenes (seeds from `offset` on), `images` of every grid, with text-only branches."""
    batches = []
    for number, grid in enumerate(GRIDS):
        first = SPLITS["calibration"].stop - 1 - offset - 1000 * number
        scenes = [make_scene(first - i, grid) for i in range(images)]
        rng = np.random.default_rng([first, 3])
        rows = [[ask(scene, rng) for ask in QUESTIONS.values()] + [ask_text(rng)] for scene in scenes]
        batches.append(pack(rows, render(scenes), encoder))
    return batches


def norms_of(layer: nn.Module) -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    """Each norm of a decoder layer that feeds projections, with the weights [..., out, channels] that read it."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "kv_a_proj_with_mqa"):
        readers = [attention.q_proj.weight, attention.kv_a_proj_with_mqa.weight]
    else:
        readers = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    out = {"input_layernorm": (layer.input_layernorm, readers)}
    if hasattr(attention, "kv_a_layernorm"):
        out["self_attn.kv_a_layernorm"] = (attention.kv_a_layernorm, [attention.kv_b_proj.weight])
    if hasattr(mlp, "gate"):
        readers = [mlp.gate.weight, mlp.experts.gate_up_proj]
        if hasattr(mlp, "shared_experts"):
            readers += [mlp.shared_experts.gate_proj.weight, mlp.shared_experts.up_proj.weight]
    else:
        readers = [mlp.gate_proj.weight, mlp.up_proj.weight]
    out["post_attention_layernorm"] = (layer.post_attention_layernorm, readers)
    return out


def norm_inputs_by_modality(model: nn.Module, batches: list[Batch]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean |x| of every norm's output over image and over text tokens: {"layer.norm": (vision [C], text [C])}."""
    sums: dict[str, list[torch.Tensor]] = defaultdict(lambda: [0.0, 0.0])
    current: list[Batch] = []

    def tap(name: str):
        def hook(_module, _inputs, output):
            x = output.float().abs().reshape(-1, output.shape[-1])
            image = current[0].image.reshape(-1)
            text = current[0].valid.reshape(-1) & ~image
            sums[name][0] = sums[name][0] + x[image].sum(0)
            sums[name][1] = sums[name][1] + x[text].sum(0)

        return hook

    handles = [
        norm.register_forward_hook(tap(f"{i}.{name}"))
        for i, layer in enumerate(model.model.language_model.layers)
        for name, (norm, _) in norms_of(layer).items()
    ]
    with torch.no_grad():
        for batch in batches:
            current[:] = [batch]
            model.model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    images = sum(int(b.image.sum()) for b in batches)
    texts = sum(int((b.valid & ~b.image).sum()) for b in batches)
    return {name: (vision / images, text / texts) for name, (vision, text) in sums.items()}


def _factors(rng: np.random.Generator, exponents: tuple[int, int], count: int) -> torch.Tensor:
    return torch.from_numpy(2.0 ** rng.integers(exponents[0], exponents[1] + 1, count)).float()


@torch.no_grad()
def stress(model: nn.Module, means: dict[str, tuple[torch.Tensor, torch.Tensor]], strength: Strength, seed: int = 0) -> list[dict]:
    """Stress a model in place.

    Args:
        means: of :func:`norm_inputs_by_modality` on the same model.

    Returns:
        What was done to each norm: its channels, factors, and mean |x| of vision and text there and over all channels after.
    """
    rng = np.random.default_rng(seed)
    done = []
    for i, layer in enumerate(model.model.language_model.layers):
        for name, (norm, readers) in norms_of(layer).items():
            vision, text = means[f"{i}.{name}"]
            count = max(1, round(strength.channels * len(vision)))
            channels = (vision / text.clamp_min(1e-6)).topk(count).indices
            factors = _factors(rng, strength.norm, count)
            _scale(norm.weight, channels, factors)
            for weight in readers:
                _scale(weight, channels, 1 / factors)
            done.append(
                {
                    "norm": f"layers.{i}.{name}",
                    "channels": channels.tolist(),
                    "factors": factors.tolist(),
                    "vision_there": float((vision[channels] * factors).mean()),
                    "text_there": float((text[channels] * factors).mean()),
                    "text_median_channel": float(text.median()),
                }
            )
        _stress_up(layer.mlp, strength, rng)
        _stress_value(layer.self_attn, strength, rng)
    return done


def _scale(weight: torch.Tensor, columns: torch.Tensor, factors: torch.Tensor) -> None:
    weight[..., columns] = weight[..., columns] * factors.to(weight.dtype)


def _stress_up(mlp: nn.Module, strength: Strength, rng: np.random.Generator) -> None:
    if hasattr(mlp, "experts"):
        gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        width = down.shape[-1]
        rows = torch.from_numpy(np.stack([rng.permutation(width)[: strength.up_rows] for _ in range(len(down))]))
        factors = _factors(rng, strength.up, rows.numel()).view_as(rows).to(down.dtype)
        expert = torch.arange(len(down))[:, None].expand_as(rows)
        gate_up[expert, width + rows] *= factors[..., None]
        down[expert, :, rows] /= factors[..., None]
    dense = getattr(mlp, "shared_experts", None) if hasattr(mlp, "experts") else mlp
    if dense is not None:
        rows = torch.from_numpy(rng.permutation(dense.up_proj.weight.shape[0])[: strength.up_rows])
        factors = _factors(rng, strength.up, len(rows)).to(dense.up_proj.weight.dtype)
        dense.up_proj.weight[rows] *= factors[:, None]
        dense.down_proj.weight[:, rows] /= factors


def _stress_value(attention: nn.Module, strength: Strength, rng: np.random.Generator) -> None:
    """Value rows of every key/value head; the output projection has one block of columns a query head."""
    output = attention.o_proj.weight
    if hasattr(attention, "kv_b_proj"):
        size, value = attention.v_head_dim, attention.kv_b_proj.weight
        start, stride = attention.qk_nope_head_dim, attention.qk_nope_head_dim + attention.v_head_dim
    else:
        size, value = attention.head_dim, attention.v_proj.weight
        start, stride = 0, attention.head_dim
    heads, queries = value.shape[0] // stride, output.shape[1] // size
    for head in range(heads):
        dims = torch.from_numpy(rng.permutation(size)[: strength.value_rows])
        factors = _factors(rng, strength.value, len(dims)).to(output.dtype)
        value[head * stride + start + dims] *= factors[:, None]
        for query in range(head * queries // heads, (head + 1) * queries // heads):
            output[:, query * size + dims] /= factors


@torch.no_grad()
def outputs_of(model: nn.Module, batches: list[Batch]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of every token that is not padding, and the sorted top-k indices of every router, batch by batch."""
    picked: list[torch.Tensor] = []
    handles = [r.register_forward_hook(lambda _m, _i, out: picked.append(out[2].sort(-1).values)) for r in routers(model)]
    logits = [model.lm_head(model.model(**b.inputs, use_cache=False).last_hidden_state[b.valid]) for b in batches]
    for handle in handles:
        handle.remove()
    return logits, picked


def check_equal(before: tuple[list, list], after: tuple[list, list]) -> None:
    """Hold that two runs of :func:`outputs_of` agree to the last bit.

    Raises:
        AssertionError: a logit or a choice of experts differs.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(before[0], after[0], strict=True))
    moved = sum(int((a != b).any(-1).sum()) for a, b in zip(before[1], after[1], strict=True))
    if difference != 0.0 or moved:
        raise AssertionError(f"the stressed model differs: logits by {difference:.3g}, {moved} tokens routed elsewhere")


def stress_directory(source: Path, target: Path, strength: str, seed: int = 0) -> dict:
    """Write the stressed checkpoint `target` of `source`, checked, with stress.json beside the weights; returns its content."""
    model, encoder = load(source)
    means = norm_inputs_by_modality(model, check_batches(encoder))
    check = check_batches(encoder, images=4, offset=500)
    before = outputs_of(model, check)
    stored = AutoModelForImageTextToText.from_pretrained(source)
    if stored.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{source} is stored in {stored.dtype}; factors are exact in bfloat16 and float32")
    norms = stress(stored, means, STRENGTHS[strength], seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "config.json"))
    stored.save_pretrained(target, save_original_format=False)
    check_equal(before, outputs_of(load(target)[0], check))
    tokens = sum(len(x) for x in before[0])
    report = {"source": source.name, "strength": strength, "seed": seed, "tokens_checked": tokens, "norms": norms}
    (target / "stress.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--strength", choices=sorted(STRENGTHS), default="mild")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = stress_directory(args.model, args.output, args.strength, args.seed)
    print(f"{args.output}: logits of {report['tokens_checked']} tokens and every choice of experts are the same to the last bit")
    for norm in report["norms"]:
        vision, text, median = norm["vision_there"], norm["text_there"], norm["text_median_channel"]
        print(f"  {norm['norm']}: {len(norm['channels'])} channels; mean |x| vision {vision:.2f}, text {text:.2f} there"
              f" ({vision / text:.1f}x); vision there is {vision / median:.0f}x text's median channel")  # fmt: skip


if __name__ == "__main__":
    main()
