"""W4A16 checkpoints in compressed-tensors' format, packed by the library itself: read as it dequantizes them, imported or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UnsupportedError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.torch_decoder import run_decoder
from ecmfq_export.models.weight_only_source import linear_parts
from ecmfq_export.progress import Silent
from ecmfq_export.stages.import_quantized import import_quantized
from tests.tiny_families import FAMILIES
from tests.tiny_kimi import kimi_sample, make_kimi_vl
from tests.tiny_models import make_qwen3_vl_moe, random_sample

WIDE = {"hidden_size": 256, "moe_intermediate_size": 384, "num_attention_heads": 4, "num_experts": 4, "num_hidden_layers": 1}


def weights_of(group_size: int, symmetric: bool, actorder: str | None) -> dict:
    return {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size, "dynamic": False, "actorder": actorder}  # fmt: skip


def quantize(
    source: Path, target: Path, group_size: int, symmetric: bool = True, actorder: str | None = None
) -> dict[str, torch.Tensor]:
    """Round every linear weight of the decoder's layers and write them as the library packs; what it unpacks them to, by module."""
    model = open_model(source)
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    # The library wrote "group" once, and has removed it: older checkpoints have it.
    known = None if actorder == "group" else actorder
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights_of(group_size, symmetric, known)})
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors, values = {}, {}
    for name in model.names():
        parts = linear_parts(model.family, model.spec, name, model.shape(name)) if name.startswith("layers.") else ()
        weight = model.tensor(name)
        if not parts:
            tensors |= model.float_source(name).split(weight)
        for part in parts:
            module = part.name.removesuffix(".weight")
            own = torch.zeros(part.shape) if module not in values else values[module]
            own[part.region] = weight[part.expert, part.rows] if weight.ndim == 3 else weight
            values[module] = own
    for index, (module, weight) in enumerate(values.items()):
        packed, direct = pack(weight, group_size, symmetric, actorder, index)
        tensors |= {f"{module}.{key}": value for key, value in packed.items()}
        values[module] = direct if actorder == "group" else compressor.decompress(packed, scheme)["weight"].float()
        assert torch.equal(values[module], direct)
    save_file({key: value.contiguous() for key, value in tensors.items()}, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_of(group_size, symmetric, actorder),
                                      "input_activations": None, "output_activations": None}},
        "ignore": ["lm_head", "re:.*visual.*"], "kv_cache_scheme": None,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    return values


