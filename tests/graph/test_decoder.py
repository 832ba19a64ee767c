"""The emitted floating-point decoder equals transformers' forward."""

import numpy as np
import onnx_ir as ir
import pytest
from transformers.cache_utils import DynamicCache

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.graph.builder import graph_dtype
from ecmfq_export.graph.decoder import add_taps, emit_decoder
from tests.graph.helpers import Decoder, HfSource, hf_logits, session
from tests.tiny_models import build_qwen3_vl_moe, qwen3_vl_moe_config

MAX_SEQ = 80
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def source() -> HfSource:
    # Three layers: routed, dense, routed; DeepStack features for the first two.
    config = qwen3_vl_moe_config(num_hidden_layers=3, mlp_only_layers=[1],
                                 vision={"depth": 2, "deepstack_visual_indexes": [0, 1]})  # fmt: skip
    return HfSource(build_qwen3_vl_moe(config))


@pytest.fixture(scope="module")
def runner(source):
    return session(emit_decoder(source, MAX_SEQ, ir.DataType.FLOAT))


def sequence(rng: np.random.Generator, length: int, hidden: int = 128):
    """Embeddings, positions on three different axes, and DeepStack features at a third of the positions."""
    embeds = rng.normal(size=(1, length, hidden)).astype(np.float32)
    positions = np.sort(rng.integers(0, length + 3, (3, 1, length)), axis=-1)
    visual = rng.random((1, length)) < 0.4
    features = [rng.normal(size=(int(visual.sum()), hidden)).astype(np.float32) for _ in range(2)]
    dense = [np.zeros_like(embeds) for _ in features]
    for target, values in zip(dense, features, strict=True):
        target[visual] = values
    return embeds, positions, visual, features, dense


@pytest.mark.parametrize("length", [1, 7, 64])
def test_prefill(source, runner, length):
    embeds, positions, visual, features, dense = sequence(np.random.default_rng(length), length)
    ours = Decoder(runner, source.spec, MAX_SEQ, 1).step(embeds, positions, [0], dense)["logits"]
    np.testing.assert_allclose(ours, hf_logits(source.model, embeds, positions, features, visual), atol=TOLERANCE)


def test_ragged_batch_with_decode_steps(source, runner):
    """Two right-padded prompts of 5 and 11, then six steps, each sequence writing at its own index."""
    rng = np.random.default_rng(3)
    lengths = [5, 11]
    parts = [sequence(rng, length) for length in lengths]
    embeds, positions = np.full((2, 11, 128), 3.0, np.float32), np.zeros((3, 2, 11), np.int64)
    deepstack = [np.zeros((2, 11, 128), np.float32) for _ in range(2)]
    for row, (e, p, _, _, dense) in enumerate(parts):
        embeds[row, : lengths[row]], positions[:, row, : lengths[row]] = e[0], p[:, 0]
        for i in range(2):
            deepstack[i][row, : lengths[row]] = dense[i][0]
    ours = Decoder(runner, source.spec, MAX_SEQ, 2)
    logits = ours.step(embeds, positions, [0, 0], deepstack)["logits"]
    caches = [DynamicCache(config=source.model.config.text_config) for _ in lengths]
    for row, (e, p, visual, features, _) in enumerate(parts):
        expected = hf_logits(source.model, e, p, features, visual, caches[row])
        np.testing.assert_allclose(logits[row, : lengths[row]], expected[0], atol=TOLERANCE)
    for step in range(6):
        cached = np.array(lengths) + step
        new = rng.normal(size=(2, 1, 128)).astype(np.float32)
        where = np.broadcast_to((cached + 4)[None, :, None], (3, 2, 1))
        logits = ours.step(new, where, cached)["logits"]
        for row in range(2):
            expected = hf_logits(source.model, new[row : row + 1], where[:, row : row + 1], cache=caches[row])
            np.testing.assert_allclose(logits[row], expected[0], atol=TOLERANCE)


def test_last_logits_are_the_same_ones(source, runner):
    graph = emit_decoder(source, MAX_SEQ, ir.DataType.FLOAT, "last")
    assert [str(d) for d in graph.graph.outputs[0].shape] == ["batch", "1", "288"]
    embeds = np.random.default_rng(0).normal(size=(2, 6, 128)).astype(np.float32)
    positions = np.broadcast_to(np.arange(6), (3, 2, 6))
    last = Decoder(session(graph), source.spec, MAX_SEQ, 2).step(embeds, positions, [0, 0], last_index=[5, 2])["logits"]
    every = Decoder(runner, source.spec, MAX_SEQ, 2).step(embeds, positions, [0, 0])["logits"]
    np.testing.assert_allclose(last[:, 0], every[[0, 1], [5, 2]], atol=1e-6)


def test_float16_runs_and_stays_near(source, runner):
    graph = emit_decoder(source, MAX_SEQ, ir.DataType.FLOAT16)
    embeds, positions, visual, features, dense = sequence(np.random.default_rng(5), 9)
    half = Decoder(session(graph), source.spec, MAX_SEQ, 1, np.float16).step(embeds, positions, [0], dense)
    exact = Decoder(runner, source.spec, MAX_SEQ, 1).step(embeds, positions, [0], dense)
    assert half["logits"].dtype == np.float32 and half["present_key_0"].dtype == np.float16
    # float16 carries 11 bits; logits of a few units after three layers stay within a few hundredths.
    np.testing.assert_allclose(half["logits"], exact["logits"], atol=0.06)


def test_tied_embeddings_and_biases():
    config = qwen3_vl_moe_config(tie_word_embeddings=True, attention_bias=True)
    source = HfSource(build_qwen3_vl_moe(config))
    embeds, positions, visual, features, dense = sequence(np.random.default_rng(1), 5)
    ours = Decoder(session(emit_decoder(source, 8, ir.DataType.FLOAT)), source.spec, 8, 1).step(embeds, positions, [0], dense[:1])
    expected = hf_logits(source.model, embeds, positions, features[:1], visual)
    np.testing.assert_allclose(ours["logits"], expected, atol=TOLERANCE)


def test_emitting_reads_no_weight(source):
    source.reads.clear()
    graph = emit_decoder(source, MAX_SEQ, ir.DataType.FLOAT16)
    assert source.reads == []
    assert sum(n.op_type == "EcmfqMoE" for n in graph.graph) == 2 and not graph.functions
    names = [n.name for n in graph.graph]
    assert len(names) == len(set(names)) and "layers.2/self_attn/q_proj" in names


def test_taps_are_the_residual_stream(source):
    graph = emit_decoder(source, MAX_SEQ, ir.DataType.FLOAT)
    add_taps(graph)
    assert [v.name for v in graph.graph.outputs][-3:] == ["hidden_0", "hidden_1", "hidden_2"]
    embeds = np.zeros((1, 2, 128), np.float32)
    out = Decoder(session(graph), source.spec, MAX_SEQ, 1).step(embeds, np.zeros((3, 1, 2), np.int64), [0])
    assert out["hidden_1"].shape == (1, 2, 128)


def test_refusals(source):
    with pytest.raises(UnsupportedError, match="bfloat16"):
        graph_dtype("bfloat16")
    weight = source.model.model.language_model.norm.weight
    kept = weight.data[0].clone()
    weight.data[0] = 1e6
    graph = emit_decoder(source, MAX_SEQ, ir.DataType.FLOAT16)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds values up to 1e\+06"):
        graph.graph.initializers["norm.weight"].const_value.numpy()
    weight.data[0] = kept
