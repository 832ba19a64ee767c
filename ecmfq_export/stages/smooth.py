"""Stage smooth: a search for scales on every norm that feeds quantized weights, on values, and on each expert's intermediate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors
from ecmfq_export.models.torch_decoder import DecoderLayer, load_layer
from ecmfq_export.progress import Progress
from ecmfq_export.quant import mbq, smoothquant, veq
from ecmfq_export.quant.ecs_objective import expert_importance
from ecmfq_export.quant.hadamard import block_hadamard
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.token_weights import TEXT, VISION, combine, cross_modal_scores, fusion_weight, text_weight
from ecmfq_export.stages import attention_view, mlp_view
from ecmfq_export.stages.calibrate import routed_mass
from ecmfq_export.stages.calibration import Calibration, load_calibration
from ecmfq_export.stages.fold import LayerScales
from ecmfq_export.stages.layer_states import LayerStates, Side, drop_states
from ecmfq_export.stages.methods import SMOOTHINGS, resolve, smoothing_settings
from ecmfq_export.stages.recipes import attention_bits, mlp_bits, mlp_group_size
from ecmfq_export.stages.resources import DEFAULT, Resources
from ecmfq_export.stages.streams import ActivationStore, Batch, add_deepstack, drop_deepstack, prepare_batches

SCALES, SEARCH = "scales.safetensors", "search.json"
MAX_TOKENS = 16384
"""Tokens a layer's searches look at, search and held-out each; more are sampled down."""

@dataclass(frozen=True)
class Taps:
    """What one layer's searches read, T tokens in a random order.

    Attributes:
        attention: float32 [T, K], what each group of attention projections reads, by name.
        moe_input: float32 [T, d].
        types: int64 [T]; phi: float32 [T].
        router_types: int64 [T], whose experts a token chooses from; None where the batches have none.
    """

    attention: dict[str, torch.Tensor]
    moe_input: torch.Tensor
    types: torch.Tensor
    phi: torch.Tensor
    router_types: torch.Tensor | None = None


def smooth(
    model_dir: Path, calibration_dir: Path, out_dir: Path, config: QuantConfig, progress: Progress, resources: Resources = DEFAULT
) -> Path:
    """Search smoothing scales of the floating-point model and write them to `out_dir`.

    Writes ``scales.safetensors`` (``layers.{i}.<name>`` for accepted scales, names as in :class:`LayerScales`),
    ``search.json`` (objectives before and after, gates) and the manifest.

    Raises:
        UserError: a method without smoothing, a damaged checkpoint or calibration directory, NaN on the way, or a full disk.
    """
    if resolve(config).smoothing == "none":
        raise UserError(f"method '{config.method}' with smoothing = '{config.smoothing}' has no scales to search", "leave stage smooth out")
    settings = smoothing_settings(config)
    inputs = {"model": bundle.fingerprint(model_dir), "calibration": bundle.fingerprint(calibration_dir)}
    if bundle.is_current(out_dir, "smooth", settings, inputs):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    calibration = load_calibration(calibration_dir)
    model = open_model(model_dir)
    with bundle.write_stage(out_dir, "smooth", settings, inputs, resume=True) as (work, info):
        found, log = search_model(model, calibration, config, progress, resources, work)
        write_safetensors(work / SCALES, {name: TensorToWrite.of(scale) for name, scale in _Results(found, log).named().items()})
        bundle.write_json(work / SEARCH, log)
        searches = [entry for entry in log.values() if "accepted" in entry]
        info.update(smoothing=settings["smoothing"], searches=len(searches), accepted=sum(bool(entry["accepted"]) for entry in searches))
    progress.note(f"smoothing by '{info['smoothing']}': {info['accepted']} of {info['searches']} searches found a scale that is kept")
    return out_dir


def load_scales(directory: Path) -> dict[int, LayerScales]:
    """Scales by layer of a finished smoothing directory; layers without an entry have none.

    Raises:
        BundleError: it is no smoothing directory, or a file in it was changed.
    """
    bundle.verify(directory, bundle.read_manifest(directory, "smooth"))
    try:
        with safe_open(directory / SCALES, framework="pt") as file:
            return scales_by_layer({key: file.get_tensor(key) for key in file.keys()})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BundleError(f"{directory / SCALES} cannot be read: {error}", "run smooth again") from None


