"""Stage smooth: ECS on every norm that feeds quantized weights, on values, and on each expert's intermediate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import BundleError
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors
from ecmfq_export.models.torch_decoder import DecoderLayer, load_layer
from ecmfq_export.progress import Progress
from ecmfq_export.quant.ecs import EcsResult, search_per_expert, search_scale
from ecmfq_export.quant.ecs_objective import Pairs, expert_importance
from ecmfq_export.quant.token_weights import TEXT, VISION, cross_modal_scores, fusion_weight, text_weight
from ecmfq_export.stages import attention_view, mlp_view
from ecmfq_export.stages.calibrate import routed_mass
from ecmfq_export.stages.calibration import Calibration, load_calibration
from ecmfq_export.stages.fold import LayerScales
from ecmfq_export.stages.recipes import attention_bits, mlp_bits
from ecmfq_export.stages.streams import ActivationStore, Batch, add_deepstack, prepare_batches

SCALES, SEARCH = "scales.safetensors", "search.json"
MAX_TOKENS = 16384
"""Tokens a layer's searches look at, search and held-out each; more are sampled down."""

CONFIG_KEYS = ("attention", "smooth_rounding", "fusion_lambda", "rotate", "seed")


@dataclass(frozen=True)
class Taps:
    """What one layer's searches read, T tokens in a random order.

    Attributes:
        attention: float32 [T, K], what each group of attention projections reads, by name.
        moe_input: float32 [T, d].
        types: int64 [T]; phi: float32 [T].
    """

    attention: dict[str, torch.Tensor]
    moe_input: torch.Tensor
    types: torch.Tensor
    phi: torch.Tensor


