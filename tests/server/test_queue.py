"""The queue is bounded; a client that goes away frees its place; failures and the end are answered."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from ecmfq_export.runtime.chat import Turn
from ecmfq_export.runtime.generate import Generator
from tests.server.conftest import running
from tests.server.raw_http import begin, body, post, status_of


def _until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_says_when_to_come_back(held):
    generator, session = held
    with running(generator, queue=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server.url, body())
        session.at_step.wait(30)
        second = pool.submit(post, server.url, body())
        _until(lambda: server.chat.worker.waiting == 1)
        status, headers, answer = post(server.url, body())
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert (answer["error"]["type"], answer["error"]["code"]) == ("rate_limit_error", "queue_full")
        # A refused client that sends a large image sees the answer too, and the server does not keep what it sends.
        assert post(server.url, body(user="x" * 5_000_000))[0] == 429
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        session.go.set()
        answers = [first.result(60)[2], second.result(60)[2], post(server.url, body())[2]]
        assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        metrics = post(server.url, None, path="/metrics", method="GET")[2]
        assert 'ecmfq_requests_total{status="429"} 3.0' in metrics and 'ecmfq_requests_total{status="200"} 3.0' in metrics
        assert "ecmfq_queue_depth 0.0" in metrics and f"ecmfq_generated_tokens_total {float(tokens)}" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_answer(held, stream):
    generator, session = held
    with running(generator, queue=1) as server:
        running_one = begin(server.url, body(max_tokens=200, stream=stream))
        session.at_step.wait(30)
        waiting_one = begin(server.url, body(max_tokens=200, stream=stream))
        _until(lambda: server.chat.worker.waiting == 1)
        waiting_one.close()
        _until(lambda: server.chat.worker.waiting == 0)
        assert server.chat.worker.occupied == 1, "a waiting request leaves at once"
        job = server.chat.worker._running
        running_one.close()
        _until(job.cancelled.is_set)
        steps = session.steps
        session.go.set()
        _until(lambda: server.chat.worker.occupied == 0)
        assert session.steps == steps, "the step that was held is the last one"
        assert post(server.url, body())[0] == 200


def test_a_client_that_goes_away_while_sending_frees_its_place(server):
    with begin(server.url, body()[:10], length=1000):
        _until(lambda: server.chat.worker.occupied == 1)
    _until(lambda: server.chat.worker.occupied == 0)


def test_a_client_that_does_not_read_holds_nobody_up(generator):
    with running(generator, queue=0) as server:
        silent = begin(server.url, body(max_tokens=250, stream=True))
        _until(lambda: server.chat.worker.state == "ok" and server.chat.metrics.text().count(b'ecmfq_answers_total{stop="') == 1)
        assert post(server.url, body())[0] == 200
        silent.close()


def test_stopping_finishes_the_running_answer_and_refuses_the_waiting(held, direct):
    generator, session = held
    with running(generator, queue=2, grace=30.0) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server.url, body(max_tokens=6))
        session.at_step.wait(30)
        waiting = begin(server.url, body())
        _until(lambda: server.chat.worker.waiting == 1)
        server.server.should_exit = True
        assert status_of(waiting) == 503
        assert server.chat.worker.state == "stopping"
        session.go.set()
        status, _, answer = first.result(60)
        assert status == 200 and answer["choices"][0]["message"]["content"] == direct([Turn("user", ("hi",))], max_new_tokens=6).text
        waiting.close()


def test_an_answer_that_outlasts_the_grace_is_cancelled(held):
    generator, session = held
    with running(generator, grace=1.0) as server:
        connection = begin(server.url, body(max_tokens=200))
        session.at_step.wait(30)
        server.server.should_exit = True
        _until(lambda: server.chat.worker._running is None or server.chat.worker._running.cancelled.is_set())
        session.go.set()
    assert session.steps < 20
    connection.close()


class _Failing:
    """A session that fails at its second step, once."""

    def __init__(self, session):
        self.session, self.left = session, 2

    def __getattr__(self, name):
        return getattr(self.session, name)

    def step(self, *arguments):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("secret detail")
        return self.session.step(*arguments)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_answered_and_survived(generator, stream, caplog):
    with running(Generator.over(_Failing(generator.session), generator.processor)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="the model failed") as caught:
                for _ in client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8,
                                                        stream=stream):  # fmt: skip
                    pass
        assert "secret" not in str(caught.value) and "secret detail" in caplog.text
        assert post(server.url, body())[0] == 200
        assert post(server.url, None, path="/health", method="GET")[:3:2] == (200, {"status": "ok"})


def test_health_tells_of_a_dead_worker(generator):
    with running(generator) as server:
        server.chat.worker._thread = threading.Thread()
        status, _, answer = post(server.url, None, path="/health", method="GET")
        assert (status, answer) == (503, {"status": "failed"})


def test_too_many_connections_are_refused(generator):
    with running(generator, max_connections=2) as server:
        open_ones = [begin(server.url, body()[:5], length=100) for _ in range(2)]
        _until(lambda: len(server.server.server_state.connections) == 2)
        assert post(server.url, body())[0] == 503
        for connection in open_ones:
            connection.close()
        _until(lambda: not server.server.server_state.connections)
        assert post(server.url, body())[0] == 200


def test_the_log_has_numbers_and_no_content(generator, caplog):
    caplog.set_level("INFO", "ecmfq_export.server")
    with running(generator) as server:
        post(server.url, body(messages=[{"role": "user", "content": "a secret"}]))
        post(server.url, body(messages=[{"role": "user", "content": "a secret"}], secret=1))
        post(server.url, None, path="/a%0ab", method="GET")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("ecmfq_export.server")]
    assert any("POST /v1/chat/completions 200" in line and "prompt=" in line and "tok/s" in line for line in lines)
    assert any("GET /a%0ab 404" in line for line in lines)
    assert not any("a secret" in line for line in lines)
