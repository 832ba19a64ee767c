"""Train one of the test bed's models from scratch on a CPU.

    python benchmarks/testbed/train.py qwen_a            # → benchmarks/testbed/checkpoints/qwen_a
    python benchmarks/testbed/train.py qwen_a --resume   # go on after an interruption

A run is a function of its arguments: batches come from (seed, step), so a resumed run sees the same data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from cells import GRIDS, SPLITS, make_scene, render, vary
from dialogue import QUESTIONS, ask_text, caption
from families import SEEDS, build_config, build_model, family_of, routers
from fast_muon import FastMuon
from memory import keep_freed_memory
from optim import build_optimizers
from packing import (
    CELL_CLASSES,
    IMAGE_EMBEDDING,
    TEXT_EMBEDDING,
    Batch,
    Encoder,
    image_embedding,
    pack,
    text_embedding,
    training_batch,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig
from vocabulary import write_processor_files

HERE = Path(__file__).resolve().parent
TEMPERATURE = 0.05
"""Of the contrastive loss over cosine similarities."""


class RouterTap:
    """Collects every router's output of the last forward, in layer order."""

    def __init__(self, model):
        self.outputs: list[tuple] = []
        for router in routers(model):
            router.register_forward_hook(lambda _m, _i, out: self.outputs.append(out))

    def take(self) -> list[tuple]:
        """The outputs (logits, weights, indices) since the last call."""
        taken, self.outputs = self.outputs, []
        return taken


def token_mass(batch: Batch) -> torch.Tensor:
    """[B·L]: image and text tokens get equal mass, padding none.

    Text outnumbers image tokens twenty to one here, and would leave the image's experts out of the balance.
    """
    image = batch.image.reshape(-1)
    text = batch.valid.reshape(-1) & ~image
    return 0.5 * image / image.sum() + 0.5 * text / text.sum()


def balance_loss(outputs: list[tuple], mass: torch.Tensor, top_k: int) -> torch.Tensor:
    """Switch's load-balancing loss (2101.03961, eq. 4), a layer at a time, mean over layers; 1 when balanced."""
    total = 0.0
    for out in outputs:
        probs = out[0].float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0 / top_k)
        total = total + probs.shape[1] * ((mass @ chosen) * (mass @ probs)).sum()
    return total / len(outputs)


