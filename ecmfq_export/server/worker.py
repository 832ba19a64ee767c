"""One thread that runs the model, and the bounded queue before it: jobs are answered in the order in which they came."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque

from ecmfq_export.runtime.generate import Generation, Generator
from ecmfq_export.server.api_error import ApiError
from ecmfq_export.server.job import Cancelled, Job
from ecmfq_export.server.metrics import Metrics

log = logging.getLogger(__name__)


class Place:
    """A right to be in the server's memory; held from before a request's body is read until its answer is done."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker: ModelWorker | None = worker

    def release(self) -> None:
        """Give it back; again does nothing."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker._free()


class ModelWorker:
    """Answers jobs with one model.

    Batches of several requests are not made: rows of a batch are rounded in another order than a row alone, and an answer would
    depend on who else asks.

    Args:
        queue: jobs that may wait while one runs.
    """

    def __init__(self, generator: Generator, queue: int, metrics: Metrics) -> None:
        self._generator, self._capacity, self._metrics = generator, queue + 1, metrics
        self._condition = threading.Condition()
        self._waiting: deque[tuple[Job, Place]] = deque()
        self._running: Job | None = None
        self._occupied = 0
        self._closing = False
        self._seconds = 1.0  # of an answer, a moving average
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        metrics.watch_queue(lambda: self.waiting, lambda: int(self._running is not None))

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def occupied(self) -> int:
        """Places taken: requests being read, waiting, or answered."""
        return self._occupied

    @property
    def state(self) -> str:
        """``ok``, ``stopping``, or ``failed`` where the thread has ended without being told to."""
        if self._closing:
            return "stopping"
        return "ok" if self._thread.is_alive() else "failed"

    def start(self) -> None:
        self._thread.start()

    def reserve(self) -> Place:
        """Take a place.

        Raises:
            ApiError: 429 where all are taken, 503 where the server is stopping.
        """
        with self._condition:
            if self._closing:
                raise _stopping()
            if self._occupied >= self._capacity:
                wait = min(60, max(1, math.ceil(self._seconds)))
                raise ApiError(429, f"the queue is full: {self._capacity} requests are being answered or wait; try again in {wait} s",
                               code="queue_full", retry_after=wait)
            self._occupied += 1
        return Place(self)

    def submit(self, job: Job, place: Place) -> None:
        """Queue a job; its place is given back when it is done."""
        job.submitted = time.monotonic()
        with self._condition:
            if self._closing:
                raise _stopping()
            self._waiting.append((job, place))
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest: a waiting job leaves the queue at once, a running one ends after the token it is at."""
        job.cancelled.set()
        with self._condition:
            found = [entry for entry in self._waiting if entry[0] is job]
            for entry in found:
                self._waiting.remove(entry)
        for entry in found:
            entry[1].release()
        job.put(Cancelled())

    def close(self) -> None:
        """Take no more jobs; waiting ones are answered 503, the running one may finish."""
        with self._condition:
            self._closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._condition.notify()
        for job, place in waiting:
            place.release()
            job.put(_stopping())

    def stop(self, seconds: float = 30.0) -> None:
        """Close, cancel the running job, and wait for the thread to end."""
        self.close()
        running = self._running
        if running is not None:
            running.cancelled.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _free(self) -> None:
        with self._condition:
            self._occupied -= 1

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                job, place = self._waiting.popleft()
                self._running = job
            end = self._answer(job)
            with self._condition:
                self._running = None
            # Before the client learns of the end: it may have the next request ready.
            place.release()
            job.put(end)

    def _answer(self, job: Job) -> Generation | ApiError | Cancelled:
        job.started = time.monotonic()

        def on_token(_row: int, piece: str) -> None:
            job.put(piece)

        try:
            (result,) = self._generator.generate_batch(
                [job.sample], job.max_new_tokens, on_token if job.stream else None, job.sampling, job.stop, job.cancelled.is_set
            )
        except BaseException:
            # The request passed every check, so this is the model's fault or ours: the log has it all, the client only that.
            # Not only Exception: a panic of the tokenizer's Rust code is none, and the thread must live.
            log.exception("%s failed", job.id)
            return ApiError(500, f"the model failed; the server's log says more under {job.id}")
        seconds = time.monotonic() - job.started
        self._seconds += 0.2 * (seconds - self._seconds)
        self._metrics.answered(result, queue_seconds=job.started - job.submitted)
        return Cancelled() if result.stop == "cancelled" else result


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=5)