def pack(
    weight: torch.Tensor, group_size: int, symmetric: bool, actorder: str | None, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One module as on disk, and its values: rounded to nearest on the grid that the library's observers choose, absmax / 7.5 or
    (max - min) / 15."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    index = torch.arange(columns) // size
    if actorder == "group":
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    groups = columns // size
    scale, zero = torch.empty(rows, groups), torch.zeros(rows, groups, dtype=torch.int8)
    for group in range(groups):
        block = weight[:, index == group]
        if symmetric:
            scale[:, group] = block.abs().amax(1) / 7.5
        else:
            low, high = block.amin(1).clamp_max(0), block.amax(1).clamp_min(0)
            scale[:, group] = (high - low) / 15
            zero[:, group] = (-8 - low / scale[:, group]).round().clamp(-8, 7).to(torch.int8)
    scale = scale.half().float()
    q = (weight / scale[:, index] + zero[:, index]).round().clamp(-8, 7).to(torch.int8)
    out = {"weight_packed": pack_to_int32(q, 4), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
    if not symmetric:
        out["weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0)
    if actorder == "group":
        out["weight_g_idx"] = index.to(torch.int32)
    return out, (q.float() - zero[:, index]) * scale[:, index]


def expected(model: MoEVLM, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.empty(model.shape(name))
    for part in linear_parts(model.family, model.spec, name, model.shape(name)):
        value = values[part.name.removesuffix(".weight")][part.region]
        out[(part.expert, part.rows) if out.ndim == 3 else ()] = value
    return out


CASES = {
    "channel": (-1, True, None),
    "groups": (128, True, None),
    "weight order": (128, True, "weight"),
    "group order": (128, True, "group"),
    "zero points": (128, False, None),
    "small groups": (64, True, None),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_library_s(tmp_path: Path, case: str) -> None:
    values = quantize(make_qwen3_vl_moe(tmp_path / "float", **WIDE), tmp_path / "quantized", *CASES[case])
    model = open_model(tmp_path / "quantized")
    assert model.weight_only.method == "compressed-tensors" and len(values) == 4 + 3 * 4
    for name in model.names():
        if name.startswith("layers.") and model.has_int4(name):
            assert torch.equal(model.tensor(name), expected(model, name, values)), name
    # Each module has an order of its own here, gate and up of one expert too.
    refused = {"group order": "orders its columns otherwise", "zero points": "zero points", "small groups": "groups of 64 among 256"}
    if case in refused:
        with pytest.raises(UnsupportedError, match=refused[case]):
            import_quantized(tmp_path / "quantized", tmp_path / "out", QuantConfig(), Silent())
        return
    imported = open_model(import_quantized(tmp_path / "quantized", tmp_path / "out", QuantConfig(), Silent()))
    name = "layers.0.mlp.experts.down_proj"
    change = float((imported.tensor(name) - model.tensor(name)).norm() / model.tensor(name).norm())
    assert change == 0 if case == "channel" else 0 < change < 5e-3
    assert imported.config["quantization_config"]["config_groups"] and imported.qtensor(name).group_size == CASES[case][0]


MAKERS = {
    "kimi_vl": (make_kimi_vl, {}, kimi_sample),
    **{name: (family.make, {}, family.sample) for name, family in FAMILIES.items() if name != "aria"},
    "glm4v_moe, two shared experts": (FAMILIES["glm4v_moe"].make, {"n_shared_experts": 2}, FAMILIES["glm4v_moe"].sample),
}


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_other_families(tmp_path: Path, family: str) -> None:
    """Shared experts are one MLP on disk: with one scale a row, each of them is its columns."""
    maker, options, sample = MAKERS[family]
    values = quantize(maker(tmp_path / "float", **options), tmp_path / "quantized", -1)
    model = open_model(tmp_path / "quantized")
    shared = 3 * len(model.spec.moe_layers) if model.spec.num_shared_experts else 0
    assert sum("shared_experts" in module for module in values) == shared
    for name in model.names():
        if name.startswith("layers.") and model.has_int4(name):
            assert torch.equal(model.tensor(name), expected(model, name, values)), name
    imported = open_model(import_quantized(tmp_path / "quantized", tmp_path / "out", QuantConfig(), Silent()))
    for index in model.spec.moe_layers:
        for suffix in ("gate_up_proj", "down_proj"):
            name = f"layers.{index}.mlp.experts.{suffix}"
            assert torch.equal(imported.tensor(name), model.tensor(name))
    inputs = prepare_inputs(model, [sample(1)], vision=model.vision_module())
    assert torch.isfinite(run_decoder(imported, inputs)).all()


def test_a_family_whose_modules_are_not_known_is_refused(tmp_path: Path) -> None:
    """Nobody has said how Aria's stacked experts are named one by one."""
    with pytest.raises(UnsupportedError, match="quantized checkpoints of model_type aria are not read"):
        quantize(FAMILIES["aria"].make(tmp_path / "float"), tmp_path / "quantized", -1)


def test_mixed_groups_are_refused(tmp_path: Path) -> None:
    quantize(make_qwen3_vl_moe(tmp_path / "float", **WIDE), tmp_path / "quantized", 128)
    file = tmp_path / "quantized" / "config.json"
    config = json.loads(file.read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = json.loads(json.dumps(groups["group_0"])) | {"targets": ["re:.*down_proj"]}
    groups["group_1"]["weights"]["group_size"] = 64
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="different schemes: group_0, group_1"):
        open_model(file.parent)


def test_experts_that_are_floating_point(tmp_path: Path) -> None:
    """Attention alone quantized, experts one by one in floating point: readable, not importable."""
    source = make_qwen3_vl_moe(tmp_path / "float", **WIDE)
    quantize(source, tmp_path / "quantized", 128)
    whole = open_model(source)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    for name in ("layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"):
        for part in linear_parts(whole.family, whole.spec, name, whole.shape(name)):
            for suffix in ("weight_packed", "weight_scale", "weight_shape"):
                del tensors[f"{part.name.removesuffix('.weight')}.{suffix}"]
            tensors[part.name] = whole.tensor(name)[part.expert, part.rows].contiguous()
    save_file(tensors, tmp_path / "quantized" / "model.safetensors")
    model = open_model(tmp_path / "quantized")
    assert torch.equal(model.tensor("layers.0.mlp.experts.down_proj"), whole.tensor("layers.0.mlp.experts.down_proj"))
    assert model.has_int4("layers.0.self_attn.q_proj.weight")
    run_decoder(model, prepare_inputs(model, [random_sample(0)], vision=model.vision_module()))
    with pytest.raises(UnsupportedError, match="gate_up_proj' is not quantized"):
        import_quantized(tmp_path / "quantized", tmp_path / "out", QuantConfig(), Silent())