@torch.no_grad()
def update_selection_bias(model, outputs: list[tuple], mass: torch.Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing (2408.15664, algorithm 1): the bias of an overloaded expert falls, else it rises."""
    for router, out in zip(routers(model), outputs, strict=True):
        indices = out[2]
        load = torch.zeros(mass.shape[0], router.num_experts).scatter_(1, indices, 1.0)
        load = mass @ load / indices.shape[1]
        router.e_score_correction_bias += rate * torch.sign(load.mean() - load)


class CellProbe(nn.Module):
    """Linear classifiers of a cell's attributes on the vision tower's output, one image token a cell.

    Learned with the model and thrown away: answers alone teach the tower shapes and hands only after many hundred steps, this
    teaches them in a hundred.
    """

    def __init__(self, model):
        super().__init__()
        width = model.config.text_config.hidden_size
        self.heads = nn.ModuleList([nn.Linear(width, count) for count in CELL_CLASSES.values()])
        self._features: list[torch.Tensor] = []
        out = model.model.visual.merger if hasattr(model.model, "visual") else model.model.mm_projector
        out.register_forward_hook(lambda _m, _i, features: self._features.append(features.reshape(-1, width)))

    def loss(self, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the last forward's features against [cells, attributes] classes."""
        features = self._features[-1]
        self._features.clear()
        losses = [F.cross_entropy(head(features), classes[:, i]) for i, head in enumerate(self.heads)]
        return torch.stack(losses).mean()


def forward(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final-normed hidden states [B, L, H], logits at the learned positions [n, vocab] and the positions' mask [B, L]."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    learned = batch.weights > 0
    return hidden, model.lm_head(hidden[learned]).float(), learned


def contrastive_loss(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """InfoNCE both ways (CLIP, 2103.00020); every row's second text is a near-duplicate, a further negative for images."""
    at = batch.embeddings
    images = F.normalize(hidden[at[IMAGE_EMBEDDING][:, 0], at[IMAGE_EMBEDDING][:, 1]].float(), dim=-1)
    texts = F.normalize(hidden[at[TEXT_EMBEDDING][:, 0], at[TEXT_EMBEDDING][:, 1]].float(), dim=-1)
    texts = torch.cat([texts[0::2], texts[1::2]])
    scores = images @ texts.T / TEMPERATURE
    own = torch.arange(len(images))
    return 0.5 * (F.cross_entropy(scores, own) + F.cross_entropy(scores[:, : len(images)].T, own))


@torch.no_grad()
def quick_evaluation(model, encoder: Encoder, images: int = 98) -> dict[str, float]:
    """On the validation split: exact-match accuracy by type under teacher forcing, and retrieval R@1 over all `images`."""
    hits: dict[str, list[bool]] = defaultdict(list)
    vectors: dict[str, list[torch.Tensor]] = defaultdict(list)
    each = images // len(GRIDS)
    for group, grid in enumerate(GRIDS):
        rng = np.random.default_rng(group)
        scenes = []
        for i in range(each):
            # Every second scene is a near-duplicate of the one before.
            fresh = make_scene(SPLITS["validation"].stop - 1 - group * 1000 - i, grid)
            scenes.append(vary(scenes[-1], rng, 3) if i % 2 else fresh)
        rows = []
        for scene in scenes:
            row = [image_embedding(), text_embedding(caption(scene))]
            row += [ask(scene, rng) for ask in QUESTIONS.values()] + [ask_text(rng), ask_text(rng)]
            rows.append(row)
        batch = pack(rows, render(scenes), encoder)
        hidden, logits, learned = forward(model, batch)
        wrong = torch.zeros_like(learned)
        wrong[learned] = logits.argmax(-1) != batch.targets[learned]
        for b, row in enumerate(rows):
            for qa, (first, last) in zip(row, batch.ends[b], strict=True):
                if qa.answer:
                    hits[qa.type].append(not bool(wrong[b, first:last].any()))
        for kind, at in batch.embeddings.items():
            vectors[kind].append(F.normalize(hidden[at[:, 0], at[:, 1]].float(), dim=-1))
    out = {type_: sum(v) / len(v) for type_, v in hits.items()}
    out["all"] = sum(out.values()) / len(out)
    scores = torch.cat(vectors[IMAGE_EMBEDDING]) @ torch.cat(vectors[TEXT_EMBEDDING]).T
    own = torch.arange(len(scores))
    out["i2t_r@1"] = float((scores.argmax(1) == own).float().mean())
    out["t2i_r@1"] = float((scores.argmax(0) == own).float().mean())
    return out


def save_checkpoint(model, name: str, directory: Path) -> None:
    """Write the Hugging Face directory (bfloat16) beside `directory`, then rename: a reader never sees half of one."""
    beside = directory.with_name(directory.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    write_processor_files(beside, family_of(name))
    clone = type(model)(model.config)
    clone.load_state_dict(model.state_dict())
    clone = clone.to(torch.bfloat16)
    for router, trained in zip(routers(clone), routers(model), strict=True):
        if hasattr(trained, "e_score_correction_bias"):
            router.e_score_correction_bias = trained.e_score_correction_bias.clone()  # float32, as the family keeps it
    text = model.config.text_config
    clone.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id
    )
    # Under the names of the classes: written back to "original" names, Kimi-K2.5 renames the decoder after its vision tower.
    clone.save_pretrained(beside, save_original_format=False)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    beside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, flat, then linear to zero over the last 60%."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (0.6 * steps))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SEEDS))
    parser.add_argument("--out", type=Path, default=None, help="default: checkpoints/MODEL beside this file")
    parser.add_argument("--work", type=Path, default=Path("/tmp/testbed"), help="resumable state and the log")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--stop-at", type=int, default=None, help="stop early, as an interruption would (schedule kept)")
    parser.add_argument("--rows", type=int, default=24, help="images a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--bias-rate", type=float, default=0.002)
    parser.add_argument("--contrastive", type=float, default=0.25)
    parser.add_argument("--probe", type=float, default=0.5)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16 (slower than float32 at this size on the CPUs tried)")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    name, family, seed = args.model, family_of(args.model), SEEDS[args.model]
    out = args.out or HERE / "checkpoints" / name
    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_processor_files(work / "processor", family)
    tokenizer = AutoTokenizer.from_pretrained(work / "processor")
    encoder = Encoder(tokenizer, family)
    model = build_model(name, build_config(name, tokenizer), seed)
    tap, probe = RouterTap(model), CellProbe(model)
    top_k = model.config.text_config.num_experts_per_tok
    optimizers = [*build_optimizers(model, "muon", args.lr, args.muon_lr, FastMuon), torch.optim.AdamW(probe.parameters(), lr=args.lr)]
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    state_file, log_file = work / "state.pt", work / "log.jsonl"
    begin = 0
    if args.resume and state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        probe.load_state_dict(state["probe"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        begin = state["step"]
        print(f"resumed at step {begin}", flush=True)
    elif log_file.exists():
        log_file.unlink()

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "probe": probe.state_dict(), "step": step}
        state["optimizers"] = [o.state_dict() for o in optimizers]
        torch.save(state, str(state_file) + ".new")
        os.replace(str(state_file) + ".new", state_file)
        save_checkpoint(model, name, out)

    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    end = min(args.steps, args.stop_at or args.steps)
    started, running = time.time(), {}
    for step in range(begin, end):
        batch = training_batch(step, seed, args.rows, encoder, bins=6 if step < args.steps // 3 else 3)
        factor = learning_rate_factor(step, args.steps, args.warmup)
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            hidden, logits, learned = forward(model, batch)
        losses = F.cross_entropy(logits, batch.targets[learned], reduction="none")
        weights = batch.weights[learned]
        answer = (losses * weights).sum() / weights.sum()
        contrast = contrastive_loss(hidden, batch)
        routed, mass = tap.take(), token_mass(batch)
        balance = balance_loss(routed, mass, top_k)
        # Kimi's experts are balanced by the selection bias; the loss is only a light help there.
        scale = args.balance if family == "qwen" else 0.1 * args.balance
        cells = probe.loss(batch.cell_classes)
        (answer + args.contrastive * contrast + args.probe * cells + scale * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if family == "kimi":
            update_selection_bias(model, routed, mass, args.bias_rate * factor)
        now = {"answer": answer, "contrast": contrast, "cells": cells, "balance": balance}
        for key, value in ((k, v.item()) for k, v in now.items()):
            running[key] = 0.95 * running.get(key, value) + 0.05 * value
        done = step + 1
        if done % 25 == 0:
            rate = (done - begin) / (time.time() - started)
            shown = " ".join(f"{k} {v:.3f}" for k, v in running.items())
            print(f"step {done}/{args.steps} {shown} {rate:.2f} step/s {(end - done) / rate / 60:.1f} min left", flush=True)
        if done % args.eval_every == 0 or done == end:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                accuracy = quick_evaluation(model, encoder)
            tap.take()
            with log_file.open("a") as log:
                log.write(json.dumps({"step": done, "s": time.time() - started, **running, "validation": accuracy}) + "\n")
            print("   " + " ".join(f"{k} {v:.2f}" for k, v in accuracy.items()), flush=True)
        if done % args.save_every == 0 or done == end:
            save(done)


if __name__ == "__main__":
    main()
