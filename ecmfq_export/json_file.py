"""JSON files that may be damaged or hostile, read with limits: size, nesting, numbers, and no key twice."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
"""The largest that we write, the index of a checkpoint with every expert's tensors, has a tenth of it."""
MAX_DEPTH = 64


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: no regular file, too large, or :func:`parse_json` refuses it.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")  # a pipe would never end
    if status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size} bytes, more than {max_bytes}")
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """The value of UTF-8 JSON text, of plain types that every caller can compare, convert and print.

    Raises:
        ValueError: no JSON, no UTF-8, a key twice in an object, nested deeper than ``MAX_DEPTH``, an integer beyond 64 bits, a
            number that is not finite, or half of a surrogate pair in a string.
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_int=_integer, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check_depth(value)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError is a ValueError
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it names '{double[:200]}' twice")
    return result


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _integer(text: str) -> int:
    # The length first: Python's own limit on digits is a setting of the process.
    if len(text) > 21 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the integer {text[:24]} is beyond 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is too large")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        level = [item for one in level if isinstance(one, dict | list) for item in (one.values() if isinstance(one, dict) else one)
                 if isinstance(item, dict | list)]
        depth += 1
