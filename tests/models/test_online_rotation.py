"""The Hadamard before down projections: stated in compressed-tensors' terms, honoured by the decoder, refused where it is unknown."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.transform import TransformConfig, TransformFactory
from torch import nn

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.online_rotation import transform_config
from ecmfq_export.models.quantized_format import QuantizedWriter
from ecmfq_export.models.torch_decoder import load_layer
from ecmfq_export.quant.hadamard import block_hadamard
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.stages.fold import rotate_down
from tests.tiny_models import make_qwen3_vl_moe

EXPERTS, DENSE = "mlp.experts.down_proj", "mlp.down_proj.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> MoEVLM:
    """Routed experts of 96 columns (blocks of 32) and a dense layer of 320 (blocks of 64); down projections in four bits."""
    source = open_model(make_qwen3_vl_moe(tmp_path_factory.mktemp("float"), mlp_only_layers=[1], intermediate_size=320))
    work = tmp_path_factory.mktemp("quantized")
    writer = QuantizedWriter(work, source, rotated_down=True)
    for index, name in enumerate((EXPERTS, DENSE)):
        writer.write_layer(index, {name: quantize_rtn(rotate_down(load_layer(source, index)).tensors[name], 4)})
    return writer.finish()


def edited(model: MoEVLM, directory: Path, change) -> Path:
    """A copy of the checkpoint with its transform group of the experts changed in place."""
    shutil.copytree(model.path, directory)
    config = copy.deepcopy(model.config)
    change(config["quantization_config"]["transform_config"]["config_groups"]["down_32"])
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_config_says_where_and_in_which_blocks(quantized):
    assert quantized.quantization.blocks == {f"layers.0.{EXPERTS}": 32, f"layers.1.{DENSE}": 64}
    assert [load_layer(quantized, index).down_block for index in range(2)] == [32, 64]
    groups = quantized.config["quantization_config"]["transform_config"]["config_groups"]
    assert {name: group["apply"][0]["targets"] for name, group in groups.items()} == {
        "down_32": [r"re:.*\.mlp\.(shared_)?experts\.\d+\.down_proj$"], "down_64": [r"re:.*\.mlp\.down_proj$"]}  # fmt: skip


@pytest.mark.parametrize(("group", "columns"), [("down_32", 96), ("down_64", 320)])
def test_compressed_tensors_reads_it_and_its_own_transforms_are_ours(quantized, group, columns):
    config = TransformConfig.model_validate(quantized.config["quantization_config"]["transform_config"])
    scheme = config.config_groups[group]
    assert [args.is_online() for args in scheme.apply] == [True, False]
    linear = nn.Linear(columns, 8, bias=False)
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    factory = TransformFactory.from_scheme(scheme, name=group)
    rotation = block_hadamard(columns)
    for args in scheme.apply:
        theirs = factory.create_transform(linear, args)(values if args.is_online() else linear.weight)
        ours = rotation.apply(values if args.is_online() else linear.weight)
        assert torch.allclose(theirs, ours, atol=1e-6), args.location


@pytest.mark.parametrize("index", [0, 1])
def test_the_decoder_computes_with_it(quantized, index):
    """The quantized down projection reads the rotated intermediate: the layer's output is near that of the plain float layer."""
    source = load_layer(quantized, index)
    plain = load_layer(quantized, index)
    plain.down_block = 1
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    if index == 0:
        where = source.dispatch(source.route(x))
        inner, before = (layer.expert_intermediate(x, where) for layer in (source, plain))
    else:
        inner, before = (layer.dense_intermediate(x) for layer in (source, plain))
    assert torch.equal(inner, block_hadamard(inner.shape[-1]).apply(before)) and not torch.allclose(inner, before, atol=0.01)
    expected = source.mlp(x)
    weight = source.quantized.pop((EXPERTS, DENSE)[index]).dequantize()
    plain.quantized.clear()
    plain.tensors[(EXPERTS, DENSE)[index]] = block_hadamard(weight.shape[-1]).apply(weight)
    error = (plain.mlp(x) - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.02, "only the int8 activations differ"


def test_names_that_no_pattern_covers_alone_are_listed():
    blocks = {"m.layers.0.mlp.experts.0.down_proj": 32, "m.layers.1.mlp.experts.0.down_proj": 128, "m.layers.2.mlp.down_proj": 1}
    groups = transform_config(blocks)["config_groups"]
    assert {name: group["apply"][0]["targets"] for name, group in groups.items()} == {
        "down_32": ["m.layers.0.mlp.experts.0.down_proj"], "down_128": ["m.layers.1.mlp.experts.0.down_proj"]}  # fmt: skip
    assert transform_config({"m.layers.2.mlp.down_proj": 1}) is None and transform_config({}) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"type": "random-hadamard"}, "type = 'random-hadamard'"),
    ({"randomize": True}, "randomize = True"),
    ({"head_dim": 24}, "head_dim = 24"),
    ({"head_dim": None}, "head_dim = None"),
    ({"head_dim": 64}, "blocks of [64]"),
    ({"precision": "float64"}, "precision = 'float64'"),
    ({"apply": []}, "applies nowhere"),
    ({"apply": [{"targets": ["re:.*down_proj$"], "location": "output"}]}, "apply = "),
    ({"apply": [{"targets": 3, "location": "input"}]}, "no targets"),
    ({"unheard_of": 1}, "unheard_of = 1"),
])  # fmt: skip
def test_other_transforms_are_refused_by_name(quantized, tmp_path, change, message):
    path = edited(quantized, tmp_path / "edited", lambda group: group.update(change))
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        open_model(path)


@pytest.mark.parametrize("target", [
    "Linear", r"re:.*self_attn\.o_proj$", r"re:.*\.mlp\.experts\.\d+\.gate_proj$", r"re:.*experts\.3\.down_proj",
])  # fmt: skip
def test_other_places_are_refused_by_name(quantized, tmp_path, target):
    def aim(group):
        for place in group["apply"]:
            place["targets"] = [target]

    with pytest.raises(UnsupportedError, match=r"transforms"):
        open_model(edited(quantized, tmp_path / "edited", aim))


def test_groups_that_are_none(quantized, tmp_path):
    path = edited(quantized, tmp_path / "edited", lambda group: None)
    config = json.loads((path / "config.json").read_text())
    for value in ({"config_groups": []}, [1], {"config_groups": {}, "more": 1}):
        config["quantization_config"]["transform_config"] = value
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="config_groups"):
            open_model(path)
