"""How compressed-tensors' config names modules: whole names, ``re:`` patterns, or the class Linear."""

from __future__ import annotations

import re
from collections.abc import Callable

from ecmfq_export.errors import CheckpointError, UnsupportedError


def matcher(targets: list[str]) -> Callable[[str], bool]:
    """Whether a module is among `targets`, as compressed-tensors matches: patterns count from the name's beginning.

    Raises:
        CheckpointError: an invalid pattern.
        UnsupportedError: a pattern that could take exponential time.
    """
    names = {target for target in targets if isinstance(target, str)}
    patterns = []
    for target in sorted(names):
        if target.startswith("re:"):
            patterns.append(_compile(target.removeprefix("re:")))
    return lambda module: module in names or "Linear" in names or any(pattern.match(module) for pattern in patterns)


_MAX_PATTERN, _MAX_REPEATS = 500, 4
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_BACKREFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")


def _compile(pattern: str) -> re.Pattern[str]:
    """A pattern from a file that may be hostile: Python's engine backtracks, and a repeated group or a backreference can make it
    take exponential time. What names modules needs neither.
    """
    if len(pattern) > _MAX_PATTERN or _REPEATED_GROUP.search(pattern) or _BACKREFERENCE.search(pattern) or (
        len(_REPEAT.findall(pattern)) > _MAX_REPEATS
    ):
        raise UnsupportedError(f"quantization_config: pattern 're:{pattern[:100]}' may take very long to match",
                               f"supported: up to {_MAX_REPEATS} repeats of single characters, no repeated group, no backreference")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"quantization_config: pattern {'re:' + pattern!r} is invalid: {error}") from None
