"""How compressed-tensors' config names modules: whole names, ``re:`` patterns, or the class Linear."""

from __future__ import annotations

import re
from collections.abc import Callable

from ecmfq_export.errors import CheckpointError


def matcher(targets: list[str]) -> Callable[[str], bool]:
    """Whether a module is among `targets`, as compressed-tensors matches: patterns count from the name's beginning.

    Raises:
        CheckpointError: an invalid pattern.
    """
    names = {target for target in targets if isinstance(target, str)}
    patterns = []
    for target in sorted(names):
        if target.startswith("re:"):
            try:
                patterns.append(re.compile(target.removeprefix("re:")))
            except re.error as error:
                raise CheckpointError(f"quantization_config: pattern {target!r} is invalid: {error}") from None
    return lambda module: module in names or "Linear" in names or any(pattern.match(module) for pattern in patterns)
