"""Every tensor of the published checkpoints, by name and shape, has exactly one place in our map.

``published_tensors.json`` holds facts: each model's config.json, and its tensors as patterns (``{0:27}`` counts, ``{a,b}`` lists),
written down from what public loaders of these checkpoints ask for. ERNIE's config is the form that transformers 5 makes of the published
one, with the values that its classes and its converter give for that checkpoint. Aria's and InternVL3.5's sizes are from memory; they make
the models' published numbers of parameters. Whether Aria's checkpoint holds the norm behind the tower, which loaders pass over, makes no
difference.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from ecmfq_export.errors import CheckpointError
from ecmfq_export.models.checkpoint import Checkpoint, TensorEntry
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.spec import RopeSpec

PUBLISHED = json.loads(Path(__file__).with_name("published_tensors.json").read_text())


def expand(pattern: str) -> list[str]:
    """``a.{0:2}.{x,y}`` to a.0.x, a.0.y, a.1.x, a.1.y."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else [str(n) for n in range(*map(int, part.split(":")))] if ":" in part else part.split(",")
               for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {tensor: tuple(shape) for pattern, shape in PUBLISHED[name]["tensors"] for tensor in expand(pattern)}


def open_published(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, tensors: dict[str, tuple[int, ...]]):
    """Open a checkpoint that has headers only."""
    (directory / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    entries = {tensor: TensorEntry(directory / "model.safetensors", torch.bfloat16, shape, 0) for tensor, shape in tensors.items()}
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, path: cls(path, entries)))
    return open_model(directory)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_has_its_place(monkeypatch, tmp_path: Path, name: str) -> None:
    tensors = published(name)
    total = sum(math.prod(shape) for shape in tensors.values()) / 1e9
    assert total == pytest.approx(PUBLISHED[name]["parameters_in_billions"], abs=0.06)
    model = open_published(monkeypatch, tmp_path, name, tensors)
    unused = sum(math.prod(tensors[tensor]) for tensor in model.unused) / 1e9
    assert sum(math.prod(model.shape(tensor)) for tensor in model.names()) / 1e9 == pytest.approx(total - unused)
    used = [disk for tensor in model.names() for disk in model.float_source(tensor).disk_shapes()]
    assert sorted([*used, *model.unused]) == sorted(tensors)
    for tensor in model.names():
        for disk, shape in model.float_source(tensor).disk_shapes().items():
            assert tensors[disk] == shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_or_renamed_tensor_is_named(monkeypatch, tmp_path: Path, name: str) -> None:
    tensors = published(name)
    victim = next(tensor for tensor in tensors if tensor.endswith("layers.5.self_attn.o_proj.weight"))
    tensors[victim + "_new"] = tensors.pop(victim)
    with pytest.raises(CheckpointError, match="layers.5.self_attn.o_proj.weight; 1 tensors are there that belong nowhere"):
        open_published(monkeypatch, tmp_path, name, tensors)


def test_kimi_vl_is_what_its_config_says(monkeypatch, tmp_path: Path) -> None:
    model = open_published(monkeypatch, tmp_path, "Kimi-VL-A3B-Instruct", published("Kimi-VL-A3B-Instruct"))
    spec, mlp = model.spec, model.spec.layers[26].mlp
    assert model.shape("layers.1.mlp.experts.gate_up_proj") == (66, 2816, 2048)
    assert (mlp.num_experts, mlp.num_shared_experts, mlp.top_k, mlp.num_slots, mlp.router.scaling) == (64, 2, 6, 8, 2.446)
    assert spec.layers[0].mlp.intermediate_size == 11264 and spec.moe_layers == tuple(range(1, 27))
    assert spec.rope.theta == 800000.0 and spec.rope.head_dim == 64 and spec.image_token_id == 163605
    assert spec.layers[0].attention.scale == 192**-0.5 and spec.vision.patch_features == 588


def test_qwen3_omni_is_what_its_config_says(monkeypatch, tmp_path: Path) -> None:
    model = open_published(monkeypatch, tmp_path, "Qwen3-Omni-30B-A3B-Instruct", published("Qwen3-Omni-30B-A3B-Instruct"))
    spec = model.spec
    assert model.shape("layers.47.mlp.experts.gate_up_proj") == (128, 1536, 2048) and spec.moe_layers == tuple(range(48))
    assert spec.rope == RopeSpec("mrope_interleaved", 1e6, (24, 20, 20), 128) and spec.num_deepstack == 3
    assert (spec.image_token_id, spec.video_token_id, spec.audio_token_id) == (151655, 151656, 151675)
    parts = model.unused_parts()
    assert list(parts) == ["thinker.audio_tower.*", "code2wav.*"] and parts["code2wav.*"].startswith("speech output: 3 tensors")


