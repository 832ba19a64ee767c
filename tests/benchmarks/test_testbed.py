"""The test bed's data, packing and stress."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.stages.samples import load_pool
from ecmfq_export.validate.evaluate import load_captions, load_questions

ROOT = Path(__file__).resolve().parents[2]
TESTBED = ROOT / "benchmarks" / "testbed"
EXAMPLE = ROOT / "examples" / "tiny_vlm"
NAMES = ("qwen_a", "qwen_b", "kimi_a", "kimi_b")


@pytest.fixture(scope="module", autouse=True)
def testbed_modules():
    """The test bed's files are scripts beside each other, not a package: import them from their folder."""
    names = {path.stem for folder in (TESTBED, EXAMPLE) for path in folder.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(TESTBED))
    yield
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory, testbed_modules):
    import make_data

    roots = [tmp_path_factory.mktemp("data") for _ in range(2)]
    for root in roots:
        make_data.write_all(root, {"validation": make_data.Sizes(32, 24), "test": make_data.Sizes(32, 24)}, calibration=27)
    return roots


@pytest.fixture(scope="module")
def models(testbed_modules):
    """Each model at its initial weights, with its encoder; routers and selection biases away from zero."""
    from families import build_config, build_model, family_of, routers
    from packing import Encoder
    from vocabulary import FORMS, build_tokenizer

    out = {}
    for name in NAMES:
        tokenizer = build_tokenizer(FORMS[family_of(name)])
        model = build_model(name, build_config(name, tokenizer), seed=0).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            for router in routers(model):
                if hasattr(router, "e_score_correction_bias"):
                    router.e_score_correction_bias += 0.05 * torch.randn(router.num_experts, generator=generator)
        out[name] = model, Encoder(tokenizer, family_of(name))
    return out


def test_same_bytes_on_every_run(small_data) -> None:
    one, other = ((root / split / "manifest.json").read_text() for root in small_data for split in ("test",))
    assert one == other


def test_split_ranges_never_overlap() -> None:
    from cells import SPLITS

    ranges = sorted(SPLITS.values(), key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:], strict=False))


def test_no_image_in_two_splits(small_data) -> None:
    import make_data

    hashes = [make_data.image_hashes(small_data[0] / split) for split in ("calibration", "validation", "test")]
    assert all(hashes) and sum(map(len, hashes)) == len(set.union(*hashes))


def test_an_image_in_two_splits_is_refused(tmp_path, monkeypatch) -> None:
    import cells
    import make_data

    monkeypatch.setitem(cells.SPLITS, "test", cells.SPLITS["validation"])
    with pytest.raises(ValueError, match="both validation and test"):
        make_data.write_all(tmp_path, {"validation": make_data.Sizes(4, 0), "test": make_data.Sizes(4, 0)}, calibration=3)


def test_the_package_reads_the_files(small_data) -> None:
    pool = load_pool(small_data[0] / "calibration")
    assert len(pool) == 27 and any(s.image is None for s in pool)
    questions = load_questions(small_data[0] / "test")
    assert len(questions) == 32 and len({q.type for q in questions}) >= 14
    captions = load_captions(small_data[0] / "test" / "captions.jsonl")
    assert len({c.text for c in captions}) == 24
    assert all(len(set(c.distractors)) == 3 and c.text not in c.distractors for c in captions)


def test_captions_come_in_groups_of_near_duplicates(small_data) -> None:
    import make_data

    rows = [json.loads(line) for line in (small_data[0] / "test" / "captions.jsonl").read_text().splitlines()]
    for start in range(0, len(rows), make_data.GROUP):
        base, *others = (row["text"].replace(",", "").split() for row in rows[start : start + make_data.GROUP])
        assert all(sum(a != b for a, b in zip(base, other, strict=True)) == 1 for other in others)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), grid=st.integers(0, 6))
def test_names_follow_the_continuous_attributes(seed: int, grid: int) -> None:
    from cells import GRIDS, HOURS, HUES, make_scene, render, vary

    scene = make_scene(seed, GRIDS[grid])
    again = make_scene(seed, GRIDS[grid])
    assert np.array_equal(render([scene]), render([again]))
    for i in range(scene.cells):
        assert HUES[int(scene.hue[i] * 16)] == scene.hue_name(i)
        # The middle of a bin is its hour: hand 0 to 1/12 is twelve, 1/12 to 2/12 is one.
        assert HOURS.index(scene.hour_name(i)) == (int(scene.hand[i] * 12) + 11) % 12
    other = vary(scene, np.random.default_rng(seed), 3)
    assert ((0 <= other.hue) & (other.hue < 1) & (0 <= other.size) & (other.size < 1)).all()


