"""The token embedding table of a bundle, looked up where it lies on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.json_file import parse_json

_DTYPES = {"F32": np.float32, "F16": np.float16}
_MAX_HEADER = 1 << 20


class EmbeddingTable:
    """A safetensors file with one tensor [rows, hidden_size], memory-mapped: only the rows that are read are loaded.

    Raises:
        BundleError: missing, damaged, or holding something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if not 0 < length <= min(size - 8, _MAX_HEADER):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = parse_json(stream.read(length))
            header.pop("__metadata__", None)
            ((_, entry),) = header.items()
            start, stop = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]])
            if any(type(n) is not int or n < 0 for n in (start, stop, *shape)) or len(shape) != 2 or 0 in shape or (
                stop - start != shape[0] * shape[1] * dtype.itemsize or 8 + length + stop > size
            ):
                raise ValueError(f"{entry['dtype']} {list(shape)} in bytes {start} to {stop} of {size - 8 - length}")
        except FileNotFoundError:
            raise BundleError(f"no embeddings at {path}", "pass the 'onnx' directory of a finished export") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} is damaged: {error}", "copy or make the bundle again") from None
        self._table = np.memmap(path, dtype, "r", offset=8 + length + start, shape=shape)
        self.rows, self.hidden_size = shape

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings [..., hidden_size] of ids [...], in the file's dtype.

        Raises:
            UserError: an id outside the table.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise UserError(
                f"token ids {int(ids.min())} to {int(ids.max())} with {self.rows} embeddings",
                "the tokenizer is another model's",
            )
        return np.asarray(self._table[ids])