def test_a_talker_is_a_part_that_is_not_run(monkeypatch, tmp_path: Path) -> None:
    """Whatever it is made of; anything beside the parts that are known belongs nowhere."""
    tensors = published("Qwen3-Omni-30B-A3B-Instruct")
    talker = {"talker.model.codec_embedding.weight": (3072, 1024), "talker.model.layers.0.mlp.experts.0.gate_proj.weight": (384, 1024),
              "talker.code_predictor.lm_head.0.weight": (2048, 1024), "talker.text_projection.linear_fc1.bias": (2048,)}
    model = open_published(monkeypatch, tmp_path, "Qwen3-Omni-30B-A3B-Instruct", tensors | talker)
    assert list(model.unused_parts()) == ["thinker.audio_tower.*", "talker.*", "code2wav.*"]
    assert model.unused_parts()["talker.*"].startswith("speech output: 4 tensors")
    with pytest.raises(CheckpointError, match="1 tensors that no part of the model takes: speaker.weight"):
        open_published(monkeypatch, tmp_path, "Qwen3-Omni-30B-A3B-Instruct", tensors | {"speaker.weight": (1,)})


def test_glm_is_what_its_config_says(monkeypatch, tmp_path: Path) -> None:
    model = open_published(monkeypatch, tmp_path, "GLM-4.5V", published("GLM-4.5V"))
    spec, mlp, attention = model.spec, model.spec.layers[45].mlp, model.spec.layers[0].attention
    assert model.shape("layers.1.mlp.experts.down_proj") == (129, 4096, 1408) and not model.unused
    assert (mlp.num_experts, mlp.num_shared_experts, mlp.top_k, mlp.router.num_groups) == (128, 1, 8, 1)
    assert mlp.router.scoring == "sigmoid" and mlp.router.selection_bias and mlp.router.renormalize
    assert spec.rope == RopeSpec("mrope", 10000.0, (8, 12, 12), 64) and attention.scale == 128**-0.5
    assert attention.bias and not attention.output_bias and not attention.qk_norm and spec.vision.num_position_embeddings == 576


def test_ernie_is_what_its_config_says(monkeypatch, tmp_path: Path) -> None:
    model = open_published(monkeypatch, tmp_path, "ERNIE-4.5-VL-28B-A3B-PT", published("ERNIE-4.5-VL-28B-A3B-PT"))
    spec, mlp = model.spec, model.spec.layers[27].mlp
    # 64 text experts of three pieces, 64 image experts of one, a shared MLP of two text experts' width.
    assert model.shape("layers.1.mlp.experts.gate_up_proj") == (262, 1024, 2560) and not model.unused
    assert (mlp.type_parts, mlp.num_experts, mlp.num_shared_experts, mlp.top_k, mlp.num_slots) == ((3, 1), 256, 6, 18, 24)
    assert model.shape("layers.1.mlp.router.weight") == (128, 2560) and spec.moe_layers == tuple(range(1, 28))
    assert spec.rope == RopeSpec("mrope_alternating", 500000.0, (20, 22, 22), 128) and spec.layers[0].attention.rope_interleaved
    assert spec.image_expert_ids == (100295, 101304, 101305, 101306, 101307) and spec.vision.position_interpolation == "none"


def test_ernie_as_transformers_saves_it(monkeypatch, tmp_path: Path) -> None:
    """The tower's names have the model's prefix then."""
    tensors = published("ERNIE-4.5-VL-28B-A3B-PT")
    saved = {f"model.{name}" if name.startswith("vision_model.") else name: shape for name, shape in tensors.items()}
    model = open_published(monkeypatch, tmp_path, "ERNIE-4.5-VL-28B-A3B-PT", saved)
    assert model.float_source("vision.vision_tower.ln.weight").name == "model.vision_model.ln.weight"


def test_aria_is_what_its_config_says(monkeypatch, tmp_path: Path) -> None:
    model = open_published(monkeypatch, tmp_path, "Aria", published("Aria"))
    spec, mlp = model.spec, model.spec.layers[0].mlp
    assert model.shape("layers.27.mlp.experts.gate_up_proj") == (66, 3328, 2560) and spec.moe_layers == tuple(range(28))
    assert (mlp.num_experts, mlp.num_shared_experts, mlp.top_k, mlp.num_slots) == (64, 2, 6, 8) and mlp.router.renormalize
    assert spec.rope == RopeSpec("rope", 5e6, (), 128) and spec.vision.queries == ((1225, 128), (4900, 256))
    assert list(model.unused_parts()) == ["vision_tower.post_layernorm.*"] and spec.vision.num_position_embeddings == 4900


@pytest.mark.parametrize(("name", "layers", "hidden", "tower"), [
    ("InternVL3_5-30B-A3B-HF", 48, 2048, 1024), ("InternVL3_5-241B-A28B-HF", 94, 4096, 3200)])  # fmt: skip
def test_internvl_is_what_its_config_says(monkeypatch, tmp_path: Path, name: str, layers: int, hidden: int, tower: int) -> None:
    model = open_published(monkeypatch, tmp_path, name, published(name))
    spec, mlp = model.spec, model.spec.layers[0].mlp
    assert spec.moe_layers == tuple(range(layers)) and (mlp.num_experts, mlp.top_k, mlp.num_slots) == (128, 8, 8)
    assert (spec.hidden_size, spec.vision.hidden_size, spec.vision.num_position_embeddings) == (hidden, tower, 1024)
    assert spec.rope == RopeSpec("rope", 1e6, (), 128) and spec.layers[0].attention.qk_norm and spec.vision.class_token
