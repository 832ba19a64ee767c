"""Stage calibrate: choose which samples of the pool to calibrate on, with MACS or another method's rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UnsupportedError
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer, Routing, load_head, load_layer
from ecmfq_export.models.torch_math import chosen
from ecmfq_export.progress import Progress
from ecmfq_export.quant import macs
from ecmfq_export.quant.token_weights import TEXT, VISION, vision_attention_mass
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.stages.calibration import LazySamples, save_calibration, split_heldout
from ecmfq_export.stages.layer_states import LayerStates, Side, drop_states
from ecmfq_export.stages.methods import calibration_settings, resolve
from ecmfq_export.stages.ranks import Ranks
from ecmfq_export.stages.resources import DEFAULT, Resources
from ecmfq_export.stages.samples import PoolSample, load_pool, pool_fingerprint
from ecmfq_export.stages.sensitivity import measure_gamma
from ecmfq_export.stages.streams import ActivationStore, Batch, add_deepstack, drop_deepstack, prepare_batches

FEATURES = 256
CHANNEL_QUANTILES = (0.5, 0.9, 1.0)


def calibrate(
    model_dir: Path, data: Path, out_dir: Path, config: QuantConfig, progress: Progress, resources: Resources = DEFAULT
) -> Path:
    """Select samples and write them to `out_dir`; every rule but a random draw runs the floating-point model over the pool once.

    Writes ``samples.safetensors`` (processed samples), ``selection.json`` (names, held-out split, figures) and the manifest.

    Args:
        model_dir: floating-point checkpoint.
        data: pool, see :func:`ecmfq_export.stages.samples.load_pool`.

    Returns:
        `out_dir`.

    Raises:
        UserError: unusable data or checkpoint, NaN on the way, or a full disk.
    """
    pool, ranks = load_pool(data), resources.ranks
    settings, parts = calibration_settings(config), resolve(config)
    inputs = ranks.from_first(lambda: {"model": bundle.fingerprint(model_dir), "data": pool_fingerprint(data, pool)})
    if ranks.from_first(lambda: bundle.is_current(out_dir, "calibrate", settings, inputs)):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    model = open_model(model_dir)
    if model.quantization is not None:
        raise UnsupportedError(f"{model_dir} is quantized already", "calibrate on the floating-point checkpoint")
    if not model.spec.moe_layers:
        raise UnsupportedError(f"{model.path} has no mixture-of-experts layer", "this tool quantizes routed experts")
    processor = Processor(model_dir)
    with ranks.write_stage(out_dir, "calibrate", settings, inputs) as (work, info):
        if parts.selection == "random":
            indices = macs.random_indices(len(pool), config.num_samples, config.seed)
            selection = macs.Selection(indices, 0, {})
        else:
            ids: list[np.ndarray] = []
            with ActivationStore(resources.activation_bytes, resources.scratch(work, "pool"), resources.device) as store:
                batches = list(prepare_batches(model, _read(pool, processor, ids, progress), store, ranks=ranks))
                wanted = ids if parts.selection == "balanced" else None
                scores = score_pool(model, batches, len(pool), store, config.seed, progress, wanted, resources, work)
            top_k = max((spec.mlp.top_k for spec in model.spec.layers if isinstance(spec.mlp, MoESpec)), default=1)
            selection = macs.select(scores, config.num_samples, top_k, config.seed, parts.selection)
        chosen = [pool[i] for i in selection.indices]
        samples = LazySamples(lambda number: pool[number].process(processor), selection.indices)
        heldout = split_heldout([str(sample.image) if sample.image else sample.name for sample in chosen],
                                config.holdout_fraction, config.seed)
        gamma, measured = parts.gamma, {}
        if gamma == 0.0:
            searched = samples.choose([not held for held in heldout])
            gamma, measured = measure_gamma(model, searched, progress, resources, resources.scratch(work, "gradients"))
        report = {**selection.report, "pool": len(pool), "selected": len(chosen), "topped_up": selection.topped_up,
                  "heldout": sum(heldout), **measured}
        if ranks.first:
            drop_states(work)
            save_calibration(work, samples, [sample.name for sample in chosen], heldout, gamma, report)
        info.update(report, gamma=gamma)
    note = f"selected {len(chosen)} of {len(pool)} samples by '{parts.selection}', {sum(heldout)} held out"
    if selection.report:
        note += (f"; {selection.topped_up} for experts with few tokens; expert usage deviates by {report['selected_usage_std']:.3f} "
                 f"against {report['random_usage_std']:.3f} at random")
    progress.note(note)
    return out_dir


def _read(pool: list[PoolSample], processor: Processor, ids: list[np.ndarray], progress: Progress) -> Iterator[ProcessedSample]:
    """Process the pool's samples one after the other, noting their token ids in `ids`."""
    for sample in progress.track(pool, "read calibration pool", len(pool)):
        processed = sample.process(processor)
        ids.append(processed.input_ids)
        yield processed


