"""A stage's directory: files, and a ``manifest.json`` that says what made them and what they hash to.

A stage writes into a directory beside its final one and renames it when everything is on disk, so a directory with a
manifest is complete by construction and a killed stage leaves nothing that could be taken for a result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ecmfq_export import __version__
from ecmfq_export.errors import BundleError
from ecmfq_export.file_hashes import active, sha256_file
from ecmfq_export.json_file import read_json

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_MAX_NAME = 2048


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself.

    Attributes:
        stage: the stage's name, e.g. ``"quantize"``.
        config: the settings that shaped the result.
        inputs: name to fingerprint of everything that was read.
        files: path inside the directory (POSIX form) to sha256.
        info: figures and facts that later stages and people read.
        version: of the ecmfq_export that wrote it; empty where it is not said.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, str]
    info: dict[str, Any]
    version: str = ""


def fingerprint(path: Path) -> str:
    """One hash for an input: a finished stage by its manifest, a file by its bytes, a directory by its files' names and bytes.

    A large file that has not changed since its hash was taken is not read again (:mod:`ecmfq_export.file_hashes`).
    """
    hashes = active()
    if path.is_file():
        return hashes.sha256(path)
    if (path / MANIFEST).is_file():
        return sha256_file(path / MANIFEST)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{hashes.sha256(file)}\n".encode())
    return digest.hexdigest()


def partial_dir(out_dir: Path) -> Path:
    """Where a stage works until it is complete; what is in there is never a result."""
    return out_dir.with_name(f".{out_dir.name}.partial")


def is_current(out_dir: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether `out_dir` already holds this stage's result for these settings and inputs, with every file in place."""
    try:
        manifest = read_manifest(out_dir, stage)
    except BundleError:
        return False
    same = manifest.config == _plain(config) and manifest.inputs == dict(inputs)
    return same and all((out_dir / name).is_file() for name in manifest.files)


