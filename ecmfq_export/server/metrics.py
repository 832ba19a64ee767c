"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ecmfq_export.runtime.generate import Generation

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_RATES = (1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("ecmfq_requests", "HTTP requests", ["status"], registry=registry)
        self._answers = Counter("ecmfq_answers", "Answers by how they ended", ["stop"], registry=registry)
        self._prompt_tokens = Counter("ecmfq_prompt_tokens", "Tokens of prompts, image tokens included", registry=registry)
        self._new_tokens = Counter("ecmfq_generated_tokens", "Tokens generated", registry=registry)
        self._queue_seconds = Histogram("ecmfq_queue_seconds", "From queued to started", buckets=_SECONDS, registry=registry)
        self._first_token = Histogram("ecmfq_first_token_seconds", "From started to the first token", buckets=_SECONDS,
                                      registry=registry)
        self._rate = Histogram("ecmfq_tokens_per_second", "Of one answer, after its first token", buckets=_RATES, registry=registry)

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Gauges that are read when they are asked for."""
        Gauge("ecmfq_queue_depth", "Requests that wait", registry=self._registry).set_function(waiting)
        Gauge("ecmfq_running", "Requests being answered", registry=self._registry).set_function(running)

    def request(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def answered(self, result: Generation, queue_seconds: float) -> None:
        self._answers.labels(result.stop).inc()
        self._prompt_tokens.inc(result.prompt_tokens)
        self._new_tokens.inc(len(result.token_ids))
        self._queue_seconds.observe(queue_seconds)
        self._first_token.observe(result.first_token_seconds)
        if result.tokens_per_second > 0:
            self._rate.observe(result.tokens_per_second)

    def text(self) -> bytes:
        """Everything, in the format that Prometheus reads."""
        return generate_latest(self._registry)
