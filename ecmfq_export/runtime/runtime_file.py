"""``runtime.json`` of an exported directory, checked as a whole before anything in it is believed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ecmfq_export import bundle
from ecmfq_export.errors import BundleError
from ecmfq_export.json_file import read_json

RUNTIME_JSON = "runtime.json"
STAGE = "onnx"
_FIX = "pass the 'onnx' directory of a finished export"
_AGAIN = "export again"

DTYPES = ("float16", "float32")
_MAX_COUNT = 1 << 24
_COUNTS = {
    "max_seq_len": 1, "num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "hidden_size": 1, "num_deepstack": 0, "image_token_id": 0,
}  # fmt: skip
"""Smallest value of each whole number that running needs."""
_OPTIONAL_COUNTS = ("max_batch", "max_image_patches", "vocab_size")
_VISION_COUNTS = ("spatial_merge_size", "num_position_embeddings", "patch_features")
_MAX_LAYERS = 1000


def find_export(path: Path) -> Path | None:
    """The exported directory that `path` is or, being a bundle, holds; None where there is none."""
    return next((directory for directory in (path, path / STAGE) if (directory / RUNTIME_JSON).is_file()), None)


def verify_export(directory: Path) -> bundle.Manifest:
    """Check every hash of an exported directory, and that it holds nothing else; call it before anything there is opened.

    Raises:
        BundleError: no finished export, a file that is missing, changed or not listed.
    """
    return bundle.open_stage(directory, STAGE)


def read_runtime(directory: Path) -> dict[str, Any]:
    """``runtime.json`` of an exported directory, every field that running reads being of its type and in its range.

    Raises:
        BundleError: missing, no JSON object, or a field that is missing or wrong, by name and value.
    """
    path = directory / RUNTIME_JSON
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise BundleError(f"{directory} has no {RUNTIME_JSON}", _FIX) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}", _AGAIN) from None
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds a {type(data).__name__}, not an object", _AGAIN)
    _check(_Fields(path, "", data))
    return data


def _check(top: _Fields) -> None:
    if top.get("dtype") not in DTYPES:
        raise top.wrong("dtype", f"one of {', '.join(DTYPES)}")
    if top.get("logits") not in ("last", "all"):
        raise top.wrong("logits", "'last' or 'all'")
    for name, minimum in _COUNTS.items():
        top.whole(name, minimum)
    for name in _OPTIONAL_COUNTS:
        if name in top.data:
            top.whole(name, 0)
    if top.data["num_layers"] > _MAX_LAYERS or top.data["num_deepstack"] > top.data["num_layers"]:
        raise top.wrong("num_layers", f"at most {_MAX_LAYERS}, and not below num_deepstack = {top.data['num_deepstack']}")
    rope = top.table("rope")
    rope.text("kind")
    theta, sections = rope.get("theta"), rope.get("sections")
    if type(theta) not in (int, float) or not (math.isfinite(theta) and theta > 0):
        raise rope.wrong("theta", "a positive number")
    rope.whole("head_dim", 2)
    half = rope.data["head_dim"] // 2
    if not isinstance(sections, list) or any(type(n) is not int or not 0 <= n <= half for n in sections) or len(sections) > 3 or (
        sections and sum(sections) != half
    ):
        raise rope.wrong("sections", f"no or three whole numbers with the sum head_dim / 2 = {half}")
    if rope.data["head_dim"] > top.data["head_dim"]:
        raise rope.wrong("head_dim", f"at most head_dim = {top.data['head_dim']}")
    vision = top.table("vision")
    for name in ("position_interpolation", "patch_order"):
        vision.text(name)
    for name in _VISION_COUNTS:
        # A tower without a position table has no entries of it.
        vision.whole(name, int(name != "num_position_embeddings" or vision.data["position_interpolation"] != "none"))
    queries = vision.data.get("queries", [])
    if not isinstance(queries, list) or any(
        not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int or not 1 <= n <= _MAX_COUNT for n in pair)
        for pair in queries
    ):
        raise vision.wrong("queries", "pairs of patches and queries")
    if type(vision.data.get("class_token", False)) is not bool:
        raise vision.wrong("class_token", "true or false")
    ids = top.data.get("image_expert_ids", [])
    if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token <= _MAX_COUNT for token in ids):
        raise top.wrong("image_expert_ids", "token ids")
    if "moe" in top.data and not isinstance(top.data["moe"], dict | None):
        raise top.wrong("moe", "an object, or null")


class _Fields:
    """One object of the file; errors name field, value and what is expected."""

    def __init__(self, path: Path, where: str, data: dict[str, Any]) -> None:
        self.path, self.where, self.data = path, where, data

    def get(self, name: str) -> Any:
        if name not in self.data:
            raise BundleError(f"{self.path}: '{self.where}{name}' is missing", _AGAIN)
        return self.data[name]

    def wrong(self, name: str, expected: str) -> BundleError:
        shown = repr(self.data.get(name))
        shown = shown if len(shown) < 80 else shown[:77] + "..."
        return BundleError(f"{self.path}: {self.where}{name} = {shown} is wrong: expected {expected}", _AGAIN)

    def whole(self, name: str, minimum: int) -> None:
        value = self.get(name)
        if type(value) is not int or not minimum <= value <= _MAX_COUNT:
            raise self.wrong(name, f"a whole number from {minimum} to {_MAX_COUNT}")

    def text(self, name: str) -> None:
        if not isinstance(self.get(name), str):
            raise self.wrong(name, "a text")

    def table(self, name: str) -> _Fields:
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return _Fields(self.path, f"{self.where}{name}.", value)
