"""The example model, its generators, held-out set and calibration pool."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny_vlm"
CHECKPOINT = EXAMPLE / "checkpoint"
CALIB = ROOT / "calib_data"


@pytest.fixture(scope="module", autouse=True)
def example_modules():
    """The example's files are scripts beside each other, not a package: import them from their folder."""
    names = {path.stem for path in EXAMPLE.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


@pytest.fixture(scope="module")
def prompter(example_modules):
    from prompts import Prompter

    return Prompter(CHECKPOINT)


@pytest.fixture(scope="module")
def model(example_modules):
    from evaluate import load

    return load(CHECKPOINT)


def test_scenes_are_a_function_of_their_seed():
    from scenes import make_scene, render

    for seed in range(20):
        assert make_scene(seed) == make_scene(seed)
        assert np.array_equal(render(make_scene(seed)), render(make_scene(seed)))
    assert len({render(make_scene(seed)).tobytes() for seed in range(200)}) == 200


def test_splits_are_disjoint():
    from scenes import SPLITS

    for a, b in itertools.combinations(SPLITS.values(), 2):
        assert a.stop <= b.start or b.stop <= a.start


def test_no_image_is_in_two_committed_sets():
    digests = [
        {hashlib.sha256(Image.open(p).convert("RGB").tobytes()).digest() for p in folder.glob("images/*.png")}
        for folder in (CALIB, EXAMPLE / "heldout")
    ]
    assert all(digests)
    assert not digests[0] & digests[1]


def test_distractors_are_false_and_near():
    from questions import caption, distractor
    from scenes import make_scene

    for seed in range(300):
        scene = make_scene(seed)
        text = distractor(scene, random.Random(seed))
        assert text != caption(scene)
        assert text.count(",") == caption(scene).count(",")


def test_yes_no_questions_are_roughly_balanced():
    from questions import ask
    from scenes import make_scene

    for type_ in ("exists", "side", "statement", "match"):
        answers = [qa.answer for s in range(600) if (qa := ask(make_scene(s), random.Random(s), type_))]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6, type_


def test_checkpoint_is_small_and_loads_strictly():
    from transformers import Qwen3VLMoeForConditionalGeneration

    assert sum(p.stat().st_size for p in CHECKPOINT.rglob("*")) <= 16 * 2**20
    _, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    config = json.loads((CHECKPOINT / "config.json").read_text())
    text = config["text_config"]
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    # Expert layouts must be told apart by shape alone.
    assert text["hidden_size"] not in (text["moe_intermediate_size"], 2 * text["moe_intermediate_size"])


def test_chat_template_has_the_qwen_form(prompter):
    assert prompter.text("Where is the red 7?", True, 2) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Where is the red 7?<|im_end|>\n<|im_start|>assistant\n"
    )
    any_text = "Ünïcode, tabs\t and \U0001f600 too."
    assert prompter.tokenizer.decode(prompter.tokenizer(any_text).input_ids) == any_text


def test_packed_rows_equal_single_turn_prompts(model, prompter):
    from data import Encoder, pack, patchify
    from questions import ask_any, ask_text
    from scenes import IMAGE_SIZES, make_scene, render

    encoder = Encoder(prompter.tokenizer)
    for size in IMAGE_SIZES[1::2]:
        scene, rng = make_scene(5, size=size), random.Random(0)
        image = render(scene)
        row = [ask_any(scene, rng), ask_text(rng), ask_any(scene, rng)]
        batch = pack([row], [image], encoder)
        stock = prompter.image_processor([image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(patchify([image]), stock, atol=1e-6)
        with torch.no_grad():
            packed = model.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw,
                mm_token_type_ids=batch.mm_token_type_ids,
                use_cache=False,
            ).last_hidden_state[0]
            at = len(encoder.prefix(int(batch.mm_token_type_ids.sum())))
            for qa in row:
                length = len(encoder.branch(qa.question, qa.answer)[0])
                inputs = prompter.batch([qa.question], [image if qa.needs_image else None], [qa.answer])
                single = model.model(**inputs, use_cache=False).last_hidden_state[0, -length:]
                torch.testing.assert_close(packed[at : at + length], single, atol=2e-3, rtol=2e-3)
                at += length


def test_training_experts_equal_the_stock_ones(prompter):
    from model import build_config, routed_experts_forward
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    torch.manual_seed(0)
    config = build_config(prompter.tokenizer).text_config
    config._experts_implementation = "eager"
    experts = Qwen3VLMoeTextExperts(config).double()
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens, chosen = 40, 4
    index = torch.stack([torch.randperm(5)[:chosen] for _ in range(tokens)])  # experts 5 and up get no token
    results = []
    for forward in (type(experts).forward, routed_experts_forward):
        x = torch.linspace(-1, 1, tokens * 128, dtype=torch.float64).view(tokens, 128).requires_grad_()
        weights = torch.linspace(0.1, 0.9, tokens * chosen, dtype=torch.float64).view(tokens, chosen).requires_grad_()
        out = forward(experts, x, index, weights)
        grads = torch.autograd.grad((out * out.cos()).sum(), [x, weights, *experts.parameters()])
        results.append([out, *grads])
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)


def test_heldout_questions_are_answered(model, prompter):
    from evaluate import answer

    lines = (EXAMPLE / "heldout" / "questions.jsonl").read_text().splitlines()
    items = [item for item in map(json.loads, lines) if item["type"] != "caption"][:60]
    images = [Image.open(EXAMPLE / "heldout" / item["image"]).convert("RGB") for item in items]
    answers = answer(model, prompter, [item["question"] for item in items], images, max_new_tokens=4)
    right = sum(got == item["answer"] for got, item in zip(answers, items, strict=True))
    assert right >= 54, f"{right} of {len(items)}"


def test_every_expert_is_used_and_modalities_differ(model, prompter):
    from evaluate import routing
    from heldout import heldout_questions, heldout_scenes

    scenes = heldout_scenes(60)
    record = routing(model, prompter, scenes, heldout_questions(scenes, 128))
    assert record["every_expert_used"]
    assert min(record["modality_total_variation"]) > 0.1


def test_calibration_manifest_holds():
    manifest = json.loads((CALIB / "manifest.json").read_text())
    assert manifest["license"] == "CC0-1.0"
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((CALIB / name).read_bytes()).hexdigest() == digest, name
    on_disk = {p.relative_to(CALIB).as_posix() for p in CALIB.rglob("*") if p.is_file()}
    assert on_disk - set(manifest["sha256"]) == {"manifest.json", "README.md"}


def test_calibration_samples_point_at_images():
    samples = [json.loads(line) for line in (CALIB / "samples.jsonl").read_text().splitlines()]
    assert any(sample["image"] is None for sample in samples)
    for sample in samples:
        assert sample["text"] and sample["answer"]
        assert sample["image"] is None or (CALIB / sample["image"]).is_file()


def test_committed_generators_remake_the_calibration_samples():
    from questions import ask_any
    from scenes import SPLITS, make_scene, render

    samples = [json.loads(line) for line in (CALIB / "samples.jsonl").read_text().splitlines()]
    first = {s["image"]: s for s in reversed(samples) if s["image"]}
    for number in (0, 100, 255):
        seed = SPLITS["calibration"][number]
        scene, rng = make_scene(seed), random.Random(f"calibration/{seed}")
        qa = ask_any(scene, rng, exclude=("caption",))
        sample = first[f"images/{number:03d}.png"]
        assert (sample["text"], sample["answer"]) == (qa.question, qa.answer)
        assert np.array_equal(Image.open(CALIB / sample["image"]).convert("RGB"), render(scene))