def scales_by_layer(tensors: dict[str, torch.Tensor]) -> dict[int, LayerScales]:
    """Scales named ``layers.{i}.<name>``, by layer."""
    grouped: dict[int, dict[str, torch.Tensor]] = {}
    for key, scale in tensors.items():
        _, index, name = key.split(".")
        grouped.setdefault(int(index), {})[name] = scale
    return {index: LayerScales(**named) for index, named in grouped.items()}


@torch.no_grad()
def search_model(
    model: MoEVLM, calibration: Calibration, config: QuantConfig, progress: Progress, resources: Resources, work: Path
) -> tuple[dict[int, LayerScales], dict[str, dict[str, Any]]]:
    """Search every layer while the floating-point activations stream through; the scales, and a log by search.

    Args:
        work: a directory for activations beyond the memory limit, and for what an interrupted run goes on from.
    """
    found: dict[int, LayerScales] = {}
    log: dict[str, dict[str, Any]] = {}
    results = _Results(found, log)
    searcher = _Searcher(model, calibration, config, resources, work)
    if config.smooth_alpha == 0.0 and searcher.parts.smoothing == "smoothquant":
        losses = torch.zeros(len(smoothquant.ALPHAS), dtype=torch.float64)
        for _, layer, train, heldout in searcher.layers(progress, "choose the model's alpha", None):
            with resources.math():
                for target in searcher.targets(layer, train, heldout):
                    losses += smoothquant.alpha_losses(target.train, target.weight, target.omega, target.bits, tie=target.tie,
                                                       rounding=searcher.parts.smooth_rounding, group_size=target.group_size).cpu()
        searcher.options["alpha"] = smoothquant.ALPHAS[int(losses.argmin())]
    for index, layer, train, heldout in searcher.layers(progress, "search smoothing scales", results):
        with resources.math():
            scales = searcher.search(index, layer, train, heldout, log)
        del layer, train, heldout
        if scales.named():
            found[index] = LayerScales(**{name: scale.cpu() for name, scale in scales.named().items()})
    drop_states(work)
    return found, log


def text_rho(gamma: float, batches: list[Batch], balanced: bool) -> float:
    """rho of text tokens for these samples: gamma itself, or clipped and balanced against the vision tokens' mass."""
    if not balanced:
        return gamma
    counts = [sum(int(((b.types == modality) & b.valid).sum()) for b in batches) for modality in (TEXT, VISION)]
    return text_weight(gamma, *counts)


def _tap(
    layer: DecoderLayer, index: int, batches: list[Batch], store: ActivationStore, config: QuantConfig, salt: int
) -> Taps:
    """Advance one stream through the layer and keep what its searches read."""
    total = sum(int(batch.lengths.sum()) for batch in batches)
    generator = torch.Generator().manual_seed(config.seed * 7919 + 2 * index + salt)
    attention = [group.name for group in attention_view.groups(layer.spec.attention)]
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in (*attention, "moe_input", "types", "phi", "router_types")}
    for batch in batches:
        hidden = store.get(f"hidden/{batch.index}")
        read, probs = attention_view.taps(layer, hidden, batch)
        phi = fusion_weight(cross_modal_scores(probs, batch.types, batch.valid), batch.types, batch.valid, config.fusion_lambda)
        hidden = hidden + layer.linear(read[attention[-1]], "self_attn.o_proj")
        inputs = layer.moe_input(hidden)
        keep = batch.valid & (torch.rand(batch.types.shape, generator=generator, device="cpu") < MAX_TOKENS / total).to(store.device)
        for name, value in {**read, "moe_input": inputs, "types": batch.types, "phi": phi, "router_types": batch.router_types}.items():
            if value is not None:
                rows[name].append(value[keep])
        store.put(f"hidden/{batch.index}", add_deepstack(hidden + layer.mlp(inputs, batch.router_types), index, batch, store))
    joined = {name: torch.cat(values) for name, values in rows.items() if values}
    order = torch.randperm(len(joined["types"]), generator=generator, device="cpu").to(store.device)
    shuffled = {name: value[order] for name, value in joined.items()}
    return Taps({name: shuffled.pop(name) for name in attention}, **shuffled)


@dataclass(frozen=True)
class _Results:
    """What searches have found so far: scales by layer, and a log by search."""

    found: dict[int, LayerScales]
    log: dict[str, dict[str, Any]]

    def named(self) -> dict[str, torch.Tensor]:
        """Scales as they are written to disk, by ``layers.{i}.<name>``."""
        return {f"layers.{i}.{name}": scale for i, scales in self.found.items() for name, scale in scales.named().items()}

    def take(self, log: dict[str, dict[str, Any]] | None, scales: dict[str, torch.Tensor]) -> None:
        """Go on from what an interrupted run had."""
        self.log.update(log or {})
        self.found.update(scales_by_layer(scales))


