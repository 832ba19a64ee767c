"""The calibration directory: the chosen samples, ready to run, split into search and held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ecmfq_export import bundle
from ecmfq_export.errors import BundleError
from ecmfq_export.json_file import read_json
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors
from ecmfq_export.runtime.sample import ProcessedSample

SAMPLES, SELECTION = "samples.safetensors", "selection.json"


class LazySamples(Sequence[ProcessedSample]):
    """Samples made when they are asked for: their image patches are the largest part of a calibration directory.

    Args:
        make: the sample of a number.
        numbers: which ones, in which order.
    """

    def __init__(self, make: Callable[[int], ProcessedSample], numbers: Sequence[int]) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> ProcessedSample:  # type: ignore[override]  # no slices: choose() does that
        return self._make(self._numbers[index])

    def choose(self, keep: Sequence[bool]) -> LazySamples:
        """Those for which `keep` says so."""
        return LazySamples(self._make, [number for number, kept in zip(self._numbers, keep, strict=True) if kept])


@dataclass(frozen=True)
class Calibration:
    """What calibrate left for the stages after it.

    Attributes:
        samples: processed samples, read when they are asked for.
        heldout: bool, one a sample: kept out of every search and every Hessian, for gates.
        gamma: text token weight before balancing (MBQ's gradient ratio, or the configured value).
        gamma_by_layer: measured ratios of each layer's MLP, None where unknown; empty where gamma was configured.
        gamma_by_layer_attention: the same of its attention.
    """

    samples: LazySamples
    heldout: list[bool]
    gamma: float
    gamma_by_layer: list[float | None] = field(default_factory=list)
    gamma_by_layer_attention: list[float | None] = field(default_factory=list)


def save_calibration(
    directory: Path, samples: Sequence[ProcessedSample], names: list[str], heldout: list[bool], gamma: float, report: dict[str, Any]
) -> None:
    """Write the samples and what is known of them into a stage's working directory; patches of one sample are in memory at a time,
    where `samples` makes them when asked."""
    tensors: dict[str, TensorToWrite] = {}
    for i, sample in enumerate(samples):
        small = {"input_ids": sample.input_ids, "answer_mask": sample.answer_mask.astype(np.uint8)}
        if sample.pixel_values is not None and sample.image_grid_thw is not None:
            small["image_grid_thw"] = np.ascontiguousarray(sample.image_grid_thw, np.int64)
            tensors[f"{i:05d}.pixel_values"] = TensorToWrite(torch.float32, sample.pixel_values.shape, partial(_patches, samples, i))
        tensors |= {f"{i:05d}.{part}": TensorToWrite.of(torch.from_numpy(value)) for part, value in small.items()}
    write_safetensors(directory / SAMPLES, tensors)
    rows = [{"name": name, "heldout": held} for name, held in zip(names, heldout, strict=True)]
    bundle.write_json(directory / SELECTION, {"samples": rows, "gamma": gamma, "report": report})


def _patches(samples: Sequence[ProcessedSample], index: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(samples[index].pixel_values, np.float32))


def load_calibration(directory: Path) -> Calibration:
    """Read a finished calibration directory.

    Raises:
        BundleError: it is no calibration directory, or a file in it was changed.
    """
    bundle.verify(directory, bundle.read_manifest(directory, "calibrate"))
    try:
        selection = read_json(directory / SELECTION)
        rows = selection["samples"]
        with safe_open(directory / SAMPLES, framework="numpy") as file:
            keys = set(file.keys())
        missing = [i for i in range(len(rows)) if not {f"{i:05d}.input_ids", f"{i:05d}.answer_mask"} <= keys]
        if missing:
            raise KeyError(f"{SAMPLES} lacks sample {missing[0]}")
        samples = LazySamples(partial(_read_sample, directory / SAMPLES, frozenset(keys)), range(len(rows)))
        report = selection["report"]
        return Calibration(samples, [bool(row["heldout"]) for row in rows], float(selection["gamma"]),
                           report.get("gamma_by_layer", []), report.get("gamma_by_layer_attention", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BundleError(f"{directory} cannot be read: {error}", "run calibrate again") from None


def _read_sample(path: Path, keys: frozenset[str], i: int) -> ProcessedSample:
    with safe_open(path, framework="numpy") as file:

        def array(part: str) -> np.ndarray | None:
            name = f"{i:05d}.{part}"
            return file.get_tensor(name) if name in keys else None

        return ProcessedSample(file.get_tensor(f"{i:05d}.input_ids"), array("pixel_values"), array("image_grid_thw"),
                               file.get_tensor(f"{i:05d}.answer_mask").astype(bool))


def split_heldout(groups: list[str], fraction: float, seed: int) -> list[bool]:
    """Choose about `fraction` of the samples to hold out, whole groups (samples of one image) at a time, at least one on
    either side; fewer than two groups are split by sample.

    Args:
        groups: one name a sample.
    """
    if len(set(groups)) < 2:
        groups = [str(i) for i in range(len(groups))]
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = max(1, round(fraction * len(groups)))
    chosen: set[str] = set()
    taken = 0
    for i in order[:-1]:
        if taken >= wanted:
            break
        chosen.add(names[i])
        taken += groups.count(names[i])
    return [group in chosen for group in groups]