@contextlib.contextmanager
def write_stage(
    out_dir: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], *, resume: bool = False
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a working directory and an ``info`` dict; on success hash the files, write the manifest and rename into place.

    With `resume`, a working directory that an interrupted run left for the SAME settings and inputs is handed back with its
    files; otherwise it is emptied first.

    Raises:
        BundleError: the disk is full or the directory cannot be written; nothing is left in `out_dir`.
    """
    work = partial_dir(out_dir)
    key = {"stage": stage, "config": _plain(config), "inputs": dict(inputs), "version": __version__}
    key_file = work / ".key.json"
    info: dict[str, Any] = {}
    try:
        if work.exists() and not (resume and _read_json(key_file) == key):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_json(key_file, key)
        (work / MANIFEST).unlink(missing_ok=True)  # of a run that was interrupted just before the end
        yield work, info
        # The key stays until the result is in place: hashing a large stage takes long, and a kill must not cost the stage.
        files = {p.relative_to(work).as_posix(): sha256_file(p) for p in sorted(work.rglob("*")) if p.is_file() and p != key_file}
        _sync_tree(work)
        write_json(work / MANIFEST, _manifest_json(stage, config, inputs, files, info))
        if out_dir.exists():
            shutil.rmtree(out_dir)
        work.rename(out_dir)
        (out_dir / key_file.name).unlink()
        _sync_path(out_dir.parent)
    except OSError as error:
        # Only what a write can meet; a missing input, say, is somebody else's error and keeps its own words.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise
        raise BundleError(
            f"stage '{stage}' could not write {work}: {error.strerror or error}",
            "free disk space or choose another --output; finished layers are kept and the run continues from them",
        ) from error


def write_bundle_manifest(root: Path, parts: list[str], config: Mapping[str, Any], info: Mapping[str, Any]) -> Manifest:
    """Write ``manifest.json`` of a whole bundle from the finished stages in it (``parts``, relative directories).

    Hashes are taken over from the parts' own manifests, and each part's manifest is hashed too, so nothing is read twice.

    Raises:
        BundleError: a part is not a finished stage.
    """
    files: dict[str, str] = {}
    for part in parts:
        manifest = read_manifest(inside(root, part))
        files.update({f"{part}/{name}": digest for name, digest in manifest.files.items()})
        files[f"{part}/{MANIFEST}"] = sha256_file(root / part / MANIFEST)
    inputs = {part: files[f"{part}/{MANIFEST}"] for part in parts}
    write_json(root / MANIFEST, _manifest_json("bundle", config, inputs, files, info))
    return read_manifest(root, "bundle")


def read_manifest(directory: Path, stage: str | None = None) -> Manifest:
    """Read and check ``manifest.json`` (schema, path safety), not yet the hashes; see :func:`verify`.

    Raises:
        BundleError: missing, damaged, of another stage or schema, or naming a file outside the directory.
    """
    data = _read_json(directory / MANIFEST)
    if data is None:
        raise BundleError(f"{directory} has no readable {MANIFEST}", "it is no finished stage; run the stage again")
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        seen = version if isinstance(data, dict) else type(data).__name__
        raise BundleError(f"{directory / MANIFEST}: schema_version {seen!r}", f"this version reads {SCHEMA_VERSION}")
    parts = {"stage": str, "config": dict, "inputs": dict, "files": dict, "info": dict}
    for key, kind in parts.items():
        if not isinstance(data.get(key), kind):
            raise BundleError(f"{directory / MANIFEST}: '{key}' is missing or no {kind.__name__}")
    if stage is not None and data["stage"] != stage:
        raise BundleError(f"{directory} is a '{data['stage']}' directory", f"expected a '{stage}' directory")
    for key in ("inputs", "files"):
        for name, digest in data[key].items():
            if not isinstance(digest, str):
                raise BundleError(f"{directory / MANIFEST}: the hash of '{name}' in '{key}' is no string")
    for name in data["files"]:
        inside(directory, name)
    return Manifest(**{key: data[key] for key in parts}, version=str(data.get("ecmfq_export", ""))[:40])


def open_stage(directory: Path, stage: str) -> Manifest:
    """The manifest of a finished stage, after every file in it was hashed: to be called before any of them is read.

    Raises:
        BundleError: as :func:`read_manifest` and :func:`verify`, or a file is there that the manifest does not list, which
            nobody has vouched for and a reader might pick up.
    """
    manifest = read_manifest(directory, stage)
    verify(directory, manifest)
    listed = {PurePosixPath(name).as_posix() for name in manifest.files} | {MANIFEST}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_dir() and name not in listed:
            raise BundleError(f"{path} is not in the manifest of {directory}", "remove it, or copy the bundle again")
    return manifest


def verify(directory: Path, manifest: Manifest, names: list[str] | None = None) -> None:
    """Check the sha256 of `names` (default: all files of the manifest).

    Raises:
        BundleError: a file is missing, changed, or not in the manifest.
    """
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise BundleError(f"'{name}' is not in the manifest of {directory}")
        path = inside(directory, name)
        if not path.is_file():
            raise BundleError(f"{path} is missing", "copy the whole bundle, or make it again")
        digest = sha256_file(path)
        if digest != manifest.files[name]:
            raise BundleError(f"{path}: sha256 {digest[:12]}..., the manifest says {manifest.files[name][:12]}...",
                              "the file was changed or damaged; copy or make the bundle again")


def inside(directory: Path, name: str) -> Path:
    """The path of `name` in `directory`, refused where it would leave it (absolute, ``..``, or through a link)."""
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"path '{name}' leaves {directory}", "paths in a bundle are relative and stay inside it")
    if pure.as_posix() != name:
        raise BundleError(f"path '{name}' of {directory} is not in its plain form '{pure.as_posix()}'",
                          "paths in a bundle have no '.', '//' or final '/'")
    if len(name) > _MAX_NAME or any(len(part.encode()) > 255 for part in pure.parts):
        raise BundleError(f"path '{name[:80]}...' has {len(name)} characters", "no file system holds such a name")
    path = directory / name
    try:
        stays = path.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name that the file system does not take
        raise BundleError(f"path '{name}' of {directory} cannot be followed: {error}", "a bundle holds real files only") from None
    if not stays:
        raise BundleError(f"path '{name}' leaves {directory} through a link", "a bundle holds real files only")
    return path


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside `path` and rename it into place, synced."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=2, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)


def _manifest_json(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], files: Mapping[str, str], info: Mapping[str, Any]
) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "ecmfq_export": __version__, "stage": stage, "config": _plain(config),
            "inputs": dict(inputs), "files": dict(files), "info": _plain(info)}


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))


def _sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _sync_path(path)
    _sync_path(root)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
