"""Generation over ONNX Runtime: equal to transformers' generate(), batches equal to singles, limits and sampling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLMoeForConditionalGeneration

from ecmfq_export.config import ExportConfig
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.graph import pipeline
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.progress import Silent
from ecmfq_export.runtime import decoder_session
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.generate import Generator, Sampling, pick
from ecmfq_export.target import load_target
from tests.tiny_models import IMAGE_TOKEN_ID, make_qwen3_vl_moe

MAX_SEQ = 96


def _open(path: Path) -> OrtRunner:
    return OrtRunner(path, threads=1)


def _image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


PROMPTS = [
    ("What is it?", [_image(24, 16)]),
    ("Hello there, how are you?", []),
    ("Compare", [_image(16, 16), _image(30, 20)]),
    ("x", [_image(40, 9)]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    config = ExportConfig(max_seq_len=MAX_SEQ)
    return export_onnx(checkpoint, tmp_path_factory.mktemp("out") / "onnx", load_target("rtx"), config, Silent(), dtype="float32")


@pytest.fixture(scope="module")
def generator(exported) -> Generator:
    return Generator(exported, _open)


@pytest.fixture(scope="module")
def samples(generator):
    return [generator.processor.sample(*prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(checkpoint, samples) -> list[list[int]]:
    """Greedy tokens of transformers' own generate(), one prompt at a time."""
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    out = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE_TOKEN_ID).long()}
        if sample.pixel_values is not None:
            inputs |= {"pixel_values": torch.from_numpy(sample.pixel_values), "image_grid_thw": torch.from_numpy(sample.image_grid_thw)}
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        out.append(tokens.tolist())
    return out


def test_batch_equals_transformers_generate(generator, samples, expected):
    results = generator.generate_batch(samples, 16)
    assert [list(r.token_ids) for r in results] == expected
    assert [r.prompt_tokens for r in results] == [s.length for s in samples]
    assert all(r.first_token_seconds > 0 and r.tokens_per_second > 0 for r in results)


def test_singles_equal_the_batch(generator, samples, expected):
    for sample, tokens in zip(samples, expected, strict=True):
        (result,) = generator.generate_batch([sample], 16)
        assert list(result.token_ids) == tokens


def test_streamed_pieces_are_the_text(generator):
    # A random model writes broken UTF-8, the hardest case for streaming.
    for text, images in PROMPTS:
        pieces: list[str] = []
        answer = generator.generate(text, images, max_new_tokens=16, on_token=pieces.append)
        assert "".join(pieces) == answer


def test_a_character_of_several_tokens_comes_out_whole(generator):
    class Spelled(Generator):
        def __init__(self, text: str) -> None:
            self.processor, ids = generator.processor, generator.processor.tokenizer(text)["input_ids"]
            ids.append(self.processor.eos_token_ids[0])
            self.session = _Script(ids)

    pieces: list[str] = []
    assert Spelled("aé漢🙂b").generate("x", on_token=pieces.append) == "aé漢🙂b"
    assert pieces == ["a", "é", "漢", "🙂", "b"]


def test_a_stop_text_is_never_streamed(generator):
    """Not even its first letters, and what looked like its beginning comes out once it is known not to be."""
    ids = generator.processor.tokenizer("one, two END, no E and the END. more")["input_ids"]

    class Spelled(Generator):
        def __init__(self) -> None:
            self.processor, self.session = generator.processor, _Script(ids)

    prompt = generator.processor.sample("x")
    for stop in (("END.",), ("nothing", "END."), ("END. and", "END.")):
        pieces: list[str] = []
        (result,) = Spelled().generate_batch([prompt], on_token=_into(pieces), stop=stop)
        assert result.text == "".join(pieces) == "one, two END, no E and the "
        assert result.stop == "text"
    pieces = []
    (result,) = Spelled().generate_batch([prompt], 12, _into(pieces), stop=("END.",))
    assert result.text == "".join(pieces) == "one, two END" and result.stop == "length", "what was held back comes at the end"


