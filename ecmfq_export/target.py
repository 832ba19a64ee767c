"""What an engine is built for: one TOML file a target, read into a frozen :class:`Target`.

The code reads fields; it never branches on a target's name. A file of one's own works as well as a bundled one:
``load_target("./my-board.toml")``.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecmfq_export.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# An installed package carries a copy; in a source tree (also behind an editable install) the user's folder is beside it.
_FOLDERS = (_PACKAGE / "targets", _PACKAGE.parent / "targets")

_CHOICES = {
    "platform": ("linux-x86_64", "linux-aarch64"),
    "engine.runtime": ("tensorrt_rtx", "tensorrt"),
    "engine.build": ("host-aot", "on-device"),
    "engine.attention": ("onnx24", "decomposed"),
    "engine.kv_cache": ("in_place", "copy"),
    "engine.plugin": ("embedded", "beside"),
    "engine.dtype": ("float16", "bfloat16"),
    "kernel.weight_layout": ("row_major", "mma_s8"),
}
_MAX_BYTES = 1 << 20
_RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
_KERNEL_CAPABILITIES = (80, 86, 87, 89, 90, 100, 110, 120, 121)


@dataclass(frozen=True)
class EngineSpec:
    """How the engine is made.

    Attributes:
        runtime: the Python module that builds: ``tensorrt_rtx`` or ``tensorrt``.
        build: ``host-aot`` (any machine, no GPU) or ``on-device`` (on the target GPU itself).
        min_version, max_version: versions of the runtime, inclusive; ``max_version`` is a prefix ("11" admits 11.4).
        attention: ``onnx24`` (Attention and TensorScatter of opset 24) or ``decomposed`` (standard ops of older parsers).
        kv_cache: how buffers of full length take new keys and values: ``in_place`` (TensorScatter: past and present are one buffer) or
            ``copy`` (ScatterElements, where the parser has no TensorScatter: two buffers that change places with every call).
        plugin: where the plugin library is: ``embedded`` in the engine, or a file ``beside`` it that a runtime loads first.
        timing_cache: whether the builder keeps measured times of tactics in a file, so that a second build is faster.
        decode_profile: whether the decoder's engine has a second profile, tuned for one token a sequence.
        dtype: of activations and of everything that is not quantized.
    """

    runtime: str
    build: str
    min_version: str
    max_version: str
    attention: str
    kv_cache: str
    plugin: str
    timing_cache: bool
    decode_profile: bool
    dtype: str


@dataclass(frozen=True)
class KernelSpec:
    """What the plugin's kernels expect.

    Attributes:
        weight_layout: of int4 weights.
        cuda: the oldest CUDA version (as the driver reports it) of the systems that the target admits, e.g. ``12.6`` for JetPack 6. A
            library compiled with a newer major version does not run there.
        max_smem_per_block: shared memory that a block may opt into, in bytes.
    """

    weight_layout: str
    cuda: str
    max_smem_per_block: int


@dataclass(frozen=True)
class Limits:
    """Sizes to build for: sequences a batch, tokens a sequence (the KV cache's length), bytes of device memory."""

    max_batch: int
    max_seq_len: int
    memory_bytes: int


@dataclass(frozen=True)
class Target:
    """One kind of device, as its TOML file describes it.

    Attributes:
        name: the file's name without ``.toml``.
        description: one line for people.
        compute_capabilities: SM versions as integers, e.g. ``(86, 89, 120)``; more than one only for ``tensorrt_rtx``.
        platform: of the device, ``linux-x86_64`` or ``linux-aarch64``.
    """

    name: str
    description: str
    compute_capabilities: tuple[int, ...]
    platform: str
    engine: EngineSpec
    kernel: KernelSpec
    limits: Limits

    @property
    def dtype(self) -> str:
        return self.engine.dtype

    @property
    def attention(self) -> str:
        return self.engine.attention

    @property
    def kv_cache(self) -> str:
        return self.engine.kv_cache


def choices(key: str) -> tuple[str, ...]:
    """The values that a field may have, by its dotted name; () where it is not one of a few."""
    return _CHOICES.get(key, ())


def list_targets() -> list[str]:
    """Names of the bundled targets, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_target(name_or_path: str | Path) -> Target:
    """Read a bundled target by its name, or any TOML file by its path.

    Raises:
        UserError: no such target, not TOML, an unknown or a missing key, a value of the wrong type or out of range.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith(".toml") else _folder() / f"{text}.toml"
    if not path.is_file():
        raise UserError(f"target '{text}' is not known", f"one of {', '.join(list_targets())}, or the path of a .toml file")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}", "start from a copy of a bundled target") from error
    target = _read(Target, data, path, "")
    if target.name != path.stem:
        raise UserError(f"{path}: name is '{target.name}'", f"name it as the file is: '{path.stem}'")
    _check(target, path)
    return target


