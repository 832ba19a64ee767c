"""Quantized checkpoints: written layer by layer, read back exactly, understood by compressed-tensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.group_scales import join_scales, split_scales
from ecmfq_export.models.moe_vlm import MoEVLM, layer_shapes, open_model
from ecmfq_export.models.quantized_format import QuantizedWriter, pack_words
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import quantize_rtn
from tests.tiny_ernie import make_ernie
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


def test_transformers_loads_it(tmp_path: Path) -> None:
    """With per-expert conversions registered for the family (5.23 has them for its text-only siblings alone), from_pretrained
    dequantizes the whole checkpoint to our values, rounded to the float16 of the stored scales. (It takes one scheme for all that
    is no expert, so not W4 dense layers beside W8 attention.)"""
    from transformers import CompressedTensorsConfig, Qwen3VLMoeForConditionalGeneration
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

    quantized = write(open_model(make_qwen3_vl_moe(tmp_path / "float")), tmp_path / "out")
    own = get_checkpoint_conversion_mapping("qwen3_vl_moe")
    per_expert = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("qwen3_vl_moe", per_expert, overwrite=True)
    try:
        model, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
            quantized.path, dtype=torch.float32, output_loading_info=True,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )  # fmt: skip
    finally:
        register_checkpoint_conversion_mapping("qwen3_vl_moe", own, overwrite=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name in quantized.names():
        ours = quantized.tensor(name)
        ours = ours.float() if quantized.recipe(name) == "float" else ours.half().float()
        assert torch.equal(state[quantized.family.disk_name(name)], ours), name


def test_resumes_after_an_interruption(source: MoEVLM, quantized: MoEVLM, tmp_path: Path) -> None:
    writer = QuantizedWriter(tmp_path, source)
    writer.write_layer(0, quantize_layer(source, 0))
    writer.write_layer(1, quantize_layer(source, 1))
    shard = tmp_path / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    again = QuantizedWriter(tmp_path, source)
    assert [again.has_layer(index) for index in range(3)] == [True, False, False]
    with pytest.raises(CheckpointError, match="lacks 2 layers, the first is 1"):
        again.finish()
    for index in (1, 2):
        again.write_layer(index, quantize_layer(source, index))
    again.finish()
    for file in sorted(quantized.path.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_floats_keep_their_dtype_and_power_of_two_folds(source: MoEVLM, tmp_path: Path) -> None:
    writer = QuantizedWriter(tmp_path, source)
    norm = source.tensor("layers.0.input_layernorm.weight").float() / 4
    writer.write_layer(0, {"input_layernorm.weight": norm})
    for index in (1, 2):
        writer.write_layer(index, {})
    written = writer.finish({"norm.weight": source.tensor("norm.weight").float() * 2})
    assert written.quantization is None
    back = written.tensor("layers.0.input_layernorm.weight")
    assert back.dtype == torch.bfloat16 and torch.equal(back.float(), norm)
    with pytest.raises(CheckpointError, match="overflows torch.bfloat16"):
        writer.write_layer(0, {"input_layernorm.weight": torch.full_like(norm, 3.4e38)})
    assert writer.has_layer(0)


def test_norms_and_routers_that_folds_made_inexact_are_float32(source: MoEVLM, tmp_path: Path) -> None:
    writer = QuantizedWriter(tmp_path, source)
    names = ("input_layernorm.weight", "mlp.router.weight", "self_attn.q_proj.weight")
    folded = {name: source.tensor(f"layers.0.{name}").float() * 1.1 for name in names}
    writer.write_layer(0, folded)
    for index in (1, 2):
        writer.write_layer(index, {})
    written = writer.finish()
    for name in names[:2]:
        back = written.tensor(f"layers.0.{name}")
        assert back.dtype == torch.float32 and torch.equal(back, folded[name])
    assert written.tensor("layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16
    assert written.tensor("layers.2.input_layernorm.weight").dtype == torch.bfloat16


def test_misuse(source: MoEVLM, quantized: MoEVLM, tmp_path: Path) -> None:
    writer = QuantizedWriter(tmp_path, source)
    with pytest.raises(ValueError, match="takes no tensor named"):
        writer.write_layer(0, {"mlp.experts.gate_proj": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected \\[8, 128, 96\\]"):
        writer.write_layer(0, {"mlp.experts.down_proj": torch.zeros(8, 96, 128)})
    with pytest.raises(ValueError, match="cannot be quantized"):
        writer.write_layer(0, {"mlp.router.weight": quantize_rtn(source.tensor("layers.0.mlp.router.weight").float(), 8)})
    with pytest.raises(ValueError, match="quantized already"):
        QuantizedWriter(tmp_path, quantized)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_scales_split_exactly(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    scale = (2.0 ** torch.randint(-24, 10, (500,), generator=generator) * (1 + torch.rand(500, generator=generator)))
    scale = scale.clamp_min(2.0**-24).half().float()
    multiplier = torch.randint(1, 128, (500, groups), dtype=torch.int8, generator=generator)
    joined = join_scales(scale, multiplier)
    back_scale, back_multiplier = split_scales(joined, "x")
    assert torch.equal(join_scales(back_scale, back_multiplier), joined)
    assert bool((back_multiplier <= multiplier).all()) and torch.equal(back_scale.half().float(), back_scale)


@pytest.mark.parametrize("scales", [[[1.0, 1 + 2**-20]], [[1.0, 1e9]], [[float("nan"), 1.0]], [[0.0, 1.0]], [[-1.0, 1.0]]])
def test_other_group_scales_are_refused(scales: list) -> None:
    with pytest.raises(CheckpointError, match="'x'"):
        split_scales(torch.tensor(scales), "x")


def edit_shard(source: Path, target: Path, changes: dict) -> None:
    """Copy a checkpoint with tensors of its first shard replaced (or removed, None)."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    shard = target / "model-00001-of-00004.safetensors"
    tensors = load_file(shard)
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    save_file(tensors, shard)


