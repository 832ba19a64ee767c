"""What `inspect`, `targets` and `doctor` show: facts as plain data first, tables made from them second."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ecmfq_export import bundle
from ecmfq_export.errors import UserError


def describe(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint, a stage, a bundle, an ONNX graph or an engine, JSON-able.

    Args:
        path: a directory, a ``.onnx`` or an ``.engine`` file.
        verify: check every hash of a directory with a manifest.

    Raises:
        UserError: nothing that can be described, or a hash that does not hold.
    """
    if path.suffix == ".onnx" and path.is_file():
        return _describe_onnx(path)
    if path.suffix == ".engine" and path.is_file():
        from ecmfq_export.engine.engine_file import read_engine_file

        return {"kind": "engine", "path": str(path), **dataclasses.asdict(read_engine_file(path))}
    if (path / bundle.MANIFEST).is_file():
        return _describe_stage(path, verify)
    if (path / "config.json").is_file():
        return _describe_checkpoint(path)
    raise UserError(f"{path} is no checkpoint, stage, bundle, .onnx or .engine file",
                    "a checkpoint has config.json, a stage or bundle manifest.json")


def _describe_stage(path: Path, verify: bool) -> dict[str, Any]:
    manifest = bundle.read_manifest(path)
    if verify:
        bundle.verify(path, manifest)
    sizes = {name: (path / name).stat().st_size for name in manifest.files if (path / name).is_file()}
    missing = sorted(set(manifest.files) - set(sizes))
    if missing:
        raise bundle.BundleError(f"{path / missing[0]} is missing ({len(missing)} files in all)", "make the stage again")
    facts: dict[str, Any] = {"kind": manifest.stage, "path": str(path), "files": sizes, "bytes": sum(sizes.values()),
                             "verified": verify, "config": manifest.config, "info": manifest.info}
    if manifest.stage == "bundle":
        from ecmfq_export.bundle_facts import bundle_facts

        facts["contents"] = bundle_facts(path)
    elif (path / "config.json").is_file():
        from ecmfq_export.validate.quantization_record import read_record

        facts["checkpoint"] = _describe_checkpoint(path)
        facts["record"] = read_record(path)
    return facts


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from ecmfq_export.layer_facts import model_layers
    from ecmfq_export.models.moe_vlm import open_model

    model = open_model(path)
    recipes = Counter("w4a16" if model.recipe(name) == "float" and model.has_int4(name) else model.recipe(name) for name in model.names())
    layers, outside = model_layers(model)
    return {"kind": "checkpoint", "path": str(path), "spec": dataclasses.asdict(model.spec), "tensors": len(model.names()),
            "recipes": dict(recipes), "quantized": model.quantization is not None or model.weight_only is not None,
            "weight_only": dataclasses.asdict(model.weight_only) if model.weight_only is not None else None,
            "not run": model.unused_parts(), "layer_bytes": layers, "bytes outside of layers": outside}


def _describe_onnx(path: Path) -> dict[str, Any]:
    from ecmfq_export.engine.graph_file import load_graph
    from ecmfq_export.layer_facts import graph_layers

    model = load_graph(path)
    layers, outside = graph_layers(model.graph)

    def values(items: Any) -> dict[str, list[int | str]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in items}

    return {"kind": "onnx", "path": str(path), "nodes": len(model.graph.node),
            "ops": dict(Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node).most_common()),
            "inputs": values(model.graph.input), "outputs": values(model.graph.output),
            "initializers": len(model.graph.initializer), "functions": [f.name for f in model.functions],
            "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import}, "layer_bytes": layers,
            "bytes outside of layers": outside}


def rows(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Facts as (field, value) texts, nested ones indented under their name; kind, path and what has tables of its own left out."""
    found: list[tuple[str, str]] = []
    for key, value in facts.items():
        if key in ("layer_bytes", "contents", "record") or (not prefix and key in ("kind", "path")):
            continue
        key = printable(key)
        if isinstance(value, dict) and value:
            found += [(f"{prefix}{key}", ""), *rows(value, prefix + "  ")]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            found.append((f"{prefix}{key}", f"{len(value)} entries, first:"))
            found += rows(value[0], prefix + "  ")
        else:
            found.append((f"{prefix}{key}", f"{value:,}" if type(value) is int and value >= 10_000 else printable(value)))
    return found


def printable(value: Any) -> str:
    """A value as one text that a terminal shows and does not obey: control characters as their codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def size_text(size: int) -> str:
    """Bytes with three digits and a unit."""
    for power, name in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.3g} {name}" if size < 999.5 * 1000**power else f"{size / 1000**power:.0f} {name}"
    return f"{size} B"


def target_facts() -> list[dict[str, Any]]:
    """Every bundled target as plain data."""
    from ecmfq_export.target import list_targets, load_target

    return [dataclasses.asdict(load_target(name)) for name in list_targets()]


def print_targets(console: Console) -> None:
    """Table of targets."""
    table = Table(title="targets", title_justify="left")
    for header in ("target", "SM", "built by", "batch", "tokens", "for"):
        table.add_column(header, no_wrap=header != "for")
    for fact in target_facts():
        where = {"host-aot": "any machine", "on-device": "the device"}[fact["engine"]["build"]]
        table.add_row(fact["name"], " ".join(map(str, fact["compute_capabilities"])), where, str(fact["limits"]["max_batch"]),
                      str(fact["limits"]["max_seq_len"]), fact["description"])
    console.print(table)


def print_checks(checks: Sequence[Any], console: Console) -> None:
    """Table of what this machine has; how to get what it lacks."""
    table = Table("", "what", "found", title="this machine", title_justify="left")
    for check in checks:
        table.add_row("[green]yes[/]" if check.ok else "[yellow]no[/]", check.name, escape(check.detail))
    console.print(table)
    for check in checks:
        if not check.ok:
            # Outside the table, so that an install line can be copied in one piece.
            console.print(f"{check.name}: {check.fix}", soft_wrap=True, markup=False, highlight=False)
