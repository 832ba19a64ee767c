"""The block Hadamard that runs before down projections, as config.json states it: compressed-tensors' ``transform_config``.

A quantized down projection then reads ``x H`` with H :func:`ecmfq_export.quant.hadamard.block_hadamard` of its columns, and its
weight on disk is ``W H`` (H is its own inverse). In the format's terms that is a ``hadamard`` transform with ``head_dim``
as the block, applied at ``input`` while the model runs and already applied at ``weight_input``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.models.module_names import matcher

KEY = "transform_config"
DOWN = ("mlp.experts.down_proj", "mlp.down_proj.weight")
"""Canonical suffixes of what such a transform may stand before."""

_PATTERNS = (r"re:.*\.mlp\.(shared_)?experts\.\d+\.down_proj$", r"re:.*\.mlp\.down_proj$")


def transform_config(blocks: Mapping[str, int]) -> dict[str, Any] | None:
    """``transform_config`` for modules (disk names) with their blocks; None where no block is above 1.

    A pattern stands for its modules where all that it matches have one block; others are named one by one.
    """
    targets: dict[int, list[str]] = {}
    left = {module: block for module, block in blocks.items()}
    for pattern in _PATTERNS:
        matched = {module: left[module] for module in left if matcher([pattern])(module)}
        if len(set(matched.values())) == 1:
            targets.setdefault(next(iter(matched.values())), []).append(pattern)
            left = {module: block for module, block in left.items() if module not in matched}
    for module, block in left.items():
        targets.setdefault(block, []).append(module)
    targets.pop(1, None)
    if not targets:
        return None
    return {"config_groups": {f"down_{block}": _group(block, names) for block, names in sorted(targets.items())}}


def read_transforms(quantization: Mapping[str, Any]) -> Callable[[str], int]:
    """From ``quantization_config`` to a function that gives a module's block, 1 where nothing is transformed.

    Raises:
        UnsupportedError: a transform of another kind or place.
        CheckpointError: groups that are none.
    """
    config = quantization.get(KEY)
    if not config:
        return lambda module: 1
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    if not isinstance(groups, Mapping) or not groups or set(config) != {"config_groups"}:
        raise CheckpointError(f"quantization_config.{KEY} has no config_groups, or more than that")
    found = [_read_group(f"quantization_config.{KEY}.config_groups.{name}", group) for name, group in groups.items()]

    def block(module: str) -> int:
        hits = [size for matches, size in found if matches(module)]
        if len(hits) > 1:
            raise UnsupportedError(f"{len(hits)} transforms stand before '{module}'", "one is supported")
        return hits[0] if hits else 1

    return block


def _group(block: int, targets: list[str]) -> dict[str, Any]:
    places = [{"targets": targets, "location": location, "inverse": location == "weight_input", "ignore": []}
              for location in ("input", "weight_input")]  # fmt: skip
    return {"type": "hadamard", "apply": places, "randomize": False, "requires_grad": False, "head_dim": block}


def _read_group(where: str, group: Any) -> tuple[Callable[[str], bool], int]:
    block = group.get("head_dim") if isinstance(group, Mapping) else None
    places = group.get("apply") if isinstance(group, Mapping) else None
    if type(block) is not int or block < 2 or block & (block - 1):
        raise UnsupportedError(f"{where}.head_dim = {block!r} is not supported", "supported: powers of two from 2")
    if not isinstance(places, list) or not places or not isinstance(places[0], Mapping):
        raise UnsupportedError(f"{where} applies nowhere", "supported: input, with weight_input")
    targets = places[0].get("targets")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UnsupportedError(f"{where}.apply has no targets", "supported: names and re: patterns of down projections")
    wanted = {**_group(block, targets), "precision": None}
    seen = {"precision": None, **group}
    seen["apply"] = [{"ignore": [], "inverse": False, **place} if isinstance(place, Mapping) else place for place in places]
    for key in sorted(set(seen) | set(wanted)):
        if seen.get(key) != wanted.get(key):
            raise UnsupportedError(f"{where}.{key} = {seen.get(key)!r} is not supported", f"supported: {wanted.get(key)!r}")
    return matcher(targets), block
