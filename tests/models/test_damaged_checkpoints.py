"""A damaged or mixed-up checkpoint is refused by name through the command line, before one file is written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export.cli import main
from tests.tiny_models import make_qwen3_vl_moe

INDEX = "model.safetensors.index.json"
GATE = "model.language_model.layers.1.mlp.gate.weight"
NORM = "model.language_model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards, 16 bits."""
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, max_shard_size="300KB")


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def _shard_of(checkpoint: Path, name: str) -> Path:
    return checkpoint / json.loads((checkpoint / INDEX).read_text())["weight_map"][name]


def _header(shard: Path, change: Callable[[dict], None]) -> None:
    """Change a shard's header in place; its data stay."""
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _weight_map(checkpoint: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    change(index["weight_map"])
    (checkpoint / INDEX).write_text(json.dumps(index))


def _swapped_shards(checkpoint: Path) -> None:
    first, second = sorted(checkpoint.glob("*.safetensors"))[:2]
    first.rename(checkpoint / "x")
    second.rename(first)
    (checkpoint / "x").rename(second)


def _shard_of_another_model(checkpoint: Path) -> None:
    """The same tensors' names, as a model of half the experts has them."""
    shard = _shard_of(checkpoint, GATE)
    tensors = load_file(shard)
    tensors[GATE] = tensors[GATE][:4].clone()
    save_file(tensors, shard, {"format": "pt"})


def _shard_in_another_type(checkpoint: Path) -> None:
    shard = _shard_of(checkpoint, GATE)
    save_file({name: tensor.half() for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})


def _reshaped(checkpoint: Path) -> None:
    _header(_shard_of(checkpoint, GATE), lambda header: header[GATE].update(shape=header[GATE]["shape"][::-1]))


def _relabelled(dtype: str) -> Callable[[Path], None]:
    return lambda checkpoint: _header(_shard_of(checkpoint, NORM), lambda header: header[NORM].update(dtype=dtype))


def _short_header(checkpoint: Path) -> None:
    shard = _shard_of(checkpoint, GATE)
    shard.write_bytes(shard.read_bytes()[:20])


def _overlap(checkpoint: Path) -> None:
    def change(header: dict) -> None:
        names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        end, second = header[names[0]]["data_offsets"][1], header[names[1]]
        size = second["data_offsets"][1] - second["data_offsets"][0]
        second["data_offsets"] = [end - 2, end - 2 + size]

    _header(_shard_of(checkpoint, GATE), change)


DAMAGES = {
    "two shards swapped": (_swapped_shards, "not in the shard that model.safetensors.index.json names"),
    "a shard of another model": (_shard_of_another_model, f"'{GATE}' has shape [4, 128]"),
    "a shard in another type": (_shard_in_another_type, "tensors are torch.float16 (model.language_model.layers"),
    "a tensor of another shape": (_reshaped, f"'{GATE}' has shape"),
    "a tensor labelled with another 16-bit type": (_relabelled("F16"), f"1 tensors are torch.float16 ({NORM}"),
    "a tensor labelled as integers": (_relabelled("I16"), f"'{NORM}' has dtype torch.int16"),
    "a tensor labelled with a wider type": (_relabelled("F32"), f"'{NORM}' F32"),
    "a missing shard": (lambda checkpoint: _shard_of(checkpoint, GATE).unlink(), "shards: model-"),
    "an index that leaves the directory": (
        lambda c: _weight_map(c, lambda m: m.update({GATE: "../model/" + m[GATE]})), f"'{GATE}' is said to lie in '../model/"),
    "a header cut off": (_short_header, "is truncated: 20 bytes"),
    "data cut off": (lambda c: _shard_of(c, GATE).write_bytes(_shard_of(c, GATE).read_bytes()[:-3]), "is truncated"),
    "overlapping tensors": (_overlap, "starts at byte"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_written_before_the_error(
    damage: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGES[damage]
    change(checkpoint)
    before = sorted(tmp_path.iterdir())
    for command in (["quantize"], ["export", "--target", "rtx"]):
        assert main([*command, str(checkpoint), "-o", str(tmp_path / "out" / "quantized"), "--method", "rtn"]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert sorted(tmp_path.iterdir()) == before


def test_one_type_of_16_bits_and_float32_norms_are_fine(checkpoint: Path, tmp_path: Path) -> None:
    shard = _shard_of(checkpoint, NORM)
    tensors = load_file(shard)
    tensors[NORM] = tensors[NORM].float()
    save_file(tensors, shard, {"format": "pt"})
    assert main(["quantize", str(checkpoint), "-o", str(tmp_path / "quantized"), "--method", "rtn"]) == 0
