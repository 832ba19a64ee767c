"""Two bundles side by side, as plain data; :mod:`ecmfq_export.bundle_facts` reads each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecmfq_export.bundle_facts import bundle_facts


@dataclass(frozen=True)
class Comparison:
    """What two bundles have and where they differ.

    Attributes:
        first, second: their facts.
        settings: (name, A, B) of those that differ; None where a bundle has no such setting.
        bytes: (what, A, B), all of them.
        evaluation: (figure, A, B), all that either has.
        layers: (index, row of A, row of B), {} where one has no such layer.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    settings: list[tuple[str, Any, Any]]
    bytes: list[tuple[str, Any, Any]]
    evaluation: list[tuple[str, Any, Any]]
    layers: list[tuple[int, dict[str, Any], dict[str, Any]]]


def compare(first: Path, second: Path) -> Comparison:
    """Read two bundles and put them side by side.

    Raises:
        BundleError: one is no bundle.
    """
    a, b = bundle_facts(first), bundle_facts(second)
    heads = [(name, a[name], b[name]) for name in ("target", "version")]
    settings = [*heads, *_merge(a["settings"], b["settings"])]
    sizes = [_sizes(facts) for facts in (a, b)]
    rows = [{row["layer"]: row for row in facts["layers"]} for facts in (a, b)]
    layers = [(index, rows[0].get(index, {}), rows[1].get(index, {})) for index in sorted({*rows[0], *rows[1]})]
    return Comparison(a, b, [row for row in settings if row[1] != row[2]], _merge(*sizes), _merge(a["evaluation"], b["evaluation"]), layers)


def difference(a: Any, b: Any) -> str:
    """B relative to A: a percentage of counts and figures, nothing where one is missing or they are equal."""
    if type(a) not in (int, float) or type(b) not in (int, float) or a == b:
        return ""
    return f"{(b - a) / a:+.2%}" if a else f"{b - a:+.4g}"


def _sizes(facts: dict[str, Any]) -> dict[str, int]:
    sizes = {f"decoder layers, {kind}": sum(row["bytes"][kind] for row in facts["layers"]) for kind in ("int4", "int8", "scales", "float")}
    sizes |= facts["outside_layers"]
    return sizes | {f"part {name}": row["bytes"] for name, row in facts["parts"].items()}


def _merge(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, of A, of B) over all names, in A's order and then B's."""
    return [(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b))]
