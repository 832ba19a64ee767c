"""What a stage starts its next layer from, kept after every layer, so that a killed run goes on behind the last one it finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ecmfq_export import bundle
from ecmfq_export.models.safetensors_writer import TensorToWrite, write_safetensors
from ecmfq_export.stages.ranks import ALONE, Ranks
from ecmfq_export.stages.streams import ActivationStore, Batch

STATE = ".state"
"""Prefix of the states' directories inside a stage's working directory."""


@dataclass(frozen=True)
class Side:
    """Streams of one set of samples: the tensors ``{name}/{batch}`` of a store, for each of `names`."""

    batches: Sequence[Batch]
    store: ActivationStore
    names: tuple[str, ...]


class LayerStates:
    """The states of one stage's run.

    Args:
        work: the stage's working directory, kept from one run to the next.
        sides: by name, what is between two layers.
        ranks: who writes. Where batches are shared out, every rank writes its own (`shared`), else rank 0 writes all.
    """

    def __init__(self, work: Path, sides: Mapping[str, Side], ranks: Ranks = ALONE, shared: bool = False) -> None:
        self._work, self._sides, self._ranks, self._shared = work, sides, ranks, shared

    def save(self, next_layer: int, log: Any, tensors: Mapping[str, torch.Tensor] | None = None, last: bool = False) -> None:
        """Keep what layer `next_layer` starts from: written beside, synced and renamed, so that it is whole or not there.

        Args:
            log: JSON, what is known of the layers before.
            tensors: the same, as tensors.
            last: whether no layer follows, so that no activations are needed.
        """
        temporary = self._work / f"{STATE}.tmp"
        if self._ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self._ranks.wait()
        for name, side in self._sides.items() if not last and (self._shared or self._ranks.first) else ():
            for batch in side.batches:
                rows = {stream: TensorToWrite.of(side.store.get(f"{stream}/{batch.index}").cpu()) for stream in side.names}
                write_safetensors(temporary / f"{name}.{batch.index}.safetensors", rows)
        self._ranks.wait()
        if not self._ranks.first:
            return
        if tensors is not None:
            write_safetensors(temporary / "results.safetensors", {name: TensorToWrite.of(t.contiguous()) for name, t in tensors.items()})
        bundle.write_json(temporary / "log.json", {"layer": next_layer, "last": last, "log": log})
        # The new state is in place before the old ones go, so that a kill in between loses nothing.
        kept = self._work / f"{STATE}.{next_layer}"
        shutil.rmtree(kept, ignore_errors=True)
        temporary.rename(kept)
        for state in self._work.glob(f"{STATE}.*"):
            if state != kept:
                shutil.rmtree(state, ignore_errors=True)

    def restore(self, upto: int) -> tuple[int, Any, dict[str, torch.Tensor]]:
        """The layer to go on with, at most `upto`, with log and tensors; streams are moved there. 0 where nothing is kept."""
        found = self._restore(upto)
        self._ranks.wait()  # nobody replaces the state before everybody has read it
        return found

    def _restore(self, upto: int) -> tuple[int, Any, dict[str, torch.Tensor]]:
        for index in range(upto, 0, -1):
            state = self._work / f"{STATE}.{index}"
            if not (state / "log.json").is_file():
                continue
            kept = json.loads((state / "log.json").read_text(encoding="utf-8"))
            for name, side in self._sides.items() if not kept["last"] else ():
                for batch in side.batches:
                    with safe_open(state / f"{name}.{batch.index}.safetensors", framework="pt") as file:
                        for stream in side.names:
                            side.store.put(f"{stream}/{batch.index}", file.get_tensor(stream))
            tensors: dict[str, torch.Tensor] = {}
            if (state / "results.safetensors").is_file():
                with safe_open(state / "results.safetensors", framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
            return index, kept["log"], tensors
        return 0, None, {}


def drop_states(work: Path) -> None:
    """Remove every state from a stage's working directory."""
    for state in work.glob(f"{STATE}.*"):
        shutil.rmtree(state)
