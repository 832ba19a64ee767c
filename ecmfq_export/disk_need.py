"""How much disk a run takes, computed from the model's shapes and checked before anything is written.

What stages leave behind is known to a per cent. Activations between layers depend on the prompts' lengths, which are estimated from a
few of them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.quant.qtensor import GROUP
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.stages.methods import resolve
from ecmfq_export.stages.recipes import attention_bits, mlp_bits
from ecmfq_export.stages.samples import load_pool
from ecmfq_export.stages.sensitivity import NUM_SAMPLES
from ecmfq_export.target import Target

_PROBED = 8
"""Samples of a pool that are processed to learn how long they are."""

_PADDING = 1.1
_SMALL = 64 << 20
"""Graph files, plugin library, logs, report and tokenizer files of a bundle, generously."""


@dataclass(frozen=True)
class StageNeed:
    """What one stage takes.

    Attributes:
        name: of the stage; directory: where its result lies.
        result: bytes that stay.
        scratch: bytes that are gone when it ends.
    """

    name: str
    directory: Path
    result: int
    scratch: int = 0


@dataclass(frozen=True)
class Prompts:
    """A calibration pool's size.

    Attributes:
        count: samples.
        tokens: of one, mean of a few; patch_bytes: of its image patches.
    """

    count: int
    tokens: float
    patch_bytes: float


def probe_pool(model_dir: Path, data: Path) -> Prompts:
    """Process a few samples of a pool, evenly spread over it.

    Raises:
        UserError: data or a processor that cannot be used.
    """
    pool, processor = load_pool(data), Processor(model_dir)
    step = max(1, len(pool) // _PROBED)
    samples = [sample.process(processor) for sample in pool[::step][:_PROBED]]
    patches = [0 if sample.pixel_values is None else sample.pixel_values.nbytes for sample in samples]
    return Prompts(len(pool), sum(s.length for s in samples) / len(samples), sum(patches) / len(samples))


def quantize_needs(model: MoEVLM, config: QuantConfig, prompts: Prompts | None, out_dir: Path, activation_bytes: int) -> list[StageNeed]:
    """Stages from a floating-point checkpoint to the quantized one in `out_dir`, in order.

    Args:
        prompts: None where the method reads none.
        activation_bytes: activations that stay in memory.
    """
    parts, spec = resolve(config), model.spec
    rotated = parts.rotate != "none"
    needs: list[StageNeed] = []
    if rotated:
        whole = sum(4 * math.prod(model.shape(name)) for name in model.names())
        needs.append(StageNeed("rotate", out_dir.with_name("rotated"), whole))
    states = scratch = 0
    if prompts is not None:
        chosen = min(config.num_samples, prompts.count)
        hidden = 4 * spec.hidden_size
        inputs = hidden * spec.num_deepstack + 8 * spec.rope.head_dim
        context = 4 * max(layer.attention.num_heads * layer.attention.value_head_dim for layer in spec.layers)

        def spilled(tokens: float, bytes_each: float) -> int:
            return max(0, int(_PADDING * tokens * bytes_each) - activation_bytes)

        def kept(tokens: float, streams: int) -> int:
            """The state that the next layer starts from, twice while one takes the other's place."""
            return int(2 * streams * hidden * _PADDING * tokens)

        tokens = prompts.count * prompts.tokens
        pool = 0 if parts.selection == "random" else spilled(tokens, hidden + inputs) + kept(tokens, 1)
        gradients = spilled(NUM_SAMPLES * prompts.tokens, hidden * (spec.num_layers + 2) + inputs) if parts.gamma == 0.0 else 0
        needs.append(StageNeed("calibrate", out_dir.with_name("calibration"),
                               int(chosen * (prompts.patch_bytes + 16 * prompts.tokens)), max(pool, gradients)))
        if parts.smoothing != "none":
            down = sum(4 * math.prod(model.shape(name)[::2]) for name in model.names() if name.endswith("experts.down_proj"))
            tokens = chosen * prompts.tokens
            needs.append(StageNeed("smooth", out_dir.with_name("smoothing"), down, spilled(tokens, hidden + inputs) + kept(tokens, 1)))
        kinds = len(parts.weightings)
        # Both models' residual streams before and behind the layer, between attention and MLP, and what each candidate leaves.
        scratch = spilled(chosen * prompts.tokens, hidden * (5 + 2 * kinds) + 2 * context + inputs)
        states = kept(chosen * prompts.tokens, 2)
    quantized = sum(stored_bytes(model, name, config, rotated) for name in model.names())
    # What is not run is copied, but for a rotated model.
    quantized += 0 if rotated else sum(model.checkpoint.entry(name).num_bytes for name in model.unused)
    needs.append(StageNeed("quantize", out_dir, quantized, scratch + states))
    return needs


