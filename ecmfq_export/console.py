"""The terminal: progress bars and notes of long work, shown with rich on standard error.

Standard output stays free for results, so that they can be piped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


class RichProgress:
    """A :class:`ecmfq_export.progress.Progress` that draws one bar a task; off a terminal it prints one line a task."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: rich.progress.Progress | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[RichProgress]:
        """Draw bars while the block runs."""
        columns = (
            rich.progress.TextColumn("[progress.description]{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bars:
            self._bars = bars
            try:
                yield self
            finally:
                self._bars = None

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` and advance a bar named `description`."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        if not self._console.is_terminal:
            self._console.print(f"  {description}" + (f" ({total})" if total is not None else ""), highlight=False)
        if self._bars is None:
            yield from items
            return
        task = self._bars.add_task(description, total=total)
        for item in items:
            yield item
            self._bars.advance(task)

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        (self._bars.console if self._bars else self._console).print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
