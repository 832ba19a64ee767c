"""Devices are refused by name with what was found, and activations beyond the limit lie in the stage's own directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecmfq_export.cli import main
from ecmfq_export.errors import UserError
from ecmfq_export.progress import Silent
from ecmfq_export.stages.calibrate import calibrate
from ecmfq_export.stages.quantize import quantize
from ecmfq_export.stages.resources import Resources, check_device
from ecmfq_export.stages.smooth import smooth
from ecmfq_export.stages.streams import ActivationStore
from tests.stages.common import SETTINGS, file_hashes


def test_the_cpu_is_always_there() -> None:
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "", "meta"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' is not known"):
        check_device(device)


def test_a_pytorch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="built without it") as caught:
        check_device("cuda")
    assert "--device" in caught.value.fix


def test_a_missing_gpu_is_named_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds 0 CUDA devices: none"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    assert check_device("cuda") == "cuda" and check_device("cuda:0") == "cuda:0"
    with pytest.raises(UserError, match="finds 1 CUDA devices: Some GPU"):
        check_device("cuda:1")


def test_the_command_line_refuses_before_any_work(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    out = tmp_path / "quantized"
    assert main(["quantize", str(tiny), "-o", str(out), "--method", "rtn", "--device", "cuda"]) == 2
    assert "device 'cuda'" in capsys.readouterr().err and not out.exists()
    assert main(["quantize", str(tiny), "-o", str(out), "--method", "rtn", "--memory", "-1"]) == 2
    assert "--memory -1" in capsys.readouterr().err


def test_everything_on_disk_gives_the_same_bytes(tiny, pool, calibrated, smoothed, tmp_path, monkeypatch) -> None:
    """With no memory for activations every tensor goes through a file of the working directory, and none is left."""
    places = set()
    place = ActivationStore._place
    monkeypatch.setattr(ActivationStore, "_place", lambda self: places.add(place(self)) or place(self))
    resources = Resources(activation_bytes=0)
    again = calibrate(tiny, pool, tmp_path / "calibration", SETTINGS, Silent(), resources)
    assert file_hashes(again) == file_hashes(calibrated)
    scales = smooth(tiny, again, tmp_path / "smoothing", SETTINGS, Silent(), resources)
    assert file_hashes(scales) == file_hashes(smoothed)
    quantize(tiny, again, scales, tmp_path / "quantized", SETTINGS, Silent(), resources)
    assert {path.parent.name for path in places} == {".calibration.partial", ".smoothing.partial", ".quantized.partial"}
    assert not list(tmp_path.rglob(".activations*"))


def test_a_store_moves_between_names_on_disk_and_in_memory(tmp_path: Path) -> None:
    with ActivationStore(limit=12, directory=tmp_path / "store") as store:
        store.put("a", torch.ones(3))
        store.put("b", torch.full((3,), 2.0))
        store.move("b", "c")
        store.move("a", "d")
        store.move("c", "d")
        assert store.names() == ["d"] and store.get("d").tolist() == [2.0] * 3
        assert len(list((tmp_path / "store").iterdir())) == 1
        store.put("e", torch.ones(3))
        assert len(list((tmp_path / "store").iterdir())) == 1, "memory that was given back is used again"
    assert not (tmp_path / "store").exists()
