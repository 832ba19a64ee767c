"""Figures of how a model was quantized: error by layer and expert, scales found, the selected samples against random ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ecmfq_export.validate.plots import BLUE, GREEN, GREY, ORANGE, RED, svg

_COLORS = (BLUE, ORANGE, GREEN, RED, GREY)
SELECTION_LABELS = {
    "objective": "objective of the selection", "coverage": "experts with enough tokens", "fewest_tokens": "tokens of the least used expert",
    "least_modality_mass": "mass of an expert's rarer modality", "usage_std": "deviation of expert usage",
}  # fmt: skip


def expert_groups(layers: list[dict[str, Any]]) -> list[str]:
    """Groups of weights that experts have one each of, in order of appearance."""
    return list(dict.fromkeys(name for row in layers for name, errors in row["errors"].items() if len(errors) > 1))


def error_plot(layers: list[dict[str, Any]]) -> str:
    """Relative output error of every expert in every layer: brighter is worse; white where an expert saw no token."""
    groups = expert_groups(layers)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        grids = [_grid(layers, name) for name in groups]
        known = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
        low, high = (float(known.min()), float(known.max())) if len(known) else (-1.0, 0.0)
        for axes, name, grid in zip(panels, groups, grids, strict=True):
            image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="magma", vmin=low, vmax=max(high, low + 1e-3),
                                interpolation="nearest")  # fmt: skip
            axes.grid(visible=False)
            axes.set(xlabel="expert", title=name)
            shown = _thinned(range(len(layers)))
            axes.set_yticks(shown, [str(layers[i]["layer"]) for i in shown])
        panels[0].set_ylabel("decoder layer")
        figure.colorbar(image, ax=list(panels), label="log10 of relative error", shrink=0.9)

    return svg("Error by layer and expert", 10, min(7.0, 1.6 + 0.22 * max(len(layers), 4)), draw)


def error_lines(layers: list[dict[str, Any]]) -> str:
    """Relative output error of each group of weights by layer: of experts the median, from the smallest to the largest shaded."""
    groups = list(dict.fromkeys(name for row in layers for name in row["errors"]))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, color in zip(groups, _cycle(len(groups)), strict=True):
            rows = [(row["layer"], _finite(row["errors"][name])) for row in layers if name in row["errors"]]
            rows = [(index, values) for index, values in rows if len(values)]
            if not rows:
                continue
            index = [i for i, _ in rows]
            axes.plot(index, [np.median(v) for _, v in rows], color=color, marker="o", markersize=3.5, linewidth=1.4, label=name)
            if any(len(v) > 1 for _, v in rows):
                axes.fill_between(index, [v.min() for _, v in rows], [v.max() for _, v in rows], color=color, alpha=0.16, linewidth=0)
        axes.set(xlabel="decoder layer", ylabel="relative error", title="Output error by group of weights", yscale="log")
        axes.set_xticks(_thinned([row["layer"] for row in layers]))
        if axes.lines:
            axes.legend(loc="best", fontsize=8)

    return svg("Error by group", 5.4, 3.2, draw)


def scale_plot(scales: dict[str, list[dict[str, Any]]]) -> str:
    """Range of the scales folded into each layer: all of them thin, 5% to 95% thick, the median a mark."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.7 / max(len(scales), 1)
        for place, ((name, rows), color) in enumerate(zip(scales.items(), _cycle(len(scales)), strict=True)):
            x = np.array([row["layer"] for row in rows]) + (place - (len(scales) - 1) / 2) * width
            low, five, middle, most, high = np.array([row["quantiles"] for row in rows]).T
            axes.vlines(x, low, high, color=color, linewidth=0.9)
            axes.vlines(x, five, most, color=color, linewidth=3.2, alpha=0.55)
            axes.plot(x, middle, "o", color=color, markersize=3.5, label=name)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="decoder layer", ylabel="scale", title="Smoothing scales")
        axes.set_xticks(_thinned(sorted({row["layer"] for rows in scales.values() for row in rows})))
        axes.margins(y=0.2)
        axes.legend(loc="upper left", fontsize=8, ncols=4)

    return svg("Smoothing scales", 5.4, 3.2, draw)


def selection_plot(selection: dict[str, Any]) -> str:
    """Figures of the selected samples divided by those of as many random ones; the line is random."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = [name for name, (_, random) in selection["figures"].items() if random]
        ratios = [selection["figures"][name][0] / selection["figures"][name][1] for name in names]
        axes.barh(range(len(names)), [ratio - 1 for ratio in ratios], left=1.0, height=0.55, color=BLUE)
        axes.axvline(1.0, color=GREY, linewidth=1.2)
        for y, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
            mine, random = selection["figures"][name]
            axes.annotate(f"{mine:.3g} against {random:.3g}", (max(ratio, 1.0), y), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(names)), [SELECTION_LABELS.get(name, name) for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.3)
        axes.set(xlabel="selected / random", title="Calibration samples")

    return svg("Selected samples against random ones", 7, 2.6, draw)


def _grid(layers: list[dict[str, Any]], name: str) -> np.ndarray:
    """log10 of errors [layers, experts], NaN where there is none."""
    width = max(len(row["errors"].get(name, ())) for row in layers)
    grid = np.full((len(layers), width), np.nan)
    for place, row in enumerate(layers):
        values = np.array([np.nan if v is None else v for v in row["errors"].get(name, ())], float)
        grid[place, : len(values)] = values
    with np.errstate(divide="ignore", invalid="ignore"):
        grid = np.log10(grid)
    return np.where(np.isfinite(grid), grid, np.nan)


def _finite(values: list[float | None]) -> np.ndarray:
    array = np.array([np.nan if v is None else v for v in values], float)
    return array[np.isfinite(array) & (array > 0)]


def _thinned(values: Sequence[int]) -> list[int]:
    """At most 24 of some values, evenly spread: what an axis has room for."""
    return list(values[:: -(-len(values) // 24)])


def _cycle(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]
