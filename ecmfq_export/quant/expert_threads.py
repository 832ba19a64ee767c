"""Experts shared out among threads, each thread computing its experts by itself.

Matrix libraries may sum a product in another order when several threads work on it, and whether they do depends on how many
matrices they are given. A thread that works alone has one order: results do not depend on how many experts are computed
together, on their order, or on the number of threads. It is also the faster way on a machine that does other work: no
operator waits for the slowest of its threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import local
from typing import Literal, TypeVar

import torch

from ecmfq_export.quant.workspace import Workspace

Threads = Literal["experts", "operators"]
"""``experts``: this module's rule. ``operators``: every operator uses all threads, for a single large matrix."""

Result = TypeVar("Result")


def for_slices(count: int, most: int, work: Callable[[slice, Workspace], Result], threads: Threads = "experts") -> list[Result]:
    """``work(slice, workspace)`` for slices of at most `most` that cover range(`count`), results in their order.

    As many slices are worked on at a time as torch has threads; a workspace belongs to one thread. An error in one of them is
    raised here.
    """
    available = torch.get_num_threads()
    workers = 1 if threads == "operators" else max(1, min(available, count))
    step = max(1, min(most, -(-count // workers)))
    slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if threads == "operators" or available == 1:
        workspace = Workspace()
        return [work(part, workspace) for part in slices]
    mine = local()

    def start() -> None:
        torch.set_num_threads(1)
        mine.workspace = Workspace()

    def call(part: slice) -> Result:
        with torch.no_grad():
            return work(part, mine.workspace)

    try:
        with ThreadPoolExecutor(workers, "experts", start) as pool:
            return list(pool.map(call, slices))
    finally:
        # What a thread sets is also what threads that start later begin with.
        torch.set_num_threads(available)
