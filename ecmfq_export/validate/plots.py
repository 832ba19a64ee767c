"""The report's figures, as inline SVG without anything from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ecmfq_export.validate.artifact_bytes import LABELS

BLUE, ORANGE, GREEN, GREY, RED = "#3060a8", "#d9772b", "#3d8b57", "#8a8f98", "#b3392f"
MODEL_COLORS = {"float": GREY, "quantized": BLUE, "onnx": ORANGE}
MODEL_LABELS = {"float": "floating point", "quantized": "quantized, PyTorch", "onnx": "quantized, ONNX Runtime"}
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e6ea", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#9aa0a8",
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip


def svg(name: str, width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """What `draw` puts on an empty figure of width x height inches, as an SVG element with `name` as its label."""
    # A hash salt of its own keeps a figure's ids apart from those of the page's other figures, and the bytes reproducible.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', rf'<svg role="img" aria-label="{name}" \1>', text, count=1)
    # Text as text: let the page's own sans-serif draw it.
    return text.replace("xlink:href", "href").replace("'DejaVu Sans', ", "")


def layer_plot(report: dict[str, Any]) -> str:
    """SQNR of every layer's output; a layer without any difference is drawn at the top, as a hollow mark."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        index = [layer["index"] for layer in report["layers"]]
        series = (("quantized_vs_onnx", "ONNX Runtime against quantized PyTorch", ORANGE, "s"),
                  ("float_vs_quantized", "quantized against floating point", BLUE, "o"))  # fmt: skip
        values = {key: [layer[key]["sqnr_db"] for layer in report["layers"]] for key, *_ in series}
        known = [v for rows in values.values() for v in rows if v is not None]
        top = (max(known) if known else 100.0) + 10
        for key, label, color, marker in series:
            drawn = [top if v is None else v for v in values[key]]
            axes.plot(index, drawn, color=color, marker=marker, markersize=4.5, linewidth=1.6, label=label)
            equal = [i for i, v in zip(index, values[key], strict=True) if v is None]
            axes.plot(equal, [top] * len(equal), marker, color=color, markerfacecolor="white", markersize=7)
        axes.set(xlabel="decoder layer", ylabel="SQNR, dB (higher is closer)", title="Hidden states after each layer")
        if len(index) <= 24:
            axes.set_xticks(index)
        axes.set_ylim(bottom=min(0.0, *(known or [0.0])))
        axes.legend(loc="lower left")

    return svg("SQNR by layer", 5.4, 3.1, draw)


