"""Where floating tensors lie on disk: a whole tensor, perhaps transposed, or experts stacked from several tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ecmfq_export.errors import CheckpointError
from ecmfq_export.models.checkpoint import Checkpoint, preview

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FloatSource:
    """A canonical tensor that is one tensor on disk.

    Attributes:
        name: on disk.
        shape: canonical.
        transposed: whether its last two axes are swapped on disk.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor on disk that it is made of."""
        return {self.name: (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape}

    def load(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The canonical tensor in its stored dtype."""
        if not self.transposed:
            return checkpoint.load(self.name)
        # Expert by expert, so that the two layouts are not in memory together.
        tensor = torch.empty(self.shape, dtype=checkpoint.dtype(self.name), device="cpu")
        for expert, matrix in enumerate(tensor):
            matrix.copy_(checkpoint.load_rows(self.name, expert, expert + 1)[0].t())
        return tensor

    def load_rows(self, checkpoint: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """``load()[start:stop]`` reading these rows only."""
        rows = checkpoint.load_rows(self.name, start, stop)
        return rows.transpose(-1, -2).contiguous() if self.transposed else rows

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A canonical tensor as what is written to disk, in the canonical layout."""
        return {self.name: tensor}


@dataclass(frozen=True)
class ExpertPart:
    """One tensor on disk that fills a region of stacked experts.

    Attributes:
        name: on disk.
        shape: of the tensor on disk; three axes where it stacks experts itself, two where it belongs to one expert.
        expert: the first expert that it fills.
        rows: of the expert's matrix.
        region: of the tensor on disk, one slice an axis; empty for all of it (always, where it stacks experts).
        transposed: whether the matrices that it stacks lie as [in, out] on disk.
    """

    name: str
    shape: tuple[int, ...]
    expert: int
    rows: slice
    region: tuple[slice, ...] = ()
    transposed: bool = False

    @property
    def num_experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def on_disk(self, values: torch.Tensor) -> torch.Tensor:
        """Rows [num_experts, ...] of its experts in the form of the region on disk."""
        if len(self.shape) == 2:
            return values[0]
        return values.transpose(1, 2) if self.transposed else values


@dataclass(frozen=True)
class ExpertsSource:
    """Stacked experts [E, N, K] made of several tensors on disk, all of one dtype.

    Attributes:
        parts: in the order of experts.
        shape: canonical.
    """

    parts: tuple[ExpertPart, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the first part, whose dtype is everybody's."""
        return self.parts[0].name

    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor on disk that it is made of."""
        return {part.name: part.shape for part in self.parts}

    def load(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The canonical tensor in its stored dtype, filled part by part."""
        return self.load_rows(checkpoint, 0, self.shape[0])

    def load_rows(self, checkpoint: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Experts `start` to `stop`, reading what belongs to them only."""
        tensor = torch.empty(stop - start, *self.shape[1:], dtype=checkpoint.dtype(self.name), device="cpu")
        for part, first, last in self._overlapping(start, stop):
            if len(part.shape) == 3:
                values = checkpoint.load_rows(part.name, first - part.expert, last - part.expert)
                values = values.transpose(1, 2) if part.transposed else values
            else:
                values = checkpoint.load(part.name)[part.region]
            tensor[first - start : last - start, part.rows] = values
        return tensor

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A canonical tensor as what is written to disk."""
        files = {name: tensor.new_empty(shape) for name, shape in self.disk_shapes().items()}
        for part in self.parts:
            values = tensor[part.expert : part.expert + part.num_experts, part.rows]
            files[part.name][part.region] = part.on_disk(values)
        return files

    def part(self, disk_name: str, experts: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """One tensor of :meth:`split`, where ``experts(start, stop)`` gives those experts of the canonical tensor."""
        parts = [part for part in self.parts if part.name == disk_name]
        made: torch.Tensor | None = None
        for part in parts:
            values = experts(part.expert, part.expert + part.num_experts)[:, part.rows]
            made = values.new_empty(part.shape) if made is None else made
            made[part.region] = part.on_disk(values)
        if made is None:
            raise ValueError(f"'{disk_name}' is no part of these experts")
        return made

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[ExpertPart, int, int]]:
        for part in self.parts:
            first, last = max(start, part.expert), min(stop, part.expert + part.num_experts)
            if first < last:
                yield part, first, last


def check_one_half_type(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """The 16-bit floating tensors among `names` on disk must all be float16 or all bfloat16: a damaged header or a shard of another
    checkpoint would pass every check of sizes, and its values mean something else.

    Raises:
        CheckpointError: both are there; naming tensors of the rarer type.
    """
    halves: dict[torch.dtype, list[str]] = {}
    for name in names:
        if checkpoint.dtype(name) in (torch.float16, torch.bfloat16):
            halves.setdefault(checkpoint.dtype(name), []).append(name)
    if len(halves) > 1:
        (few, rare), (many, usual) = sorted(halves.items(), key=lambda item: len(item[1]))
        file = checkpoint.entry(rare[0]).file.name
        raise CheckpointError(
            f"{checkpoint.path}: {len(rare)} tensors are {few} ({preview(sorted(rare))}, in {file}) and {len(usual)} are {many}",
            "a header is damaged or a shard belongs to another checkpoint; download it again, or save the model in one dtype",
        )


@dataclass(frozen=True)
class JoinedPart:
    """One tensor on disk that is some rows of a canonical one, transposed or in another shape."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class JoinedSource:
    """A small canonical tensor whose rows are several tensors on disk, one behind the other, all of one dtype.

    Attributes:
        parts: in the order of rows.
        shape: canonical.
    """

    parts: tuple[JoinedPart, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the first part, whose dtype is everybody's."""
        return self.parts[0].name

    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor on disk that it is made of."""
        return {part.name: part.shape for part in self.parts}

    def load(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The canonical tensor in its stored dtype."""
        stored = [checkpoint.load(part.name) for part in self.parts]
        rows = [t.t() if part.transposed else t for part, t in zip(self.parts, stored, strict=True)]
        return torch.cat([row.reshape(-1, *self.shape[1:]) for row in rows])

    def load_rows(self, checkpoint: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """``load()[start:stop]``."""
        return self.load(checkpoint)[start:stop].clone()

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A canonical tensor as what is written to disk."""
        files: dict[str, torch.Tensor] = {}
        start = 0
        for part in self.parts:
            shape = part.shape[::-1] if part.transposed else part.shape
            count = math.prod(shape) // math.prod(self.shape[1:])
            rows = tensor[start : start + count].reshape(shape)
            files[part.name] = (rows.t() if part.transposed else rows).contiguous()
            start += count
        return files


def check_source(checkpoint: Checkpoint, source: FloatSource | ExpertsSource | JoinedSource) -> None:
    """Shapes and dtypes from headers.

    Raises:
        CheckpointError: one is not what config.json implies, or parts of one tensor have different dtypes.
    """
    for name, shape in source.disk_shapes().items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"'{name}' has shape {list(checkpoint.shape(name))}, config.json implies {list(shape)}",
                "the checkpoint and its config.json do not belong together",
            )
        if checkpoint.dtype(name) not in FLOAT_DTYPES:
            raise CheckpointError(
                f"'{name}' has dtype {checkpoint.dtype(name)}, expected float32, float16 or bfloat16",
                "give the floating-point checkpoint, or one quantized by ecmfq-export",
            )
        if checkpoint.dtype(name) != checkpoint.dtype(source.name):
            raise CheckpointError(
                f"'{name}' has dtype {checkpoint.dtype(name)}, '{source.name}' {checkpoint.dtype(source.name)}",
                "all experts of a layer must have one dtype; save the model in one dtype",
            )
