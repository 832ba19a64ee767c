"""What the layer cannot be faster than on this machine: its operations, each at a rate measured here. Called by run.py.

Operations of one expert with a weight [N, K] and n tokens (a multiply-add is two):

    Hessian        n K^2        H = X^T diag(w) X is symmetric: half of the full product
    factorization  K^3 / 3      Cholesky; the walk needs no inverse
    columns        N K^2        each column's error goes to the columns after it: half of a full product
    memory         each weight read and each integer written once, each Hessian written and read once

Three floors. ``arithmetic`` takes the first three at the best rate that any matrix product reached. ``library`` takes each at the
rate that the product of its own shape reached, and the Hessian in full, since no library call that PyTorch has computes half of it;
to this it adds the memory traffic, and the rounding itself, 4 operations a weight. Both are those of any GPTQ. ``FAQ`` adds what FAQ
computes beside it: the layer's Hessian (all tokens, full product), the search of scales (8 clips, 5 operations a weight), and the
first 128 rows of each expert's factor times what rounding to nearest misses (no row may be worse than that). Single operations on
weights count as a multiply-add each, at the rate of the best product: nothing that runs on vectors is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import Meter
from problem import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K

BLOCK = 128
SHAPES = {"gate_up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}


def best(function: Callable[[], object], repeats: int = 4) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    function()
    seconds = []
    for _ in range(repeats):
        # On one thread core time, which a machine that does other work does not change.
        clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
        start = clock()
        function()
        seconds.append(clock() - start)
    return min(seconds)


def product_rate(batch: int, rows: int, inner: int, columns: int, transposed: bool = False) -> float:
    """Operations a second of `batch` products [rows, inner] x [inner, columns], on operands too large for a core's cache."""
    left = torch.randn(batch, inner, rows).mT if transposed else torch.randn(batch, rows, inner)
    right, out = torch.randn(batch, inner, columns), torch.empty(batch, rows, columns)
    return 2 * batch * rows * inner * columns / best(lambda: torch.bmm(left, right, out=out))


def measure() -> dict[str, float]:
    """Rates of this machine with all of torch's threads, in operations, bytes or items a second."""
    pairs = TOKENS * TOP_K // EXPERTS
    rates = {"square product": product_rate(2, 2048, 2048, 2048)}
    for name, (rows, columns) in SHAPES.items():
        rates[f"hessian {name}"] = product_rate(8, columns, pairs, columns, transposed=True)
        rates[f"columns {name}"] = product_rate(8, 128, columns // 2, rows)
        rates[f"factorization {name}"] = product_rate(8, 256, columns // 2, columns // 2)
        matrix = torch.randn(2, columns, columns)
        matrix = matrix @ matrix.mT + columns * torch.eye(columns)
        rates[f"LAPACK Cholesky {name}"] = 2 * columns**3 / 3 / best(lambda m=matrix: torch.linalg.cholesky(m), 2)
    source = torch.randn(1 << 26)
    target = torch.empty_like(source)
    rates["memory"] = 8 * source.numel() / best(lambda: target.copy_(source))
    return rates


def floors(rates: dict[str, float], experts: int) -> dict[str, object]:
    """Operations and seconds of the layer by part, and the sums."""
    pairs = TOKENS * TOP_K // EXPERTS
    top = max(rate for name, rate in rates.items() if name.split()[0] in ("square", "hessian", "columns", "factorization"))
    operations = {"hessian": 0.0, "factorization": 0.0, "columns": 0.0}
    library = {"hessian": 0.0, "factorization": 0.0, "columns": 0.0, "memory": 0.0, "rounding": 0.0}
    faq = {"layer's Hessian": 2 * TOKENS * experts / EXPERTS * HIDDEN**2 / rates["square product"], "search of scales": 0.0,
           "check against nearest": 0.0}
    for name, (rows, columns) in SHAPES.items():
        for part, count, factor in (("hessian", pairs * columns**2, 2), ("factorization", columns**3 / 3, 1),
                                    ("columns", rows * columns**2, 1)):
            operations[part] += experts * count
            library[part] += experts * factor * count / rates[f"{part} {name}"]
        weights = experts * rows * columns
        library["memory"] += (5 * weights + 8 * experts * columns**2) / rates["memory"]
        library["rounding"] += 2 * 4 * weights / top
        faq["search of scales"] += 2 * 8 * 5 * weights / top
        faq["check against nearest"] += 2 * BLOCK * weights / rates[f"columns {name}"]
    arithmetic = sum(operations.values()) / top
    return {"operations": operations, "best rate": top, "arithmetic seconds": arithmetic, "library seconds by part": library,
            "library seconds": sum(library.values()), "FAQ seconds by part": faq,
            "FAQ seconds": sum(library.values()) + sum(faq.values())}


@torch.no_grad()
def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, required=True)
    experts = parser.parse_args().experts
    meter = Meter()
    rates = measure()
    print(json.dumps({"rates": rates, "threads": torch.get_num_threads(), **floors(rates, experts), "others": meter.others}))


if __name__ == "__main__":
    main()
