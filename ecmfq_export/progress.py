"""How long work reports its progress, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What a stage calls; the command line shows it as bars, tests pass :class:`Silent`."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, advancing a bar named `description` by one for each."""
        ...

    def note(self, text: str) -> None:
        """One line that a person should see while the work runs."""
        ...


class Silent:
    """Shows nothing."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def note(self, text: str) -> None:
        pass
