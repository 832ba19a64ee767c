"""Users' data files: COCO caption annotations, and image paths that stay inside the data's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ecmfq_export.errors import UserError

_COCO_FORM = 'give a captions file of COCO\'s form: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'


@dataclass(frozen=True)
class CocoImage:
    """An image with all its captions (COCO has five an image), in the file's order.

    Attributes:
        name: file and image id, e.g. ``"captions_val2017.json:139"``.
    """

    name: str
    image: Path
    captions: tuple[str, ...]


def read_coco(path: Path, forms: str = _COCO_FORM) -> list[CocoImage]:
    """The images of a COCO caption file that have captions, in file order; images are checked to exist, not decoded.

    Args:
        forms: what to give instead, for the errors.

    Raises:
        UserError: not such a file, an annotation without a caption, or an image that is missing or lies outside the folder.
    """
    data = read_json(path, forms)
    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(f"{path} has no 'images' and 'annotations' lists", forms)
    captions: dict[Any, list[str]] = {}
    for row in annotations:
        if not isinstance(row, Mapping) or not isinstance(row.get("caption"), str) or isinstance(row.get("image_id"), list | dict):
            raise UserError(f"{path}: an annotation has no caption: {str(row)[:80]}",
                            "give the captions file, not instances or keypoints")
        captions.setdefault(row.get("image_id"), []).append(row["caption"].strip())
    rows = [row for row in images if isinstance(row, Mapping) and not isinstance(row.get("id"), list | dict)
            and row.get("id") in captions]  # fmt: skip
    if not rows:
        raise UserError(f"{path}: none of its {len(images)} images has a caption", forms)
    root = _coco_root(path, rows)
    out = []
    for row in rows:
        name = f"{path.name}:{row['id']}"
        out.append(CocoImage(name, image_path(str(row.get("file_name")), name, root), tuple(captions[row["id"]])))
    return out


def _coco_root(path: Path, rows: list[Any]) -> Path:
    """The images' folder: ``images`` beside the file, the file's own, or COCO's layout (annotations/captions_X.json, X/)."""
    first = str(rows[0].get("file_name"))
    split = path.stem.removeprefix("captions_")
    candidates = [path.parent / "images", path.parent, path.parent / split, path.parent.parent / split]
    for root in candidates:
        if (root / first).is_file():
            return root
    raise UserError(f"{path}: image '{first}' is in none of {', '.join(map(str, candidates))}", "put the images into one of them")


def image_path(name: str, where: str, root: Path) -> Path:
    """An absolute path as it is, a relative one inside `root`.

    Args:
        where: what names the image, for the errors.

    Raises:
        UserError: no such file, or a relative path that leaves `root`.
    """
    pure = PurePosixPath(name)
    if "\0" in name or (not pure.is_absolute() and ".." in pure.parts):
        raise UserError(f"{where}: image path '{name}' leaves {root}", "use a path inside the data's folder, or an absolute one")
    path = Path(name) if pure.is_absolute() else root / name
    if not path.is_file():
        raise UserError(f"{where}: no image at {path}", "paths are relative to the samples' file")
    if not pure.is_absolute() and not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: image path '{name}' leaves {root} through a link", "copy the image into the folder")
    return path


def read_json(path: Path, forms: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        UserError: it cannot be read or is something else; `forms` says what to give.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}", forms) from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not an object", forms)
    return data
