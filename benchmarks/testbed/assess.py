"""Accuracy and retrieval of a test bed checkpoint in floating point and under simulated round-to-nearest quantization.

    python benchmarks/testbed/assess.py benchmarks/testbed/checkpoints/qwen_a --split validation

A check that the models are trained and that quantization shows; it runs transformers' modules on packed prompts and simulates
integers in floating point (`ecmfq-export evaluate` runs quantized checkpoints in integers).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from dialogue import QA
from families import use_training_forms
from packing import IMAGE_EMBEDDING, TEXT_EMBEDDING, Encoder, image_embedding, pack, text_embedding
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

HERE = Path(__file__).resolve().parent


def fake_quantize(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric rounding along the last axis with a scale each row, back in floating point."""
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
    return (x / scale).round().clamp(-top, top) * scale


def _quantized_experts(self, hidden_states, top_k_index, top_k_weights):
    """Experts whose weights are rounded already and whose activations are rounded to int8 a token before each product."""
    x = fake_quantize(hidden_states, 8)
    out = torch.zeros_like(hidden_states)
    for e in torch.unique(top_k_index).tolist():
        token, slot = torch.where(top_k_index == e)
        gate, up = F.linear(x[token], self.gate_up_proj[e]).chunk(2, -1)
        y = F.linear(fake_quantize(F.silu(gate) * up, 8), self.down_proj[e])
        out.index_add_(0, token, y * top_k_weights[token, slot, None])
    return out


ALL_EXPERTS_FUNCTIONS.register("testbed_quantized", _quantized_experts)


@torch.no_grad()
def simulate_rtn(model: nn.Module, experts: int = 4, attention: int = 8) -> None:
    """Round the decoder in place: experts (shared ones too) and attention projections, int8 activations a token.

    A dense first layer's MLP counts as attention does: int8.
    """
    for layer in model.model.language_model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                bits = experts if "shared_experts" in name else attention
                module.weight.copy_(fake_quantize(module.weight, bits))
                module.register_forward_pre_hook(lambda _m, args: (fake_quantize(args[0], 8), *args[1:]))
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.gate_up_proj.copy_(fake_quantize(layer.mlp.experts.gate_up_proj, experts))
            layer.mlp.experts.down_proj.copy_(fake_quantize(layer.mlp.experts.down_proj, experts))
    model.set_experts_implementation("testbed_quantized")


def load(directory: Path) -> tuple[nn.Module, Encoder]:
    """The checkpoint in float32 in its fast form, and its encoder."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    use_training_forms(model)
    family = "kimi" if model.config.model_type == "kimi_k25" else "qwen"
    return model, Encoder(AutoTokenizer.from_pretrained(directory), family)


def read_split(directory: Path) -> tuple[list[dict], list[dict]]:
    """Rows of questions.jsonl and of captions.jsonl, with `pixels` [H, W, 3] uint8 where there is an image."""
    out = []
    for name in ("questions.jsonl", "captions.jsonl"):
        rows = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        for row in rows:
            if row["image"]:
                row["pixels"] = np.asarray(Image.open(directory / row["image"]))
        out.append(rows)
    return out[0], out[1]


def _batches(rows: list[list[QA]], pixels: list[np.ndarray], size: int = 64) -> Iterator[list[int]]:
    """Indices of rows whose images have one size, at most `size` a batch."""
    groups = defaultdict(list)
    for i, image in enumerate(pixels):
        groups[image.shape].append(i)
    for members in groups.values():
        for at in range(0, len(members), size):
            yield members[at : at + size]


@dataclass
class Assessment:
    """What a run gives, items in file order.

    Attributes:
        correct: [questions] bool, exact match of the whole answer under teacher forcing.
        types: of the questions.
        log_probs: of each question, log-probabilities [answer tokens, vocab].
        scores: [images, texts] cosine similarities of the captions.
        distractors: [images, 3] cosine similarities with the false texts.
    """

    correct: np.ndarray
    types: list[str]
    log_probs: list[torch.Tensor]
    scores: np.ndarray
    distractors: np.ndarray
    extra: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Accuracy (all, and by type), R@1 both ways, near-duplicate choice."""
        own = self.scores.diagonal()
        out = {
            "accuracy": float(self.correct.mean()),
            "i2t_r@1": float((self.scores >= own[:, None]).sum(1).__eq__(1).mean()),
            "t2i_r@1": float((self.scores >= own[None, :]).sum(0).__eq__(1).mean()),
            "i2t_r@5": float(((self.scores >= own[:, None]).sum(1) <= 5).mean()),
            "choice": float((own[:, None] > self.distractors).all(1).mean()),
        }
        for type_ in sorted(set(self.types)):
            out[type_] = float(self.correct[[t == type_ for t in self.types]].mean())
        return out


