"""Safetensors directories: read lazily and exactly; everything damaged is refused in words."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export.errors import CheckpointError
from ecmfq_export.models import checkpoint as module
from ecmfq_export.models.checkpoint import Checkpoint, preview
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor([[7]], dtype=torch.int8),
    "d": torch.zeros(0, 5, dtype=torch.float16),
    "e": torch.tensor(3, dtype=torch.int64),
}


def single(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def sharded(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    parts = {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c", "d", "e"]}
    for shard, names in parts.items():
        save_file({name: TENSORS[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in parts.items() for name in names}
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: dict) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(directory: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + data)
    return directory


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("make", [single, sharded])
def test_reads_every_tensor(tmp_path: Path, make) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "c"))
    assert checkpoint.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        loaded = checkpoint.load(name)
        assert torch.equal(loaded, tensor) and loaded.dtype == tensor.dtype == checkpoint.dtype(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    assert torch.equal(checkpoint.load_rows("a", 1, 3), TENSORS["a"][1:3])
    assert checkpoint.load_rows("a", 2, 2).shape == (0, 4)
    with pytest.raises(ValueError, match="rows 1:4"):
        checkpoint.load_rows("a", 1, 4)
    with pytest.raises(CheckpointError, match="has no tensor 'z'"):
        checkpoint.load("z")


def test_a_linked_cache_is_read(tmp_path: Path) -> None:
    """The Hugging Face cache keeps files as links to blobs elsewhere."""
    single(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    assert torch.equal(Checkpoint.open(tmp_path / "snapshot").load("a"), TENSORS["a"])


@pytest.mark.parametrize("size", [0, 7, 8, 40, -1])
def test_truncated(tmp_path: Path, size: int) -> None:
    file = single(tmp_path / "c") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="model.safetensors is truncated: .* bytes"):
        Checkpoint.open(tmp_path / "c")


def test_truncated_after_opening(tmp_path: Path) -> None:
    file = single(tmp_path / "c") / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path / "c")
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match="ends after .* of .* bytes"):
        for name in TENSORS:
            checkpoint.load(name)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load("a")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not JSON"),
        (b"[1]", b"", "no JSON object"),
        (b"[" * 200000, b"", "not JSON"),
        (b'{"a":{},"a":{}}', b"", "names 'a' twice"),
        ({"a": 3}, b"", "entry of 'a' is malformed"),
        ({"a": entry(shape=[-2])}, b"", "entry of 'a' is malformed"),
        ({"a": entry(shape=[True])}, b"", "entry of 'a' is malformed"),
        ({"a": entry(offsets=[0])}, b"", "entry of 'a' is malformed"),
        ({"a": entry("F8_E4M3")}, bytes(8), "dtype 'F8_E4M3'"),
        ({"a": entry("F64")}, bytes(8), "dtype 'F64'"),
        ({"a": entry(["F32"])}, bytes(8), "dtype \\['F32'\\]"),
        ({"a": entry(shape=[3])}, bytes(8), "needs 12 bytes, the header gives it 8"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8), "needs"),
        ({"a": entry(offsets=[4, 12])}, bytes(12), "starts at byte"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "starts at byte"),
        ({"a": entry()}, bytes(9), "1 bytes more than its header says"),
        ({"a": entry()}, bytes(7), "truncated"),
    ],
)
def test_damaged_header(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(raw(tmp_path / "c", header, data))


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1])
def test_absurd_header_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint.open(raw(tmp_path / "c", {}, b"", length))


def test_index_leaving_the_directory(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "c")
    (tmp_path / "outside.safetensors").write_bytes((directory / "model-1.safetensors").read_bytes())
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "x\\y.safetensors", "", "model.bin", 3):
        write_index(directory, {"a": shard})
        with pytest.raises(CheckpointError, match="'a' is said to lie in"):
            Checkpoint.open(directory)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "c")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(directory, index | {"f": "model-3.safetensors"})
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards: model-3.safetensors"):
        Checkpoint.open(directory)
    write_index(directory, index | {"f": "model-1.safetensors", "g": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match="2 tensors are not in the shard .*: f, g"):
        Checkpoint.open(directory)
    write_index(directory, index | {"a": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match="1 tensors are not in the shard .*: a"):
        Checkpoint.open(directory)
    write_index(directory, {name: shard for name, shard in index.items() if name != "b"})
    with pytest.raises(CheckpointError, match="holds 'b', which .* does not list"):
        Checkpoint.open(directory)
    save_file({"c": TENSORS["c"], "a": TENSORS["a"], "d": TENSORS["d"], "e": TENSORS["e"]}, directory / "model-2.safetensors")
    write_index(directory, index)
    with pytest.raises(CheckpointError, match="'a' is in model-1.safetensors and in model-2.safetensors"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}'])
def test_unreadable_index(tmp_path: Path, text: str) -> None:
    directory = sharded(tmp_path / "c")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json"):
        Checkpoint.open(directory)


def test_two_sources_of_weights(tmp_path: Path) -> None:
    single(sharded(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="remove the one that is not meant"):
        Checkpoint.open(tmp_path / "c")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin", "config.json"], "pickled weights only: pytorch_model.bin"),
        (["model-00001-of-00002.safetensors"], "neither model.safetensors nor"),
        (["config.json"], "holds no model.safetensors"),
    ],
)
def test_nothing_to_read(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(tmp_path: Path, monkeypatch, dtype: torch.dtype, bad: float) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    tensor = torch.zeros(5, 10, dtype=dtype)
    tensor[3, 2] = bad
    checkpoint = Checkpoint.open(single(tmp_path / "c", {"layer.weight": tensor, "fine": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"tensor 'layer.weight' in .* holds -?(nan|inf) at element 32 of 50"):
        checkpoint.load("layer.weight")
    with pytest.raises(CheckpointError, match="holds -?(nan|inf) at element 2 of 10"):
        checkpoint.load_rows("layer.weight", 3, 4)
    assert torch.equal(checkpoint.load_rows("layer.weight", 0, 3), tensor[:3])
    assert torch.equal(checkpoint.load("fine"), torch.ones(3))


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    total = write_safetensors(file, {name: TensorToWrite.of(tensor) for name, tensor in TENSORS.items()})
    back = load_file(file)
    assert back.keys() == TENSORS.keys() and all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)
    assert total == sum(tensor.nbytes for tensor in TENSORS.values())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"a": TensorToWrite.of(torch.ones(2))})
    before = file.read_bytes()
    wrong = TensorToWrite(torch.float32, (3,), lambda: torch.ones(2))
    with pytest.raises(ValueError, match="not what was announced"):
        write_safetensors(file, {"a": TensorToWrite.of(torch.zeros(2)), "b": wrong})
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_preview() -> None:
    assert preview(["a", "b"]) == "a, b" and preview(list("abcde")) == "a, b, c and 2 more"