@dataclass
class _Tally:
    """Sums over samples while layers go by, see :class:`macs.PoolScores`."""

    mass: torch.Tensor
    tokens: torch.Tensor
    attention: torch.Tensor
    features: torch.Tensor

    def keep(self, samples: list[int]) -> None:
        """Make every other sample's row zero: another rank has it."""
        others = torch.ones(len(self.tokens), dtype=torch.bool)
        others[samples] = False
        for rows in vars(self).values():
            rows[others] = 0

    def whole(self, ranks: Ranks) -> _Tally:
        """All ranks' rows."""
        return self if ranks.size == 1 else _Tally(**{name: ranks.add_disjoint(rows) for name, rows in vars(self).items()})


@torch.no_grad()
def score_pool(
    model: MoEVLM, batches: list[Batch], size: int, store: ActivationStore, seed: int, progress: Progress,
    ids: list[np.ndarray] | None = None, resources: Resources = DEFAULT, work: Path | None = None,
) -> macs.PoolScores:
    """Measure every sample of the pool while its activations stream through the decoder.

    A sample's figures depend on its batch alone, and batches go through a layer one after the other.

    Args:
        batches: prepared, their embeddings in `store` under ``hidden``; consumed.
        size: number of samples in all batches.
        ids: the samples' token ids, to measure also how likely the model finds their text; None for not.
        work: where what an interrupted run goes on from is kept; None keeps nothing.
    """
    moe = model.spec.moe_layers
    num_experts = {model.spec.layers[i].mlp.num_experts for i in moe}
    if len(num_experts) > 1:
        raise UnsupportedError(f"layers with different numbers of experts ({sorted(num_experts)}) are not supported")
    experts = num_experts.pop()
    tally = _Tally(torch.zeros(size, len(moe), experts, 2), torch.zeros(size, len(moe), experts, dtype=torch.int64),
                   torch.zeros(size), torch.zeros(size, FEATURES))
    layers, start, ranks = model.spec.num_layers, 0, resources.ranks
    states = None if work is None else LayerStates(work, {"pool": Side(batches, store, ("hidden",))}, ranks, shared=True)
    if states is not None:
        start, _, sums = states.restore(layers)
        if start:
            tally = _Tally(**sums)
            tally.keep([sample for batch in batches for sample in batch.samples])
            progress.note(f"continuing after layer {start} of {layers}, which an interrupted run finished")
    for index in progress.track(range(start, layers), "score pool, layer by layer", layers - start):
        layer = load_layer(model, index).to(resources.device)
        place = moe.index(index) if index in moe else None
        projection = _projection(model.spec.hidden_size, seed, index) if place is not None else None
        with resources.math():
            for batch in batches:
                _score_batch(model, layer, place, projection, batch, store, tally)
        drop_deepstack(index, batches, store)
        del layer  # before the next one is read
        if states is not None:
            # The last layer's outputs are what the likelihood of the text is read from.
            states.save(index + 1, None, vars(tally.whole(ranks)), last=ids is None and index + 1 == layers)
    tally = tally.whole(ranks)
    likelihood = (None, None) if ids is None else [ranks.add_disjoint(part) for part in _text_loss(model, batches, ids, store)]
    return macs.PoolScores(tally.mass, tally.tokens, tally.attention, tally.features, *likelihood)


