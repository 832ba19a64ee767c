"""What a bundle is, as plain data: `inspect` shows it, `compare` puts two of them side by side.

Figures come from the bundle's own files, the report's from ``report/report.json``. A file that says something of another form than it
should is taken for one that says nothing there: showing a bundle must not fail on what it shows.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from ecmfq_export import bundle
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.json_file import read_json
from ecmfq_export.layer_facts import graph_layers

STAGES = ("rotated", "calibration", "smoothing", "quantized")


def bundle_facts(path: Path) -> dict[str, Any]:
    """Facts of a bundle, JSON-able.

    Returns:
        ``path``, ``version`` (of ecmfq_export), ``target``; ``parts`` {name: {files, bytes}}; ``settings`` {stage.setting: value};
        ``layers`` [{layer, bytes {precision: bytes}, attention, mlp (their precisions), sqnr_db, errors {group: median}}];
        ``outside_layers`` {what: bytes}; ``evaluation`` {figure: number or text}; ``engines`` [{...}].

    Raises:
        BundleError: no bundle, or one without its graphs.
    """
    manifest = bundle.read_manifest(path, "bundle")
    onnx_dir = path / "onnx"
    layers, outside = _weights(onnx_dir)
    report = _report(path / "report" / "report.json")
    add_errors(layers, report)
    return {
        "path": str(path), "version": manifest.version, "target": manifest.config.get("target"), "parts": _parts(path, manifest),
        "settings": _settings(path), "layers": layers, "outside_layers": outside, "evaluation": _evaluation(report),
        "engines": _engines(path),
    }  # fmt: skip


def _weights(onnx_dir: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows by layer of the decoder's graph, and the bytes of what lies outside of its layers."""
    layers, outside = graph_layers(load_graph(onnx_dir / "decoder" / "model.onnx").graph)
    _, vision = graph_layers(load_graph(onnx_dir / "vision" / "model.onnx").graph)
    embeddings = onnx_dir / "embed_tokens.safetensors"
    return layers, {"decoder, outside of its layers": outside, "vision tower": vision,
                    "embeddings": embeddings.stat().st_size if embeddings.is_file() else 0}  # fmt: skip


def _parts(path: Path, manifest: bundle.Manifest) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for name in manifest.files:
        pieces = name.split("/")
        part = "/".join(pieces[: 2 if pieces[0] == "engines" else 1])
        file = path / name
        row = parts.setdefault(part, {"files": 0, "bytes": 0})
        row["files"] += 1
        row["bytes"] += file.stat().st_size if file.is_file() else 0
    stages = path / "stages"
    if stages.is_dir():
        sizes = [file.stat().st_size for file in stages.rglob("*") if file.is_file()]
        parts["stages (not shipped)"] = {"files": len(sizes), "bytes": sum(sizes)}
    return parts


def _settings(path: Path) -> dict[str, Any]:
    """Every setting that shaped the bundle, by stage; stages that are not there any more have none."""
    settings: dict[str, Any] = {}
    for stage in (*(f"stages/{name}" for name in STAGES), "onnx"):
        try:
            manifest = bundle.read_manifest(path / stage)
        except BundleError:
            continue
        name = stage.removeprefix("stages/")
        settings |= _flat({name: manifest.config})
        if isinstance(method := manifest.info.get("method"), str):
            settings[f"{name}.method"] = method
    return settings


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _report(path: Path) -> dict[str, Any]:
    try:
        report = read_json(path)
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _at(data: Any, *keys: str | int) -> Any:
    """The value at a place of nested data, None where there is no such place."""
    for key in keys:
        if isinstance(data, dict) and key in data:
            data = data[key]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return None
    return data


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _by_number(rows: Any, key: str) -> dict[int, dict[str, Any]]:
    return {row[key]: row for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict) and type(row.get(key)) is int}


def add_errors(layers: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """What the report says of each layer: SQNR of its output, and the median output error of each group of weights."""
    rows, records = _by_number(_at(report, "layers"), "index"), _by_number(_at(report, "quantization", "layers"), "layer")
    for layer in layers:
        layer["sqnr_db"] = number(_at(rows.get(layer["layer"]), "float_vs_quantized", "sqnr_db"))
        errors = _at(records.get(layer["layer"]), "errors")
        layer["errors"] = {}
        for group, values in errors.items() if isinstance(errors, dict) else ():
            known = [value for value in map(number, values if isinstance(values, list) else []) if value is not None]
            if known:
                layer["errors"][group] = statistics.median(known)


def _evaluation(report: dict[str, Any]) -> dict[str, Any]:
    """The report's figures by name, only those that are there."""
    places = {
        "accuracy, floating point": ("accuracy", "float", "all", "accuracy"),
        "accuracy, quantized": ("accuracy", "quantized", "all", "accuracy"),
        "accuracy, ONNX Runtime": ("accuracy", "onnx", "all", "accuracy"), "questions": ("accuracy", "float", "all", "total"),
        "answers kept, quantized": ("retention", "quantized"), "answers kept, ONNX Runtime": ("retention", "onnx"),
        "KL, floating point to quantized": ("logits", "float_vs_quantized", "kl_mean"),
        "KL, quantized to ONNX Runtime": ("logits", "quantized_vs_onnx", "kl_mean"),
        "same token, quantized": ("logits", "float_vs_quantized", "top1_agreement"),
        "quantized layers / float16": ("bytes", "layers", "quantized", "ratio"), "whole checkpoint / float16": ("bytes", "whole", "ratio"),
    }  # fmt: skip
    figures: dict[str, Any] = {name: value for name, keys in places.items() if (value := number(_at(report, *keys))) is not None}
    for model in ("float", "quantized", "onnx"):
        recalls = _at(report, "retrieval", "recalls", model)
        for name, value in recalls.items() if isinstance(recalls, dict) else ():
            if number(value) is not None:
                figures[f"retrieval {name}, {model}"] = value
    if isinstance(report.get("passed"), bool):
        figures["validation"] = "passed" if report["passed"] else "failed"
    return figures


def _engines(path: Path) -> list[dict[str, Any]]:
    """What each build wrote down of its engines, and the versions that go with them."""
    found = []
    for directory in sorted(file.parent for file in (path / "engines").glob(f"*/{bundle.MANIFEST}")):
        try:
            manifest = bundle.read_manifest(directory, "build")
        except UserError:
            continue
        for part in ("decoder", "vision"):
            facts = manifest.info.get(part)
            if isinstance(facts, dict):
                nodes = facts.get("plugin_nodes")
                found.append({
                    "target": directory.name, "part": part, "bytes": number(facts.get("bytes")), "runtime": str(facts.get("runtime")),
                    "runtime version": str(facts.get("runtime_version")), "SM": str(facts.get("compute_capabilities")),
                    "plugin nodes": len(nodes) if isinstance(nodes, list) else None, "plugin ABI": manifest.info.get("plugin_abi"),
                    "plugin library": str(manifest.inputs.get("plugin_library", ""))[:12],
                    "build seconds": number(_at(facts, "build", "seconds")),
                })  # fmt: skip
    return found
