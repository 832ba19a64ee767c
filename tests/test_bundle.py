"""Stage directories: complete or absent, hashed, and closed to paths that leave them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from ecmfq_export import bundle
from ecmfq_export.errors import BundleError


def _make(root: Path, config: dict | None = None, text: str = "x") -> Path:
    out = root / "stage"
    with bundle.write_stage(out, "demo", config or {"a": 1}, {"in": "hash"}) as (work, info):
        (work / "sub").mkdir()
        (work / "sub" / "file.txt").write_text(text)
        info["figure"] = 3
    return out


def test_a_stage_is_renamed_into_place_with_hashes(tmp_path: Path) -> None:
    out = _make(tmp_path)
    manifest = bundle.read_manifest(out, "demo")
    assert manifest.info == {"figure": 3}
    assert set(manifest.files) == {"sub/file.txt"}
    bundle.verify(out, manifest)
    assert not bundle.partial_dir(out).exists()


def test_a_failed_stage_leaves_the_old_result(tmp_path: Path) -> None:
    out = _make(tmp_path)
    with pytest.raises(RuntimeError), bundle.write_stage(out, "demo", {"a": 2}, {}) as (work, _):
        (work / "half").write_text("half")
        raise RuntimeError("killed")
    assert bundle.read_manifest(out, "demo").config == {"a": 1}


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="could not write"), bundle.write_stage(tmp_path / "s", "demo", {}, {}):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "s").exists()


def test_a_missing_input_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), bundle.write_stage(tmp_path / "s", "demo", {}, {}):
        (tmp_path / "nowhere").read_text()


def test_resume_only_for_the_same_settings(tmp_path: Path) -> None:
    out = tmp_path / "s"

    def interrupted(config: dict, *, resume: bool) -> list[str]:
        seen: list[str] = []
        with pytest.raises(RuntimeError), bundle.write_stage(out, "demo", config, {}, resume=resume) as (work, _):
            seen += [p.name for p in work.iterdir() if p.name != ".key.json"]
            (work / "layer0").write_text("done")
            raise RuntimeError("killed")
        return seen

    assert interrupted({"a": 1}, resume=True) == []
    assert interrupted({"a": 1}, resume=True) == ["layer0"]
    assert interrupted({"a": 2}, resume=True) == []
    assert interrupted({"a": 2}, resume=False) == []


def test_is_current(tmp_path: Path) -> None:
    out = _make(tmp_path)
    assert bundle.is_current(out, "demo", {"a": 1}, {"in": "hash"})
    assert not bundle.is_current(out, "demo", {"a": 2}, {"in": "hash"})
    assert not bundle.is_current(out, "demo", {"a": 1}, {"in": "other"})
    assert not bundle.is_current(out, "other", {"a": 1}, {"in": "hash"})
    (out / "sub" / "file.txt").unlink()
    assert not bundle.is_current(out, "demo", {"a": 1}, {"in": "hash"})


def test_changed_bytes_are_named(tmp_path: Path) -> None:
    out = _make(tmp_path)
    (out / "sub" / "file.txt").write_text("y")
    with pytest.raises(BundleError, match=r"sub/file\.txt"):
        bundle.verify(out, bundle.read_manifest(out))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\0b", "..\\x"])
def test_paths_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="leaves"):
        bundle.inside(tmp_path, name)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to("/etc")
    with pytest.raises(BundleError, match="through a link"):
        bundle.inside(tmp_path / "b", "link/passwd")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 99}', '{"schema_version": 1, "stage": 5}', "[" * 100_000])
def test_damaged_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / bundle.MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        bundle.read_manifest(tmp_path)


def test_a_manifest_may_not_name_files_outside(tmp_path: Path) -> None:
    out = _make(tmp_path)
    data = json.loads((out / bundle.MANIFEST).read_text())
    data["files"]["../../etc/passwd"] = "0" * 64
    (out / bundle.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="leaves"):
        bundle.read_manifest(out)


def test_bundle_manifest_covers_its_parts(tmp_path: Path) -> None:
    _make(tmp_path)
    manifest = bundle.write_bundle_manifest(tmp_path, ["stage"], {"target": "t"}, {})
    assert set(manifest.files) == {"stage/sub/file.txt", "stage/manifest.json"}
    bundle.verify(tmp_path, manifest)
    (tmp_path / "stage" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        bundle.verify(tmp_path, manifest)