def kl_plot(report: dict[str, Any]) -> str:
    """Histograms of KL by decade."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        histogram = report["kl_histogram"]
        edges = np.array(histogram["log10_edges"])
        for key, label, color in (("float_vs_quantized", "floating point to quantized", BLUE),
                                  ("quantized_vs_onnx", "quantized PyTorch to ONNX Runtime", ORANGE)):  # fmt: skip
            axes.stairs(histogram[key], edges, fill=True, alpha=0.45, color=color, label=label)
            axes.stairs(histogram[key], edges, color=color, linewidth=1.2)
            mean = report["logits"][key]["kl_mean"]
            if mean > 0:
                axes.axvline(np.log10(mean), color=color, linestyle="--", linewidth=1.2)
        used = np.flatnonzero(np.add(histogram["float_vs_quantized"], histogram["quantized_vs_onnx"]))
        if len(used):
            axes.set_xlim(edges[used[0]] - 0.25, edges[used[-1] + 1] + 0.25)
        axes.xaxis.set_major_formatter(lambda x, _: f"1e{x:g}" if float(x).is_integer() else "")
        axes.set(xlabel="KL divergence, nats (dashed: mean)", ylabel="positions",
                 title="Final logits")  # fmt: skip
        # Room above the bars for the legend.
        axes.set_ylim(0, 1.35 * max(1, *histogram["float_vs_quantized"], *histogram["quantized_vs_onnx"]))
        axes.legend(loc="upper left", fontsize=8)

    return svg("KL divergence", 5.4, 3.1, draw)


def bytes_plot(report: dict[str, Any]) -> str:
    """What the checkpoint takes by precision, and each recipe's layers, beside float16."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        sizes = report["bytes"]
        unit, name = _unit(sizes["whole"]["float16"])
        rows = [("whole model, float16", [("float", sizes["whole"]["float16"])]),
                ("whole model, now", list(sizes["by_precision"].items()))]  # fmt: skip
        for key, label in LABELS.items():
            if key in sizes["layers"]:
                layers = sizes["layers"][key]
                rows.append((f"{label}, float16", [("float", layers["float16"])]))
                rows.append((f"{label}, now", [("int4" if key.startswith("w4") else "int8", layers["stored"])]))
        colors = {"int4": BLUE, "int8": GREEN, "scales": ORANGE, "float": GREY}
        labels = {"int4": "int4", "int8": "int8", "scales": "scales", "float": "floating point"}
        seen: set[str] = set()
        for y, (_, parts) in enumerate(rows):
            left = 0.0
            for kind, size in parts:
                axes.barh(y, size / unit, left=left, color=colors[kind], height=0.62,
                          label=None if kind in seen else labels[kind])  # fmt: skip
                seen.add(kind)
                left += size / unit
            axes.annotate(f"{left:.3g} {name}", (left, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.set(xlabel=name, title="Bytes")
        axes.legend(loc="lower right")

    return svg("Bytes by precision", 5.4, 0.6 + 0.42 * (2 + 2 * len(set(report["bytes"]["layers"]) - {"quantized"})) + 0.6, draw)


def _unit(size: float) -> tuple[float, str]:
    for power, name in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return 1000.0**power, name
    return 1.0, "bytes"


def accuracy_plot(report: dict[str, Any]) -> str:
    """Exact-match accuracy by question type with Wilson's 95% intervals."""

    def draw(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        kinds = list(report["accuracy"]["float"])
        width = 0.26
        for offset, model in enumerate(MODEL_COLORS):
            rows = [report["accuracy"][model][kind] for kind in kinds]
            x = np.arange(len(kinds)) + (offset - 1) * width
            values = np.array([row["accuracy"] for row in rows])
            spread = np.abs(np.array([[row["low"] for row in rows], [row["high"] for row in rows]]) - values)
            axes.bar(x, values, width * 0.94, color=MODEL_COLORS[model], label=MODEL_LABELS[model], yerr=spread,
                     error_kw={"ecolor": "#33373d", "elinewidth": 0.8, "capsize": 1.8})  # fmt: skip
        labels = [f"{kind}\n({report['accuracy']['float'][kind]['total']})" for kind in kinds]
        axes.set_xticks(range(len(kinds)), [label.replace("$", r"\$") for label in labels], fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.set(ylim=(0, 1.14), ylabel="exact match", title="Accuracy by question type (number of questions)")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}" if y <= 1.0 else "")
        axes.legend(loc="upper right", ncols=3, fontsize=8)

    return svg("Accuracy by type", 10, 3.4, draw)


def expert_plot(report: dict[str, Any]) -> str:
    """How much each expert is used, text and vision tokens apart: 1 is an equal share."""
    layers = [layer for layer in report["layers"] if layer["expert_usage"]]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        image = None
        for axes, kind in zip(panels, ("text", "vision"), strict=True):
            counts = np.array([layer["expert_usage"][kind] for layer in layers], float)
            share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * counts.shape[1]
            image = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=3, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xlabel="expert", title=f"{kind} tokens")
            if len(layers) <= 24:
                axes.set_yticks(range(len(layers)), [str(layer["index"]) for layer in layers])
        panels[0].set_ylabel("decoder layer")
        if image is not None:
            figure.colorbar(image, ax=list(panels), label="use / equal share", extend="max", shrink=0.9)

    return svg("Expert usage", 10, min(7.0, 1.4 + 0.22 * max(len(layers), 4)), draw)