def _folder() -> Path:
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise UserError(f"no folder of targets: neither {_FOLDERS[0]} nor {_FOLDERS[1]}", "install ecmfq-export again")


def _read(kind: type, data: Any, path: Path, prefix: str) -> Any:
    """Make a dataclass of a TOML table: every key known, every field given, every value of the field's type."""
    if not isinstance(data, dict):
        raise UserError(f"{path}: '{prefix.rstrip('.')}' is {data!r}", "it must be a table")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise UserError(f"{path}: unknown key '{prefix}{unknown[0]}'", f"known keys: {', '.join(prefix + n for n in names)}")
    missing = [name for name in names if name not in data]
    if missing:
        raise UserError(f"{path}: key '{prefix}{missing[0]}' is missing")
    return kind(**{name: _value(hints[name], data[name], path, prefix + name) for name in names})


def _value(hint: Any, value: Any, path: Path, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), value, path, key + ".")
    if isinstance(hint, types.GenericAlias):  # tuple[int, ...]
        if not isinstance(value, list) or not value or any(type(item) is not int for item in value):
            raise UserError(f"{path}: '{key}' is {value!r}", "it must be a list of integers, at least one")
        return tuple(value)
    if type(value) is not hint:
        raise UserError(f"{path}: '{key}' is {value!r}", f"it must be of type {hint.__name__}")
    if hint is int and value <= 0:
        raise UserError(f"{path}: '{key}' is {value}", "it must be positive")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"{path}: '{key}' is '{value}'", f"one of {', '.join(_CHOICES[key])}")
    return value


def _check(target: Target, path: Path) -> None:
    """What no single field can say."""
    seen = target.compute_capabilities
    if len(set(seen)) != len(seen):
        raise UserError(f"{path}: compute_capabilities {list(seen)} repeats a value")
    if target.engine.runtime == "tensorrt_rtx":
        known = tuple(sm for sm in _RTX_CAPABILITIES if sm in _KERNEL_CAPABILITIES)
    else:
        known = _KERNEL_CAPABILITIES
        if len(seen) != 1:
            raise UserError(f"{path}: compute_capabilities is {list(seen)}",
                            "a 'tensorrt' engine runs on one; 'tensorrt_rtx' takes several")
    wrong = [sm for sm in seen if sm not in known]
    if wrong:
        raise UserError(f"{path}: compute capability {wrong[0]} has no kernel or no engine with {target.engine.runtime}",
                        f"one of {', '.join(map(str, known))}")
    if (target.engine.runtime == "tensorrt_rtx") != (target.engine.build == "host-aot"):
        raise UserError(f"{path}: runtime '{target.engine.runtime}' with build '{target.engine.build}'",
                        "tensorrt_rtx builds host-aot, tensorrt builds on-device")
    if target.engine.runtime == "tensorrt_rtx" and (target.engine.decode_profile or target.engine.timing_cache):
        raise UserError(f"{path}: decode_profile or timing_cache with runtime 'tensorrt_rtx'",
                        "TensorRT-RTX compiles for the shapes it meets on the device and measures nothing while building: false for both")
    _version(target.kernel.cuda, path)
    if (target.engine.attention == "onnx24") != (target.engine.kv_cache == "in_place"):
        raise UserError(f"{path}: attention '{target.engine.attention}' with kv_cache '{target.engine.kv_cache}'",
                        "TensorScatter, which updates in place, is part of 'onnx24'; 'decomposed' graphs take 'copy'")
    if target.engine.attention == "onnx24" and target.engine.runtime == "tensorrt":
        if _version(target.engine.min_version, path) < (10, 15):
            raise UserError(f"{path}: attention 'onnx24' with min_version {target.engine.min_version}",
                            "TensorRT's parser knows TensorScatter since 10.15; before that use 'decomposed'")


def _version(text: str, path: Path) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise UserError(f"{path}: '{text}' is not a version", "numbers with dots, e.g. 10.15") from None
