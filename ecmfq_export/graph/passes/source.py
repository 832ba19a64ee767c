"""One quantized weight in memory at a time."""

from __future__ import annotations

from typing import Any


class OneAtATime:
    """Keeps the last weight read, so that its values, scales and multipliers are written from one reading.

    Initializers are written in order and a weight's parts are neighbours: at most one weight is held.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._name, self._value = "", None

    def qtensor(self, name: str) -> Any:
        """``source.qtensor(name)``."""
        if self._name != name:
            self._name, self._value = "", None  # free the last one before the next is read
            self._value = self._source.qtensor(name)
            self._name = name
        return self._value
