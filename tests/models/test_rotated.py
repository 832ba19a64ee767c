"""A rotated view computes what the model computes: exactly in exact arithmetic, to rounding in float32."""

import json
import shutil

import numpy as np
import pytest
import torch

from ecmfq_export.errors import CheckpointError
from ecmfq_export.models.float_source import ExpertsSource
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.residual import residual_roles
from ecmfq_export.models.rotated import NOTE, RotatedModel, residual_rotation
from ecmfq_export.models.spec import GqaSpec, MlaSpec
from ecmfq_export.models.torch_decoder import load_layer, run_decoder
from tests.stages.common import plant_outliers
from tests.tiny_aria import aria_sample, make_aria
from tests.tiny_glm import glm_sample, make_glm
from tests.tiny_internvl import internvl_sample, make_internvl
from tests.tiny_kimi import kimi_sample, make_kimi_k25, make_kimi_vl
from tests.tiny_models import make_qwen3_vl_moe, random_sample
from tests.tiny_omni import make_qwen3_omni

KINDS = {
    "routed": (make_qwen3_vl_moe, {}),
    "dense and biases": (make_qwen3_vl_moe, {"mlp_only_layers": [1], "attention_bias": True}),
    "tied": (make_qwen3_vl_moe, {"tie_word_embeddings": True}),
    "blocks of 4": (make_qwen3_vl_moe, {"hidden_size": 116}),
    "published latent attention": (make_kimi_vl, {"tie_word_embeddings": True}),
    "latent attention": (make_kimi_k25, {"q_lora_rank": 40, "rope_interleave": False}),
    "a thinker with tied embeddings": (make_qwen3_omni, {"tie_word_embeddings": True}),
    "no bias behind the tower, a part of a head rotated": (make_glm, {}),
    "learned queries, transposed experts": (make_aria, {"attention_bias": True}),
    "class tokens": (make_internvl, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    make, options = KINDS[request.param]
    return open_model(make(tmp_path_factory.mktemp("model"), seed=4, **options))


def roles(model):
    vision = [name for name in model.names() if name.startswith("vision.")]
    return residual_roles(model.spec, model.family.residual_writers(model.spec), vision)


def columns_of(model, name: str) -> torch.Tensor:
    """What `name` adds to the residual stream, float64 [hidden, anything]."""
    tensor = model.tensor(name).double()
    if name == "embed_tokens.weight":
        return tensor.t()
    return tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor.transpose(0, -2).reshape(model.spec.hidden_size, -1)


def rows_of(model, name: str, norm: str) -> torch.Tensor:
    """A reader's rows, float64 [anything, hidden], behind its norm."""
    stored = "embed_tokens.weight" if name == "lm_head.weight" and model.spec.tie_word_embeddings else name
    return model.tensor(stored).double().flatten(0, -2) * model.tensor(norm).double()


def test_every_reader_sees_every_writer_as_before(model):
    """In float64: (R diag(g) Q) (Q^T W) = R diag(g) W for all pairs, which with Q orthogonal is the whole function."""
    view = RotatedModel(model, seed=3, dtype=torch.float64)
    found = roles(view)
    readers = [name for name, role in found.items() if role.kind == "reads"]
    writers = [name for name, role in found.items() if role.kind == "writes"]
    layers = model.spec.num_layers
    assert "lm_head.weight" in readers and len(readers) >= 4 * layers + 1
    assert sum(name.startswith("vision.") and name.endswith(".weight") for name in writers) == 1 + model.spec.num_deepstack
    assert len(writers) >= 2 + 2 * layers
    before = [columns_of(model, name) for name in writers]
    after = [columns_of(view, name) for name in writers]
    for reader in readers:
        old, new = (rows_of(m, reader, found[reader].norm) for m in (model, view))
        for writer, was, now in zip(writers, before, after, strict=True):
            assert torch.allclose(new @ now, old @ was, rtol=1e-12, atol=1e-12), (reader, writer)
    matrix = view.rotation.matrix()
    assert torch.allclose(matrix @ matrix.t(), torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-13)
    for name, role in found.items():
        if role.kind == "norm":
            assert torch.equal(view.tensor(name), torch.ones(model.spec.hidden_size, dtype=torch.float64))
        elif role.kind == "inside":
            assert torch.equal(view.tensor(name), model.tensor(name).double())


def value_heads(model, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of o and rows that make values, by query head: [hidden, heads, size] and [heads, size, anything]."""
    spec, prefix = model.spec.layers[layer].attention, f"layers.{layer}.self_attn."
    out = model.tensor(prefix + "o_proj.weight").unflatten(1, (spec.num_heads, -1))
    if isinstance(spec, GqaSpec):
        value = model.tensor(prefix + "v_proj.weight").unflatten(0, (spec.num_kv_heads, -1))
        return out, value.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
    return out, model.tensor(prefix + "kv_b_proj.weight").unflatten(0, (spec.num_heads, -1))[:, spec.qk_nope_head_dim :]


def test_values_are_rotated_within_heads_and_cancel(model):
    plain, view = RotatedModel(model, 3, dtype=torch.float64), RotatedModel(model, 3, values=True, dtype=torch.float64)
    turned = []
    for layer in range(model.spec.num_layers):
        (out_a, value_a), (out_b, value_b) = (value_heads(m, layer) for m in (plain, view))
        value_a, out_a = value_a.double(), out_a.double()
        assert not torch.allclose(value_a, value_b, atol=1e-3)
        before, after = (torch.einsum("dhs,hsk->hdk", out, value) for out, value in ((out_a, value_a), (out_b, value_b)))
        assert torch.allclose(before, after, rtol=1e-12, atol=1e-12)
        turned.append(value_b[0] @ torch.linalg.pinv(value_a[0]))
    assert not torch.allclose(turned[0], turned[1], atol=1e-3), "each layer has a rotation of its own"
    spec, name = model.spec.layers[0].attention, "layers.0.self_attn.kv_b_proj.weight"
    if isinstance(spec, MlaSpec):
        keys = [m.tensor(name).unflatten(0, (spec.num_heads, -1))[:, : spec.qk_nope_head_dim].double() for m in (plain, view)]
        assert torch.equal(*keys), "rows that make keys stay"


@pytest.mark.parametrize("values", [False, True])
def test_logits_are_the_same_to_rounding(model, values):
    """Both sides round every product to 24 bits; through two layers that stays some tens of units in the last place of a
    typical logit."""
    view = RotatedModel(model, seed=5, values=values)
    makers = {"kimi_vl": kimi_sample, "kimi_k25": kimi_sample, "glm4v_moe": glm_sample, "aria": aria_sample,
              "internvl": internvl_sample}
    make = makers.get(model.spec.family, random_sample)
    samples = [make(1, [(1, 4, 4)]), make(2), make(3, [(1, 4, 8)])]
    with torch.no_grad():
        sides = [run_decoder(m, prepare_inputs(m, samples, vision=m.vision_module())) for m in (model, view)]
    typical = float(sides[0].pow(2).mean().sqrt())
    assert float((sides[0] - sides[1]).abs().max()) < 100 * np.finfo(np.float32).eps * typical


def test_outlier_channels_are_spread(tmp_path):
    directory = make_qwen3_vl_moe(tmp_path, seed=1)
    plant_outliers(directory)
    model = open_model(directory)
    samples = [random_sample(seed, [(1, 4, 8)], text=20) for seed in range(4)]

    def peak(m):
        """Largest over root mean square of what each layer's experts read, by token, in the middle."""
        found = []
        inputs = prepare_inputs(m, samples, vision=m.vision_module())
        hidden = inputs.inputs_embeds
        for index in range(m.spec.num_layers):
            layer = load_layer(m, index)
            out, _ = layer.attend(layer.attention_input(hidden), inputs.cos, inputs.sin, inputs.mask)
            x = layer.moe_input(hidden + out)
            found.append((x.abs().amax(-1) / x.pow(2).mean(-1).sqrt()).median())
            hidden = layer.forward(hidden, inputs.cos, inputs.sin, inputs.mask)
        return torch.stack(found)

    with torch.no_grad():
        before, after = peak(model), peak(RotatedModel(model, seed=0))
    # Of 128 Gaussian values the largest is about 2.7 times their root mean square; six planted channels give 7 and more.
    assert (before > 6).all() and (after < 3.5).all()


def test_rows_of_a_tensor(model):
    view = RotatedModel(model, seed=3)
    mlp = "layers.1.mlp.experts.down_proj" if model.has("layers.1.mlp.experts.down_proj") else "layers.1.mlp.down_proj.weight"
    for name in ("embed_tokens.weight", "layers.0.self_attn.o_proj.weight", mlp, "norm.weight"):
        whole = view.tensor(name)
        assert whole.dtype == view.stored_dtype(name) == torch.float32 and tuple(whole.shape) == view.shape(name)
        assert torch.equal(view.tensor_rows(name, 1, 3), whole[1:3]), name


def test_parts_on_disk_are_the_rotated_experts(model):
    view = RotatedModel(model, seed=3)
    for name in (name for name in view.names() if ".experts." in name):
        source = view.float_source(name)
        if isinstance(source, ExpertsSource):
            expected = source.split(view.tensor(name))
            assert set(expected) == set(source.disk_shapes()) and len(expected) >= 2
            assert all(torch.equal(view.disk_part(name, part), values) for part, values in expected.items())
            with pytest.raises(ValueError, match="no part of"):
                view.disk_part(name, "another")
        else:
            with pytest.raises(ValueError, match="one tensor on disk"):
                view.disk_part(name, source.name)


def test_chunks_change_nothing(model, monkeypatch):
    if not model.has("layers.1.mlp.experts.down_proj"):
        pytest.skip("a dense layer")
    whole = RotatedModel(model, seed=3).tensor("layers.1.mlp.experts.down_proj")
    monkeypatch.setattr("ecmfq_export.models.rotated._CHUNK", 1)
    assert torch.equal(RotatedModel(model, seed=3).tensor("layers.1.mlp.experts.down_proj"), whole)


def test_a_note_says_how_it_was_rotated(tmp_path):
    directory = make_qwen3_vl_moe(tmp_path / "m")
    assert residual_rotation(open_model(directory)) is None
    note = {"kind": "randomized_hadamard", "size": 128, "seed": 9, "values": False}
    (directory / NOTE).write_text(json.dumps(note))
    view = RotatedModel(open_model(directory), 9)
    assert torch.equal(residual_rotation(open_model(directory)).matrix(), view.rotation.matrix())
    for bad in ("{", "[]", json.dumps({**note, "size": 64}), json.dumps({**note, "kind": "learned"}), json.dumps({**note, "seed": 1.5})):
        (directory / NOTE).write_text(bad)
        with pytest.raises(CheckpointError, match="rotate again"):
            residual_rotation(open_model(directory))
    shutil.rmtree(directory)
