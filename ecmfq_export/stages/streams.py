"""Batches of samples on their way through the decoder, and the activations between two layers, in memory or on disk."""

from __future__ import annotations

import itertools
import shutil
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
from ecmfq_export.stages.ranks import ALONE, Ranks
from ecmfq_export.stages.resources import ACTIVATION_BYTES

BATCH_TOKENS = 2048
WINDOW, WINDOW_PATCH_BYTES = 64, 1 << 28
"""Samples sorted by length together: so many, or as many as have so many bytes of image patches."""


class ActivationStore:
    """Float32 tensors by name; beyond `limit` bytes they are files, which :meth:`close` removes.

    Args:
        limit: bytes kept in memory.
        directory: where the files lie, made when the first one is needed; None for a temporary directory.
        device: where :meth:`get` puts what it reads. What is kept lies in host memory.

    Attributes:
        device: the same.
    """

    def __init__(self, limit: int = ACTIVATION_BYTES, directory: Path | None = None, device: str = "cpu") -> None:
        self.device = device
        self._limit, self._held = limit, 0
        self._memory: dict[str, torch.Tensor] = {}
        self._files: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self._wanted, self._directory = directory, directory
        self._numbers = itertools.count()

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Keep `value` under `name`, in place of what was there."""
        self.drop(name)
        value = value.detach().to("cpu", torch.float32).contiguous()
        size = value.numel() * 4
        if self._held + size <= self._limit:
            self._memory[name] = value
            self._held += size
            return
        file = self._place() / str(next(self._numbers))
        value.numpy().tofile(file)
        self._files[name] = (file, tuple(value.shape))

    def get(self, name: str) -> torch.Tensor:
        """The tensor kept under `name`; not to be changed in place."""
        if name in self._memory:
            return self._memory[name].to(self.device)
        file, shape = self._files[name]
        return torch.from_numpy(np.fromfile(file, np.float32)).view(shape).to(self.device)

    def drop(self, name: str) -> None:
        """Forget `name`, if it is there."""
        held = self._memory.pop(name, None)
        if held is not None:
            self._held -= held.numel() * 4
        elif name in self._files:
            self._files.pop(name)[0].unlink()

    def move(self, name: str, new: str) -> None:
        """Keep under `new` what is kept under `name`, without touching its values."""
        self.drop(new)
        if name in self._memory:
            self._memory[new] = self._memory.pop(name)
        else:
            self._files[new] = self._files.pop(name)

    def names(self) -> list[str]:
        """Everything kept, sorted."""
        return sorted([*self._memory, *self._files])

    def close(self) -> None:
        """Forget everything."""
        self._memory.clear()
        self._files.clear()
        self._held = 0
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = self._wanted

    def _place(self) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="ecmfq-activations-"))
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory


@dataclass(frozen=True)
class Batch:
    """Right-padded samples, B of them, S tokens of the longest; the activations lie in an :class:`ActivationStore`.

    Attributes:
        index: number of the batch, its key in the store.
        samples: their numbers in the list that was prepared.
        types: int64 [B, S], 0 text, 1 vision.
        lengths: int64 [B].
        num_deepstack: DeepStack tensors in the store; 0 for a batch without images.
        store: what keeps its rotary tables, ``cos/{index}`` and ``sin/{index}``.
        router_types: int64 [B, S], as ``models.inputs.DecoderInputs`` has them.
    """

    index: int
    samples: list[int]
    types: torch.Tensor
    lengths: torch.Tensor
    num_deepstack: int
    store: ActivationStore
    router_types: torch.Tensor | None = None

    @property
    def valid_router_types(self) -> torch.Tensor | None:
        """`router_types` without padding, [T]."""
        return None if self.router_types is None else self.router_types[self.valid]

    @property
    def cos(self) -> torch.Tensor:
        """float32 [B, S, head_dim]."""
        return self.store.get(f"cos/{self.index}")

    @property
    def sin(self) -> torch.Tensor:
        """float32 [B, S, head_dim]."""
        return self.store.get(f"sin/{self.index}")

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, S], False at padding."""
        return torch.arange(self.types.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)

    @property
    def mask(self) -> torch.Tensor:
        """Additive causal mask [B, 1, S, S]; made when asked for, it is the largest of a batch's inputs."""
        length = self.types.shape[1]
        mask = torch.from_numpy(host_inputs.attention_mask(np.zeros(len(self.lengths), np.int64), length, length)).float()
        return mask.to(self.lengths.device)