def _score_batch(
    model: MoEVLM, layer: DecoderLayer, place: int | None, projection: torch.Tensor | None, batch: Batch, store: ActivationStore,
    tally: _Tally,
) -> None:
    """Move one batch through a layer; `place` is the layer's among those with experts."""
    hidden = store.get(f"hidden/{batch.index}")
    context, probs = layer.attention_context(layer.attention_input(hidden), batch.cos, batch.sin, batch.mask)
    hidden = hidden + layer.linear(context, "self_attn.o_proj")
    x = layer.moe_input(hidden)
    tally.attention[batch.samples] += vision_attention_mass(probs, batch.types, batch.valid).cpu() / model.spec.num_layers
    if place is None or projection is None:
        out = hidden + layer.mlp(x, batch.router_types)
    else:
        tokens = x.flatten(0, 1)
        routing = layer.route(tokens, None if batch.router_types is None else batch.router_types.flatten())
        _tally_routing(tally, place, layer, routing, batch)
        tally.features[batch.samples] += _channel_features(x, batch).cpu() @ projection / len(model.spec.moe_layers) ** 0.5
        out = hidden + layer.experts(tokens, routing).view_as(x)
    store.put(f"hidden/{batch.index}", add_deepstack(out, layer.spec.index, batch, store))


def _text_loss(
    model: MoEVLM, batches: list[Batch], ids: list[np.ndarray], store: ActivationStore
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of each sample's negative log likelihoods of text tokens [N], and how many they are [N]; `store` has the last outputs."""
    head = load_head(model)
    loss, predicted = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.int64)
    for batch in batches:
        hidden, types = store.get(f"hidden/{batch.index}").cpu(), batch.types.cpu()
        for row, number in enumerate(batch.samples):
            said = torch.from_numpy(ids[number])
            text = types[row, 1 : len(said)] == TEXT
            scores = head(hidden[row : row + 1, : len(said) - 1])[0][text].log_softmax(-1)
            loss[number] = -float(scores.gather(-1, said[1:][text].unsqueeze(-1)).double().sum())
            predicted[number] = int(text.sum())
    return loss, predicted


def _tally_routing(tally: _Tally, place: int, layer: DecoderLayer, routing: Routing, batch: Batch) -> None:
    size, length = batch.types.shape
    valid = batch.valid.flatten()
    mass = potential_mass(routing, layer)
    for modality in (0, 1):
        inside = ((batch.types.flatten() == modality) & valid).unsqueeze(1)
        tally.mass[batch.samples, place, :, modality] = (mass * inside).view(size, length, -1).sum(1).cpu()
    # Shared experts take every token: they say nothing of a sample.
    routed = chosen(routing.topk_ids[:, : _moe(layer).top_k], mass.shape[1]) & valid.unsqueeze(1)
    tally.tokens[batch.samples, place] = routed.view(size, length, -1).sum(1).long().cpu()


def potential_mass(routing: Routing, layer: DecoderLayer) -> torch.Tensor:
    """Router scores of the 2k best routed experts of each token, others 0: float32 [T, E] ("potentially activated" experts)."""
    mlp = _moe(layer)
    best = routing.scores.topk(min(2 * mlp.top_k, mlp.num_experts), dim=-1)
    values = best.values
    if mlp.type_parts:  # a token with empty slots has fewer candidates
        taken = (routing.topk_ids[:, : mlp.top_k] >= 0).sum(-1, keepdim=True)
        values = values * (torch.arange(values.shape[-1]) < 2 * taken)
    return torch.zeros_like(routing.scores).scatter_(1, best.indices, values)


def routed_mass(routing: Routing, layer: DecoderLayer, types: torch.Tensor) -> torch.Tensor:
    """Score mass a routed expert gets from text and from vision tokens, float32 [E, 2]; `types` is [T]."""
    mass = potential_mass(routing, layer)
    vision = (types == VISION).float().unsqueeze(1)
    return torch.stack(((mass * (1 - vision)).sum(0), (mass * vision).sum(0)), -1)


def _moe(layer: DecoderLayer) -> MoESpec:
    assert isinstance(layer.spec.mlp, MoESpec)
    return layer.spec.mlp


def _channel_features(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log quantiles over tokens of each channel's magnitude, [B, 3 * hidden]."""
    values = torch.where(batch.valid.unsqueeze(-1), x.abs(), torch.full_like(x, float("nan")))
    quantiles = torch.nanquantile(values, torch.tensor(CHANNEL_QUANTILES), dim=1)
    return torch.log(quantiles + 1e-6).permute(1, 0, 2).flatten(1)


def _projection(hidden_size: int, seed: int, layer: int) -> torch.Tensor:
    """Random [3 * hidden, 256] of unit expected column norm."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    rows = len(CHANNEL_QUANTILES) * hidden_size
    return torch.randn(rows, FEATURES, generator=generator, device="cpu") / rows**0.5
