"""The stage: three forms of one model answer the same prompts, and the differences become a report with a verdict."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecmfq_export import bundle
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.heap import give_back
from ecmfq_export.models.inputs import run_vision
from ecmfq_export.models.moe_vlm import MoEVLM, open_model
from ecmfq_export.progress import Progress
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate import onnx_side
from ecmfq_export.validate.artifact_bytes import artifact_bytes, checkpoint_bytes
from ecmfq_export.validate.compare import Difference, LogitComparison
from ecmfq_export.validate.evaluate import (
    accuracy_by_type,
    exact_match,
    near_duplicate_choice,
    paired_bootstrap,
    recalls,
)
from ecmfq_export.validate.prompts import Prompts, load_prompts, match_pairs, match_samples, yes_no_ids
from ecmfq_export.validate.quantization_record import read_record
from ecmfq_export.validate.report import DEFAULT_THRESHOLDS, SCHEMA_VERSION, Thresholds, finite, judge
from ecmfq_export.validate.torch_lockstep import Lockstep

MODELS = ("float", "quantized", "onnx")
STAGE = "validate"
_CHUNK_TOKENS = 65_536
"""Tokens whose hidden states are held at once."""
_LOGIT_BYTES = 1 << 29
"""Logits of answers that are held at once, of all models together."""
_TAPPED_SAMPLES, _TAPPED_TOKENS, _TAPPED_BYTES = 6, 2048, 1 << 28
"""Prompts whose hidden states are compared with ONNX Runtime's layer by layer, and what all layers' states may take."""
_WORST = 12


def validate(
    float_dir: Path,
    quantized_dir: Path,
    onnx_dir: Path,
    out_dir: Path,
    *,
    data: Path | None,
    limit: int = 0,
    progress: Progress,
    engines_dir: Path | None = None,
    candidates: int = 16,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> dict[str, Any]:
    """Compare floating-point PyTorch, quantized PyTorch and ONNX Runtime; write ``report.json`` and ``report.html``.

    Args:
        float_dir, quantized_dir: checkpoints of one model; the two may be the same directory, a floating-point one too.
        onnx_dir: what was exported from `quantized_dir`.
        data: held-out questions, see :func:`ecmfq_export.validate.prompts.load_prompts`; None compares logits on a few made-up
            prompts.
        limit: at most so many questions (0: all).
        engines_dir: engines whose sizes and facts go into the report.
        candidates: captions that retrieval ranks (``captions.jsonl`` beside the questions); 0 leaves retrieval out.

    Returns:
        The report; ``report.verdict`` tells whether it passed, ``report.failures`` names the rows that did not.

    Raises:
        UserError: directories that do not belong together, unusable items, or NaN logits. A failed check is no error here.
    """
    floating, quantized = open_model(float_dir), open_model(quantized_dir)
    graphs = bundle.read_manifest(onnx_dir, "onnx")
    if graphs.config.get("flavour") == "ort":
        quantized = quantized.with_float_activations()
    # Rotating unties the output matrix from the embeddings, and changes nothing else.
    if floating.spec != dataclasses.replace(quantized.spec, tie_word_embeddings=floating.spec.tie_word_embeddings):
        raise UserError(f"{float_dir} and {quantized_dir} are different models", "give the checkpoint it was quantized from")
    inputs = {"float": bundle.fingerprint(float_dir), "quantized": bundle.fingerprint(quantized_dir),
              "onnx": bundle.fingerprint(onnx_dir)}  # fmt: skip
    if data is not None:
        questions = _existing(data / "questions.jsonl" if data.is_dir() else data)
        files = [questions, questions.with_name("captions.jsonl")]
        inputs |= {f"data/{file.name}": bundle.sha256_file(file) for file in files if file.is_file()}
    if engines_dir is not None:
        inputs["engines"] = bundle.fingerprint(engines_dir)
    config = {"limit": limit, "candidates": candidates, "thresholds": dataclasses.asdict(thresholds)}
    if bundle.is_current(out_dir, STAGE, config, inputs):
        progress.note(f"{out_dir}: up to date")
        return json.loads((out_dir / "report.json").read_text(encoding="utf-8"))
    processor = Processor(float_dir)
    prompts = load_prompts(processor, data, limit, candidates)
    session = onnx_side.open_session(onnx_dir, taps=onnx_side.tapped_names(floating.spec.num_layers))
    onnx_side.require_same_vocabulary(session, floating.spec.vocab_size)
    for sample in prompts.samples:
        session.check_length(sample)
    with bundle.write_stage(out_dir, STAGE, config, inputs) as (work, info):
        study = _Study(floating, quantized, session, processor, prompts, progress, graphs.info.get("computes") or _imported(quantized_dir))
        study.run()
        vision, retrieval = study.vision_difference(), study.retrieval()
        progress.note("hidden states in ONNX Runtime")
        states = onnx_side.hidden_states(session, [prompts.samples[i] for i in study.tapped])
        report = study.report(states, vision)
        report["retrieval"] = retrieval
        report["bytes"] = checkpoint_bytes(quantized) | {"artifacts": artifact_bytes(onnx_dir, engines_dir)}
        report["engines"] = _engine_facts(engines_dir)
        report["quantization"] = read_record(quantized_dir)
        report["thresholds"] = dataclasses.asdict(thresholds)
        report["checks"] = judge(report, thresholds)
        report["passed"] = all(check["passed"] is not False for check in report["checks"])
        report = finite(report)
        from ecmfq_export.validate.html_report import render

        bundle.write_json(work / "report.json", report)
        (work / "report.html").write_text(render(report, [q.image for q in prompts.questions]), encoding="utf-8")
        info["passed"] = report["passed"]
    return report


def _imported(quantized_dir: Path) -> str:
    """What an imported checkpoint computes with and was made for; empty for others."""
    try:
        manifest = bundle.read_manifest(quantized_dir, "import")
    except BundleError:
        return ""
    return f"W4A8, imported from {manifest.info['method']} (activations: {manifest.info['activations']})"


def _existing(data: Path) -> Path:
    if not data.exists():
        raise UserError(f"no evaluation file at {data}")
    return data


@dataclass
class _Study:
    """One run over all prompts and what it gathers."""

    floating: MoEVLM
    quantized: MoEVLM
    session: DecoderSession
    processor: Processor
    prompts: Prompts
    progress: Progress
    computes: str

    def __post_init__(self) -> None:
        self.lockstep = Lockstep(self.floating, self.quantized)
        self.layers = self.lockstep.layers
        spec = self.floating.spec
        budget = _TAPPED_BYTES // (4 * spec.hidden_size * spec.num_layers)
        self.tapped = _first_within([s.length for s in self.prompts.samples], min(_TAPPED_TOKENS, budget))
        self.onnx_dtype = str(self.session.dtype)
        self.kept: dict[tuple[int, int], np.ndarray] = {}
        self.logits = {"float_vs_quantized": LogitComparison("floating point against quantized PyTorch"),
                       "quantized_vs_onnx": LogitComparison("quantized PyTorch against ONNX Runtime"),
                       "prefill_vs_decode": LogitComparison("ONNX Runtime's prefill against its decode steps")}  # fmt: skip
        self.predicted: dict[str, list[np.ndarray]] = {m: [] for m in MODELS}
        self.item_kl: list[float] = []
        self.seconds = {"pytorch": 0.0, "onnx": 0.0}

    def run(self) -> None:
        samples = self.prompts.samples
        chunks = _chunks(samples, self.floating.spec.vocab_size)
        for start, stop in self.progress.track(chunks, "validate: held-out prompts", len(chunks)):
            chunk = samples[start:stop]
            tapped = {i - start for i in self.tapped if start <= i < stop}

            def keep(layer: int, row: int, hidden: np.ndarray, start: int = start, tapped: set[int] = tapped) -> None:
                if row in tapped:
                    self.kept[start + row, layer] = hidden.copy()  # a view would keep its whole batch

            floating, quantized, onnx = self._all_logits(chunk, record=True, on_hidden=keep)
            for rows in zip(floating, quantized, onnx, strict=True):
                self.logits["float_vs_quantized"].add(rows[0], rows[1])
                self.logits["quantized_vs_onnx"].add(rows[1], rows[2])
                self.item_kl.append(float(self.logits["float_vs_quantized"].kl[-1].mean()))
                for model, logits in zip(MODELS, rows, strict=True):
                    self.predicted[model].append(logits.argmax(axis=-1))
        steps = [samples[i] for i in self.tapped]
        prefilled = onnx_side.answer_logits(self.session, steps)
        for whole, step in zip(prefilled, onnx_side.answer_logits(self.session, steps, stepwise=True), strict=True):
            self.logits["prefill_vs_decode"].add(whole, step)

    def _all_logits(self, samples: list[ProcessedSample], **options: Any) -> tuple[list[np.ndarray], ...]:
        start = time.perf_counter()
        floating, quantized = self.lockstep.answer_logits(samples, **options)
        middle = time.perf_counter()
        onnx = onnx_side.answer_logits(self.session, samples)
        self.seconds["pytorch"] += middle - start
        self.seconds["onnx"] += time.perf_counter() - middle
        return floating, quantized, onnx

    def report(self, states: list[list[np.ndarray]], vision: list[dict[str, Any]]) -> dict[str, Any]:
        spec = self.floating.spec
        moe = [spec.layers[i].mlp for i in spec.moe_layers]
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {"family": spec.family, "layers": spec.num_layers, "hidden_size": spec.hidden_size,
                      "experts": moe[0].num_experts if moe else 0, "top_k": moe[0].top_k if moe else 0,
                      "quantized": self.quantized.quantization is not None or bool(self.computes), "computes": self.computes},
            "settings": {"items": len(self.prompts.samples), "positions": self.prompts.positions,
                         "tapped_items": len(self.tapped), "onnx_dtype": self.onnx_dtype},
            "vision": vision,
            "layers": [self._layer(i, states) for i in range(spec.num_layers)],
            "logits": {name: comparison.as_dict() for name, comparison in self.logits.items()},
            "kl_histogram": _histograms(self.logits),
            "seconds": self.seconds,
            **self._accuracy(),
        }  # fmt: skip

    def _layer(self, index: int, states: list[list[np.ndarray]]) -> dict[str, Any]:
        record, onnx = self.layers[index], Difference()
        for item, layers in zip(self.tapped, states, strict=True):
            onnx.add(self.kept[item, index], layers[index])
        usage = None
        if record.text is not None and record.vision is not None:
            usage = {"text": record.text.tolist(), "vision": record.vision.tolist()}
        return {"index": index, "float_vs_quantized": record.hidden.as_dict(), "quantized_vs_onnx": onnx.as_dict(),
                "same_experts": record.same / record.picks if record.picks else None, "expert_usage": usage}  # fmt: skip

    def vision_difference(self) -> list[dict[str, Any]]:
        """Image features and DeepStack features of the tapped prompts, the quantized checkpoint's tower against the graph's."""
        samples = [sample for sample in (self.prompts.samples[i] for i in self.tapped) if sample.pixel_values is not None]
        tower = self.quantized.vision_module() if samples else None
        features = [run_vision(tower, sample.pixel_values, sample.image_grid_thw) for sample in samples]
        del tower  # before ONNX Runtime's is opened, where its features are not known any more
        give_back()
        differences: list[Difference] = []
        for sample, (merged, deepstack) in zip(samples, features, strict=True):
            pairs = zip((merged, *deepstack), self.session.image_features(sample), strict=True)
            for i, (torch_features, onnx_features) in enumerate(pairs):
                if i == len(differences):
                    differences.append(Difference())
                differences[i].add(torch_features.numpy(), onnx_features)
        self.session.release_vision()
        give_back()
        return [{"output": "image features" if i == 0 else f"DeepStack {i - 1}", **d.as_dict()}
                for i, d in enumerate(differences)]  # fmt: skip

    def _accuracy(self) -> dict[str, Any]:
        questions = self.prompts.questions
        if not questions:
            return {"accuracy": None, "retention": None, "paired": None, "same_answers": None, "items": []}
        answers = [s.input_ids[s.answer_mask] for s in self.prompts.samples]
        types = [q.type for q in questions]
        correct = {m: np.array([exact_match(p, a) for p, a in zip(self.predicted[m], answers, strict=True)]) for m in MODELS}
        base = int(correct["float"].sum())
        retention = {m: int(correct[m].sum()) / base if base else None for m in MODELS[1:]}
        said = {m: [_greedy_part(p, a) for p, a in zip(self.predicted[m], answers, strict=True)] for m in MODELS}
        pairs = (("float", "quantized"), ("quantized", "onnx"))
        same = {f"{a}, {b}": float(np.mean([np.array_equal(x, y) for x, y in zip(said[a], said[b], strict=True)])) for a, b in pairs}
        paired = {f"{b} - {a}": dataclasses.asdict(paired_bootstrap(correct[a], correct[b]))
                  for a, b in pairs}  # fmt: skip
        return {"accuracy": {m: accuracy_by_type(types, correct[m]) for m in MODELS}, "retention": retention,
                "paired": paired, "same_answers": same, "items": self._worst(said, correct)}  # fmt: skip

    def _worst(self, said: dict[str, list[np.ndarray]], correct: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """The questions where quantization changed most: lost answers first, then by KL."""
        lost = correct["float"] & ~(correct["quantized"] & correct["onnx"])
        order = sorted(range(len(lost)), key=lambda i: (not lost[i], -self.item_kl[i]))[:_WORST]
        rows = []
        for i in order:
            question = self.prompts.questions[i]
            texts = {m: self.processor.decode(said[m][i]) for m in MODELS}
            rows.append({"index": i, "question": question.question, "answer": question.answer, "type": question.type,
                         "kl": self.item_kl[i], "said": texts, "correct": {m: bool(correct[m][i]) for m in MODELS}})  # fmt: skip
        return rows

    def retrieval(self) -> dict[str, Any] | None:
        """Recalls of each model by log P(yes) - log P(no), or None without captions or single-token yes and no."""
        captions, ids = self.prompts.captions, yes_no_ids(self.processor)
        if len(captions) < 2 or ids is None:
            return None
        pairs, counts = match_pairs(captions)
        scores: dict[str, list[float]] = {m: [] for m in MODELS}
        samples = match_samples(self.processor, pairs)
        chunks = _chunks(samples, self.floating.spec.vocab_size, _CHUNK_TOKENS // 4)
        for start, stop in self.progress.track(chunks, "validate: caption retrieval", len(chunks)):
            for model, logits in zip(MODELS, self._all_logits(samples[start:stop]), strict=True):
                scores[model] += [float(rows[0, ids[0]] - rows[0, ids[1]]) for rows in logits]
        n = len(captions)
        out: dict[str, Any] = {"candidates": n, "prompts": len(pairs), "recalls": {}}
        for model, values in scores.items():
            matrix, rest = np.array(values[: n * n]).reshape(n, n), np.array(values[n * n :])
            hard = np.split(rest, np.cumsum(counts)[:-1])
            out["recalls"][model] = recalls(matrix) | {"near_duplicate": near_duplicate_choice(matrix.diagonal(), hard)}
        return out


def _greedy_part(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Tokens that greedy decoding is known to give: up to the first that differs from the answer, it included.

    Two models with equal such parts give the same answer up to there, and the whole answer where it is right.
    """
    wrong = np.flatnonzero(predicted != answer)
    return predicted[: wrong[0] + 1] if len(wrong) else predicted


