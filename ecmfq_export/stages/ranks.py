"""Several processes at one run, started by torchrun: who does what, and what they send each other.

Work is shared out so that no sum is split: an expert's Hessian is built by one rank, a sample's figures come from one rank, and
what is gathered is put together in the order of experts or samples. So the result has the bits of a run by one process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ecmfq_export import bundle
from ecmfq_export.errors import UserError

_TIMEOUT = datetime.timedelta(days=7)
"""Ranks wait for one another while one of them does what cannot be shared out, and that may take hours."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number; rank 0 writes, and does alone what is not shared out.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of range(`count`), one of `size` parts in the order of ranks whose lengths differ by one at most."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[slice]:
        """Every rank's part."""
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    def gather(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """All ranks' parts of a tensor along its first axis of `count`, which was shared out by :meth:`share`, on every rank."""
        if self.size == 1:
            return part
        parts = []
        for rank, share in enumerate(self.shares(count)):
            values = part if rank == self.rank else part.new_empty(share.stop - share.start, *part.shape[1:])
            values = values.contiguous()
            if values.numel():
                distributed.broadcast(values, rank)
            parts.append(values)
        return torch.cat(parts)

    def add_disjoint(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of tensors that are zero wherever another rank's is not: exact, whatever the order."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            distributed.barrier()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0 (JSON), on every rank; the others wait.

        Raises:
            UserError: on rank 0 what `make` raises; on the others that rank 0 did.
        """
        if self.size == 1:
            return make()
        if not self.first:
            answer = json.loads(self._receive())
            if "failed" in answer:
                raise UserError(f"rank {self.rank} stops because rank 0 did", "rank 0's message says why")
            return answer["value"]
        try:
            value = make()
        except BaseException:
            self._send(json.dumps({"failed": True}))
            raise
        self._send(json.dumps({"value": value}))
        return value

    @contextlib.contextmanager
    def write_stage(
        self, out_dir: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """:func:`bundle.write_stage` with ``resume``, of rank 0; the others are handed its working directory, to read in and to put
        files of their own names in."""
        if self.first:
            with bundle.write_stage(out_dir, stage, config, inputs, resume=True) as (work, info):
                for left in work.glob(".activations.*"):  # of a killed run, perhaps of more ranks
                    shutil.rmtree(left)
                self.wait()
                yield work, info
                self.wait()
        else:
            self.wait()
            yield bundle.partial_dir(out_dir), {}
            self.wait()
        # Nobody looks at the result before it is in its place.
        self.wait()

    def _send(self, text: str) -> None:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        distributed.broadcast(torch.tensor([len(data)], device="cpu"), 0)
        distributed.broadcast(data, 0)

    def _receive(self) -> str:
        length = torch.zeros(1, dtype=torch.int64, device="cpu")
        distributed.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        distributed.broadcast(data, 0)
        return data.numpy().tobytes().decode()


ALONE = Ranks()


def join_ranks(device: str) -> tuple[Ranks, str]:
    """Meet the other processes that torchrun started, over gloo for host memory and NCCL for CUDA; :data:`ALONE` without torchrun.

    Returns:
        this process's place, and its device: ``cuda`` becomes the one of its number on this machine.

    Raises:
        UserError: torchrun's variables are there and the processes do not meet.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return ALONE, device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        backend = "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo"
        distributed.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"WORLD_SIZE = {size}, but the processes do not meet: {' '.join(str(error).split())[:300]}",
                        "start with torchrun --nproc-per-node N -m ecmfq_export.cli ..., or unset WORLD_SIZE") from None
    return Ranks(distributed.get_rank(), distributed.get_world_size()), device


def leave_ranks(ranks: Ranks) -> None:
    """Part from the others at the end of a run."""
    if ranks.size > 1:
        distributed.destroy_process_group()
