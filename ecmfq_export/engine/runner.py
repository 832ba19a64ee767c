"""What runs a graph or an engine: named NumPy arrays in, named NumPy arrays out.

`validate` and `runtime` know this interface alone, so the same code runs over ONNX Runtime and over an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ecmfq_export.errors import UserError


@runtime_checkable
class Runner(Protocol):
    """A loaded graph or engine.

    Attributes:
        input_names, output_names: in the graph's order.
        device_bytes: memory that it holds on a device of its own; 0 where it computes on the CPU.
    """

    @property
    def input_names(self) -> Sequence[str]: ...

    @property
    def output_names(self) -> Sequence[str]: ...

    @property
    def device_bytes(self) -> int: ...

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: every input by name, of the graph's dtype and a shape that its dimensions admit.
            outputs: names of the outputs that are wanted; None: all.

        Returns:
            these outputs by name; arrays of their own. A cache output (``present_*``) may be on the device: it goes into the next
            call's ``past_*`` as it is, and indexing or ``np.asarray`` copies it to the host.

        Raises:
            UserError: an input is missing, unknown, or of a wrong dtype or shape.
        """
        ...


def check_feeds(feeds: Mapping[str, np.ndarray], expected: Mapping[str, tuple[np.dtype, Sequence[int | str | None]]]) -> None:
    """Compare the arrays given with the inputs expected: names, dtypes, ranks and fixed extents.

    Args:
        feeds: arrays by input name.
        expected: input name to its dtype and its shape; an extent that is no positive integer is free.

    Raises:
        UserError: the first difference, with what was given and what is wanted.
    """
    missing = [name for name in expected if name not in feeds]
    unknown = [name for name in feeds if name not in expected]
    if missing or unknown:
        raise UserError(f"inputs missing: {', '.join(missing) or 'none'}; inputs unknown: {', '.join(unknown) or 'none'}",
                        f"the graph's inputs: {', '.join(expected)}")
    for name, (dtype, shape) in expected.items():
        array = feeds[name]
        fits = len(array.shape) == len(shape) and all(
            not isinstance(want, int) or want < 0 or want == have for have, want in zip(array.shape, shape, strict=True))
        if array.dtype != dtype or not fits:
            raise UserError(f"input '{name}' is {array.dtype}{list(array.shape)}, the graph takes {dtype}{list(shape)}")