def _first_within(lengths: list[int], budget: int = _TAPPED_TOKENS) -> list[int]:
    """The tapped prompts: the first few, evenly spread, that stay within the token budget together (one at least)."""
    count = min(_TAPPED_SAMPLES, len(lengths))
    chosen: list[int] = []
    for i in (k * len(lengths) // count for k in range(count)):
        if not chosen or sum(lengths[j] for j in chosen) + lengths[i] <= budget:
            chosen.append(i)
    return chosen


def _chunks(samples: Sequence[ProcessedSample], vocab_size: int, budget: int = _CHUNK_TOKENS) -> list[tuple[int, int]]:
    """Ranges of prompts of at most `budget` tokens each, whose answers' logits fit :data:`_LOGIT_BYTES` (one prompt at least)."""
    out, start, total, answers = [], 0, 0, 0
    most = _LOGIT_BYTES // (4 * len(MODELS) * vocab_size)
    for i, sample in enumerate(samples):
        rows = int(sample.answer_mask.sum())
        if i > start and (total + sample.length > budget or answers + rows > most):
            out.append((start, i))
            start, total, answers = i, 0, 0
        total += sample.length
        answers += rows
    return [*out, (start, len(samples))]


def _histograms(comparisons: dict[str, LogitComparison]) -> dict[str, Any]:
    """Counts of KL in decades, 1e-10 to 100 nats in steps of a quarter decade; smaller and larger ones in the outer bins."""
    edges = np.arange(-10.0, 2.0 + 1e-9, 0.25)
    out: dict[str, Any] = {"log10_edges": edges.tolist()}
    for name, comparison in comparisons.items():
        values = np.clip(np.log10(np.maximum(comparison.values()[0], 1e-300)), edges[0], edges[-1])
        out[name] = np.histogram(values, edges)[0].tolist()
    return out


def _engine_facts(engines_dir: Path | None) -> dict[str, Any] | None:
    if engines_dir is None:
        return None
    try:
        manifest = bundle.read_manifest(engines_dir, "build")
    except BundleError:
        return None
    return {"target": engines_dir.name, **manifest.info}