def test_cancelling_ends_between_tokens(generator, samples, expected):
    answers = iter([False, False, True])
    results = generator.generate_batch(samples[:2], 16, cancelled=lambda: next(answers))
    assert [list(result.token_ids) for result in results] == [tokens[:3] for tokens in expected[:2]]
    assert {result.stop for result in results} == {"cancelled"}


def _into(pieces: list[str]):
    return lambda _row, piece: pieces.append(piece)


class _Script:
    """A session whose model says given tokens, whatever it is asked."""

    max_seq_len = 1000

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def check_length(self, sample, room=0):
        pass

    def _next(self) -> np.ndarray:
        logits = np.zeros((1, 300), np.float32)
        logits[0, next(self._ids)] = 1.0
        return logits

    def prefill(self, samples):
        return self._next(), None

    def step(self, tokens, state, active):
        return self._next()


def test_stops_at_end_of_turn_row_by_row(generator, samples, expected, monkeypatch):
    stop = expected[0][3]
    monkeypatch.setattr(generator.processor, "eos_token_ids", (stop,))
    results = generator.generate_batch(samples, 16)
    for result, tokens in zip(results, expected, strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert list(result.token_ids) == tokens[:end]
        assert result.stop == ("eos" if stop in tokens else "length")
    assert results[0].stop == "eos"


def test_the_context_fills_to_its_last_slot(generator, samples, expected):
    room = MAX_SEQ - samples[2].length
    results = generator.generate_batch([samples[2], samples[0]], 60)
    # The last token needs no slot of its own: nothing follows it.
    assert results[0].stop == "context" and len(results[0].token_ids) == room + 1
    assert list(results[0].token_ids[:16]) == expected[2] and list(results[1].token_ids[:16]) == expected[0]


def test_length_errors_give_the_numbers(generator):
    with pytest.raises(UserError, match=r"prompt of 119 tokens \(0 of them for images\) is too long in a context of 96"):
        generator.generate("a" * 100)
    with pytest.raises(UserError, match="leaves no room for 1 more in a context of 96"):
        generator.generate("a" * 77)
    with pytest.raises(UserError, match="max_new_tokens 0"):
        generator.generate("a", max_new_tokens=0)


def test_sampling(generator, samples, expected):
    (nucleus,) = generator.generate_batch(samples[:1], 16, sampling=Sampling(temperature=1.0, top_p=1e-6))
    assert list(nucleus.token_ids) == expected[0]
    hot = Sampling(temperature=3.0, seed=1)
    first, again = (generator.generate_batch(samples[:1], 16, sampling=hot)[0].token_ids for _ in range(2))
    other = generator.generate_batch(samples[:1], 16, sampling=Sampling(temperature=3.0, seed=2))[0].token_ids
    assert first == again != other


def test_pick_follows_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = np.random.default_rng(0)
    counts = np.bincount([pick(logits, Sampling(1.0), draws) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    kept = np.bincount([pick(logits, Sampling(1.0, top_p=0.6), draws) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(kept, [0.625, 0.375, 0, 0], atol=0.03)
    with np.errstate(all="raise", under="ignore"):
        assert pick(logits, Sampling(1e-310), draws) == 0, "next to no temperature is greedy, not an overflow"
    with pytest.raises(UserError, match="NaN"):
        pick(np.array([np.nan, 1.0]), Sampling(), draws)


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_ranges(values):
    with pytest.raises(UserError, match="out of range"):
        Sampling(**values)


def test_answer_logits_through_the_cache_equal_one_pass(generator):
    samples = [generator.processor.sample(text, images, answer) for (text, images), answer in
               zip(PROMPTS, ["a cat", "fine", "no", "a long one"], strict=True)]  # fmt: skip
    whole = generator.session.answer_logits(samples)
    steps = generator.session.answer_logits(samples, stepwise=True)
    for sample, a, b in zip(samples, whole, steps, strict=True):
        assert a.shape == (int(sample.answer_mask.sum()), 288)
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_last_logits_graph(exported, checkpoint, generator, samples, tmp_path, monkeypatch):
    # The vision graph is the same one; tracing it again would take seconds.
    monkeypatch.setattr(pipeline._Export, "vision", lambda job: shutil.copytree(exported / "vision", job.work / "vision"))
    config = ExportConfig(max_seq_len=MAX_SEQ, logits="last")
    last = DecoderSession(export_onnx(checkpoint, tmp_path / "onnx", load_target("rtx"), config, Silent(), dtype="float32"), _open)
    ours, _ = last.prefill(samples)
    theirs, _ = generator.session.prefill(samples)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    answered = [generator.processor.sample("hi", [], "there")]
    np.testing.assert_allclose(last.answer_logits(answered)[0], generator.session.answer_logits(answered)[0], atol=2e-5)
    with pytest.raises(UserError, match="logits = last"):
        last.forward(samples)


def test_images_are_split_over_vision_calls(exported, samples, monkeypatch):
    together = DecoderSession(exported, _open).image_features(samples[2])
    monkeypatch.setattr(decoder_session, "_VISION_BATCH_PATCHES", 1)
    calls = []

    class Counting(OrtRunner):
        def run(self, feeds):
            calls.append(len(feeds["patches"]))
            return super().run(feeds)

    session = DecoderSession(exported, lambda path: Counting(path, threads=1))
    for a, b in zip(session.image_features(samples[2]), together, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert calls == samples[2].image_grid_thw.prod(axis=1).tolist()
    session.image_features(samples[2])
    assert len(calls) == 2, "features of an image that was seen are kept"
    monkeypatch.setattr(decoder_session, "_CACHED_FEATURE_BYTES", 1)
    for _ in range(2):
        session.image_features(samples[0])
        session.image_features(samples[2])
    assert len(calls) == 2 + 1 + 2 + 1 + 2, "beyond the limit only the last features are kept"
    assert len(session._features) == 1 and session._feature_bytes == sum(a.nbytes for a in session.image_features(samples[2]))


def _copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_bad_bundles_are_named(exported, tmp_path, samples):
    with pytest.raises(BundleError, match="runtime.json"):
        DecoderSession(tmp_path, _open)
    copy = _copy(exported, tmp_path)
    runtime = json.loads((copy / "runtime.json").read_text())
    (copy / "runtime.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        DecoderSession(copy, _open)
    (copy / "runtime.json").write_text("[]")
    with pytest.raises(BundleError, match="holds a list"):
        DecoderSession(copy, _open)
    for key in ("num_layers", "logits", "rope"):
        (copy / "runtime.json").write_text(json.dumps({k: v for k, v in runtime.items() if k != key}))
        with pytest.raises(UserError, match=key):
            DecoderSession(copy, _open)
    (copy / "runtime.json").write_text(json.dumps({**runtime, "max_image_patches": 16}))
    with pytest.raises(UserError, match="the vision graph takes 16"):
        DecoderSession(copy, _open).prefill(samples[:1])
    (copy / "runtime.json").write_text(json.dumps({**runtime, "hidden_size": 64}))
    with pytest.raises(BundleError, match="embeddings are 128 wide, the decoder 64"):
        DecoderSession(copy, _open)


def test_damaged_embeddings_are_named(exported, tmp_path):
    copy = _copy(exported, tmp_path)
    path = copy / "embed_tokens.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:4], b"", b"\xff" * 100, whole[:8] + b"x" * (len(whole) - 8)):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="embed_tokens"):
            DecoderSession(copy, _open)
    path.unlink()
    with pytest.raises(BundleError, match="no embeddings"):
        DecoderSession(copy, _open)


def test_ids_beyond_the_embeddings_are_refused(generator):
    with pytest.raises(UserError, match="288 embeddings"):
        generator.session.step(np.array([300]), generator.session.prefill([generator.processor.sample("x")])[1])
