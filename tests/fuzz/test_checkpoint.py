"""Damaged checkpoints: safetensors headers, the index, config.json and its compressed-tensors part."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ecmfq_export.errors import UserError
from ecmfq_export.models.checkpoint import Checkpoint, read_header
from ecmfq_export.models.module_names import matcher
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.runtime.embeddings import EmbeddingTable
from tests.fuzz.mutations import mutate_json, mutate_safetensors
from tests.fuzz.sandbox import outcome
from tests.fuzz.subject import SEEDS, Subject, run_cases

QUANTIZED = "stages/quantized"
SHARD = f"{QUANTIZED}/model-00001-of-00003.safetensors"


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": "group", "dynamic": False}
FOREIGN = (
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True, "checkpoint_format": "gptq",
     "dynamic": {"-:x": {}}},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*visual.*"],
     "quantization_status": "compressed",
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4, "input_activations": None, "output_activations": None}}},
)  # fmt: skip
"""Weight-only quantization as other programs write it; the tensors are not theirs, so each ends in an error."""


def _load_some(model: MoEVLM) -> None:
    model.qtensor("layers.0.mlp.experts.down_proj", 0, 1)
    model.tensor("layers.0.input_layernorm.weight")


@pytest.mark.parametrize("seed", SEEDS["safetensors headers"])
def test_safetensors_headers(seed: int, subject: Subject) -> None:
    """A shard's header by itself and against the index."""
    data = subject.bytes_of(SHARD)

    def read() -> None:
        entries = read_header(subject.root / SHARD)
        opened = Checkpoint.open(subject.root / QUANTIZED)
        for name in sorted(entries)[:3]:
            opened.load(name)

    assert len(run_cases(subject, seed, lambda draw: (SHARD, *mutate_safetensors(draw, data)), read, rehash=False)) > 70


@pytest.mark.parametrize("seed", SEEDS["embedding tables"])
def test_embedding_tables(seed: int, subject: Subject) -> None:
    """The table that is mapped, by its own header alone."""
    name = "onnx/embed_tokens.safetensors"
    data = subject.bytes_of(name)

    def read() -> None:
        table = EmbeddingTable(subject.root / name)
        table.rows_of(np.array([0, table.rows - 1]))

    assert len(run_cases(subject, seed, lambda draw: (name, *mutate_safetensors(draw, data)), read, rehash=False)) > 40


@pytest.mark.parametrize("seed", SEEDS["damaged shards and indices of a model"])
def test_damaged_shards_and_indices_of_a_model(seed: int, subject: Subject) -> None:
    """The model opened over them, and weights read where it opens."""
    index = f"{QUANTIZED}/model.safetensors.index.json"

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        if draw.random() < 0.5:
            return SHARD, *mutate_safetensors(draw, subject.bytes_of(SHARD))
        return index, *mutate_json(draw, json.loads(subject.bytes_of(index)))

    run_cases(subject, seed, mutate, lambda: _load_some(open_model(subject.root / QUANTIZED)), rehash=False)


@pytest.mark.parametrize("seed", SEEDS["config json"])
def test_config_json(seed: int, subject: Subject) -> None:
    """Half of them in the part on quantization: ours, or another quantizer's put in its place."""
    name = f"{QUANTIZED}/config.json"
    config = json.loads(subject.bytes_of(name))

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        quantization = draw.choice([config["quantization_config"], *FOREIGN])
        return name, *mutate_json(draw, config | {"quantization_config": quantization}, draw.choice([(), ("quantization_config",)]))

    run_cases(subject, seed, mutate, lambda: _load_some(open_model(subject.root / QUANTIZED)), rehash=False)


@pytest.mark.parametrize("pattern", [
    "(a+)+$", "(.*)*x", "(.*a){30}", "(a|a)*$", r"(.*)\1\1", "(?P<n>.*)(?P=n)", ".*" * 9 + "x", "x" * 501, "(", "[", "*", "a{99999999999}",
    "(?i:" * 200 + ")" * 200,
])  # fmt: skip
def test_patterns_that_could_run_for_ever(pattern: str, tmp_path: Path) -> None:
    error = outcome(tmp_path, lambda: matcher([f"re:{pattern}"])("model.language_model.layers.0." + "a" * 200))
    assert isinstance(error, UserError)


def test_usual_patterns_are_taken() -> None:
    for pattern in (r".*\.mlp\.(shared_)?experts\.\d+\.(gate|up|down)_proj$", r".*\.self_attn\.\w+_proj(_with_mqa)?$", ".*lm_head",
                    "visual.*", r"model\.visual\..*", r"(.*\.)?lm_head$", r"^(?!.*experts).*mlp.*gate$"):  # fmt: skip
        assert callable(matcher([f"re:{pattern}"]))
