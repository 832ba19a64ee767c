"""What a run may use of the machine: memory for activations, and the device that computes. Nothing here shapes a result's meaning."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.stages.ranks import ALONE, Ranks

ACTIVATION_BYTES = 1 << 30


@dataclass(frozen=True)
class Resources:
    """Limits and devices of one run.

    Attributes:
        activation_bytes: activations between layers that a stage holds in memory; what is more lies on disk.
        device: what computes, ``cpu`` or a CUDA device; weights and activations come to it layer by layer and batch by batch.
        ranks: the processes that share the work.
    """

    activation_bytes: int = ACTIVATION_BYTES
    device: str = "cpu"
    ranks: Ranks = ALONE

    @contextlib.contextmanager
    def math(self) -> Iterator[None]:
        """Inside, tensors that are made from nothing are made on the device."""
        if self.device == "cpu":
            yield
            return
        with torch.device(self.device):
            yield

    def scratch(self, work: Path, name: str) -> Path:
        """An empty place for a store's files inside a stage's working directory: on the output's disk, not in a temporary directory
        that could be memory, and found and removed by the next run where this one is killed."""
        directory = work / f".activations.{name}.{self.ranks.rank}"
        shutil.rmtree(directory, ignore_errors=True)
        return directory


DEFAULT = Resources()


def check_device(device: str) -> str:
    """`device` as PyTorch names it, once it is known to be there.

    Raises:
        UserError: another kind than cpu and cuda, or a CUDA device that this machine or this PyTorch does not have.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise UserError(f"device '{device}' is not known", "use cpu, cuda or cuda:N")
    if wanted.type == "cpu":
        return "cpu"
    if torch.version.cuda is None:
        raise UserError(f"device '{device}' needs CUDA, and this PyTorch ({torch.__version__}) is built without it",
                        "install a CUDA build of PyTorch, or leave --device out to compute on the CPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (wanted.index or 0) >= count:
        found = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
        raise UserError(f"device '{device}' is not there; PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds {count} CUDA "
                        f"devices: {found}", "check the driver with nvidia-smi, or leave --device out to compute on the CPU")
    return str(wanted)