@torch.no_grad()
def assess(model: nn.Module, encoder: Encoder, questions: list[dict], captions: list[dict]) -> Assessment:
    """Run the questions (teacher forcing) and the captions' embeddings through the model."""
    blank = np.zeros((16, 32, 3), np.uint8)
    rows = [[QA(q["question"], q["answer"], q["type"], q["image"] is not None)] for q in questions]
    pixels = [q.get("pixels", blank) for q in questions]
    correct, log_probs = np.zeros(len(rows), bool), [torch.empty(0)] * len(rows)
    for members in _batches(rows, pixels):
        batch = pack([rows[i] for i in members], np.stack([pixels[i] for i in members]), encoder)
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        for b, i in enumerate(members):
            at = batch.weights[b] > 0
            logits = model.lm_head(hidden[b, at])
            correct[i] = bool((logits.argmax(-1) == batch.targets[b, at]).all())
            log_probs[i] = logits.log_softmax(-1)
    rows = [[image_embedding(), text_embedding(c["text"]), *map(text_embedding, c["distractors"])] for c in captions]
    pixels = [c["pixels"] for c in captions]
    images, texts = [None] * len(rows), [None] * len(rows)
    for members in _batches(rows, pixels):
        batch = pack([rows[i] for i in members], np.stack([pixels[i] for i in members]), encoder)
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        for kind, store in ((IMAGE_EMBEDDING, images), (TEXT_EMBEDDING, texts)):
            at = batch.embeddings[kind]
            vectors = F.normalize(hidden[at[:, 0], at[:, 1]], dim=-1).view(len(members), -1, hidden.shape[-1])
            for b, i in enumerate(members):
                store[i] = vectors[b]
    images, texts = torch.stack(images)[:, 0], torch.stack(texts)  # [N, H], [N, 1 + distractors, H]
    scores = (images @ texts[:, 0].T).numpy()
    distractors = torch.einsum("nh,nkh->nk", images, texts[:, 1:]).numpy()
    return Assessment(correct, [q["type"] for q in questions], log_probs, scores, distractors)


def mean_kl(floating: Assessment, other: Assessment) -> float:
    """Mean KL divergence over all answer tokens, nats."""
    terms = [F.kl_div(q, p, log_target=True, reduction="none").sum(-1) for p, q in zip(floating.log_probs, other.log_probs, strict=True)]
    return float(torch.cat(terms).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--bits", default="8/8,4/8,4/4,3/8", help="experts/attention of the simulated round-to-nearest runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    questions, captions = read_split(args.data / args.split)
    for directory in args.model:
        model, encoder = load(directory)
        floating = assess(model, encoder, questions, captions)
        print(directory.name, "float", " ".join(f"{k} {v:.3f}" for k, v in floating.summary().items()), flush=True)
        for setting in filter(None, args.bits.split(",")):
            experts, attention = map(int, setting.split("/"))
            rounded, _ = load(directory)
            simulate_rtn(rounded, experts, attention)
            run = assess(rounded, encoder, questions, captions)
            values = {"kl": mean_kl(floating, run), **run.summary()}
            print(directory.name, f"W{setting}A8", " ".join(f"{k} {v:.4f}" for k, v in values.items()), flush=True)


if __name__ == "__main__":
    main()
