"""Stage quantize: the weights rounded layer by layer, by FAQ or another method, into a compressed-tensors checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from ecmfq_export import bundle
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.models.quantized_format import QuantizedWriter
from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer, load_layer
from ecmfq_export.progress import Progress
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import Clip, quantize_rtn
from ecmfq_export.quant.token_weights import Weighting
from ecmfq_export.stages import attention_view, mlp_view
from ecmfq_export.stages.calibration import Calibration, load_calibration
from ecmfq_export.stages.fold import LayerScales, fold_layer, rotate_down
from ecmfq_export.stages.judge import Judge, clearly_best, judged_layers
from ecmfq_export.stages.layer_quantizer import LayerQuantizer, Stream
from ecmfq_export.stages.layer_states import LayerStates, Side, drop_states
from ecmfq_export.stages.methods import resolve, rounding_settings
from ecmfq_export.stages.recipes import attention_bits, check_supported, mlp_bits, mlp_group_size
from ecmfq_export.stages.resources import DEFAULT, Resources
from ecmfq_export.stages.smooth import SCALES, load_scales, text_rho
from ecmfq_export.stages.streams import ActivationStore, drop_deepstack, prepare_batches

LAYERS, SMOOTHING = "quantization.json", "smoothing_scales.safetensors"
"""What was done to each layer (see :func:`quantize`), and the scales that were folded in, as stage smooth wrote them."""


def quantize(
    model_dir: Path, calibration_dir: Path | None, smoothing_dir: Path | None, out_dir: Path, config: QuantConfig,
    progress: Progress, resources: Resources = DEFAULT,
) -> Path:
    """Write the quantized checkpoint to `out_dir`; an interrupted run continues from its last finished layer.

    Beside it, where samples are looked at: ``quantization.json``, a list with one object a layer, ``weighting`` chosen, ``kl`` by
    weighting (final-logit KL on held-out samples, in layers where weightings are compared; in the others, which have one weighting,
    behind the last layer only), ``errors`` by group of weights
    (one number an expert, weighted squared output error over that of the outputs) and ``tokens`` that each expert computed
    ([text, vision]); and ``smoothing_scales.safetensors``.

    Args:
        model_dir: floating-point checkpoint.
        calibration_dir: of stage calibrate; not read by a method that looks at no samples (``rtn``).
        smoothing_dir: of stage smooth, or None for none; not read by such a method either.

    Raises:
        UserError: a model or settings that are not supported, missing calibration, NaN on the way, or a full disk.
    """
    parts = resolve(config)
    if parts.needs_data and calibration_dir is None:
        raise UserError(f"method '{config.method}' needs a calibration directory", "run calibrate first, or set method = 'rtn'")
    settings, ranks = rounding_settings(config), resources.ranks
    read = {"model": model_dir}
    if parts.needs_data and calibration_dir is not None:
        read |= {"calibration": calibration_dir} | ({} if smoothing_dir is None else {"smoothing": smoothing_dir})
    inputs = ranks.from_first(lambda: {name: bundle.fingerprint(path) for name, path in read.items()})
    if ranks.from_first(lambda: bundle.is_current(out_dir, "quantize", settings, inputs)):
        progress.note(f"{out_dir}: up to date")
        return out_dir
    model = open_model(model_dir)
    if model.quantization is not None:
        raise UnsupportedError(f"{model_dir} is quantized already", "give the floating-point checkpoint")
    check_supported(model.spec, config)
    fewest = min((layer.mlp.total_experts for layer in model.spec.layers if isinstance(layer.mlp, MoESpec)), default=1)
    if ranks.size > fewest:
        raise UserError(f"{ranks.size} processes share layers of {fewest} experts", f"start at most {fewest} (torchrun --nproc-per-node)")
    if model.unused:
        progress.note(model.unused_note("copied unchanged into the quantized checkpoint"))
    with ranks.write_stage(out_dir, "quantize", settings, inputs) as (work, info):
        info["method"] = config.method
        writer = QuantizedWriter(work, model, rotated_down=parts.rotate == "residual_online")
        if parts.needs_data and calibration_dir is not None:
            scales = load_scales(smoothing_dir) if smoothing_dir is not None else {}
            if smoothing_dir is not None and ranks.first:
                shutil.copyfile(smoothing_dir / SCALES, work / SMOOTHING)
            _Run(model, load_calibration(calibration_dir), scales, config, writer, progress, resources).run(info)
        elif ranks.first:
            for index in progress.track(range(model.spec.num_layers), "round to nearest", model.spec.num_layers):
                if not writer.has_layer(index):
                    layer = _prepared(model, index, LayerScales(), config)
                    layer = rtn_layer(layer, config, "mse" if parts.clip == "mse" else "absmax")
                    writer.write_layer(index, layer.quantized)
                    del layer
        if ranks.first:
            info.update(_finish(model, writer, config))
            drop_states(work)
    return out_dir


def _finish(model: MoEVLM, writer: QuantizedWriter, config: QuantConfig) -> dict[str, int]:
    """Write what is in no layer, and count bytes."""
    rest: dict[str, torch.Tensor | QTensor] = {}
    if config.lm_head == "w8a8":
        clip: Clip = "absmax" if resolve(config).clip == "absmax" else "mse"
        rest["lm_head.weight"] = quantize_rtn(model.tensor("lm_head.weight"), 8, clip=clip)
    return layer_bytes(writer.finish(rest))


def _prepared(model: MoEVLM, index: int, scales: LayerScales, config: QuantConfig) -> DecoderLayer:
    """The floating-point layer as it is to be quantized: scales folded in, a quantized down projection's inputs rotated if asked."""
    layer = fold_layer(load_layer(model, index), scales, consume=True)
    return rotate_down(layer) if resolve(config).rotate == "residual_online" and mlp_bits(layer.spec, config) is not None else layer


