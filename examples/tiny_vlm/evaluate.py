"""Measure a checkpoint on the held-out split: answers, retrieval, routing.

    python evaluate.py --checkpoint checkpoint

Writes evaluation.json, routing.json and routing.png beside the checkpoint's README. Everything runs in transformers'
stock forward on weights as stored; only the retrieval's 40,000 scores a protocol use the packed rows of data.py (held equal
by tests).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from data import Encoder, pack
from heldout import HERE, distractors, heldout_questions, heldout_scenes
from memory import keep_freed_memory
from model import use_training_forms
from prompts import Prompter
from questions import CAPTION_PROMPT, MATCH_PROMPT, QA, TYPE_WEIGHTS, ask_text, caption
from rich.progress import track
from scenes import Scene, render
from torch.nn import functional as F
from train import forward
from transformers import Qwen3VLMoeForConditionalGeneration

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def load(directory: Path) -> Qwen3VLMoeForConditionalGeneration:
    """The checkpoint in float32 (its values are the stored ones)."""
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def answer(model, prompter: Prompter, questions: list[str], images: list, max_new_tokens: int = 48) -> list[str]:
    """Greedy answers of the stock generate(), one left-padded batch."""
    inputs = prompter.batch(questions, images)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in prompter.tokenizer.batch_decode(new, skip_special_tokens=True)]


def vqa(model, prompter: Prompter, scenes: list[Scene], items: list[tuple[int, QA]], batch: int = 64) -> dict:
    """Exact-match accuracy of greedy answers, in all and by type."""
    # Captions generate many tokens: keep them in batches of their own.
    items = sorted(items, key=lambda item: (item[1].type == "caption", item[1].needs_image))
    hits: dict[str, list[bool]] = defaultdict(list)
    for at in track(range(0, len(items), batch), "held-out questions"):
        part = items[at : at + batch]
        images = [render(scenes[i]) if qa.needs_image else None for i, qa in part]
        answers = answer(model, prompter, [qa.question for _, qa in part], images)
        for (_, qa), got in zip(part, answers, strict=True):
            hits[qa.type].append(got == qa.answer)
    by_type = {t: {"accuracy": sum(h) / len(h), "questions": len(h)} for t, h in sorted(hits.items())}
    every = [h for group in hits.values() for h in group]
    return {"accuracy": sum(every) / len(every), "questions": len(every), "by_type": by_type}


@torch.no_grad()
def _answer_logits(model, encoder: Encoder, scene: Scene, asked: list[QA], per_row: int = 10):
    """Logits and targets at every answer token of many questions about one image, in the questions' order."""
    rows = [asked[i : i + per_row] for i in range(0, len(asked), per_row)]
    batch = pack(rows, [render(scene)] * len(rows), encoder)
    logits, learned = forward(model, batch)
    return logits, batch.targets[learned]


def yes_scores(model, encoder: Encoder, scene: Scene, texts: list[str]) -> torch.Tensor:
    """log P(yes) - log P(no) of the retrieval prompt, for one image and many texts."""
    asked = [QA(MATCH_PROMPT.format(text=text), "yes", "match") for text in texts]
    logits, targets = _answer_logits(model, encoder, scene, asked)
    yes, no = (encoder.pieces(word)[0] for word in ("yes", "no"))
    logits = logits[targets == yes]
    return logits[:, yes] - logits[:, no]


def caption_scores(model, encoder: Encoder, scene: Scene, texts: list[str]) -> torch.Tensor:
    """log P(text) as the answer to the caption prompt, for one image and many texts."""
    asked = [QA(CAPTION_PROMPT, text, "caption") for text in texts]
    logits, targets = _answer_logits(model, encoder, scene, asked)
    scores = -F.cross_entropy(logits, targets, reduction="none")
    lengths = [encoder.branch(qa.question, qa.answer)[1] for qa in asked]
    return torch.stack([part.sum() for part in scores.split(lengths)])


def recall(scores: torch.Tensor, k: int) -> float:
    """Share of rows whose diagonal entry is among the k largest."""
    better = (scores > scores.diagonal()[:, None]).sum(1)
    return (better < k).float().mean().item()


def retrieval(model, encoder: Encoder, scenes: list[Scene], score=yes_scores) -> dict:
    """R@1/5/10 both ways over all image-caption pairs, and the choice among five near-duplicates."""
    captions = [caption(scene) for scene in scenes]
    rows, near = [], []
    for scene in track(scenes, f"retrieval by {score.__name__}"):
        scores = score(model, encoder, scene, [*captions, caption(scene), *distractors(scene, 4)])
        rows.append(scores[: len(captions)])
        hard = scores[len(captions) :]
        near.append(bool(hard[0] > hard[1:].max()))
    scores = torch.stack(rows)  # [image, caption]
    result = {"images": len(scenes), "captions": len(captions)}
    for name, matrix in (("image_to_text", scores), ("text_to_image", scores.t())):
        result |= {f"{name}_R@{k}": recall(matrix, k) for k in (1, 5, 10)}
    result["mean_recall"] = sum(v for key, v in result.items() if "R@" in key) / 6
    result["chance_R@1"] = 1 / len(scenes)
    result["near_duplicate_choice"] = sum(near) / len(near)
    result["near_duplicate_chance"] = 0.2
    return result


