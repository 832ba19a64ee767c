"""Opening a model: every tensor mapped once, none missing or left over, layouts told apart, damage named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.moe_vlm import MoEVLM, decoder_shapes, open_model
from tests.tiny_models import build_qwen3_vl_moe, make_qwen3_vl_moe, qwen3_vl_moe_config

LAYER = "model.language_model.layers.1."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("moe_vlm"))


def edited(directory: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the checkpoint with its tensors changed in place by `change`."""
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def expect_names(model: MoEVLM, reference: Qwen3VLMoeForConditionalGeneration) -> None:
    state = reference.state_dict()
    names = {model.family.disk_name(name): name for name in model.names()}
    assert len(names) == len(model.names())
    tied = {"lm_head.weight"} if model.spec.tie_word_embeddings else set()
    assert set(names) == set(state) - tied
    for disk, name in names.items():
        assert torch.equal(model.tensor(name), state[disk]), name
        assert model.shape(name) == tuple(state[disk].shape) and model.has(name) and model.recipe(name) == "float"


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"mlp_only_layers": [1], "attention_bias": True}, {"max_shard_size": "200KB"}],
    ids=str,
)
def test_every_tensor_under_its_name(tmp_path: Path, options: dict) -> None:
    model = open_model(make_qwen3_vl_moe(tmp_path, seed=4, **options))
    config = {key: value for key, value in options.items() if key != "max_shard_size"}
    expect_names(model, build_qwen3_vl_moe(qwen3_vl_moe_config(**config), seed=4))
    assert model.quantization is None and list(decoder_shapes(model.spec)) == [n for n in model.names() if "vision" not in n]


def test_rows_of_a_tensor(directory: Path) -> None:
    model = open_model(directory)
    name = "layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(model.tensor_rows(name, 3, 5), model.tensor(name)[3:5])
    assert torch.equal(model.tensor_rows("embed_tokens.weight", 7, 8), model.tensor("embed_tokens.weight")[7:8])


def transpose_experts(tensors: Tensors) -> None:
    for name in list(tensors):
        if ".mlp.experts." in name:
            tensors[name] = tensors[name].transpose(1, 2)


def test_published_layout(directory: Path, tmp_path: Path) -> None:
    """Experts transposed on disk, as the published checkpoints hold them, are read into the same memory layout."""
    published, ours = open_model(edited(directory, tmp_path / "p", transpose_experts)), open_model(directory)
    for name in ours.names():
        assert torch.equal(published.tensor(name), ours.tensor(name)) and published.shape(name) == ours.shape(name)
    name = "layers.1.mlp.experts.down_proj"
    assert torch.equal(published.tensor_rows(name, 2, 4), ours.tensor(name)[2:4])
    theirs = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "p", dtype=torch.float32)
    assert torch.equal(theirs.model.language_model.layers[1].mlp.experts.down_proj, ours.tensor(name))


@pytest.mark.parametrize("intermediate", [64, 128])
def test_ambiguous_layout(tmp_path: Path, intermediate: int) -> None:
    path = make_qwen3_vl_moe(tmp_path / "saved", moe_intermediate_size=intermediate)
    square = "gate_up_proj" if intermediate == 64 else "down_proj"
    with pytest.raises(UnsupportedError, match=f"{square}.*square experts"):
        open_model(path)
    saved = open_model(path, expert_layout="transformers")
    published = open_model(edited(path, tmp_path / "published", transpose_experts), expert_layout="published")
    for name in saved.names():
        assert torch.equal(saved.tensor(name), published.tensor(name))
    with pytest.raises(CheckpointError, match="has shape"):
        open_model(path, expert_layout="published")


def remove(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor], source: str | None = None) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: make(tensors[source or name])})


DAMAGE = {
    "missing tensor": (remove(LAYER + "self_attn.q_norm.weight"), "lacks 1 of 64 tensors: .*layers.1.self_attn.q_norm.weight"),
    "missing experts": (remove(LAYER + "mlp.experts.down_proj"), "lacks 1 of .*experts.down_proj"),
    "missing vision tensor": (remove("model.visual.merger.norm.bias"), "lacks 1 of .*model.visual.merger.norm.bias"),
    "extra tensor": (put("model.visual.extra", lambda t: t.clone(), LAYER + "mlp.gate.weight"), "1 tensors that no part .*visual.extra"),
    "another layer": (
        put("model.language_model.layers.2.mlp.gate.weight", lambda t: t.clone(), LAYER + "mlp.gate.weight"),
        "1 tensors that no part of the model takes: model.language_model.layers.2.mlp.gate.weight",
    ),
    "renamed": (
        lambda t: t.update({LAYER + "mlp.router.weight": t.pop(LAYER + "mlp.gate.weight")}),
        "lacks 1 of .*mlp.gate.weight; 1 tensors are there that belong nowhere: .*mlp.router.weight",
    ),
    "wrong shape": (put(LAYER + "self_attn.k_proj.weight", lambda t: t[:-1]), "k_proj.weight' has shape \\[63, 128\\].* \\[64, 128\\]"),
    "wrong experts": (put(LAYER + "mlp.experts.gate_up_proj", lambda t: t[:, :-2]), "gate_up_proj' has shape \\[8, 190, 128\\]"),
    "wrong vision shape": (put("model.visual.pos_embed.weight", lambda t: t[:-1]), "pos_embed.weight' has shape \\[35, 48\\]"),
    "wrong dtype": (put(LAYER + "mlp.gate.weight", lambda t: t.to(torch.int8)), "has dtype torch.int8"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged(directory: Path, tmp_path: Path, case: str) -> None:
    change, message = DAMAGE[case]
    with pytest.raises(CheckpointError, match=message):
        open_model(edited(directory, tmp_path / "bad", change))


def test_nan_is_named_when_loaded(directory: Path, tmp_path: Path) -> None:
    def poison(tensors: Tensors) -> None:
        tensors[LAYER + "mlp.experts.down_proj"][5, 3, 2] = float("nan")

    model = open_model(edited(directory, tmp_path / "bad", poison))
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts.down_proj.*holds nan at element"):
        model.tensor("layers.1.mlp.experts.down_proj")
    assert torch.isfinite(model.tensor("layers.0.mlp.experts.down_proj")).all()


def test_tied_checkpoint_with_a_head_of_its_own(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tied"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="lm_head.weight.*\n.*tie_word_embeddings = true"):
        open_model(copy)


def test_names_that_do_not_exist(directory: Path) -> None:
    model = open_model(directory)
    for ask in (model.tensor, model.shape, model.recipe, model.qtensor):
        with pytest.raises(ValueError, match="no canonical name"):
            ask("layers.0.mlp.gate.weight")
    with pytest.raises(ValueError, match="is not quantized"):
        model.qtensor("layers.0.mlp.experts.down_proj")


def test_mixed_dtypes_are_kept(directory: Path, tmp_path: Path) -> None:
    half = edited(directory, tmp_path / "mixed", put(LAYER + "mlp.gate.weight", lambda t: t.to(torch.bfloat16)))
    model = open_model(half)
    assert model.tensor("layers.1.mlp.router.weight").dtype == model.stored_dtype("layers.1.mlp.router.weight") == torch.bfloat16
    assert model.tensor("layers.0.mlp.router.weight").dtype == torch.float32
