"""The report as one HTML page that needs nothing from outside: figures are inline SVG, images are data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ecmfq_export import __version__
from ecmfq_export.errors import UserError
from ecmfq_export.runtime.images import load_rgb
from ecmfq_export.validate import plots, quantization_plots
from ecmfq_export.validate.artifact_bytes import LABELS
from ecmfq_export.validate.html_page import page, table, word
from ecmfq_export.validate.report import decibel, failures, recall_label

_THUMBNAIL = 72


def render(report: dict[str, Any], images: Sequence[Path | None] = ()) -> str:
    """The page for a report (see :mod:`ecmfq_export.validate.report`).

    Args:
        images: the image of each question, for the thumbnails of the table of changed answers; may be shorter.
    """
    parts = [_verdict(report), f'<div class="two"><section>{plots.layer_plot(report)}{_layer_note(report)}</section>'
             f"<section>{plots.kl_plot(report)}{_logit_table(report)}</section></div>"]  # fmt: skip
    if report["accuracy"]:
        parts.append(f"<section>{plots.accuracy_plot(report)}{_accuracy_note(report)}</section>")
    if report["retrieval"]:
        parts.append(_retrieval(report["retrieval"]))
    parts.append(f'<div class="two"><section>{plots.bytes_plot(report)}</section>{_bytes_table(report["bytes"])}</div>')
    if any(layer["expert_usage"] for layer in report["layers"]):
        parts.append(f"<section><h2>Expert usage of the floating-point model</h2>{plots.expert_plot(report)}</section>")
    parts.append(quantization_sections(report["quantization"]))
    parts.append(_layers_table(report))
    if report["items"]:
        parts.append(_items_table(report["items"], images))
    if report["engines"]:
        parts.append(_engines_table(report["engines"]))
    title = f"Validation of {report['model']['family']}"
    return page(title, _subtitle(report), parts)


def _subtitle(report: dict[str, Any]) -> str:
    model, settings = report["model"], report["settings"]
    positions = report["logits"]["float_vs_quantized"]["positions"]
    computes = f"{model['computes']}. " if model.get("computes") else ""
    return (
        f"{computes}{model['layers']} layers, hidden size {model['hidden_size']}, {model['experts']} experts, top-{model['top_k']}. "
        f"{settings['items']} prompts, {positions:,} positions ({settings['positions']}). Graphs in {settings['onnx_dtype']}. "
        f"ecmfq_export {__version__}."
    )


def _verdict(report: dict[str, Any]) -> str:
    passed = not failures(report)
    words = {True: ("ok", "pass"), False: ("bad", "FAIL"), None: ("open", "not judged")}
    rows = [
        (escape(c["name"]), f"{c['value']:.4g}", escape(c["limit"]), word(*words[c["passed"]]), escape(c["detail"]))
        for c in report["checks"]
    ]
    return (
        f'<section class="verdict {"pass" if passed else "fail"}"><h2>Validation {"passed" if passed else "failed"}</h2>'
        + table(("check", "value", "must be", "", "detail"), rows, numbers={1, 2}) + "</section>"
    )  # fmt: skip


def _layer_note(report: dict[str, Any]) -> str:
    count = report["settings"]["tapped_items"]
    return (
        '<p class="note">Quantized against floating point: the error of quantization, over all prompts. ONNX Runtime against '
        f"quantized PyTorch ({count} prompts): the same integers computed elsewhere; what is left is rounding of activations. "
        "A hollow mark: no difference at all. "
        "One int8 step in one token weighs heavily in the SQNR; the table's median error is that of a typical token.</p>"
    )


def _logit_table(report: dict[str, Any]) -> str:
    labels = {"float_vs_quantized": "floating point to quantized", "quantized_vs_onnx": "quantized PyTorch to ONNX Runtime",
              "prefill_vs_decode": "ONNX Runtime: prefill to decode steps"}  # fmt: skip
    rows = [
        (label, f"{c['kl_mean']:.2e}", f"{c['kl_p95']:.2e}", f"{c['kl_max']:.2e}", f"{c['top1_agreement']:.2%}")
        for key, label in labels.items() if (c := report["logits"].get(key))
    ]  # fmt: skip
    return table(("", "KL mean", "95%", "largest", "same top-1"), rows, numbers={1, 2, 3, 4})


def _accuracy_note(report: dict[str, Any]) -> str:
    parts = []
    for model, label in (("quantized", "quantized PyTorch"), ("onnx", "ONNX Runtime")):
        if report["retention"][model] is not None:
            parts.append(f"{label} keeps {report['retention'][model]:.1%} of the floating-point model's right answers")
    for name, difference in report["paired"].items():
        parts.append(f"{name}: {difference['difference']:+.2%} (95% {difference['low']:+.2%} to {difference['high']:+.2%}, "
                     f"p = {difference['p_value']:.2g}, paired bootstrap)")  # fmt: skip
    for name, share in report["same_answers"].items():
        parts.append(f"{name}: {share:.1%} of greedy answers are the same text")
    return f'<p class="note">{escape("; ".join(parts))}. Whiskers: 95% Wilson intervals.</p>'


def _retrieval(retrieval: dict[str, Any]) -> str:
    names = list(retrieval["recalls"]["float"])
    rows = [
        (plots.MODEL_LABELS[model], *("" if values[n] is None else f"{values[n]:.1%}" for n in names))
        for model, values in retrieval["recalls"].items()
    ]
    head = ("model", *map(recall_label, names))
    return (
        f"<section><h2>Caption retrieval</h2>{table(head, rows, numbers=set(range(1, len(head))))}"
        f'<p class="note">{retrieval["candidates"]} images and their captions, ranked both ways by log P(yes) - log P(no); '
        "near duplicate: the true caption against captions of the same image with one detail changed.</p></section>"
    )


def _bytes_table(sizes: dict[str, Any]) -> str:
    labels = {**LABELS, "quantized": "all quantized layers"}
    rows = [(label, sizes["layers"][key]) for key, label in labels.items() if key in sizes["layers"]]
    rows.append(("whole checkpoint", sizes["whole"]))
    body = [(label, f"{r['float16']:,}", f"{r['stored']:,}", f"{r['ratio']:.2%}") for label, r in rows]
    body += [(escape(name), "", f"{size:,}", "") for name, size in sizes["artifacts"].items()]
    return (
        f"<section><h2>Bytes</h2>{table(('what', 'float16', 'now', 'ratio'), body, numbers={1, 2, 3})}"
        '<p class="note">Scales are counted with the layers they belong to.</p></section>'
    )


def quantization_sections(record: dict[str, Any] | None) -> str:
    """How the model was quantized; every part that no stage wrote down is named as missing."""
    if record is None:
        return "<section><h2>Quantization</h2><p class=note>The checkpoint has no record of how it was quantized.</p></section>"
    method = escape(str(record["method"] or "unknown"))
    missing, parts = [], []
    layers = [row for row in record["layers"] if row.get("errors")]
    if layers:
        if quantization_plots.expert_groups(layers):
            parts.append(f"<section>{quantization_plots.error_plot(layers)}{_error_note(layers)}</section>")
        parts.append(f'<div class="two"><section>{quantization_plots.error_lines(layers)}</section>{_weightings(layers)}</div>')
    else:
        missing.append("errors by layer and expert")
    pair = []
    if record["scales"]:
        pair.append(f"<section>{quantization_plots.scale_plot(record['scales'])}</section>")
    else:
        missing.append("smoothing scales")
    if record["selection"]:
        pair.append(f"<section>{quantization_plots.selection_plot(record['selection'])}{_selection_note(record['selection'])}</section>")
    else:
        missing.append("the calibration samples' selection against random ones")
    if pair:
        parts.append(f'<div class="two">{"".join(pair)}</div>')
    note = f"No record of {', of '.join(missing)}: method {method} did not need it, or its stage's directory is gone." if missing else ""
    head = f'<section><h2>Quantization with method {method}</h2><p class="note">{note}</p></section>'
    return head + "".join(parts)


def _error_note(layers: list[dict[str, Any]]) -> str:
    unseen = sum(sum(counts) == 0 for row in layers for counts in row.get("tokens", []))
    text = "Squared error of an expert's output over the squared output, on the calibration tokens that it computed."
    if unseen:
        text += f" {unseen} experts saw none."
    return f'<p class="note">{text}</p>'


def _weightings(layers: list[dict[str, Any]]) -> str:
    rows = []
    for row in layers:
        kl = row.get("kl") or {}
        value = kl.get(row.get("weighting"))
        others = ", ".join(f"{escape(name)} {k:.1e}" for name, k in kl.items() if name != row.get("weighting") and k is not None)
        rows.append((str(row["layer"]), escape(str(row.get("weighting"))), "" if value is None else f"{value:.1e}", others))
    head = ("layer", "weighting", "held-out KL", "others")
    return f"<section><h2>Token weighting chosen by layer</h2>{table(head, rows, numbers={2})}</section>"


def _selection_note(selection: dict[str, Any]) -> str:
    return (
        f'<p class="note">{selection["selected"]} of {selection["pool"]} samples, {selection["topped_up"]} of them added for experts '
        "with few tokens. Random: mean over five seeds. Bars to the right of the line are larger than random.</p>"
    )


def _layers_table(report: dict[str, Any]) -> str:
    rows = []
    for output in report["vision"]:
        rows.append((f"vision: {escape(output['output'])}", "", "", "", decibel(output["sqnr_db"]), f"{output['median_error']:.1e}"))
    for layer in report["layers"]:
        q, o = layer["float_vs_quantized"], layer["quantized_vs_onnx"]
        same = "" if layer["same_experts"] is None else f"{layer['same_experts']:.2%}"
        rows.append((str(layer["index"]), decibel(q["sqnr_db"]), f"{q['cosine']:.6f}", same, decibel(o["sqnr_db"]),
                     f"{o['median_error']:.1e}"))  # fmt: skip
    head = ("layer", "quantized SQNR, dB", "cosine", "same experts", "ONNX SQNR, dB", "ONNX median error")
    return f"<section><h2>Layers</h2>{table(head, rows, numbers={1, 2, 3, 4, 5})}</section>"


def _items_table(items: list[dict[str, Any]], images: Sequence[Path | None]) -> str:
    rows = []
    for item in items:
        image = images[item["index"]] if item["index"] < len(images) else None
        said = [word("ok" if item["correct"][m] else "bad", item["said"][m]) for m in ("float", "quantized", "onnx")]
        rows.append((_thumbnail(image), escape(item["question"]), escape(item["answer"]), *said, f"{item['kl']:.2e}"))
    head = ("", "question", "answer", "floating point", "quantized", "ONNX Runtime", "KL")
    return (
        f"<section><h2>Where quantization changed most</h2>{table(head, rows, numbers={6})}"
        '<p class="note">Lost answers first, then by KL. A wrong answer is shown up to its first wrong token.</p></section>'
    )


def _engines_table(engines: dict[str, Any]) -> str:
    rows = []
    for part, facts in engines.items():
        if isinstance(facts, dict):
            nodes = facts.get("plugin_nodes", [])
            capabilities = ", ".join(str(c) for c in facts.get("compute_capabilities", []))
            rows.append((escape(part), f"{facts.get('bytes', 0):,}", str(len(nodes)), escape(capabilities)))
    return (
        f"<section><h2>Engines for {escape(str(engines['target']))}</h2>"
        f"{table(('engine', 'bytes', 'plugin nodes', 'SM'), rows, numbers={1, 2})}</section>"
    )


def _thumbnail(image: Path | None) -> str:
    if image is None:
        return ""
    try:
        picture = load_rgb(image)
    except UserError:
        return ""  # it was readable when the prompt was made; a page without one picture is still a page
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{picture.width}" height="{picture.height}" src="data:image/png;base64,{data}">'