def test_the_hand_points_where_its_hour_says() -> None:
    from cells import HOURS, Scene, render

    size, still = np.array([0.9, 0.0]), np.zeros((2, 4)) + 0.5
    for hour, (row, col) in {"twelve": (2, 8), "three": (8, 13), "six": (13, 8), "nine": (8, 2)}.items():
        hand = np.full(2, ((HOURS.index(hour) + 1) % 12 + 0.5) / 12)
        scene = Scene(1, 2, np.zeros(2), size, hand, np.zeros(2, int), still, 0.0)
        assert scene.hour_name(0) == hour
        assert render([scene])[0, row, col].min() > 120  # white, where the shape is red or dark


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_branch_is_the_single_prompt(models, name: str) -> None:
    """Hidden states of packed branches equal those of each prompt alone in transformers' own masks and positions."""
    from cells import make_scene, render
    from dialogue import QUESTIONS, ask_text
    from packing import pack
    from vocabulary import FORMS

    model, encoder = models[name]
    scene, rng = make_scene(3, (2, 3)), np.random.default_rng(0)
    row = [QUESTIONS["hue"](scene, rng), ask_text(rng), QUESTIONS["caption"](scene, rng)]
    batch = pack([row], render([scene]), encoder)
    form = FORMS[encoder.family]
    with torch.no_grad():
        packed = model.model(**batch.inputs, use_cache=False).last_hidden_state[0]
        for qa, (first, last) in zip(row, batch.ends[0], strict=True):
            content = [{"type": "image"}] if qa.needs_image else []
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": qa.question}]}]
            text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = encoder.pieces(text.replace(form.image[1], form.image[1] * 6) + qa.answer + "<|im_end|>")
            ids = torch.tensor([ids])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if qa.needs_image:
                inputs |= {k: batch.inputs[k] for k in ("pixel_values", "image_grid_thw")}
            if encoder.family == "qwen":
                inputs["mm_token_type_ids"] = (ids == encoder.image).long()
            alone = model.model(**inputs, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[first : last + 1], alone[-(last + 1 - first) :], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("strength", ("mild", "strong"))
@pytest.mark.parametrize("name", NAMES)
def test_stress_keeps_every_bit(models, name: str, strength: str) -> None:
    import copy

    import stress

    model, encoder = models[name]
    batches = stress.check_batches(encoder, images=1)
    means = stress.norm_inputs_by_modality(model, batches)
    stressed = copy.deepcopy(model)
    done = stress.stress(stressed, means, stress.STRENGTHS[strength], seed=1)
    stress.check_equal(stress.outputs_of(model, batches), stress.outputs_of(stressed, batches))
    after = stress.norm_inputs_by_modality(stressed, batches)
    for norm in done:
        vision = after[norm["norm"].removeprefix("layers.")][0]
        assert float(vision[norm["channels"]].mean()) == pytest.approx(norm["vision_there"], rel=1e-3)
        assert norm["vision_there"] > 4 * norm["text_median_channel"]
    layer, plain = stressed.model.language_model.layers[-1], model.model.language_model.layers[-1]
    for path in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.o_proj.weight", "mlp.gate.weight"):
        assert not torch.equal(layer.get_parameter(path), plain.get_parameter(path))


def test_a_stress_that_changes_logits_is_caught(models) -> None:
    import copy

    import stress

    model, encoder = models["qwen_a"]
    batches = stress.check_batches(encoder, images=1)[:1]
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.language_model.layers[0].input_layernorm.weight[0] *= 2
    with pytest.raises(AssertionError, match="differs"):
        stress.check_equal(stress.outputs_of(model, batches), stress.outputs_of(changed, batches))


def test_the_selection_bias_moves_towards_idle_experts(models) -> None:
    from types import SimpleNamespace

    from train import update_selection_bias

    gate = SimpleNamespace(num_experts=4, e_score_correction_bias=torch.zeros(4))
    layer = SimpleNamespace(mlp=SimpleNamespace(gate=gate))
    model = SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(layers=[layer])))
    chosen = torch.tensor([[0, 1], [0, 1], [0, 2]])
    update_selection_bias(model, [(None, None, chosen)], torch.full((3,), 1 / 3), rate=0.5)
    assert gate.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_prompts_are_those_of_the_evaluation(testbed_modules) -> None:
    """Models are trained on what they are asked: a changed prompt would measure another readout."""
    import dialogue

    from ecmfq_export.validate.evaluation import evalset
    from ecmfq_export.validate.prompts import MATCH_PROMPT

    assert dialogue.IMAGE_EMBEDDING_PROMPT == evalset.IMAGE_EMBEDDING_PROMPT
    assert dialogue.TEXT_EMBEDDING_PROMPT == evalset.TEXT_EMBEDDING_PROMPT
    assert (dialogue.CAPTION_PROMPT, dialogue.MATCH_PROMPT) == (evalset.CAPTION_PROMPT, MATCH_PROMPT)
