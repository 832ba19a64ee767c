"""The tiny model of each family that tests/*/test_families.py runs through everything, beside transformers' own model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecmfq_export.runtime.sample import ProcessedSample
from tests.tiny_aria import aria_config, aria_feeds, aria_sample, build_aria, make_aria
from tests.tiny_ernie import build_ernie, ernie_config, ernie_sample, ernie_types, make_ernie
from tests.tiny_glm import TOKENS as GLM_TOKENS
from tests.tiny_glm import build_glm, glm_config, glm_sample, make_glm
from tests.tiny_internvl import build_internvl, internvl_config, internvl_feeds, internvl_sample, make_internvl
from tests.tiny_models import random_sample
from tests.tiny_omni import build_omni, make_qwen3_omni, make_qwen3_omni_thinker, omni_config


@dataclass(frozen=True)
class TinyFamily:
    """How a family's tiny model is made and asked.

    Attributes:
        make: writes a checkpoint; takes a directory, ``seed`` and overrides of config fields.
        build: transformers' generating model with the same weights; takes ``seed`` and the same overrides.
        sample: a random prompt, as tests.tiny_models.random_sample.
        feeds: what transformers' model needs beside ids, mask and images.
        variants: overrides under which its numbers are compared.
        routers: ends of names of submodules of a layer of transformers' model that give (logits, weights, ids), one for each type of
            tokens that has experts of its own.
        grids: of four images that the tower takes in one call.
    """

    make: Callable[..., Path]
    build: Callable[..., torch.nn.Module]
    sample: Callable[..., ProcessedSample] = random_sample
    feeds: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = field(default=lambda feeds: {})
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"plain": {}})
    routers: tuple[str, ...] = ("mlp.gate",)
    grids: tuple[tuple[int, int, int], ...] = ((1, 4, 6), (1, 8, 2), (1, 4, 4), (1, 2, 2))


def reference_feeds(family: TinyFamily, samples: Sequence[ProcessedSample]) -> dict[str, torch.Tensor]:
    """What transformers' model takes for a right-padded batch of `samples`."""
    longest = max(sample.length for sample in samples)
    ids = np.full((len(samples), longest), 256, np.int64)
    mask = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : sample.length] = sample.input_ids
        mask[row, : sample.length] = 1
    feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    pictures = [sample for sample in samples if sample.pixel_values is not None]
    if pictures:
        feeds["pixel_values"] = torch.from_numpy(np.concatenate([sample.pixel_values for sample in pictures]))
        feeds["image_grid_thw"] = torch.from_numpy(np.concatenate([sample.image_grid_thw for sample in pictures]))
    return feeds | family.feeds(feeds)


def watch_routers(family: TinyFamily, model: torch.nn.Module) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
    """By layer and token type, what the routing submodules of transformers' model gave last."""
    found: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
    for name, module in model.named_modules():
        for kind, end in enumerate(family.routers):
            if name.endswith(end) and ".layers." in name:
                key = (int(name.split(".layers.")[1].split(".")[0]), kind)
                module.register_forward_hook(lambda module, args, out, key=key: found.__setitem__(key, out))
    return found


def _omni(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    return build_omni(omni_config(**overrides), seed).thinker


_OMNI_VARIANTS = {
    "plain": {},
    "no renormalization, biases, a dense layer": {"norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [0]},
    "tied, no DeepStack": {"tie_word_embeddings": True, "vision": {"deepstack_visual_indexes": []}},
}

def _glm(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    return build_glm(glm_config(**overrides), seed)


def _token_types(image: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda feeds: {"mm_token_type_ids": (feeds["input_ids"] == image).int()}


_GLM_VARIANTS = {
    "plain": {},
    "a whole head rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6],
                                                 "partial_rotary_factor": 1.0}},
    "no groups, no biases": {"n_group": 1, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False,
                             "attention_bias": False, "vision": {"attention_bias": True}},
    "two shared experts, tied": {"n_shared_experts": 2, "tie_word_embeddings": True},
}  # fmt: skip

def _ernie(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    return build_ernie(ernie_config(**overrides), seed)


_ERNIE_VARIANTS = {
    "plain": {},
    "equal widths, untied, all routed": {"moe_intermediate_size": [48, 48], "tie_word_embeddings": False,
                                         "mlp_layer_types": ["sparse", "sparse"], "moe_num_shared_experts": 0},
    "image experts wider, two shared": {"moe_intermediate_size": [64, 96], "moe_num_shared_experts": 2, "moe_k": 3},
}  # fmt: skip

def _aria(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    return build_aria(aria_config(**overrides), seed)


_ARIA_VARIANTS = {
    "plain": {},
    "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
    "one shared expert, top-4, a larger table": {"moe_num_shared_experts": 1, "moe_topk": 4, "vision": {"image_size": 560}},
}  # fmt: skip

def _internvl(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    return build_internvl(internvl_config(**overrides), seed)


_INTERNVL_VARIANTS = {
    "plain": {},
    "no renormalization, biases, a dense layer": {"norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [0]},
    "InternViT-6B's form, tied": {"tie_word_embeddings": True, "vision": {
        "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "use_mean_pooling": False}},
}  # fmt: skip

FAMILIES = {
    "qwen3_omni_moe": TinyFamily(make_qwen3_omni, _omni, variants=_OMNI_VARIANTS),
    "qwen3_omni_moe_thinker": TinyFamily(make_qwen3_omni_thinker, _omni),
    "ernie4_5_vl_moe": TinyFamily(make_ernie, _ernie, ernie_sample, ernie_types, _ERNIE_VARIANTS, ("text_moe.gate", "vision_moe.gate")),
    "aria": TinyFamily(make_aria, _aria, aria_sample, aria_feeds, _ARIA_VARIANTS, ("mlp.router",)),
    "internvl": TinyFamily(make_internvl, _internvl, internvl_sample, internvl_feeds, _INTERNVL_VARIANTS,
                           grids=((1, 4, 4), (2, 4, 4), (1, 4, 4), (1, 4, 4))),
    "glm4v_moe": TinyFamily(make_glm, _glm, glm_sample, _token_types(GLM_TOKENS["<|image|>"]), _GLM_VARIANTS),
}
"""By ``model_type``."""

BATCHES: dict[str, Sequence[tuple[int, tuple[tuple[int, int, int], ...], int]]] = {
    "text": [(1, (), 5), (2, (), 9)],
    "mixed image sizes": [(4, ((1, 4, 6),), 5), (5, ((1, 8, 4),), 2), (6, (), 5)],
    "several images in a prompt": [(7, ((1, 4, 4), (1, 2, 8), (1, 6, 6)), 5), (8, ((1, 2, 2),), 5)],
}
"""Prompts as (seed, grids, text tokens at each place)."""


def batch_of(family: TinyFamily, name: str) -> list[ProcessedSample]:
    """The prompts of ``BATCHES[name]``."""
    return [family.sample(seed, grids, text) for seed, grids, text in BATCHES[name]]
