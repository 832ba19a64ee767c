"""What some image processors need of the model beside their own settings: the size of a patch, and how many queries read an image.

They are in ``runtime.json`` of an exported directory, or in ``config.json`` of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.errors import CheckpointError
from ecmfq_export.json_file import read_json


@dataclass(frozen=True)
class VisionFacts:
    """Fields as models.spec.VisionSpec has them; `queries` is empty where the file names none."""

    patch_size: int
    queries: tuple[tuple[int, int], ...] = ()


def read_vision_facts(directory: Path) -> VisionFacts:
    """The facts of an exported directory or of a checkpoint.

    Raises:
        CheckpointError: there is neither file, or it lacks them.
    """
    for file, section in (("runtime.json", "vision"), ("config.json", "vision_config")):
        path = directory / file
        if not path.is_file():
            continue
        try:
            facts = read_json(path)
            patch = facts[section]["patch_size"]
            sides = set(patch) if isinstance(patch, list) else {patch}
            pairs = facts[section].get("queries", ()) if section == "vision" else (facts.get("projector_patch_to_query_dict") or {}).items()
            queries = tuple((int(patches), int(count)) for patches, count in pairs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: {error!r} is missing or wrong", "copy the file from the model again") from None
        if len(sides) != 1 or type(next(iter(sides))) is not int or next(iter(sides)) < 1:
            raise CheckpointError(f"{path}: {section}.patch_size = {patch!r}", "expected one size")
        return VisionFacts(sides.pop(), queries)
    raise CheckpointError(f"{directory} has neither runtime.json nor config.json", "its images are cut as the model says")