@dataclass(frozen=True)
class _Target:
    """Everything that one shared scale is searched for."""

    name: str
    train: Pairs
    heldout: Pairs
    weight: torch.Tensor
    omega: torch.Tensor
    bits: int
    group_size: int
    tie: torch.Tensor | None


class _Searcher:
    """One method's search over the layers of a model."""

    def __init__(self, model: MoEVLM, calibration: Calibration, config: QuantConfig, resources: Resources, work: Path) -> None:
        self._model, self._calibration, self._config = model, calibration, config
        self._resources, self._work = resources, work
        self.parts = resolve(config)
        self._method = SMOOTHINGS[self.parts.smoothing]
        self._rho = 1.0
        self.options: dict[str, float] = {}
        if self.parts.smoothing == "ecs":
            self.options["theta"] = config.theta
        elif self.parts.smoothing == "smoothquant":
            self.options["alpha"] = config.smooth_alpha

    def layers(
        self, progress: Progress, description: str, results: _Results | None
    ) -> Iterator[tuple[int, DecoderLayer, Taps, Taps]]:
        """Every layer with what its searches read, search and held-out side.

        `results` are kept behind every layer, and layers that an interrupted run has searched are passed over, their results read back;
        None keeps nothing.

        A method without a gate has no use for samples that its search may not see: it searches on all of them.
        """
        samples, held = self._calibration.samples, self._calibration.heldout
        limit, device = self._resources.activation_bytes // 2, self._resources.device
        with (ActivationStore(limit, self._resources.scratch(self._work, "train"), device) as train_store,
              ActivationStore(limit, self._resources.scratch(self._work, "heldout"), device) as heldout_store):
            chosen = (samples.choose([not (h and self._method.gated) for h in held]), samples.choose(held))
            sides = [(list(prepare_batches(self._model, part, store)), store)
                     for part, store in zip(chosen, (train_store, heldout_store), strict=True)]
            self._rho = text_rho(self._calibration.gamma, sides[0][0], self.parts.balanced)
            layers, start = self._model.spec.num_layers, 0
            names = ("train", "heldout")
            states = LayerStates(self._work, {name: Side(*side, ("hidden",)) for name, side in zip(names, sides, strict=True)})
            if results is not None:
                start, log, scales = states.restore(layers)
                results.take(log, scales)
            if start:
                progress.note(f"continuing after layer {start} of {layers}, which an interrupted run finished")
            for index in progress.track(range(start, layers), description, layers - start):
                layer = load_layer(self._model, index).to(device)
                with self._resources.math():
                    train, heldout = (_tap(layer, index, *side, self._config, salt) for salt, side in enumerate(sides))
                for batches, store in sides:
                    drop_deepstack(index, batches, store)
                yield index, layer, train, heldout
                # Nothing of this layer may be held while the next one is read.
                del layer, train, heldout
                if results is not None:
                    states.save(index + 1, results.log, results.named(), last=index + 1 == layers)

    def search(self, index: int, layer: DecoderLayer, train: Taps, heldout: Taps, log: dict[str, Any]) -> LayerScales:
        """The layer's scales; what was found goes into `log`."""
        scales: dict[str, torch.Tensor] = {}
        rounding = self.parts.smooth_rounding
        for target in self.targets(layer, train, heldout):
            result = self._method.shared(target.train, target.heldout, target.weight, target.omega, target.bits, rounding, target.tie,
                                         group_size=target.group_size, **self.options)
            log[f"layers.{index}.{target.name}"] = result.summary()
            if result.accepted:
                scales[target.name] = result.scale
                if target.tie is not None:
                    # One scale a channel of the producer: any of the columns that read it.
                    scales[target.name] = torch.ones(int(target.tie.max()) + 1).scatter_(0, target.tie, result.scale)
        bits = mlp_bits(layer.spec, self._config)
        if bits is None or self._method.per_expert is None:
            return LayerScales(**scales)
        inner = (self._inner_pairs(layer, side) for side in (train, heldout))
        _, down = mlp_view.stacked_weights(layer)
        # Scales are folded in before the rotation, which then mixes channels that they have made alike.
        rotation = block_hadamard(down.shape[-1]) if self.parts.rotate == "residual_online" else None
        found = self._method.per_expert(*inner, down, bits, rounding, group_size=mlp_group_size(layer.spec, self._config),
                                        rotation=rotation)
        accepted = found.accepted
        if bool(accepted.any()):
            scales["down"] = found.scale
        log[f"layers.{index}.down"] = {
            "experts": len(accepted), "experts_accepted": int(accepted.sum()),
            "heldout_before": float(found.ratio_before[accepted].mean()) if bool(accepted.any()) else None,
            "heldout_after": float(found.ratio_after[accepted].mean()) if bool(accepted.any()) else None,
        }
        return LayerScales(**scales)

    def targets(self, layer: DecoderLayer, train: Taps, heldout: Taps) -> Iterator[_Target]:
        """What shares a scale in this layer, in the order of computation."""
        bits = attention_bits(self._config)
        for group in attention_view.groups(layer.spec.attention) if bits is not None else ():
            if self._method.norms_only and not all("norm" in name for name in group.producers):
                continue
            sides = (self._dense_pairs(layer, side, side.attention[group.name]) for side in (train, heldout))
            yield _Target(group.name, *sides, attention_view.stacked_weight(layer, group), torch.ones(1), bits, -1, group.tie)
        bits = mlp_bits(layer.spec, self._config)
        if bits is not None:
            gate_up, _ = mlp_view.stacked_weights(layer)
            sides = (self._mlp_pairs(layer, side) for side in (train, heldout))
            group_size = mlp_group_size(layer.spec, self._config)
            yield _Target("moe_input", *sides, gate_up, self._importance(layer, train), bits, group_size, None)

    def _dense_pairs(self, layer: DecoderLayer, taps: Taps, x: torch.Tensor) -> Pairs:
        """Pairs of a dense projection: no router, so w has no gate."""
        rows, ones = torch.arange(len(x)), torch.ones(len(x))
        rho = self._modality_weight(layer, taps.types, self._calibration.gamma_by_layer_attention)
        return Pairs(x, rows, torch.zeros_like(rows), combine(self._method.weighting, rho, ones, taps.phi), taps.types)

    def _mlp_pairs(self, layer: DecoderLayer, taps: Taps) -> Pairs:
        """Pairs of the MLP's input, with the method's token weights."""
        routed = mlp_view.route(layer, taps.moe_input, taps.router_types)
        return Pairs(taps.moe_input, routed.token, routed.expert, self._weights(layer, taps, routed), taps.types)

    def _inner_pairs(self, layer: DecoderLayer, taps: Taps) -> Pairs:
        """Pairs of the MLP's intermediate, one row a pair."""
        routed = mlp_view.route(layer, taps.moe_input, taps.router_types)
        inner = mlp_view.intermediate(layer, taps.moe_input, routed)
        return Pairs(inner, torch.arange(len(inner)), routed.expert, self._weights(layer, taps, routed), taps.types[routed.token])

    def _weights(self, layer: DecoderLayer, taps: Taps, routed: mlp_view.Routed) -> torch.Tensor:
        rho = self._modality_weight(layer, taps.types, self._calibration.gamma_by_layer)
        return combine(self._method.weighting, rho[routed.token], routed.gate, taps.phi[routed.token], self._config.gate_power)

    def _modality_weight(self, layer: DecoderLayer, types: torch.Tensor, by_layer: list[float | None]) -> torch.Tensor:
        """rho of each token, float32 [T]; MBQ has one of its own for each layer and block, where gradients were measured."""
        text = self._rho
        if self.parts.smoothing == "mbq":
            known = any(ratio is not None for ratio in by_layer)
            text = mbq.text_weight(by_layer, layer.spec.index) if known else self._calibration.gamma
        return torch.tensor([text, 1.0])[types]

    def _importance(self, layer: DecoderLayer, taps: Taps) -> torch.Tensor:
        routed = mlp_view.route(layer, taps.moe_input, taps.router_types)
        if routed.routing is None or self._method.importance == "equal":
            return torch.ones(mlp_view.num_experts(layer))
        if self._method.importance == "consensus":
            shared = mlp_view.num_experts(layer) - routed.routing.scores.shape[1]
            return expert_importance(routed_mass(routed.routing, layer, taps.types), shared)
        return veq.expert_importance(routed.expert, taps.types[routed.token], mlp_view.num_experts(layer), self._calibration.gamma)