def rtn_layer(layer: DecoderLayer, config: QuantConfig, clip: Clip = "absmax") -> DecoderLayer:
    """Every weight that the recipes name rounded to nearest, by default its largest magnitude on the grid's end."""
    weights: dict[str, QTensor] = {}
    bits = attention_bits(config)
    if bits is not None:
        weights = {name: quantize_rtn(layer.tensors[name], bits, clip=clip)
                   for name in attention_view.weight_names(layer.spec.attention)}
    bits = mlp_bits(layer.spec, config)
    if bits is not None:
        group_size = mlp_group_size(layer.spec, config)
        gate_up, down = mlp_view.stacked_weights(layer)
        weights |= mlp_view.named_gate_up(layer, quantize_rtn(gate_up, bits, group_size, clip))
        weights |= mlp_view.named_down(layer, quantize_rtn(down, bits, group_size, clip))
    return mlp_view.with_quantized(layer, weights)


class _Run:
    """A method that looks at samples over all layers, from the start or from the state that an interrupted run left."""

    def __init__(
        self, model: MoEVLM, calibration: Calibration, scales: dict[int, LayerScales], config: QuantConfig,
        writer: QuantizedWriter, progress: Progress, resources: Resources,
    ) -> None:
        self._model, self._calibration, self._scales, self._config = model, calibration, scales, config
        self._writer, self._progress, self._resources = writer, progress, resources
        self._parts = resolve(config)
        self._judged = judged_layers(model.spec.num_layers, config.judged_layers) if self._parts.chooses_weighting else []

    @torch.no_grad()
    def run(self, info: dict[str, Any]) -> None:
        layers, resources, work = self._model.spec.num_layers, self._resources, self._writer.work_dir
        limit = resources.activation_bytes // 2
        with (ActivationStore(limit, resources.scratch(work, "train"), resources.device) as train_store,
              ActivationStore(limit, resources.scratch(work, "heldout"), resources.device) as heldout_store):
            train, heldout = (self._prepare(store, held) for store, held in ((train_store, False), (heldout_store, True)))
            samples = self._calibration.samples.choose(self._calibration.heldout)
            judge = Judge(self._model, samples, heldout.batches, heldout.store, ahead=self._parts.chooses_weighting)
            rho = torch.tensor([text_rho(self._calibration.gamma, train.batches, self._parts.balanced), 1.0], device=resources.device)
            states = LayerStates(work, {name: Side(stream.batches, stream.store, ("fp", "q"))
                                        for name, stream in (("train", train), ("heldout", heldout))}, resources.ranks)
            written = next((index for index in range(layers) if not self._writer.has_layer(index)), layers)
            start, log, _ = states.restore(written)
            if log is None and written == layers and (work / LAYERS).is_file():  # stopped while the result was hashed
                start, log = layers, json.loads((work / LAYERS).read_text(encoding="utf-8"))
            log = log or []
            if start:
                self._progress.note(f"continuing after layer {start} of {layers}, which an interrupted run finished")
            steps = self._steps(start)
            for index in self._progress.track(steps, "quantize, layer by layer", len(steps)):
                if len(log) > index:
                    continue
                wanted = self._parts.weightings if index in self._judged or not log else (log[-1]["weighting"],)
                with resources.math():
                    layer, entry = self._layer(index, wanted, train, heldout, judge, rho)
                if resources.ranks.first:
                    self._writer.write_layer(index, {**layer.tensors, **layer.quantized})
                del layer
                for stream in (train, heldout):
                    drop_deepstack(index, stream.batches, stream.store)
                log.append(entry)
                states.save(index + 1, log, last=index + 1 == layers)
        if resources.ranks.first:
            bundle.write_json(work / LAYERS, log)
        brief = [{key: entry[key] for key in ("layer", "weighting", "kl")} for entry in log]
        info.update(layers=brief, heldout_kl=log[-1]["kl"][log[-1]["weighting"]], rho_text=float(rho[0]), heldout_samples=len(samples),
                    heldout_is_calibration=not self._parts.chooses_weighting)
        chosen = ", ".join(entry["weighting"] for entry in log)
        self._progress.note(f"weightings by layer: {chosen}; held-out final-logit KL {info['heldout_kl']:.3g}")

    def _steps(self, start: int) -> list[int]:
        """Layers from `start` on, each as many times as it is quantized, so that steps take about the same time."""
        layers = range(start, self._model.spec.num_layers)
        if all(index in self._judged for index in layers) or not self._judged:
            return list(layers)
        return [index for index in layers for _ in range(len(self._parts.weightings) + 1 if index in self._judged else 1)]

    def _prepare(self, store: ActivationStore, held: bool) -> Stream:
        """One side's streams. Held-out samples are calibrated on too where no choice is judged on them."""
        kept = held or self._parts.chooses_weighting
        samples = self._calibration.samples.choose([h == held or not kept for h in self._calibration.heldout])
        batches = list(prepare_batches(self._model, samples, store, stream="fp"))
        for batch in batches:
            store.put(f"q/{batch.index}", store.get(f"fp/{batch.index}"))
        return Stream(batches, store)

    def _folded(self, index: int) -> DecoderLayer:
        """The floating-point layer on the device, scales folded in."""
        return _prepared(self._model, index, self._scales.get(index, LayerScales()), self._config).to(self._resources.device)

    def _layer(
        self, index: int, wanted: tuple[Weighting, ...], train: Stream, heldout: Stream, judge: Judge, rho: torch.Tensor
    ) -> tuple[DecoderLayer, dict[str, Any]]:
        """Quantize one layer, keep the best weighting of `wanted`, and move both streams behind it; the layer in host memory and its log
        entry."""
        folded = self._folded(index)
        quantizer = LayerQuantizer(folded, index, train, heldout, rho, self._config, self._resources.ranks)
        kl: dict[Weighting, float] = {}
        best = wanted[0]
        if len(wanted) > 1:
            candidates = {weighting: quantizer.quantize(weighting) for weighting in wanted}
            quantizer.drop_weights()
            del folded
            kl, best = self._judge(index, candidates, quantizer, judge)
            # Read once more, with no candidate left: it was not in memory beside the layers that the judge read.
            candidates.clear()
            layer = quantizer.refit(best, self._folded(index))
            quantizer.drop_weights()
        else:
            # Where another layer's choice is taken, nothing is left to be judged on held-out samples here.
            layer = quantizer.refit(best, folded) if self._parts.chooses_weighting else quantizer.quantize(best)
            quantizer.drop_weights()
            del folded
            if index + 1 == self._model.spec.num_layers:
                if not self._parts.chooses_weighting:
                    judge.refer_to("fp.next")
                kl, _ = self._judge(index, {best: layer}, quantizer, judge)
        for side, stream in (("train", train), ("heldout", heldout)):
            quantizer.outputs(layer, best, side, "q.next")
            for batch in stream.batches:
                for name in ("fp", "q"):
                    stream.store.move(f"{name}.next/{batch.index}", f"{name}/{batch.index}")
        quantizer.release()
        errors = {group: error.tolist() for group, error in quantizer.errors[best].items()}
        entry = {"layer": index, "weighting": best, "kl": kl, "errors": errors, "tokens": quantizer.tokens.tolist()}
        layer.drop_integers()
        return layer.to("cpu"), entry

    def _judge(
        self, index: int, candidates: dict[Weighting, DecoderLayer], quantizer: LayerQuantizer, judge: Judge
    ) -> tuple[dict[Weighting, float], Weighting]:
        """Held-out KL of each candidate, and the one that is clearly best.

        The quantized layers do the work: neither the floating-point experts nor more than one layer's widened integers are in memory,
        with the layers that the judge reads.
        """
        for weighting, layer in candidates.items():
            quantizer.outputs(layer, weighting, "heldout", f"out.{weighting}")
            layer.drop_integers()
        found = judge.kl([f"out.{weighting}" for weighting in candidates], index + 1)
        kl = {weighting: float(found[f"out.{weighting}"].mean()) for weighting in candidates}
        return kl, clearly_best({weighting: found[f"out.{weighting}"] for weighting in candidates})


def layer_bytes(model: MoEVLM) -> dict[str, int]:
    """Bytes on disk of the quantized weights with their scales, and what the same weights take in 16 bits."""
    taken = full = 0
    for name in model.names():
        if model.recipe(name) == "float":
            continue
        shape = model.shape(name)
        # One expert tells of all of them what the scales look like.
        weight = model.qtensor(name, 0, 1) if len(shape) == 3 else model.qtensor(name)
        count, share = math.prod(shape), math.prod(shape) // weight.qvalue.numel()
        taken += count * weight.num_bits // 8 + share * weight.scale.numel() * 2
        taken += 0 if weight.group_multiplier is None else share * weight.group_multiplier.numel()
        full += count * 2
    return {"quantized_bytes": taken, "quantized_bytes_in_16_bits": full}
