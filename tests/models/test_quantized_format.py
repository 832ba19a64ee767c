"""Quantized checkpoints: written layer by layer, read back exactly, understood by compressed-tensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.group_scales import join_scales, split_scales
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes, open_model
from ecmfq_export.models.quantized_format import QuantizedWriter, pack_words
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import quantize_rtn
from tests.tiny_models import make_qwen3_vl_moe

ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
DENSE = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def quantize_layer(model: MoEVLM, index: int, attention_bits: int | None = 8, group_size: int = -1) -> dict[str, QTensor]:
    """Round-to-nearest tensors of one layer by canonical suffix."""
    tensors = {}
    for suffix in layer_shapes(model.spec, model.spec.layers[index]):
        bits = 4 if suffix in (*EXPERTS, *DENSE) else attention_bits if suffix in ATTENTION else None
        if bits is not None:
            weight = model.tensor(f"layers.{index}.{suffix}")
            grouped = group_size if weight.shape[-1] % 128 == 0 else -1
            tensors[suffix] = quantize_rtn(weight.float(), bits, grouped)
    return tensors


def write(model: MoEVLM, directory: Path, **options) -> MoEVLM:
    directory.mkdir()
    writer = QuantizedWriter(directory, model)
    for index in range(model.spec.num_layers):
        writer.write_layer(index, quantize_layer(model, index, **options))
    return writer.finish()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> MoEVLM:
    path = make_qwen3_vl_moe(tmp_path_factory.mktemp("float"), dtype=torch.bfloat16, mlp_only_layers=[1], num_hidden_layers=3)
    return open_model(path)


@pytest.fixture(scope="module")
def quantized(source: MoEVLM, tmp_path_factory: pytest.TempPathFactory) -> MoEVLM:
    return write(source, tmp_path_factory.mktemp("quantized") / "w4a8")


def equal(first: QTensor, second: QTensor) -> bool:
    return torch.equal(first.qvalue, second.qvalue) and torch.equal(first.scale, second.scale)


def test_reads_back_what_was_written(source: MoEVLM, quantized: MoEVLM) -> None:
    assert quantized.names() == source.names() and quantized.spec == source.spec
    for index in range(source.spec.num_layers):
        for suffix, weight in quantize_layer(source, index).items():
            name = f"layers.{index}.{suffix}"
            assert equal(quantized.qtensor(name), weight)
            assert torch.equal(quantized.tensor(name), weight.dequantize())
            assert quantized.recipe(name) == ("w8a8" if suffix in ATTENTION else "w4a8")
    floats = [name for name in source.names() if quantized.recipe(name) == "float"]
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.mlp.router.weight", "vision.pos_embed.weight"} <= set(floats)
    for name in floats:
        assert torch.equal(quantized.tensor(name), source.tensor(name)) and quantized.tensor(name).dtype == torch.bfloat16


def test_experts_can_be_read_in_parts(quantized: MoEVLM) -> None:
    name = "layers.0.mlp.experts.gate_up_proj"
    whole, part = quantized.qtensor(name), quantized.qtensor(name, 2, 5)
    assert torch.equal(part.qvalue, whole.qvalue[2:5]) and torch.equal(part.scale, whole.scale[2:5])
    assert torch.equal(quantized.tensor_rows(name, 7, 8), whole.dequantize()[7:8])


def test_compressed_tensors_decompresses_to_our_values(quantized: MoEVLM) -> None:
    """The library itself, with the schemes of our config.json, gives our dequantized values bit for bit."""
    config = QuantizationConfig.model_validate(quantized.config["quantization_config"])
    assert config.format == "mixed-precision" and len(config.config_groups) == 2
    shard = load_file(quantized.path / "model-00001-of-00004.safetensors")
    seen = 0
    for scheme in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for module in {name.rsplit(".", 1)[0] for name in shard if name.endswith("weight_scale")}:
            packed = f"{module}.weight_packed" in shard
            if packed != (scheme.format == "pack-quantized"):
                continue
            state = {name.removeprefix(module + "."): t for name, t in shard.items() if name.startswith(module + ".")}
            state["weight_scale"] = state["weight_scale"].float()  # it multiplies in the scale's dtype
            weight = compressor.decompress(state, scheme)["weight"]
            ours = quantized.tensor(_canonical(module))
            if ".experts." in module:
                ours = ours[int(module.split(".experts.")[1].split(".")[0])]
                gate_rows = ours.shape[0] // 2
                ours = ours[:gate_rows] if "gate_proj" in module else ours[gate_rows:] if "up_proj" in module else ours
            assert torch.equal(weight, ours), module
            seen += 1
    assert seen == 4 + 8 * 3


def _canonical(module: str) -> str:
    name = module.removeprefix("model.language_model.")
    if ".experts." not in name:
        return name + ".weight"
    return name.split(".experts.")[0] + (".experts.down_proj" if name.endswith("down_proj") else ".experts.gate_up_proj")


@pytest.mark.parametrize("columns", [8, 96, 100, 129])
def test_packing_is_the_library_s(columns: int) -> None:
    values = torch.randint(-8, 8, (3, 5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))
    assert torch.equal(pack_words(values), pack_to_int32(values, 4))


@pytest.mark.parametrize("options", [{"attention_bits": None}, {"attention_bits": 4}, {"group_size": 128}], ids=str)
def test_other_recipes(source: MoEVLM, tmp_path: Path, options: dict) -> None:
    written = write(source, tmp_path / "out", **options)
    QuantizationConfig.model_validate(written.config["quantization_config"])
    for suffix, weight in quantize_layer(source, 2, **options).items():
        back = written.qtensor(f"layers.2.{suffix}")
        assert torch.equal(back.dequantize(), weight.dequantize()) and back.group_size == weight.group_size
    if options == {"group_size": 128}:
        shard = load_file(written.path / "model-00001-of-00004.safetensors")
        assert shard["model.language_model.layers.0.mlp.experts.0.up_proj.weight_scale"].shape == (96, 1)
    bits = options.get("attention_bits", 8)
    assert written.recipe("layers.0.self_attn.o_proj.weight") == {None: "float", 4: "w4a8", 8: "w8a8"}[bits]


def test_lm_head_and_uneven_layers(source: MoEVLM, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    writer = QuantizedWriter(tmp_path / "out", source)
    for index in range(3):
        layer = quantize_layer(source, index, attention_bits=8 if index else None)
        if index == 2:
            del layer["mlp.experts.down_proj"]
        writer.write_layer(index, layer)
    written = writer.finish({"lm_head.weight": quantize_rtn(source.tensor("lm_head.weight").float(), 8)})
    assert written.recipe("lm_head.weight") == "w8a8"
    assert [written.recipe(f"layers.{i}.self_attn.q_proj.weight") for i in range(3)] == ["float", "w8a8", "w8a8"]