def smooth(model_dir: Path, calibration_dir: Path, out_dir: Path, config: QuantConfig, progress: Progress) -> Path:
    """Search smoothing scales of the floating-point model and write them to `out_dir`.

    Writes ``scales.safetensors`` (``layers.{i}.<name>`` for accepted scales, names as in :class:`LayerScales`),
    ``search.json`` (objectives before and after, gates) and the manifest.

    Raises:
        UserError: a damaged checkpoint or calibration directory, NaN on the way, or a full disk.
    """
    settings = {key: dataclasses.asdict(config)[key] for key in CONFIG_KEYS}
    inputs = {"model": bundle.fingerprint(model_dir), "calibration": bundle.fingerprint(calibration_dir)}
    if bundle.is_current(out_dir, "smooth", settings, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    calibration = load_calibration(calibration_dir)
    model = open_model(model_dir)
    with bundle.write_stage(out_dir, "smooth", settings, inputs) as (work, info):
        found, log = search_model(model, calibration, config, progress)
        tensors = {f"layers.{i}.{name}": TensorToWrite.of(scale)
                   for i, scales in found.items() for name, scale in scales.named().items()}
        write_safetensors(work / SCALES, tensors)
        bundle.write_json(work / SEARCH, log)
        searches = [entry for entry in log.values() if "accepted" in entry]
        info.update(searches=len(searches), accepted=sum(bool(entry["accepted"]) for entry in searches))
    progress.note(f"smoothing: {info['accepted']} of {info['searches']} searches passed their held-out gate")
    return out_dir


def load_scales(directory: Path) -> dict[int, LayerScales]:
    """Scales by layer of a finished smoothing directory; layers without an entry have none.

    Raises:
        BundleError: it is no smoothing directory, or a file in it was changed.
    """
    bundle.verify(directory, bundle.read_manifest(directory, "smooth"))
    grouped: dict[int, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(directory / SCALES, framework="pt") as file:
            for key in file.keys():
                _, index, name = key.split(".")
                grouped.setdefault(int(index), {})[name] = file.get_tensor(key)
        return {index: LayerScales(**named) for index, named in grouped.items()}
    except (ValueError, TypeError) as error:
        raise BundleError(f"{directory / SCALES} cannot be read: {error}", "run smooth again") from None


@torch.no_grad()
def search_model(
    model: MoEVLM, calibration: Calibration, config: QuantConfig, progress: Progress
) -> tuple[dict[int, LayerScales], dict[str, dict[str, Any]]]:
    """Search every layer while the floating-point activations stream through; the scales, and a log by search."""
    found: dict[int, LayerScales] = {}
    log: dict[str, dict[str, Any]] = {}
    with ActivationStore() as train_store, ActivationStore() as heldout_store:
        sides = []
        for store, held in ((train_store, False), (heldout_store, True)):
            chosen = [s for s, h in zip(calibration.samples, calibration.heldout, strict=True) if h == held]
            sides.append((list(prepare_batches(model, chosen, store)), store))
        rho = torch.tensor([balanced_rho(calibration.gamma, sides[0][0]), 1.0])
        for index in progress.track(range(model.spec.num_layers), "search smoothing scales", model.spec.num_layers):
            layer = load_layer(model, index)
            train, heldout = (_tap(layer, index, batches, store, config, salt) for salt, (batches, store) in enumerate(sides))
            scales = _search_layer(layer, index, train, heldout, rho, config, log)
            if scales.named():
                found[index] = scales
    return found, log


def balanced_rho(gamma: float, batches: list[Batch]) -> float:
    """rho of text tokens for these samples."""
    counts = [sum(int(((b.types == modality) & b.valid).sum()) for b in batches) for modality in (TEXT, VISION)]
    return text_weight(gamma, *counts)


def _tap(
    layer: DecoderLayer, index: int, batches: list[Batch], store: ActivationStore, config: QuantConfig, salt: int
) -> Taps:
    """Advance one stream through the layer and keep what its searches read."""
    total = sum(int(batch.lengths.sum()) for batch in batches)
    generator = torch.Generator().manual_seed(config.seed * 7919 + 2 * index + salt)
    attention = [group.name for group in attention_view.groups(layer.spec.attention)]
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in (*attention, "moe_input", "types", "phi")}
    for batch in batches:
        hidden = store.get(f"hidden/{batch.index}")
        read, probs = attention_view.taps(layer, hidden, batch)
        phi = fusion_weight(cross_modal_scores(probs, batch.types, batch.valid), batch.types, batch.valid, config.fusion_lambda)
        hidden = hidden + layer.linear(read[attention[-1]], "self_attn.o_proj")
        inputs = layer.moe_input(hidden)
        keep = batch.valid & (torch.rand(batch.types.shape, generator=generator) < MAX_TOKENS / total)
        for name, value in {**read, "moe_input": inputs, "types": batch.types, "phi": phi}.items():
            rows[name].append(value[keep])
        store.put(f"hidden/{batch.index}", add_deepstack(hidden + layer.mlp(inputs), index, batch, store))
    joined = {name: torch.cat(values) for name, values in rows.items()}
    order = torch.randperm(len(joined["types"]), generator=generator)
    shuffled = {name: value[order] for name, value in joined.items()}
    return Taps({name: shuffled.pop(name) for name in attention}, **shuffled)


def _search_layer(
    layer: DecoderLayer, index: int, train: Taps, heldout: Taps, rho: torch.Tensor, config: QuantConfig, log: dict[str, Any]
) -> LayerScales:
    rounding = config.smooth_rounding
    one = torch.ones(1)
    scales: dict[str, torch.Tensor] = {}

    def keep(name: str, result: EcsResult) -> None:
        log[f"layers.{index}.{name}"] = result.summary()
        if result.accepted:
            scales[name] = result.scale

    bits = attention_bits(config)
    for group in attention_view.groups(layer.spec.attention) if bits is not None else ():
        sides = (_dense_pairs(side, side.attention[group.name], rho) for side in (train, heldout))
        keep(group.name, search_scale(*sides, attention_view.stacked_weight(layer, group), one, bits, rounding, group.tie))
        if group.tie is not None and group.name in scales:
            # One scale a channel of the producer: any of the columns that read it.
            scales[group.name] = torch.ones(int(group.tie.max()) + 1).scatter_(0, group.tie, scales[group.name])
    bits = mlp_bits(layer.spec, config)
    if bits is None:
        return LayerScales(**scales)
    gate_up, down = mlp_view.stacked_weights(layer)
    pairs, inner = zip(*(_mlp_pairs(layer, side, rho) for side in (train, heldout)), strict=True)
    omega = _importance(layer, train)
    keep("moe_input", search_scale(*pairs, gate_up, omega, bits, rounding))
    if config.rotate == "residual_online":
        # The rotation mixes the intermediate's channels: scales that are judged one channel at a time have no meaning behind it.
        return LayerScales(**scales)
    result = search_per_expert(*inner, down, bits, rounding)
    if bool(result.accepted.any()):
        scales["down"] = result.scale
    accepted = result.accepted
    log[f"layers.{index}.down"] = {
        "experts": len(accepted), "experts_accepted": int(accepted.sum()),
        "heldout_before": float(result.ratio_before[accepted].mean()) if bool(accepted.any()) else None,
        "heldout_after": float(result.ratio_after[accepted].mean()) if bool(accepted.any()) else None,
    }
    return LayerScales(**scales)


def _dense_pairs(taps: Taps, x: torch.Tensor, rho: torch.Tensor) -> Pairs:
    rows = torch.arange(len(x))
    return Pairs(x, rows, torch.zeros_like(rows), rho[taps.types] * taps.phi, taps.types)


def _mlp_pairs(layer: DecoderLayer, taps: Taps, rho: torch.Tensor) -> tuple[Pairs, Pairs]:
    """Pairs of the MLP's input and of its intermediate, with w = rho * g * phi."""
    routed = mlp_view.route(layer, taps.moe_input)
    weight = (rho[taps.types] * taps.phi)[routed.token] * routed.gate
    rows = torch.arange(len(routed.token))
    inner = Pairs(mlp_view.intermediate(layer, taps.moe_input, routed), rows, routed.expert, weight, taps.types[routed.token])
    return Pairs(taps.moe_input, routed.token, routed.expert, weight, taps.types), inner


def _importance(layer: DecoderLayer, taps: Taps) -> torch.Tensor:
    routed = mlp_view.route(layer, taps.moe_input)
    if routed.routing is None:
        return torch.ones(1)
    shared = mlp_view.num_experts(layer) - routed.routing.scores.shape[1]
    return expert_importance(routed_mass(routed.routing, layer, taps.types), shared)
