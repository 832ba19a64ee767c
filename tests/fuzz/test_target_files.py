"""Damaged target files: a target, or one message."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ecmfq_export.target import list_targets, load_target
from tests.fuzz.mutations import mutate_bytes, mutate_tree
from tests.fuzz.sandbox import outcome
from tests.fuzz.subject import CASES, SEEDS

FOLDER = Path(__file__).parents[2] / "targets"


def _toml(value: Any) -> str:
    """A value as TOML; what TOML has no word for becomes text, in an own line that may not parse."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(one)}' for key, one in value.items()) + "}"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _mutate(draw: random.Random) -> tuple[bytes, str]:
    data = (FOLDER / f"{draw.choice(list_targets())}.toml").read_bytes()
    tree = tomllib.loads(data.decode())
    tree["name"] = "board"
    text = "\n".join(f'"{key}" = {_toml(value)}' for key, value in tree.items()).encode()
    kind = draw.choice(["tree"] * 6 + ["bytes", "bytes", "double", "deep", "utf16"])
    if kind == "bytes":
        return mutate_bytes(draw, text)
    if kind == "tree":
        tree, done = mutate_tree(draw, tree)
        return "\n".join(f'"{key}" = {_toml(value)}' for key, value in tree.items()).encode("utf-8", "surrogatepass"), done
    changed = {"double": text + b'\nname = "board"\n', "deep": text + b"\nx = " + b"[" * 50_000, "utf16": text.decode().encode("utf-16")}
    return changed[kind], kind


@pytest.mark.parametrize("seed", SEEDS["target files"])
def test_target_files(seed: int, tmp_path: Path) -> None:
    """A target comes out, or one message."""
    path, refused = tmp_path / "board.toml", 0
    for case in range(CASES):
        data, done = _mutate(random.Random(f"{seed}/{case}"))
        path.write_bytes(data)
        try:
            refused += outcome(tmp_path, lambda: load_target(path)) is not None
        except AssertionError as failure:
            raise AssertionError(f"case {seed}/{case}: {done}: {failure}") from failure
    assert refused > 60


def test_enough_cases() -> None:
    assert CASES * sum(map(len, SEEDS.values())) >= 5000