def import_needs(model: MoEVLM, config: QuantConfig, out_dir: Path) -> list[StageNeed]:
    """The stage that carries another quantizer's checkpoint over into `out_dir`."""
    return [StageNeed("import", out_dir, sum(stored_bytes(model, name, config, False) for name in model.names()))]


def export_needs(model: MoEVLM, config: QuantConfig, target: Target | None, root: Path, build: bool,
                 expert_weights: str = "engine") -> list[StageNeed]:
    """Graphs and engines of a bundle at `root`; `config` tells what is quantized where the model is not yet.

    Args:
        target: None for graphs for ONNX Runtime alone.
        expert_weights: where engines have them; as ``inputs`` they lie in the graphs' files alone.
    """
    experts = other = vision = 0
    width = 2 if target is not None and target.dtype == "float16" else 4
    for name in model.names():
        bits = _bits(model, name, config)
        size = width * math.prod(model.shape(name)) if bits is None else _integer_bytes(model.shape(name), bits, config.group_size)
        if name.startswith("vision."):
            vision += size
        elif name == "embed_tokens.weight" and not model.spec.tie_word_embeddings:
            continue
        elif bits == 4 and len(model.shape(name)) == 3:
            experts += size
        else:
            other += size
    embeddings = width * math.prod(model.shape("embed_tokens.weight"))
    layouts = 1 if target is None or target.kernel.weight_layout == "row_major" else 2
    needs = [StageNeed("export graphs", root / "onnx", layouts * experts + other + vision + embeddings + _SMALL)]
    if build and target is not None:
        inside = experts if expert_weights == "engine" else 0
        needs.append(StageNeed("build engines", root / "engines" / target.name, inside + other + vision + _SMALL))
    return [*needs, StageNeed("validate", root / "report", _SMALL)]


def stored_bytes(model: MoEVLM, name: str, config: QuantConfig, rotated: bool) -> int:
    """Bytes of a tensor in the quantized checkpoint."""
    shape, bits = model.shape(name), _bits(model, name, config)
    if bits is None:
        # Rotated tensors are float32, and so are norms and routers that a fold leaves with more digits than 16 bits hold.
        narrow = not rotated and not name.endswith(("norm.weight", "router.weight"))
        return math.prod(shape) * (model.stored_dtype(name).itemsize if narrow else 4)
    return _integer_bytes(shape, bits, config.group_size)


def check_space(needs: Sequence[StageNeed], root: Path) -> None:
    """Refuse to start what will not fit: what finished stages and an interrupted one have written counts as written.

    Raises:
        UserError: bytes that are needed at the fullest moment, stage by stage, and those that are free.
    """
    kept = peak = 0
    fullest, lines = "", []
    for need in needs:
        finished = (need.directory / bundle.MANIFEST).is_file()
        written = _written(bundle.partial_dir(need.directory))
        result = 0 if finished else max(0, need.result - written)
        scratch = 0 if finished else need.scratch
        lines.append(f"{need.name} {_gb(result)}" + (f" and {_gb(scratch)} while it runs" if scratch > 1e7 else ""))
        if kept + result + scratch > peak:
            peak, fullest = kept + result + scratch, need.name
        kept += result
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if peak > free:
        raise UserError(f"{root} needs about {_gb(peak)} of disk at its fullest, in stage '{fullest}', and {_gb(free)} are free: "
                        + ", ".join(lines),
                        "free disk space, choose an --output on a larger disk, or use fewer calibration samples (--set num_samples=N)")


def _bits(model: MoEVLM, name: str, config: QuantConfig) -> int | None:
    """Weight bits of a tensor once it is quantized."""
    recipe = model.recipe(name)
    if model.quantization is not None:
        return {"float": None, "w8a8": 8, "w4a8": 4}[recipe]
    if name == "lm_head.weight":
        return 8 if config.lm_head == "w8a8" else None
    _, _, suffix = name.removeprefix("layers.").partition(".")
    if not name.startswith("layers."):
        return None
    layer = model.spec.layers[int(name.split(".")[1])]
    if suffix.startswith("self_attn.") and suffix.endswith("_proj.weight"):
        return attention_bits(config)
    if suffix.startswith("mlp.") and "_proj" in suffix:
        expert = suffix.startswith("mlp.experts.")
        return mlp_bits(layer, config) if expert == isinstance(layer.mlp, MoESpec) else None
    return None


def _integer_bytes(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    count = math.prod(shape)
    grouped = bits == 4 and len(shape) == 3 and group_size != -1
    # A float16 scale a channel, or a float32 one a group; and the two numbers of each int4 matrix's shape.
    scales = 4 * count // GROUP if grouped else 2 * count // shape[-1]
    return count * bits // 8 + scales + (48 * shape[0] if len(shape) == 3 else 16)


def _written(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors")) if directory.is_dir() else 0


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
