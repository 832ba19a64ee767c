"""Which families are supported, and the one way to read a ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.json_file import read_json
from ecmfq_export.models import (
    aria,
    aria_vision,
    ernie4_5_vl_moe,
    ernie_vision,
    glm4v_moe,
    intern_vision,
    internvl,
    kimi_vision,
    kimi_vl,
    qwen3_omni_moe,
    qwen3_vl_moe,
)
from ecmfq_export.models.family_facts import REFUSED
from ecmfq_export.models.float_source import ExpertPart, JoinedSource
from ecmfq_export.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
MAX_LAYERS = 1000
_COUNTS = ("num_hidden_layers", "depth", "num_layers", "num_labels", "vt_num_hidden_layers")


@dataclass(frozen=True)
class Family:
    """What the rest of the package needs to know of a family; everything else is in the spec it reads.

    Attributes:
        name: of the family, as in ``ModelSpec.family``.
        model_type: of ``config.json``.
        read_spec: config.json's content to a spec; refuses every field it does not understand.
        disk_name: canonical tensor name to the name on disk.
        expert_parts: a layer's stacked experts to the tensors on disk that hold them; empty where they are one tensor.
        vision_shapes: config.json's content to the vision tower's canonical tensor names and shapes.
        build_vision: config.json's content to transformers' own vision tower, without weights, on the meta device.
        vision_state: the tower's tensors, by canonical name without ``vision.``, as the state of the built tower.
        finish_vision: puts the buffers that no checkpoint holds into a tower whose parameters are loaded.
        residual_writers: a spec to the canonical tensors of the vision tower whose rows (or only axis) enter the decoder's residual
            stream: weight and bias of its last projections.
        unused: prefixes of names on disk to what their tensors are for, where text and images do not need them.
        joined: a canonical tensor that several tensors on disk make, or one in another shape; None for any other.
        published_name: a name on disk, as transformers saves it, to the one in published checkpoints, where that is another.
    """

    name: str
    model_type: str
    read_spec: Callable[[dict[str, Any]], ModelSpec]
    disk_name: Callable[[str], str]
    expert_parts: Callable[[ModelSpec, str], tuple[ExpertPart, ...]]
    vision_shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]
    build_vision: Callable[[dict[str, Any]], torch.nn.Module]
    vision_state: Callable[[torch.nn.Module, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    finish_vision: Callable[[torch.nn.Module], None]
    residual_writers: Callable[[ModelSpec], tuple[str, ...]]
    unused: Mapping[str, str] = field(default_factory=dict)
    joined: Callable[[ModelSpec, str], JoinedSource | None] = lambda spec, name: None
    published_name: Callable[[str], str] = lambda name: name


def _one_tensor(spec: ModelSpec, name: str) -> tuple[ExpertPart, ...]:
    return ()


def _same_state(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state


SUPPORTED: Mapping[str, Family] = {
    "qwen3_vl_moe": Family(
        name="qwen3_vl_moe",
        model_type="qwen3_vl_moe",
        read_spec=qwen3_vl_moe.read_spec,
        disk_name=qwen3_vl_moe.disk_name,
        expert_parts=_one_tensor,
        vision_shapes=qwen3_vl_moe.vision_shapes,
        build_vision=qwen3_vl_moe.build_vision,
        vision_state=_same_state,
        finish_vision=qwen3_vl_moe.finish_vision,
        residual_writers=qwen3_vl_moe.residual_writers,
    ),
    "qwen3_omni_moe": Family(
        name="qwen3_omni_moe",
        model_type="qwen3_omni_moe",
        read_spec=qwen3_omni_moe.read_spec,
        disk_name=qwen3_omni_moe.disk_name,
        expert_parts=qwen3_omni_moe.expert_parts,
        vision_shapes=qwen3_omni_moe.vision_shapes,
        build_vision=qwen3_omni_moe.build_vision,
        vision_state=_same_state,
        finish_vision=qwen3_vl_moe.finish_vision,
        residual_writers=qwen3_omni_moe.residual_writers,
        unused=qwen3_omni_moe.UNUSED,
    ),
    "qwen3_omni_moe_thinker": Family(
        name="qwen3_omni_moe_thinker",
        model_type="qwen3_omni_moe_thinker",
        read_spec=qwen3_omni_moe.read_thinker_spec,
        disk_name=qwen3_omni_moe.thinker_disk_name,
        expert_parts=qwen3_omni_moe.thinker_expert_parts,
        vision_shapes=qwen3_omni_moe.vision_shapes,
        build_vision=qwen3_omni_moe.build_vision,
        vision_state=_same_state,
        finish_vision=qwen3_vl_moe.finish_vision,
        residual_writers=qwen3_omni_moe.residual_writers,
        unused=qwen3_omni_moe.THINKER_UNUSED,
    ),
    "glm4v_moe": Family(
        name="glm4v_moe",
        model_type="glm4v_moe",
        read_spec=glm4v_moe.read_spec,
        disk_name=glm4v_moe.disk_name,
        expert_parts=glm4v_moe.expert_parts,
        vision_shapes=glm4v_moe.vision_shapes,
        build_vision=glm4v_moe.build_vision,
        vision_state=_same_state,
        finish_vision=qwen3_vl_moe.finish_vision,
        residual_writers=glm4v_moe.residual_writers,
    ),
    "ernie4_5_vl_moe": Family(
        name="ernie4_5_vl_moe",
        model_type="ernie4_5_vl_moe",
        read_spec=ernie4_5_vl_moe.read_spec,
        disk_name=ernie4_5_vl_moe.disk_name,
        expert_parts=ernie4_5_vl_moe.expert_parts,
        vision_shapes=ernie4_5_vl_moe.vision_shapes,
        build_vision=ernie4_5_vl_moe.build_vision,
        vision_state=_same_state,
        finish_vision=ernie_vision.finish,
        residual_writers=ernie4_5_vl_moe.residual_writers,
        joined=ernie4_5_vl_moe.joined,
        published_name=ernie4_5_vl_moe.published_name,
    ),
    "aria": Family(
        name="aria",
        model_type="aria",
        read_spec=aria.read_spec,
        disk_name=aria.disk_name,
        expert_parts=aria.expert_parts,
        vision_shapes=aria.vision_shapes,
        build_vision=aria.build_vision,
        vision_state=_same_state,
        finish_vision=aria_vision.finish,
        residual_writers=aria.residual_writers,
        unused=aria.UNUSED,
    ),
    "internvl": Family(
        name="internvl",
        model_type="internvl",
        read_spec=internvl.read_spec,
        disk_name=internvl.disk_name,
        expert_parts=internvl.expert_parts,
        vision_shapes=internvl.vision_shapes,
        build_vision=internvl.build_vision,
        vision_state=_same_state,
        finish_vision=intern_vision.finish,
        residual_writers=internvl.residual_writers,
    ),
    "kimi_vl": Family(
        name="kimi_vl",
        model_type="kimi_vl",
        read_spec=kimi_vl.read_spec,
        disk_name=kimi_vl.disk_name,
        expert_parts=kimi_vl.expert_parts,
        vision_shapes=kimi_vl.vision_shapes,
        build_vision=kimi_vl.build_vision,
        vision_state=kimi_vl.vision_state,
        finish_vision=kimi_vision.finish,
        residual_writers=kimi_vl.residual_writers,
    ),
    "kimi_k25": Family(
        name="kimi_k25",
        model_type="kimi_k25",
        read_spec=kimi_vl.read_k25_spec,
        disk_name=kimi_vl.k25_disk_name,
        expert_parts=kimi_vl.k25_expert_parts,
        vision_shapes=kimi_vl.k25_vision_shapes,
        build_vision=kimi_vl.build_vision,
        vision_state=_same_state,
        finish_vision=kimi_vision.finish,
        residual_writers=kimi_vl.k25_residual_writers,
    ),
}
"""Families by ``model_type``."""


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of the directory `path`, as plain data; no code of the checkpoint is run.

    Raises:
        CheckpointError: missing, not JSON, or no JSON object.
    """
    file = Path(path) / CONFIG_FILE
    try:
        config = read_json(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {CONFIG_FILE}", "give the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", "download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, no object", "download it again")
    _check_counts(config, file)
    return config


def _check_counts(config: dict[str, Any], file: Path) -> None:
    """Refuse counts that transformers' config classes would make lists of, before they see them."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, file)
        elif name in _COUNTS and type(value) is int and value > MAX_LAYERS:
            raise CheckpointError(f"{file}: {name} = {value}", f"at most {MAX_LAYERS}")
        elif type(value) is int and abs(value) > 2**53:
            raise CheckpointError(f"{file}: {name} = {value}", "no size is that large")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.

    Raises:
        UnsupportedError: its ``model_type`` is missing or not supported.
    """
    model_type = config.get("model_type")
    family = SUPPORTED.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
        raise UnsupportedError(f"model_type {model_type!r} is not supported" + (f": {reason}" if reason else ""),
                               f"supported: {', '.join(sorted(SUPPORTED))}")
    return family