EXPERT = "model.language_model.layers.0.mlp.experts.3.gate_proj."
QUERY = "model.language_model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (EXPERT + "weight_packed", lambda t: t[:, :-1].contiguous(), "expected torch.int32 \\[96, 16\\]"),
        (EXPERT + "weight_shape", lambda t: t + 1, "says \\[97, 129\\]"),
        (EXPERT + "weight_scale", lambda t: -t, "scales span"),
        (EXPERT + "weight_scale", lambda t: t * float("nan"), "holds nan"),
        (EXPERT + "weight_scale", lambda t: t.float() + 1e-7, "not float16 values"),
        (QUERY + "weight", lambda t: t.float(), "expected torch.int8"),
        (QUERY + "weight", lambda t: torch.full_like(t, -128), "spans \\[-128, "),
    ],
)
def test_damaged_quantized_tensors(quantized: MoEVLM, tmp_path: Path, name: str, change, message: str) -> None:
    edit_shard(quantized.path, tmp_path / "bad", {name: change})
    with pytest.raises(CheckpointError, match=message):
        bad = open_model(tmp_path / "bad")
        for canonical in ("layers.0.mlp.experts.gate_up_proj", "layers.0.self_attn.q_proj.weight"):
            bad.qtensor(canonical)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["quant_method"], "fp8", "method 'fp8'"),
        (["quantization_status"], "frozen", "quantization_status 'frozen'"),
        (["kv_cache_scheme"], {"num_bits": 8}, "kv_cache_scheme"),
        (["config_groups"], {}, "no config_groups"),
        (["config_groups", "group_0", "weights", "num_bits"], 3, "num_bits = 3"),
        (["config_groups", "group_0", "weights", "symmetric"], False, "weights.symmetric = False"),
        (["config_groups", "group_0", "weights", "strategy"], "tensor", "weights.strategy = 'tensor'"),
        (["config_groups", "group_0", "weights", "type"], "float", "weights.type = 'float'"),
        (["config_groups", "group_0", "input_activations"], None, "lacks weights, input_activations"),
        (["config_groups", "group_0", "input_activations", "dynamic"], False, "input_activations.dynamic = False"),
        (["config_groups", "group_0", "format"], "int-quantized", "format = 'int-quantized'"),
        (["config_groups", "group_0", "targets"], ["re:("], "pattern 're:\\('"),
        (["config_groups", "group_0", "targets"], ["re:.*experts.[0-6].*"], "different schemes"),
        (["ignore"], [], None),
        (["ignore"], ["re:.*self_attn.*"], "12 tensors that no part"),
    ],
)
def test_other_quantization_configs(quantized: MoEVLM, tmp_path: Path, path: list, value, message: str | None) -> None:
    target = tmp_path / "other"
    edit_shard(quantized.path, target, {})
    config = json.loads((target / "config.json").read_text())
    node = config["quantization_config"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (target / "config.json").write_text(json.dumps(config))
    if message is None:
        assert open_model(target).quantization.recipes == quantized.quantization.recipes
    else:
        with pytest.raises((CheckpointError, UnsupportedError), match=message):
            open_model(target)


def test_published_names_of_a_tower_are_kept(tmp_path: Path) -> None:
    """ERNIE's published tower stands beside the model, transformers saves it inside."""
    make_ernie(tmp_path / "saved")
    (tmp_path / "published").mkdir()
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    renamed = {name.removeprefix("model.") if ".vision_model." in name else name: tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "published" / "model.safetensors")
    (tmp_path / "published" / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    original = open_model(tmp_path / "published")
    written = write(original, tmp_path / "written")
    ignored = written.config["quantization_config"]["ignore"]
    assert "vision_model.blocks.0.attn.qkv" in ignored and not any(name.startswith("model.vision_model") for name in ignored)
    for name in original.names():
        if written.recipe(name) == "float":
            assert torch.equal(written.tensor(name), original.tensor(name)), name
