"""What `inspect` and `compare` print: tables of facts, one for each question that a reader has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ecmfq_export.bundle_compare import Comparison, difference
from ecmfq_export.describe import printable, rows, size_text
from ecmfq_export.layer_facts import PRECISIONS

RIGHT = "right"
_NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
"""For tables of many columns: 80 of them are enough."""
_LEGEND = ("dB: SQNR of the layer's output against floating point; error: the largest of the medians of its groups of weights, squared "
           "output error over squared output")  # fmt: skip


def print_description(facts: dict[str, Any], console: Console) -> None:
    """Facts of :func:`ecmfq_export.describe.describe`: a bundle by its parts, everything else as fields, then its layers."""
    contents = facts.get("contents")
    title = printable(f"{facts['kind']}: {facts['path']}")
    if contents is None:
        table = Table("field", "value", title=escape(title), title_justify="left")
        for key, value in rows(facts):
            table.add_row(escape(key), escape(value))
        console.print(table)
        _layers(facts.get("layer_bytes") or (facts.get("checkpoint") or {}).get("layer_bytes") or [], console)
        return
    hashes = "hashes hold" if facts["verified"] else "hashes not checked (--verify checks them)"
    version = contents["version"] or "unknown"
    size = f"{facts['bytes']:,} bytes in {len(facts['files'])} files"
    made = printable(f"for {contents['target']}, by ecmfq_export {version}; {size}; {hashes}")
    console.print(f"{title}\n{made}", highlight=False, markup=False, soft_wrap=True)
    parts = Table("part", title="parts", title_justify="left")
    _columns(parts, ("files", "bytes"))
    for name, row in contents["parts"].items():
        parts.add_row(escape(printable(name)), str(row["files"]), f"{row['bytes']:,}")
        for what, size in contents["outside_layers"].items() if name == "onnx" else ():
            parts.add_row(f"  of it {what}", "", f"{size:,}")
    console.print(parts)
    _layers(contents["layers"], console)
    _engines([contents], console)
    if contents["evaluation"]:
        table = Table("figure", title="report", title_justify="left")
        _columns(table, ("value",))
        for name, value in contents["evaluation"].items():
            table.add_row(escape(printable(name)), shown(value))
        console.print(table)
    table = Table("setting", "value", title="settings", title_justify="left")
    for name, value in contents["settings"].items():
        table.add_row(escape(printable(name)), escape(printable(value)))
    console.print(table)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Two bundles side by side: what differs in their settings, bytes, precision and errors by layer, figures, engines."""
    first, second = comparison.first, comparison.second
    console.print(f"A: {printable(first['path'])}\nB: {printable(second['path'])}", highlight=False, markup=False, soft_wrap=True)
    _pairs("settings that differ", comparison.settings, console, empty="every setting is the same")
    _pairs("bytes", comparison.bytes, console, change=True)
    _pairs("report", comparison.evaluation, console, change=True, empty="no figure is in either report")
    table = Table("layer", "attention", "mlp", title="layers, A / B", title_justify="left", **_NARROW)
    _columns(table, ("bytes A", "bytes B", "dB A", "dB B", "error A", "error B"))
    for index, a, b in comparison.layers:
        table.add_row(str(index), _both(a, b, "attention"), _both(a, b, "mlp"), *(_total(row) for row in (a, b)),
                      *(shown(row.get("sqnr_db")) for row in (a, b)), *(shown(worst_error(row)) for row in (a, b)))
    console.print(table)
    console.print(_LEGEND, highlight=False, soft_wrap=True)
    _engines([first, second], console)


def worst_error(row: dict[str, Any]) -> float | None:
    """The largest median error among a layer's groups of weights; None where none is known."""
    return max(row.get("errors", {}).values(), default=None)


def shown(value: Any) -> str:
    """A figure with four digits, a count with separators, nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else escape(printable(value))


def _columns(table: Table, headers: Sequence[str]) -> None:
    for header in headers:
        table.add_column(header, justify=RIGHT, no_wrap=True)


def _total(row: dict[str, Any]) -> str:
    return size_text(sum(row["bytes"].values())) if row else ""


def _both(a: dict[str, Any], b: dict[str, Any], key: str) -> str:
    left, right = a.get(key, ""), b.get(key, "")
    return left if left == right else f"{left or '-'} / {right or '-'}"


def _layers(layers: list[dict[str, Any]], console: Console) -> None:
    if not layers:
        return
    errors = any(row.get("sqnr_db") is not None or row.get("errors") for row in layers)
    table = Table("layer", "attn", "mlp", title="layers: bytes by precision", title_justify="left", **_NARROW)
    _columns(table, (*PRECISIONS, "all", *(("dB", "error") if errors else ())))
    for row in layers:
        table.add_row(str(row["layer"]), row["attention"], row["mlp"], *(size_text(row["bytes"][kind]) for kind in PRECISIONS), _total(row),
                      *((shown(row.get("sqnr_db")), shown(worst_error(row))) if errors else ()))
    console.print(table)
    if errors:
        console.print(_LEGEND, highlight=False, soft_wrap=True)


def _engines(bundles: list[dict[str, Any]], console: Console) -> None:
    rows = [(name, engine) for name, facts in zip("AB", bundles, strict=False) for engine in facts["engines"]]
    if not rows:
        console.print("no engines" if len(bundles) == 1 else "no engines in either", highlight=False)
        return
    # Engines stand in columns: they are few, and their facts are many.
    table = Table("", title="engines", title_justify="left")
    for name, engine in rows:
        label = f"{engine['target']}/{engine['part']}"
        table.add_column(escape(printable(f"{name}: {label}" if len(bundles) > 1 else label)))
    for key in (key for key in rows[0][1] if key not in ("target", "part")):
        table.add_row(key, *(shown(engine[key]) for _, engine in rows))
    console.print(table)


def _pairs(
    title: str, pairs: list[tuple[str, Any, Any]], console: Console, change: bool = False, empty: str = ""
) -> None:
    if not pairs:
        console.print(f"{title}: {empty or 'nothing'}", highlight=False)
        return
    table = Table("", title=title, title_justify="left")
    for header in ("A", "B", *(("B to A",) if change else ())):
        table.add_column(header, justify=RIGHT if change else "left")
    for name, a, b in pairs:
        table.add_row(escape(printable(name)), shown(a), shown(b), *((difference(a, b),) if change else ()))
    console.print(table)
