"""Figures of decoder layers, of one model or of two side by side: bytes by precision, and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ecmfq_export.validate.plots import BLUE, GREEN, GREY, ORANGE, RED, svg

_KINDS = {"int4": BLUE, "int8": GREEN, "scales": ORANGE, "float": GREY}
_SERIES = (BLUE, ORANGE, GREEN, RED, GREY)
_HATCHES = ("", "///")


def bytes_by_layer_plot(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Stacked bars of each layer's bytes by precision; several models stand beside each other, the second one hatched.

    Args:
        models: label to rows {layer, bytes {precision: bytes}}.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / max(len(models), 1)
        for place, (label, rows) in enumerate(models.items()):
            x = np.array([row["layer"] for row in rows], float) + (place - (len(models) - 1) / 2) * width
            below = np.zeros(len(rows))
            for kind, color in _KINDS.items():
                sizes = np.array([row["bytes"][kind] for row in rows], float) / 1e6
                if sizes.any():
                    axes.bar(x, sizes, width * 0.92, bottom=below, color=color, hatch=_HATCHES[place % 2], edgecolor="white", linewidth=0.3,
                             label=f"{label}: {kind}" if len(models) > 1 else kind)  # fmt: skip
                below += sizes
        axes.set(xlabel="decoder layer", ylabel="MB", title="Bytes by layer and precision")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.3)
        axes.legend(loc="upper left", fontsize=8, ncols=4)

    return svg("Bytes by layer", 10, 3.2, draw)


def errors_by_layer_plot(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """SQNR of each layer's output (left), and the median error of each group of weights (right), where they are known.

    Args:
        models: label to rows {layer, sqnr_db, errors {group: median}}.
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        groups = list(dict.fromkeys(name for rows in models.values() for row in rows for name in row["errors"]))
        for place, (label, rows) in enumerate(models.items()):
            style = ("-", "--")[place % 2]
            known = [(row["layer"], row["sqnr_db"]) for row in rows if row["sqnr_db"] is not None]
            if known:
                left.plot(*zip(*known, strict=True), style, marker="o", markersize=3.5, color=_SERIES[place % 5], label=label)
            for index, group in enumerate(groups):
                points = [(row["layer"], row["errors"][group]) for row in rows if row["errors"].get(group, 0) > 0]
                if points:
                    right.plot(*zip(*points, strict=True), style, marker="o", markersize=3.5, color=_SERIES[index % 5],
                               label=f"{label}: {group}" if len(models) > 1 else group)  # fmt: skip
        left.set(xlabel="decoder layer", ylabel="SQNR, dB (higher is closer)", title="Layer outputs against floating point")
        right.set(xlabel="decoder layer", ylabel="relative error", title="Median error by group of weights")
        if right.lines:
            right.set_yscale("log")
        for axes in (left, right):
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="best", fontsize=8)

    return svg("Errors by layer", 10, 3.4, draw)
