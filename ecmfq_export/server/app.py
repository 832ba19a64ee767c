"""The routes: chat completions, the list of models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ecmfq_export.runtime.generate import Generation, Generator
from ecmfq_export.server import completion
from ecmfq_export.server.api_error import ApiError
from ecmfq_export.server.body import ClientDisconnect, read_body, until_gone
from ecmfq_export.server.job import Cancelled, Event, Job
from ecmfq_export.server.metrics import Metrics
from ecmfq_export.server.prepare import Preparer, unknown_model
from ecmfq_export.server.request_log import CLIENT_GONE, RequestLog
from ecmfq_export.server.settings import Settings
from ecmfq_export.server.worker import ModelWorker

log = logging.getLogger(__name__)
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


class Chat:
    """One model behind HTTP: its worker, and the thread that prepares requests.

    Args:
        generator: the model; over any runner.
    """

    def __init__(self, generator: Generator, settings: Settings, created: int = 0) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.worker = ModelWorker(generator, settings.limits.queue, self.metrics)
        self._prepare = Preparer(generator.processor, generator.session, settings.model_name, settings.limits)
        self._pool = ThreadPoolExecutor(1, "prepare")
        self._created = created

    @contextlib.asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncIterator[None]:
        """The server's lifespan."""
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.check_access(request)
        limits = self.settings.limits
        place = self.worker.reserve()
        submitted = False
        try:
            body = await read_body(request, limits.max_request_bytes, limits.body_seconds)
            loop = asyncio.get_running_loop()
            job = await loop.run_in_executor(self._pool, self._prepare, body, request.state.id)
            job.loop = loop
            self.worker.submit(job, place)
            submitted = True
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        finally:
            if not submitted:
                place.release()
        return await self._answer(request, job)

    async def _answer(self, request: Request, job: Job) -> Response:
        """The response as soon as its status is known; whatever ends this early cancels the job."""
        gone = asyncio.create_task(until_gone(request))
        gone.add_done_callback(lambda _task: self.worker.cancel(job))
        streaming = False
        try:
            event = await job.events.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Cancelled):
                request.state.note = f"images={job.images} prompt={job.sample.length} client gone"
                return Response(status_code=CLIENT_GONE)
            if job.stream:
                streaming = True
                return _EventStream(self, request, job, event, gone)
            assert isinstance(event, Generation)
            request.state.note = _note(job, event)
            return JSONResponse(completion.completion(job, event, self.settings.model_name))
        finally:
            if not streaming:
                gone.cancel()

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self.check_access(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self.check_access(request)
        if (name := request.path_params["name"]) != self.settings.model_name:
            raise unknown_model(name, self.settings.model_name)
        return JSONResponse(self._model())

    async def health(self, _request: Request) -> Response:
        """GET /health; open without a key."""
        state = self.worker.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def measured(self, request: Request) -> Response:
        """GET /metrics."""
        self.check_access(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def check_access(self, request: Request) -> None:
        """The key; where none is asked for and only this machine is served, that no web page talks through a browser.

        Raises:
            ApiError: 401, or 403 for another name than this machine's own (DNS rebinding).
        """
        keys = self.settings.keys
        if keys:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            # Every key is compared in full, so that time says nothing about where they differ.
            found = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
            if scheme.lower() != "bearer" or not any(found):
                raise ApiError(401, "no valid API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        elif not self.settings.allow_no_key:
            try:
                host = urlsplit(f"//{request.headers.get('host', '')}").hostname
            except ValueError:
                host = None
            if host not in _LOOPBACK_NAMES and host != self.settings.host:
                raise ApiError(403, "this server answers to localhost only; give it an API key to serve under another name")

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.model_name, "object": "model", "created": self._created, "owned_by": "ecmfq-export"}


class _EventStream(Response):
    """Server-sent events of one job; the job is cancelled when the client goes away or the server is told to stop."""

    media_type = "text/event-stream"

    def __init__(self, chat: Chat, request: Request, job: Job, event: Event, gone: asyncio.Task[None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chat, self._request, self._job, self._event, self._gone = chat, request, job, event, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job, model, event = self._job, self._chat.settings.model_name, self._event
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            data = completion.first_event(job, model)
            while isinstance(event, str):
                data += completion.piece_event(job, model, event)
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data, event = b"", await job.events.get()
            if isinstance(event, Generation):
                data += completion.last_events(job, model, event)
                self._request.state.note = _note(job, event)
            elif isinstance(event, ApiError):
                data += completion.error_event(event)
                self._request.state.note = f"failed while streaming: {event.status}"
            else:
                self._request.state.note = f"images={job.images} prompt={job.sample.length} client gone while streaming"
            await send({"type": "http.response.body", "body": data, "more_body": False})
        finally:
            self._gone.cancel()
            self._chat.worker.cancel(job)


def create_app(chat: Chat) -> ASGIApp:
    """The application; its lifespan starts and stops the model's thread."""
    app = FastAPI(title="ecmfq-export serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=chat.running)
    app.add_api_route("/v1/chat/completions", chat.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", chat.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", chat.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", chat.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", chat.measured, methods=["GET"], response_model=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    # Outside of everything, so that it sees the answer to a bug too.
    return RequestLog(app, chat.metrics, discard_bytes=4 * chat.settings.limits.max_request_bytes)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    # Messages may quote what a client sent; its code and field say enough for the log.
    request.state.note = " ".join(filter(None, [error.code, error.param and f"in {error.param!r}"]))
    return JSONResponse(error.body, error.status, error.headers)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    phrase = HTTPStatus(error.status_code).phrase
    answer = ApiError(error.status_code, f"{phrase}: {request.method} {request.url.path[:200]}", code="unknown_url")
    return JSONResponse(answer.body, answer.status, error.headers)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return JSONResponse(ApiError(500, "an error of the server; its log says more").body, 500)


def _note(job: Job, result: Generation) -> str:
    queued = max(0.0, job.started - job.submitted)
    return (f"images={job.images} prompt={result.prompt_tokens} new={len(result.token_ids)} end={result.stop} queued={queued:.2f}s "
            f"first={result.first_token_seconds:.2f}s {result.tokens_per_second:.1f} tok/s")