@torch.no_grad()
def routing(model, prompter: Prompter, scenes: list[Scene], items: list[tuple[int, QA]]) -> dict:
    """How often each expert is chosen, by layer and modality, over whole exchanges (prompt and answer)."""
    layers, text = model.model.language_model.layers, model.config.text_config
    counts = torch.zeros(len(layers), 2, text.num_experts)
    chosen: list[torch.Tensor] = []
    handles = [layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for layer in layers]
    for at in range(0, len(items), 64):
        part = items[at : at + 64]
        questions, answers = [qa.question for _, qa in part], [qa.answer for _, qa in part]
        images = [render(scenes[i]) if qa.needs_image else None for i, qa in part]
        inputs = prompter.batch(questions, images, answers)
        chosen.clear()
        model(**inputs)
        valid, image = inputs["attention_mask"].bool().reshape(-1), inputs["mm_token_type_ids"].bool().reshape(-1)
        for layer, experts in enumerate(chosen):
            for modality, mask in enumerate((valid & ~image, image)):
                counts[layer, modality] += torch.bincount(experts[mask].reshape(-1), minlength=text.num_experts)
    for handle in handles:
        handle.remove()
    shares = counts / counts.sum(-1, keepdim=True)
    return {
        "text_share": shares[:, 0].tolist(),
        "image_share": shares[:, 1].tolist(),
        "every_expert_used": bool((counts.sum(1) > 0).all()),
        "smallest_share_of_a_layers_tokens": (counts.sum(1) / counts.sum((1, 2))[:, None]).min().item(),
        # 0: both modalities use the experts alike; 1: they share none.
        "modality_total_variation": (0.5 * (shares[:, 0] - shares[:, 1]).abs().sum(-1)).tolist(),
    }


def plot_routing(record: dict, path: Path) -> None:
    """Bars of expert usage, one panel a decoder layer, text beside image."""
    layers, experts = len(record["text_share"]), len(record["text_share"][0])
    figure, axes = plt.subplots(layers, 1, figsize=(9, 2.1 * layers), sharex=True, sharey=True)
    for layer, axis in enumerate(axes):
        x = torch.arange(experts)
        axis.bar(x - 0.2, record["text_share"][layer], 0.4, label="text tokens", color="#4c72b0")
        axis.bar(x + 0.2, record["image_share"][layer], 0.4, label="image tokens", color="#dd8452")
        axis.axhline(1 / experts, color="gray", linewidth=0.8, linestyle="--")
        distance = record["modality_total_variation"][layer]
        axis.set_title(f"layer {layer}: total variation between modalities {distance:.2f}", fontsize=9)
        axis.set_ylabel("share of slots", fontsize=8)
    axes[0].legend(fontsize=8, loc="upper right")
    axes[-1].set_xticks(range(experts))
    axes[-1].set_xlabel("expert (dashed: uniform)")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--questions", type=int, default=1800)
    parser.add_argument("--retrieval-images", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    model, prompter = load(args.checkpoint), Prompter(args.checkpoint)
    scenes = heldout_scenes(args.images)
    items = heldout_questions(scenes, args.questions)
    rng = random.Random("heldout/text")
    # As many text-only questions as there are of each other type.
    with_text = [*items, *[(0, ask_text(rng)) for _ in range(args.questions // len(TYPE_WEIGHTS))]]
    routed = routing(model, prompter, scenes, with_text[-800:])
    (args.out / "routing.json").write_text(json.dumps(routed, indent=1) + "\n")
    plot_routing(routed, args.out / "routing.png")
    report = {"split": "heldout", "dtype": "float32 compute on stored weights", "vqa": {}, "retrieval": {}}
    report["vqa"] = vqa(model, prompter, scenes, with_text)
    print(json.dumps(report["vqa"]), flush=True)
    use_training_forms(model)
    encoder, pool = Encoder(prompter.tokenizer), scenes[: args.retrieval_images]
    report["retrieval"]["p_yes"] = retrieval(model, encoder, pool, yes_scores)
    report["retrieval"]["caption_likelihood"] = retrieval(model, encoder, pool, caption_scores)
    report["seconds"] = round(time.time() - started)
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
