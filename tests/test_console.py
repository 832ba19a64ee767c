"""Progress: bars on a terminal, lines off it, both with the time that is left."""

from __future__ import annotations

import io

from rich.console import Console

from ecmfq_export.console import ESTIMATE_PERIOD, RichProgress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(terminal: bool, seconds: float, count: int = 4) -> str:
    stream, clock = io.StringIO(), Clock()
    with RichProgress(Console(file=stream, force_terminal=terminal, width=100), clock).running() as progress:
        for _ in progress.track(range(count), "quantize, layer by layer", count):
            clock.now += seconds
        progress.note("done [1]")
    return stream.getvalue()


def test_off_a_terminal_long_tasks_say_what_is_left() -> None:
    lines = run(False, 90.0).splitlines()
    assert lines == ["  quantize, layer by layer (4)", "  quantize, layer by layer: 1 of 4, about 4 min left",
                     "  quantize, layer by layer: 2 of 4, about 3 min left", "  quantize, layer by layer: 3 of 4, about 90 s left",
                     "  done [1]"]  # fmt: skip
    assert "about 5 h 0 min left" in run(False, 6000.0)


def test_off_a_terminal_short_tasks_are_one_line() -> None:
    assert run(False, 1.0).splitlines() == ["  quantize, layer by layer (4)", "  done [1]"]


def test_bars_estimate_from_layers_that_take_minutes() -> None:
    out = run(True, 1.0)
    assert "4/4" in out and "quantize, layer by layer" in out
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RichProgress(console).running() as progress:
        bars = progress._bars
        bars.get_time = clock
        task = bars.add_task("layers", total=10)
        for _ in range(3):
            clock.now += 300.0
            bars.advance(task)
        assert bars.tasks[0].time_remaining == 2100 < ESTIMATE_PERIOD
