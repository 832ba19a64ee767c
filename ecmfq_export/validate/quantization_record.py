"""What the stages wrote down of a quantization, as the report's data: errors by layer and expert, scales, the samples' selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ecmfq_export import bundle
from ecmfq_export.errors import BundleError
from ecmfq_export.json_file import read_json

LAYERS, SCALES = "quantization.json", "smoothing_scales.safetensors"
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SELECTION_FIGURES = ("objective", "coverage", "fewest_tokens", "least_modality_mass", "usage_std")
"""Of the calibration stage's report, for the selected samples and for random ones; see docs/method.md."""


def read_record(quantized_dir: Path) -> dict[str, Any] | None:
    """The record of a quantized checkpoint, or None where it has none (a floating-point or foreign checkpoint).

    Returns:
        ``method``: its name, or None. ``layers``: [] where no samples were looked at, else for each layer ``layer``, ``weighting``,
        ``kl`` {weighting: nats}, ``errors`` {group: [experts]} (squared output error over squared output, both weighted), ``tokens``
        [experts][text, vision]. ``scales``: {name: [{layer, quantiles}]}, quantiles 0, 5%, 50%, 95%, 1 of the scales that were folded in.
        ``selection``: figures of the selected and of random samples, None where the samples are not beside the checkpoint any
        more or were not selected.

    Raises:
        BundleError: a file that is damaged.
    """
    try:
        manifest = bundle.read_manifest(quantized_dir)
    except BundleError:
        return None
    if manifest.stage == "import":
        method = f"{manifest.info.get('method')}, imported (activations: {manifest.info.get('activations')})"
        return {"method": method, "layers": [], "scales": {}, "selection": None}
    if manifest.stage != "quantize":
        return None
    record: dict[str, Any] = {"method": manifest.info.get("method"), "layers": [], "scales": {}, "selection": None}
    path = quantized_dir / LAYERS
    if path.is_file():
        try:
            record["layers"] = read_json(path)
            if not isinstance(record["layers"], list) or not all(map(_is_layer, record["layers"])):
                raise ValueError("no list of layers with their errors")
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} is damaged: {error}", "quantize again") from None
    if (quantized_dir / SCALES).is_file():
        record["scales"] = _scales(quantized_dir / SCALES)
    record["selection"] = _selection(quantized_dir.parent / "calibration", manifest.inputs.get("calibration"))
    return record


def _is_layer(row: Any) -> bool:
    """Whether a row has the form that figures are drawn from."""
    def numbers(values: Any) -> bool:
        return isinstance(values, list) and all(value is None or type(value) in (int, float) for value in values)

    if not isinstance(row, dict) or type(row.get("layer")) is not int:
        return False
    errors, kl, tokens = (row.get(key) for key in ("errors", "kl", "tokens"))
    return (
        (errors is None or (isinstance(errors, dict) and all(map(numbers, errors.values()))))
        and (kl is None or (isinstance(kl, dict) and numbers(list(kl.values()))))
        and (tokens is None or (isinstance(tokens, list) and all(numbers(counts) and None not in counts for counts in tokens)))
    )


def _scales(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                _, layer, kind = name.split(".", 2)
                values = np.asarray(file.get_tensor(name), np.float64)
                rows = found.setdefault(kind, [])
                rows.append({"layer": int(layer), "quantiles": np.quantile(values, _QUANTILES).tolist()})
    except (OSError, ValueError, TypeError, IndexError, SafetensorError) as error:
        raise BundleError(f"{path} is damaged: {error}", "quantize again") from None
    return {kind: sorted(rows, key=lambda row: row["layer"]) for kind, rows in sorted(found.items())}


def _selection(directory: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """The calibration stage's figures, if `directory` still is what the checkpoint was quantized with."""
    if fingerprint is None:
        return None
    try:
        info = bundle.read_manifest(directory, "calibrate").info
    except BundleError:
        return None
    figures = [info.get(f"{which}_{key}") for key in SELECTION_FIGURES for which in ("selected", "random")]
    if bundle.fingerprint(directory) != fingerprint or not all(type(value) in (int, float) for value in figures):
        return None
    return {"pool": info.get("pool"), "selected": info.get("selected"), "topped_up": info.get("topped_up"),
            "figures": {key: [info[f"selected_{key}"], info[f"random_{key}"]] for key in SELECTION_FIGURES}}  # fmt: skip
