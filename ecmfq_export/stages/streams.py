"""Batches of samples on their way through the decoder, and the activations between two layers, in memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import prepare_inputs
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.torch_decoder import DecoderLayer
from ecmfq_export.runtime import host_inputs
from ecmfq_export.runtime.sample import ProcessedSample

BATCH_TOKENS = 2048
WINDOW = 64
MEMORY_LIMIT = 1 << 30
"""Bytes of activations kept in memory; what comes after goes to disk."""


@dataclass(frozen=True)
class Batch:
    """Right-padded samples, B of them, S tokens of the longest; the activations lie in an :class:`ActivationStore`.

    Attributes:
        index: number of the batch, its key in the store.
        samples: their numbers in the list that was prepared.
        cos, sin: float32 [B, S, head_dim].
        types: int64 [B, S], 0 text, 1 vision.
        lengths: int64 [B].
        num_deepstack: DeepStack tensors in the store.
    """

    index: int
    samples: list[int]
    cos: torch.Tensor
    sin: torch.Tensor
    types: torch.Tensor
    lengths: torch.Tensor
    num_deepstack: int

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, S], False at padding."""
        return torch.arange(self.types.shape[1]) < self.lengths.unsqueeze(1)

    @property
    def mask(self) -> torch.Tensor:
        """Additive causal mask [B, 1, S, S]; made when asked for, it is the largest of a batch's inputs."""
        length = self.types.shape[1]
        return torch.from_numpy(host_inputs.attention_mask(np.zeros(len(self.lengths), np.int64), length, length)).float()


class ActivationStore:
    """Float32 tensors by name; beyond `limit` bytes they are files in a temporary directory that :meth:`close` removes."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._limit, self._held = limit, 0
        self._memory: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Keep `value` under `name`, in place of what was there."""
        self.drop(name)
        value = value.detach().float().contiguous()
        size = value.numel() * 4
        if self._held + size <= self._limit:
            self._memory[name] = value
            self._held += size
            return
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="ecmfq-activations-")
        value.numpy().tofile(self._path(name))
        self._shapes[name] = tuple(value.shape)

    def get(self, name: str) -> torch.Tensor:
        """The tensor kept under `name`; not to be changed in place."""
        if name in self._memory:
            return self._memory[name]
        shape = self._shapes[name]
        return torch.from_numpy(np.fromfile(self._path(name), np.float32)).view(shape)

    def drop(self, name: str) -> None:
        """Forget `name`, if it is there."""
        held = self._memory.pop(name, None)
        if held is not None:
            self._held -= held.numel() * 4
        elif self._shapes.pop(name, None) is not None:
            self._path(name).unlink()

    def names(self) -> list[str]:
        """Everything kept, sorted."""
        return sorted([*self._memory, *self._shapes])

    def close(self) -> None:
        """Forget everything."""
        self._memory.clear()
        self._shapes.clear()
        self._held = 0
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _path(self, name: str) -> Path:
        if self._directory is None:
            raise KeyError(name)
        return Path(self._directory.name) / name.replace("/", "_")


def prepare_batches(
    model: MoEVLM, samples: Iterable[ProcessedSample], store: ActivationStore, *, batch_tokens: int = BATCH_TOKENS,
    stream: str = "hidden",
) -> Iterator[Batch]:
    """Run the vision tower and the embeddings, batch by batch, into `store` (``{stream}/{index}``, ``deepstack.{i}/{index}``).

    Samples are sorted by length within windows of 64, so that little is padding; a batch holds at most `batch_tokens` tokens,
    padding included, or one sample.

    Raises:
        UserError: a sample that is longer than the model's positions.
    """
    vision: torch.nn.Module | None = None
    index = 0
    for window in _windows(enumerate(samples)):
        for group in _groups(sorted(window, key=lambda item: item[1].length), batch_tokens):
            longest = group[-1][1].length
            if longest > model.spec.max_position_embeddings:
                raise UserError(f"sample {group[-1][0]} has {longest} tokens, the model takes {model.spec.max_position_embeddings}",
                                "use smaller images or shorter texts")
            if vision is None and any(sample.pixel_values is not None for _, sample in group):
                vision = model.vision_module()
            inputs = prepare_inputs(model, [sample for _, sample in group], vision=vision)
            store.put(f"{stream}/{index}", inputs.inputs_embeds)
            for i, deep in enumerate(inputs.deepstack):
                store.put(f"deepstack.{i}/{index}", deep)
            yield Batch(index, [number for number, _ in group], inputs.cos.float(), inputs.sin.float(), inputs.token_types,
                        inputs.lengths, len(inputs.deepstack))
            index += 1


def _windows(items: Iterable[tuple[int, ProcessedSample]]) -> Iterator[list[tuple[int, ProcessedSample]]]:
    window = []
    for item in items:
        window.append(item)
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def _groups(window: list[tuple[int, ProcessedSample]], batch_tokens: int) -> Iterator[list[tuple[int, ProcessedSample]]]:
    group: list[tuple[int, ProcessedSample]] = []
    for item in window:
        if group and item[1].length * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(item)
    yield group


def add_deepstack(hidden: torch.Tensor, layer: int, batch: Batch, store: ActivationStore) -> torch.Tensor:
    """A layer's output plus the DeepStack features that belong to it."""
    return hidden + store.get(f"deepstack.{layer}/{batch.index}") if layer < batch.num_deepstack else hidden


@torch.no_grad()
def advance(
    layer: DecoderLayer, index: int, batches: Iterable[Batch], store: ActivationStore, stream: str,
    into: str | None = None, forward: Callable[[torch.Tensor, Batch], torch.Tensor] | None = None,
) -> None:
    """Move a stream through one layer: ``{stream}/{i}`` becomes the layer's output, kept under `into` (default: in its place)."""
    for batch in batches:
        hidden = store.get(f"{stream}/{batch.index}")
        out = layer.forward(hidden, batch.cos, batch.sin, batch.mask) if forward is None else forward(hidden, batch)
        store.put(f"{into or stream}/{batch.index}", add_deepstack(out, index, batch, store))
