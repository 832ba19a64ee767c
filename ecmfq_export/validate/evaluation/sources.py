"""What a path given by a user holds: a checkpoint, an exported bundle, or the result of an earlier evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ecmfq_export.bundle import sha256_file
from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.runtime.processor import PROCESSOR_FILES
from ecmfq_export.runtime.runtime_file import find_export
from ecmfq_export.validate.evaluation.onnx_model import OnnxModel

_FORMS = "give a checkpoint directory (config.json), a bundle, or a bundle's onnx directory"
_SHAPING_FILES = tuple(name for name in PROCESSOR_FILES if name != "generation_config.json")


@dataclass(frozen=True)
class Source:
    """A model that can be evaluated, and the directory of its tokenizer, chat template and image settings."""

    model: MoEVLM | OnnxModel
    processor_dir: Path


def open_source(path: Path, threads: int = 0) -> Source:
    """Open a checkpoint (evaluated in PyTorch) or a bundle's graphs (evaluated in ONNX Runtime).

    Args:
        threads: of the CPU, 0: all cores. Of PyTorch this sets the whole process.

    Raises:
        UserError: the path holds none of them, or something damaged.
    """
    path = Path(path)
    directory = find_export(path)
    if directory is not None:
        return Source(OnnxModel(directory, threads), directory)
    if not path.exists():
        raise UserError(f"no model at {path}", _FORMS)
    if not path.is_dir():
        raise UserError(f"{path} is a file", _FORMS)
    if threads:
        torch.set_num_threads(threads)
    return Source(open_model(path), path)


def require_same_processor(first: Path, second: Path) -> None:
    """Raise UserError unless two directories tokenize and preprocess alike, by their files' bytes: only then are prompts the same."""
    for name in _SHAPING_FILES:
        files = [directory / name for directory in (first, second)]
        there = [file.is_file() for file in files]
        if any(there) and (not all(there) or sha256_file(files[0]) != sha256_file(files[1])):
            raise UserError(f"{first} and {second} have different {name} files, so their prompts would not be the same",
                            "evaluate each alone with --json, and give the one's file as --reference of the other")
