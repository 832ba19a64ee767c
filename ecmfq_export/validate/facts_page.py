"""What `inspect --html` and `compare --html` write: one self-contained page of facts, with figures of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ecmfq_export import __version__
from ecmfq_export.validate import layer_plots
from ecmfq_export.validate.html_page import page, table
from ecmfq_export.validate.html_report import quantization_sections

_KINDS = ("int4", "int8", "scales", "float")
Pairs = Sequence[tuple[str, Any, Any]]


def description_page(facts: Mapping[str, Any], fields: Sequence[tuple[str, str]]) -> str:
    """The page of one bundle, stage, checkpoint, graph or engine.

    Args:
        facts: of ``describe.describe``.
        fields: (name, value) texts of everything that has no table of its own.
    """
    contents = facts.get("contents")
    checkpoint = facts.get("checkpoint") or {}
    layers = contents["layers"] if contents else facts.get("layer_bytes") or checkpoint.get("layer_bytes") or []
    parts = _layer_sections({"": layers}) if layers else []
    if contents:
        parts += [_section("Parts", _bytes_table(contents)), _engines({"": contents})]
        parts.append(_section("Report", _two_columns(contents["evaluation"])))
        parts.append(_section("Settings", _two_columns(contents["settings"])))
    if facts.get("record") is not None:
        parts.append(quantization_sections(facts["record"]))
    if not contents:
        indented = [(escape(name).replace("  ", "&nbsp;&nbsp;"), escape(value)) for name, value in fields]
        parts.append(_section("Fields", table(("field", "value"), indented, ())))
    return page(f"{facts['kind']}: {facts['path']}", f"ecmfq_export {__version__}", parts)


def comparison_page(
    first: Mapping[str, Any], second: Mapping[str, Any], settings: Pairs, sizes: Pairs, evaluation: Pairs,
    difference: Callable[[Any, Any], str],
) -> str:  # fmt: skip
    """The page of two bundles; pairs are (name, of A, of B), `difference` says how B stands to A."""

    def pairs(rows: Pairs, change: bool) -> str:
        if not rows:
            return '<p class="note">None.</p>'
        head = ("", "A", "B", *(("B to A",) if change else ()))
        cells = [(escape(name), _figure(a), _figure(b), *((difference(a, b),) if change else ())) for name, a, b in rows]
        return table(head, cells, {1, 2, 3} if change else ())

    labels = {"A": first, "B": second}
    parts = [_section("Bundles", table(("", "path"), [(name, escape(facts["path"])) for name, facts in labels.items()], ()))]
    parts += _layer_sections({name: facts["layers"] for name, facts in labels.items()})
    parts += [_section("Settings that differ", pairs(settings, False)), _section("Bytes", pairs(sizes, True)),
              _section("Report", pairs(evaluation, True)), _engines(labels)]  # fmt: skip
    return page("Two bundles", f"ecmfq_export {__version__}", parts)


def _layer_sections(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    rows = {name: [{"sqnr_db": None, "errors": {}, **row} for row in layers] for name, layers in models.items()}
    parts = [f"<section>{layer_plots.bytes_by_layer_plot(rows)}</section>"]
    if any(row["sqnr_db"] is not None or row["errors"] for layers in rows.values() for row in layers):
        parts.append(f"<section>{layer_plots.errors_by_layer_plot(rows)}</section>")
    groups = list(dict.fromkeys(name for layers in rows.values() for row in layers for name in row["errors"]))
    several = len(rows) > 1
    head = (*(("",) if several else ()), "layer", "attention", "mlp", *_KINDS, "SQNR, dB", *groups)
    cells = [
        (*((name,) if several else ()), str(row["layer"]), escape(row["attention"]), escape(row["mlp"]),
         *(f"{row['bytes'][kind]:,}" for kind in _KINDS), _figure(row["sqnr_db"]), *(_figure(row["errors"].get(group)) for group in groups))
        for name, layers in rows.items() for row in layers
    ]  # fmt: skip
    cells.sort(key=lambda cell: int(cell[1 if several else 0]))
    first = 4 if several else 3
    return [*parts, _section("Layers", table(head, cells, range(first, len(head))))]


def _bytes_table(contents: Mapping[str, Any]) -> str:
    rows = [(escape(name), f"{row['files']:,}", f"{row['bytes']:,}") for name, row in contents["parts"].items()]
    rows += [(f"of onnx: {escape(name)}", "", f"{size:,}") for name, size in contents["outside_layers"].items()]
    return table(("part", "files", "bytes"), rows, {1, 2})


def _engines(bundles: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(name, engine) for name, facts in bundles.items() for engine in facts["engines"]]
    if not rows:
        return _section("Engines", '<p class="note">None were built.</p>')
    head = ("", *rows[0][1]) if len(bundles) > 1 else tuple(rows[0][1])
    cells = [(*((name,) if len(bundles) > 1 else ()), *map(_figure, engine.values())) for name, engine in rows]
    return _section("Engines", table(head, cells, ()))


def _two_columns(values: Mapping[str, Any]) -> str:
    if not values:
        return '<p class="note">None.</p>'
    return table(("", "value"), [(escape(name), _figure(value)) for name, value in values.items()], ())


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else escape(str(value))
