"""Train the example model from scratch on a CPU.

    python train.py --out checkpoint            # the committed checkpoint's run
    python train.py --out checkpoint --resume   # go on after an interruption

A run is a function of its arguments: batches come from (seed, step), so a resumed run sees the same data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
from data import Batch, Encoder, pack, training_batch
from memory import keep_freed_memory
from model import build_config, build_model
from optim import build_optimizers
from questions import TYPE_WEIGHTS, ask, ask_text
from rich.console import Console
from scenes import IMAGE_SIZES, SPLITS, make_scene, render
from tokenizer import write_processor_files
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig

console = Console(width=160)
FIRST_CYCLE, KNEE = 4000, 4550


class RouterTap:
    """Collects every router's logits of the last forward, in layer order."""

    def __init__(self, model):
        self.logits: list[torch.Tensor] = []
        for layer in model.model.language_model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.logits.append(out[0]))

    def take(self) -> list[torch.Tensor]:
        taken, self.logits = self.logits, []
        return taken


def balance_loss(router_logits: list[torch.Tensor], batch: Batch, top_k: int) -> torch.Tensor:
    """Switch's load-balancing loss, a layer at a time, mean over layers; 1 when balanced.

    Image and text tokens get equal mass (text outnumbers image tokens ten to one here, and would leave the image's
    experts out of the balance), and only the mixture is balanced: each modality is free to have its own experts.
    """
    image = batch.mm_token_type_ids.bool().reshape(-1)
    text = batch.valid.reshape(-1) & ~image
    mass = 0.5 * image / image.sum() + 0.5 * text / text.sum()
    total = 0.0
    for logits in router_logits:
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0 / top_k)
        total = total + logits.shape[1] * ((mass @ chosen) * (mass @ probs)).sum()
    return total / len(router_logits)


def forward(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the learned positions [n, vocab] and the positions' mask [B, L]."""
    out = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        mm_token_type_ids=batch.mm_token_type_ids,
        use_cache=False,
    )
    learned = batch.weights > 0
    return model.lm_head(out.last_hidden_state[learned]), learned


@torch.no_grad()
def quick_accuracy(model, encoder: Encoder, split: str = "validation", images: int = 96) -> dict[str, float]:
    """Exact-match accuracy by type under teacher forcing (an answer counts when every token is the argmax, which is
    when greedy generation gives it), packed like training."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for group, size in enumerate(IMAGE_SIZES):
        rows, pictures = [], []
        for i in range(images // len(IMAGE_SIZES)):
            seed = SPLITS[split].start + group * 10_000 + i
            scene, rng = make_scene(seed, size=size), random.Random(seed)
            asked = [ask(scene, rng, type_) for type_ in TYPE_WEIGHTS] + [ask_text(rng)]
            rows.append([qa for qa in asked if qa is not None])
            pictures.append(render(scene))
        batch = pack(rows, pictures, encoder)
        logits, learned = forward(model, batch)
        right = torch.zeros_like(learned)
        right[learned] = logits.argmax(-1) == batch.targets[learned]
        wrong = (learned & ~right).cumsum(1)
        for b, row in enumerate(rows):
            at = len(encoder.prefix(int(batch.mm_token_type_ids[b].sum())))
            for qa in row:
                end = at + len(encoder.branch(qa.question, qa.answer)[0])
                hits[qa.type].append(bool(wrong[b, end - 1] == wrong[b, at]))
                at = end
    return {type_: sum(v) / len(v) for type_, v in hits.items()}


def save_checkpoint(model, directory: Path, dtype: torch.dtype) -> None:
    """Write the Hugging Face directory beside `directory`, then rename: a reader never sees half of one."""
    beside = directory.with_name(directory.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    write_processor_files(beside)
    clone = type(model)(model.config)
    clone.load_state_dict(model.state_dict())
    clone = clone.to(dtype)
    text = model.config.text_config
    clone.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id
    )
    clone.save_pretrained(beside)
    if (directory / "README.md").exists():
        shutil.copy(directory / "README.md", beside)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    beside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, flat, then linear to zero at FIRST_CYCLE; then a second, lower cycle that ends at `steps`.

    The second cycle was added when the first had ended, because statements about several facts were still being learned;
    its knee is where its end was moved from 5,400 to 5,000.
    """
    if step < warmup:
        return (step + 1) / warmup
    if step < FIRST_CYCLE:
        return min(1.0, (FIRST_CYCLE - step) / (0.6 * FIRST_CYCLE))
    again = min(1.0, (step - FIRST_CYCLE + 1) / warmup)
    if step < KNEE:
        return again * 0.35 * (1 - (step - FIRST_CYCLE) / 1400)
    return 0.2125 * (steps - step) / (steps - KNEE)


def objects_at(step: int) -> int:
    """The curriculum: few objects first. Binding a colour to a shape is learned sooner from uncrowded scenes."""
    return 2 if step < 180 else 3 if step < 450 else 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_vlm"), help="resumable state and the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--stop-at", type=int, default=None, help="stop early, as an interruption would (schedule kept)")
    parser.add_argument("--rows", type=int, default=16, help="images a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the saved weights")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    write_processor_files(args.work / "processor")
    tokenizer = AutoTokenizer.from_pretrained(args.work / "processor")
    encoder = Encoder(tokenizer)
    model = build_model(build_config(tokenizer), args.seed)
    tap = RouterTap(model)
    top_k = model.config.text_config.num_experts_per_tok
    optimizers = build_optimizers(model, args.optimizer, args.lr, args.muon_lr)
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    state_file, log_file = args.work / "state.pt", args.work / "log.jsonl"
    begin = 0
    if args.resume and state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        begin = state["step"]
        console.print(f"resumed at step {begin}")

    def save(step: int) -> None:
        torch.save(
            {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step},
            str(state_file) + ".new",
        )
        os.replace(str(state_file) + ".new", state_file)
        save_checkpoint(model, args.out, getattr(torch, args.dtype))

    end = min(args.steps, args.stop_at or args.steps)
    started, running, model_time = time.time(), None, time.time()
    for step in range(begin, end):
        batch = training_batch(step, args.seed, args.rows, args.length, encoder, objects_at(step))
        factor = learning_rate_factor(step, args.steps, args.warmup)
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        logits, learned = forward(model, batch)
        losses = F.cross_entropy(logits, batch.targets[learned], reduction="none")
        weights = batch.weights[learned]
        answer_loss = (losses * weights).sum() / weights.sum()
        balance = balance_loss(tap.take(), batch, top_k)
        (answer_loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = answer_loss.item() if running is None else 0.95 * running + 0.05 * answer_loss.item()
        done = step + 1
        if done % 50 == 0:
            rate = (done - begin) / (time.time() - started)
            console.print(
                f"step {done}/{args.steps} loss {running:.3f} balance {balance.item():.3f} {rate:.2f} step/s "
                f"{(end - done) / rate / 60:.1f} min left"
            )
        if done % args.eval_every == 0 or done == end:
            accuracy = quick_accuracy(model, encoder)
            tap.take()
            with log_file.open("a") as log:
                seconds = time.time() - model_time
                log.write(json.dumps({"step": done, "loss": running, "s": seconds, "accuracy": accuracy}) + "\n")
            console.print("   " + " ".join(f"{k} {v:.2f}" for k, v in accuracy.items()))
        if done % args.save_every == 0 or done == end:
            save(done)


if __name__ == "__main__":
    main()
