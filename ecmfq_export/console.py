"""The terminal: progress bars and notes of long work, shown with rich on standard error.

Standard output stays free for results, so that they can be piped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")

ESTIMATE_PERIOD = 86400.0
"""Seconds of history behind a remaining time: decoder layers take minutes each, longer than rich looks back by itself."""

REPORT_EVERY = 60.0
"""Seconds between lines about one task off a terminal."""


class RichProgress:
    """A :class:`ecmfq_export.progress.Progress` that draws one bar a task; off a terminal it prints a line a task,
    and every minute what is left of it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
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
        with rich.progress.Progress(*columns, console=self._console, disable=not self._console.is_terminal,
                                    speed_estimate_period=ESTIMATE_PERIOD) as bars:
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
            yield from self._lines(items, description, total)
            return
        if self._bars is None:
            yield from items
            return
        task = self._bars.add_task(description, total=total)
        for item in items:
            yield item
            self._bars.advance(task)

    def _lines(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield `items`; at most once a minute a line says how many are done and how long the rest takes at their pace."""
        start = told = self._clock()
        for done, item in enumerate(items):
            now = self._clock()
            if done and now - told >= REPORT_EVERY:
                left = "" if total is None else f" of {total}, about {_duration((now - start) / done * (total - done))} left"
                self._console.print(f"  {description}: {done}{left}", highlight=False)
                told = now
            yield item

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        (self._bars.console if self._bars else self._console).print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """Hours and minutes, or seconds where there are only those."""
    if seconds < 120:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
