"""Stage rotate: the same floating-point model in a basis without outlier channels, as a checkpoint of its own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import BundleError, UnsupportedError, UserError
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.quantized_format import QuantizedWriter
from ecmfq_export.models.rotated import NOTE, RotatedModel, write_note
from ecmfq_export.progress import Progress
from ecmfq_export.stages.methods import resolve


@torch.no_grad()
def rotate(model_dir: Path, out_dir: Path, config: QuantConfig, progress: Progress) -> Path:
    """Write the rotated checkpoint of `model_dir` to `out_dir`, one tensor in memory at a time.

    What changes becomes float32, since rotated values no longer fit 16 bits without loss; the rest keeps its type. It is a Hugging
    Face directory of the same family with the same tensor names, whose function is the original's: see
    :mod:`ecmfq_export.models.rotated`. An interrupted run continues after its last finished layer.

    Raises:
        UserError: nothing is to be rotated, the model is quantized or rotated already, a part of it is not supported, a
            damaged tensor, or a full disk.
    """
    parts = resolve(config)
    if parts.rotate == "none":
        raise UserError("nothing to rotate: rotate = 'none'", "set rotate = 'residual' or 'residual_online'")
    settings = {"rotate_values": parts.rotate_values, "seed": config.seed}
    inputs = {"model": bundle.fingerprint(model_dir)}
    if bundle.is_current(out_dir, "rotate", settings, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    model = open_model(model_dir)
    if model.quantization is not None:
        raise UnsupportedError(f"{model_dir} is quantized already", "give the floating-point checkpoint")
    if (model_dir / NOTE).exists():
        raise UnsupportedError(f"{model_dir} is rotated already: it has a {NOTE}", "give the original, or set rotate = 'none'")
    if model.unused:
        progress.note(model.unused_note("left out of the rotated checkpoint, in whose basis they would compute wrongly"))
    rotated = RotatedModel(model, config.seed, parts.rotate_values)
    _require_space(rotated, out_dir)
    with bundle.write_stage(out_dir, "rotate", settings, inputs, resume=True) as (work, info):
        # A writer of checkpoints that is given no quantized weight copies every tensor, here the view's.
        writer = QuantizedWriter(work, rotated)
        layers = range(rotated.spec.num_layers)
        for index in progress.track(layers, "rotate, layer by layer", len(layers)):
            if not writer.has_layer(index):
                writer.write_layer(index, {})
        writer.finish()
        write_note(work, rotated, config.seed, parts.rotate_values)
        info.update(block=rotated.rotation.block, untied=model.spec.tie_word_embeddings)
    return out_dir


def _require_space(model: RotatedModel, out_dir: Path) -> None:
    """Refuse to start what will not fit; what an interrupted run left there counts as written.

    Raises:
        BundleError: with the bytes that are needed and those that are free.
    """
    needed = sum(math.prod(model.shape(name)) * model.stored_dtype(name).itemsize for name in model.names())
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    written = sum(file.stat().st_size for file in bundle.partial_dir(out_dir).glob("*.safetensors"))
    free = shutil.disk_usage(out_dir.parent).free
    if free + written < needed:
        raise BundleError(f"the rotated checkpoint takes {needed / 1e9:.2f} GB, {out_dir.parent} has {free / 1e9:.2f} GB free",
                          "free disk space, choose another --output, or set rotate = 'none'")