def prepare_batches(
    model: MoEVLM, samples: Iterable[ProcessedSample], store: ActivationStore, *, batch_tokens: int = BATCH_TOKENS,
    stream: str = "hidden", ranks: Ranks = ALONE,
) -> Iterator[Batch]:
    """Run the vision tower and the embeddings, batch by batch, into `store`: ``{stream}/{index}``, ``deepstack.{i}/{index}``, and the
    rotary tables.

    Samples are sorted by length within windows of 64 (fewer where images are large), so that little is padding; a batch holds at
    most `batch_tokens` tokens, padding included, or one sample.

    Args:
        ranks: each of them prepares and yields every so manieth batch; all see all samples.

    Raises:
        UserError: a sample that is longer than the model's positions.
    """
    vision: torch.nn.Module | None = None
    index = -1
    for window in _windows(enumerate(samples)):
        for group in _groups(sorted(window, key=lambda item: item[1].length), batch_tokens):
            longest = group[-1][1].length
            if longest > model.spec.max_position_embeddings:
                raise UserError(f"sample {group[-1][0]} has {longest} tokens, the model takes {model.spec.max_position_embeddings}",
                                "use smaller images or shorter texts")
            index += 1
            if index % ranks.size != ranks.rank:
                continue
            if vision is None and any(sample.pixel_values is not None for _, sample in group):
                vision = model.vision_module().to(store.device)
            inputs = prepare_inputs(model, [sample for _, sample in group], vision=vision)
            # Without an image they are zeros.
            deepstack = inputs.deepstack if bool(inputs.token_types.any()) else []
            for name, value in ((stream, inputs.inputs_embeds), ("cos", inputs.cos), ("sin", inputs.sin)):
                store.put(f"{name}/{index}", value)
            for i, deep in enumerate(deepstack):
                store.put(f"deepstack.{i}/{index}", deep)
            kinds = None if inputs.router_types is None else inputs.router_types.to(store.device)
            yield Batch(index, [number for number, _ in group], inputs.token_types.to(store.device), inputs.lengths.to(store.device),
                        len(deepstack), store, kinds)


def _windows(items: Iterable[tuple[int, ProcessedSample]]) -> Iterator[list[tuple[int, ProcessedSample]]]:
    window: list[tuple[int, ProcessedSample]] = []
    patch_bytes = 0
    for item in items:
        window.append(item)
        patch_bytes += 0 if item[1].pixel_values is None else item[1].pixel_values.nbytes
        if len(window) == WINDOW or patch_bytes >= WINDOW_PATCH_BYTES:
            yield window
            window, patch_bytes = [], 0
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


def drop_deepstack(layer: int, batches: Iterable[Batch], store: ActivationStore) -> None:
    """Forget the DeepStack features of a layer that no stream of `store` has to go through any more."""
    for batch in batches:
        store.drop(f"deepstack.{layer}/{batch.index}")


@torch.no_grad()
def advance(
    layer: DecoderLayer, index: int, batches: Iterable[Batch], store: ActivationStore, stream: str,
    into: str | None = None, forward: Callable[[torch.Tensor, Batch], torch.Tensor] | None = None,
) -> None:
    """Move a stream through one layer: ``{stream}/{i}`` becomes the layer's output, kept under `into` (default: in its place)."""
    for batch in batches:
        hidden = store.get(f"{stream}/{batch.index}")
        out = (layer.forward(hidden, batch.cos, batch.sin, batch.mask, types=batch.router_types) if forward is None
               else forward(hidden, batch))
        store.put(f"{into or stream}/{batch.index}", add_deepstack(out, index, batch, store))
