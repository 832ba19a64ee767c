"""Quantized weights in memory one at a time, or two that belong together."""

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


class WeightOnlyCache:
    """Keeps the last two int4 weights read, with their columns in the order of their groups: an expert's two matrices."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._kept: dict[str, tuple[Any, Any, Any]] = {}

    def weight(self, name: str) -> Any:
        """``source.weight_only_tensor(name)``."""
        return self._read(name)[0]

    def ordered(self, name: str) -> Any:
        """The weight with each group's columns side by side."""
        return self._read(name)[1]

    def order(self, name: str) -> Any:
        """Where the columns of :meth:`ordered` came from; None where none moved."""
        return self._read(name)[2]

    def _read(self, name: str) -> tuple[Any, Any, Any]:
        if name not in self._kept:
            while len(self._kept) > 1:  # free one before the next is read
                del self._kept[next(iter(self._kept))]
            weight = self._source.weight_only_tensor(name)
            self._kept[name] = (weight, *weight.in_group_order())
        return self._kept[name]
