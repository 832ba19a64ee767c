"""Remembered hashes: a file is read again exactly when it may have changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ecmfq_export import bundle, file_hashes
from ecmfq_export.file_hashes import SMALLEST, FileHashes, remembered, sha256_file


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that was read for its hash."""
    seen: list[Path] = []

    def read(path: Path) -> str:
        seen.append(path)
        return sha256_file(path)

    monkeypatch.setattr(file_hashes, "sha256_file", read)
    # Times are set by hand below, so nothing has to wait until a file counts as settled.
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", -(10**18))
    return seen


def _file(path: Path, fill: bytes = b"a") -> Path:
    path.write_bytes(fill * SMALLEST)
    return path


def test_an_unchanged_file_is_read_once_by_this_and_the_next_process(tmp_path: Path, reads: list[Path]) -> None:
    file, kept = _file(tmp_path / "weights"), tmp_path / "deep" / "hashes.json"
    first = FileHashes(kept)
    assert first.sha256(file) == first.sha256(file) == FileHashes(kept).sha256(file) == sha256_file(file)
    assert len(reads) == 1
    assert FileHashes(tmp_path / "other.json").sha256(file) == sha256_file(file) and len(reads) == 2


def test_a_small_file_is_always_read(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "small").write_bytes(b"x")
    hashes = FileHashes()
    hashes.sha256(tmp_path / "small")
    hashes.sha256(tmp_path / "small")
    assert len(reads) == 2


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path, reads: list[Path]) -> None:
    """The time of modification is set back, as copying tools do; the time of the change of status cannot be."""
    file, hashes = _file(tmp_path / "weights"), FileHashes()
    before, status = hashes.sha256(file), file.stat()
    time.sleep(0.02)
    _file(file, b"b")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns and file.stat().st_size == status.st_size
    assert hashes.sha256(file) == sha256_file(file) != before


def test_another_file_in_its_place_is_seen(tmp_path: Path, reads: list[Path]) -> None:
    file, other, hashes = _file(tmp_path / "weights"), _file(tmp_path / "other", b"b"), FileHashes()
    before = hashes.sha256(file)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)
    assert hashes.sha256(file) != before


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 2 * 10**9)
    file, hashes = _file(tmp_path / "weights"), FileHashes()
    hashes.sha256(file)
    hashes.sha256(file)
    assert len(reads) == 2, "a second change within the clock's step would leave no trace"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": [1, 2]}', '{"a": [1, 2, 3, 4, 5, 6]}'])
def test_a_damaged_memory_is_left_out(text: str, tmp_path: Path, reads: list[Path]) -> None:
    file, kept = _file(tmp_path / "weights"), tmp_path / "hashes.json"
    kept.write_text(text)
    assert FileHashes(kept).sha256(file) == sha256_file(file)


def test_fingerprints_inside_share_one_memory(tmp_path: Path, reads: list[Path]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    _file(model / "one.safetensors")
    _file(model / "two.safetensors", b"b")
    with remembered(tmp_path / "hashes.json"):
        first = bundle.fingerprint(model)
        with remembered(tmp_path / "inner.json"):
            assert bundle.fingerprint(model) == first
    assert len(reads) == 2 and not (tmp_path / "inner.json").exists()
    assert bundle.fingerprint(model) == first and len(reads) == 4, "outside, everything is read"
