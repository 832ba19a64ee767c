"""Straight lines through measured depths: time = a + b x layers, what is left over, and what they say of a deeper model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DEPTH = 48
"""Decoder layers of Qwen3-VL-30B-A3B."""


def line(layers: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Least squares of `values` over `layers`, two depths at least.

    Returns:
        ``a``, ``b``, ``at_48``, ``residuals`` (measured minus line, in the order of `layers`), and ``largest_residual``: the largest of
        them by magnitude, as a share of its value (0 for two depths, which a line always meets).
    """
    b, a = np.polyfit(np.asarray(layers, float), np.asarray(values, float), 1)
    residuals = np.asarray(values, float) - (a + b * np.asarray(layers, float))
    shares = np.abs(residuals) / np.maximum(np.abs(values), 1e-9)
    return {"a": round(float(a), 3), "b": round(float(b), 3), f"at_{DEPTH}": round(float(a + b * DEPTH), 1),
            "residuals": [round(float(r), 3) for r in residuals], "largest_residual": round(float(shares.max()), 4)}


def spread(values: Sequence[float]) -> float:
    """How far the largest value lies above the smallest, as a share of the smallest."""
    return round(max(values) / max(min(values), 1e-9) - 1, 4)


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Fits of the finished runs of one setting: of the whole and of each stage, CPU and wall seconds; peaks side by side.

    Returns:
        None for fewer than two depths. Of a depth that was run twice the last run counts.
    """
    by_depth = {run["layers"]: run for run in runs if run.get("finished", run["returncode"] == 0)}
    layers = sorted(by_depth)
    if len(layers) < 2:
        return None
    out: dict[str, Any] = {"layers": layers, "stages": {}}
    names = [name for name in by_depth[layers[-1]]["stages"] if all(name in by_depth[n]["stages"] for n in layers)]
    for name in ["whole", *names]:
        costs = [by_depth[n]["whole"] if name == "whole" else by_depth[n]["stages"][name] for n in layers]
        entry = {kind: line(layers, [cost[kind] for cost in costs]) for kind in ("cpu_seconds", "seconds")}
        for kind in ("peak_bytes", "anonymous_bytes"):
            values = [cost[kind] for cost in costs]
            entry[kind] = {"values": values, "spread": spread(values), "bytes_a_layer": round(line(layers, values)["b"])}
        if name == "whole":
            out["whole"] = entry
        else:
            out["stages"][name] = entry
    return out


def table(summary: dict[str, Any]) -> str:
    """The summary as text: a row a stage."""
    layers = summary["layers"]
    rows = [f"{'stage':<16}" + "".join(f"{f'{n} layers':>13}" for n in layers) + f"{'spread':>8}{'CPU s = a + b L':>22}{'off':>7}"
            + f"{f'CPU at {DEPTH}':>12}"]
    for name, entry in {**summary["stages"], "whole": summary["whole"]}.items():
        peaks = "".join(f"{value / 1e9:>10.2f} GB" for value in entry["peak_bytes"]["values"])
        cpu = entry["cpu_seconds"]
        said = f"{cpu['a']:.0f} + {cpu['b']:.1f} L"
        rows.append(f"{name:<16}{peaks}{entry['peak_bytes']['spread']:>8.1%}{said:>22}{cpu['largest_residual']:>7.1%}"
                    f"{cpu[f'at_{DEPTH}'] / 60:>8.1f} min")
    return "\n".join(rows)
