"""One request on its way through the model: what is asked, and the events that come back to its HTTP handler."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field

from ecmfq_export.runtime.generate import Generation, Sampling
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.server.api_error import ApiError


@dataclass(frozen=True)
class Cancelled:
    """The last event of a job that nobody waits for any more."""


Event = str | Generation | ApiError | Cancelled
"""A piece of text, or the end: the whole answer, an error, or cancelled."""


@dataclass(eq=False)
class Job:
    """What a request asks for, ready to run.

    Attributes:
        id: of the completion, ``chatcmpl-...``.
        images: how many it has, for the log.
        created: Unix time.
        loop, events: of the handler; events are put there from any thread.
        cancelled: set once nobody wants the rest.
        submitted, started: seconds of the monotonic clock, into the queue and out of it; 0 where it did not come to it.
    """

    id: str
    sample: ProcessedSample
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    images: int
    created: int = field(default_factory=lambda: int(time.time()))
    loop: asyncio.AbstractEventLoop | None = None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: float = 0.0
    started: float = 0.0

    def put(self, event: Event) -> None:
        """Hand an event to the handler; from any thread."""
        assert self.loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone, and the handler with it
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
