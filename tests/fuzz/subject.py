"""The small bundle that every fuzz case damages, made once a session, and a copy of it that is repaired after each case."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ecmfq_export import bundle, workflow
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.graph.pipeline import export_onnx
from ecmfq_export.progress import Silent
from ecmfq_export.target import load_target
from tests.fuzz.sandbox import outcome
from tests.tiny_models import make_qwen3_vl_moe

CASES = 100
"""Of each seed."""

SEEDS = {
    "manifests": range(0, 7),
    "changed files are not opened": range(10, 17),
    "runtime json": range(20, 27),
    "processor files": range(30, 32),
    "safetensors headers": range(100, 107),
    "embedding tables": range(110, 113),
    "damaged shards and indices of a model": range(120, 122),
    "config json": range(130, 138),
    "places of weights": range(200, 206),
    "nodes": range(210, 214),
    "bytes": range(220, 225),
    "target files": range(300, 306),
}
"""Seeds of each test; all of them together draw at least 5,000 cases."""

SECRET = "outside.bin"
"""A file beside the bundle, large enough to serve as any of its weight files: nothing may read it."""


def make(root: Path) -> Path:
    """A bundle (graphs and a quantized checkpoint under stages/) of the tiny model, rounded to nearest: seconds."""
    torch.manual_seed(0)
    model = make_qwen3_vl_moe(root / "model")
    quantized = workflow.quantize_model(model, None, root / "bundle/stages/quantized", QuantConfig(method="rtn"), Silent())
    sizes = ExportConfig(max_seq_len=64, max_batch=1, max_image_patches=64)
    export_onnx(quantized, root / "bundle/onnx", load_target("rtx"), sizes, Silent())
    bundle.write_bundle_manifest(root / "bundle", ["onnx"], {"target": "rtx"}, {"engines_built": False})
    shutil.rmtree(model)
    (root / SECRET).write_bytes(bytes(1 << 20))
    return root / "bundle"


class Subject:
    """A copy of the bundle, for one test file.

    Attributes:
        root: the bundle.
    """

    def __init__(self, original: Path, directory: Path) -> None:
        self.root = directory / "bundle"
        shutil.copytree(original, self.root)
        shutil.copyfile(original.parent / SECRET, directory / SECRET)
        self._bytes = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def bytes_of(self, name: str) -> bytes:
        return self._bytes[self.root / name]

    @contextlib.contextmanager
    def changed(self, name: str, data: bytes, rehash: bool = False) -> Iterator[None]:
        """`name` holding `data`; with `rehash` the manifests vouch for it, as an attacker's would."""
        files = {name: data}
        if rehash:
            files |= self._manifests(name, data)
        try:
            for file, content in files.items():
                self._put(self.root / file, content)
            yield
        finally:
            for file in files:
                self._put(self.root / file, self._bytes[self.root / file])

    def _manifests(self, name: str, data: bytes) -> dict[str, bytes]:
        changed = {}
        while name != bundle.MANIFEST:
            owner = next(parent for parent in Path(name).parents
                         if (self.root / parent / bundle.MANIFEST) in self._bytes and str(parent / bundle.MANIFEST) != name)
            manifest = json.loads(self.bytes_of(str(owner / bundle.MANIFEST)))
            manifest["files"][Path(name).relative_to(owner).as_posix()] = hashlib.sha256(data).hexdigest()
            if owner == Path("."):
                manifest["files"].update({old: hashlib.sha256(content).hexdigest() for old, content in changed.items()})
            name, data = str(owner / bundle.MANIFEST), json.dumps(manifest).encode()
            changed[name] = data
        return changed

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        # A new file each time: mapped pages of the old one keep what they had. Not renamed into place, which waits for the disk.
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def run_cases(
    subject: Subject, seed: int, mutate: Callable[[random.Random], tuple[str, bytes, str]], read: Callable[[], object],
    *, rehash: bool, may_pass: bool = True,
) -> list[UserError]:  # fmt: skip
    """``CASES`` cases drawn from `seed`; returns the errors of ours that they ended with.

    Args:
        mutate: draws a file's name in the bundle, its bytes and what was done.
        read: what is done with the damaged bundle.
        rehash: whether the manifests' hashes are made to fit.
        may_pass: whether a reader may take what it gets, the fault being one that changes nothing or nothing that can be seen.
    """
    refused = []
    for case in range(CASES):
        draw = random.Random(f"{seed}/{case}")
        name, data, done = mutate(draw)
        with subject.changed(name, data, rehash):
            try:
                error = outcome(subject.root, read)
            except AssertionError as failure:
                raise AssertionError(f"case {seed}/{case}: {name}: {done}: {failure}") from failure
        assert may_pass or error is not None or data == subject.bytes_of(name), f"case {seed}/{case}: {name}: {done}: taken"
        refused += [] if error is None else [error]
    return refused
