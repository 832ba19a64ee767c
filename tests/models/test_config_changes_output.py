"""Every field of a family's config.json changes what the model computes, or is an error, or is known not to matter.

The weights stay: one field of config.json is flipped beside them and the same prompt is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.runtime.sample import ProcessedSample
from tests.models import test_config_fields, test_families_config, test_kimi_config
from tests.models.test_config_fields import changed, fields, flipped, value_at
from tests.tiny_aria import aria_sample, make_aria
from tests.tiny_ernie import ernie_sample, make_ernie
from tests.tiny_glm import glm_sample, make_glm
from tests.tiny_internvl import internvl_sample, make_internvl
from tests.tiny_kimi import kimi_sample, make_kimi_k25, make_kimi_vl
from tests.tiny_models import make_qwen3_vl_moe, random_sample
from tests.tiny_omni import make_qwen3_omni, make_qwen3_omni_thinker

LIMITS = {"max_position_embeddings"}
"""Limits on what is run: a longer prompt is an error, a shorter one is computed alike."""

PLACEHOLDERS = {"video_token_id", "vision_start_token_id", "vision_end_token_id", "audio_token_id"}
"""Tokens that mark images and videos in a prompt: positions come from image tokens alone, videos and audio are refused by their token."""

SECTIONS = {"architectures", "id2label", "label2id"}
"""transformers writes them into sections too, where nobody reads them."""

DECIDE: dict[str, set[str]] = {
    "ernie4_5_vl_moe": {"moe_k", "moe_norm_min", "image_start_token_id", "image_end_token_id", "video_end_token_id"},
    "aria": {"moe_topk", "projector_patch_to_query_dict", "vision_feature_layer"},
}
"""Fields that decide where tokens go, and with what weight, where they are not `_DECIDE`."""

_DECIDE = {"num_experts_per_tok", "norm_topk_prob"}

VALUES = {"moe_norm_min": 0.9}
"""Other values than the next one: a floor that sums of weights are below."""

FAMILIES: dict[str, tuple[Callable[..., Path], Callable[..., ProcessedSample], set[str]]] = {
    "qwen3_vl_moe": (partial(make_qwen3_vl_moe, mlp_only_layers=[0], num_hidden_layers=3), random_sample,
                     test_config_fields.HARMLESS - {"architectures"}),
    "kimi_vl": (make_kimi_vl, kimi_sample, test_kimi_config.HARMLESS),
    "kimi_k25": (make_kimi_k25, kimi_sample, test_kimi_config.HARMLESS | {"text_config.tie_word_embeddings"}),
    "qwen3_omni_moe": (partial(make_qwen3_omni, mlp_only_layers=[0], num_hidden_layers=3), random_sample, test_families_config.HARMLESS),
    "qwen3_omni_moe_thinker": (partial(make_qwen3_omni_thinker, mlp_only_layers=[0], num_hidden_layers=3), random_sample,
                               test_families_config.HARMLESS),
    "glm4v_moe": (partial(make_glm, vision={"image_size": 27}), glm_sample,
                  test_families_config.HARMLESS | {"image_start_token_id", "image_end_token_id"}),
    "ernie4_5_vl_moe": (make_ernie, ernie_sample,
                        test_families_config.HARMLESS - {"video_end_token_id"} | {"text_config.tie_word_embeddings"}),
    "aria": (partial(make_aria, vision={"image_size": 559}), aria_sample,
             test_families_config.HARMLESS | {"text_config.tie_word_embeddings"}),
    "internvl": (partial(make_internvl, mlp_only_layers=[0], num_hidden_layers=3), internvl_sample,
                 test_families_config.HARMLESS | {"text_config.tie_word_embeddings"}),
}


class Base:
    """A checkpoint, a prompt with an image, and the logits that it gives."""

    def __init__(self, directory: Path, sample: ProcessedSample) -> None:
        self.directory, self.sample = directory, sample
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.logits = self.run(directory)

    @torch.no_grad()
    def run(self, directory: Path) -> torch.Tensor:
        model = open_model(directory)
        return run_decoder(model, prepare_inputs(model, [self.sample]))

    def with_config(self, config: dict[str, Any], where: Path) -> Path:
        where.mkdir()
        for file in self.directory.iterdir():
            (where / file.name).symlink_to(file)
        (where / "config.json").unlink()
        (where / "config.json").write_text(json.dumps(config))
        return where


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, set[str]]:
    make, sample, harmless = FAMILIES[request.param]
    return Base(make(tmp_path_factory.mktemp(request.param)), sample(0, [(1, 4, 6)])), harmless


def test_every_field(base: tuple[Base, set[str]], tmp_path: Path) -> None:
    model, harmless = base
    outcomes: dict[str, list[str]] = {"error": [], "output": [], "nothing": []}
    for number, path in enumerate(fields(model.config)):
        last = path.split(".")[-1]
        # A type must be one that there is: the fields that name one are not those that decide it.
        value = "float16" if last in ("dtype", "torch_dtype") else VALUES.get(last, flipped(value_at(model.config, path)))
        config = changed(path, value, model.config)
        try:
            logits = model.run(model.with_config(config, tmp_path / str(number)))
        except UserError:
            assert last not in harmless and path not in harmless, f"{path} is refused"
            outcomes["error"].append(path)
            continue
        same = logits.shape == model.logits.shape and torch.equal(logits, model.logits)
        outcomes["nothing" if same else "output"].append(path)
        expected = last in harmless | LIMITS | PLACEHOLDERS or path in harmless or "." in path and last in SECTIONS
        assert same == expected, f"{path}: {'nothing' if same else 'output'} changed"
    assert min(len(paths) for paths in outcomes.values()) >= 3, outcomes
    effective = {path.split(".")[-1] for path in outcomes["output"] + outcomes["error"]}
    decide = DECIDE.get(model.config["model_type"], _DECIDE)
    assert decide <= effective, "what decides where tokens go is never without effect"


def test_a_video_token_is_an_error_by_the_config_that_names_it(base: tuple[Base, set[str]], tmp_path: Path) -> None:
    model, _ = base
    if "video_token_id" not in model.config:
        pytest.skip("this family's config names no video token")
    inside = int(model.sample.input_ids[0])
    with pytest.raises(UserError, match="video"):
        model.run(model.with_config(model.config | {"video_token_id": inside}, tmp_path / "video"))
