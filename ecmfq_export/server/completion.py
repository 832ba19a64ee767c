"""Answers in the form of OpenAI's chat completions: one object, or server-sent events."""

from __future__ import annotations

import json
from typing import Any

from ecmfq_export.runtime.generate import Generation
from ecmfq_export.server.api_error import ApiError
from ecmfq_export.server.job import Job

DONE = b"data: [DONE]\n\n"
_FINISH = {"eos": "stop", "text": "stop", "length": "length", "context": "length"}


def completion(job: Job, result: Generation, model: str) -> dict[str, Any]:
    """The whole answer."""
    message = {"role": "assistant", "content": result.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH[result.stop]}
    return {**_head(job, "chat.completion", model), "choices": [choice], "usage": usage(result)}


def usage(result: Generation) -> dict[str, int]:
    """Token counts; image tokens count as prompt tokens, the end of the turn as a completion token."""
    prompt, new = result.prompt_tokens, len(result.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def first_event(job: Job, model: str) -> bytes:
    """Says who speaks."""
    return _chunk(job, model, {"role": "assistant", "content": ""}, None)


def piece_event(job: Job, model: str, piece: str) -> bytes:
    """A piece of text."""
    return _chunk(job, model, {"content": piece}, None)


def last_events(job: Job, model: str, result: Generation) -> bytes:
    """Why it ended, the usage where it was asked for, and the end mark."""
    events = _chunk(job, model, {}, _FINISH[result.stop])
    if job.include_usage:
        events += _event({**_head(job, "chat.completion.chunk", model), "choices": [], "usage": usage(result)})
    return events + DONE


def error_event(error: ApiError) -> bytes:
    """An error after the first event; clients raise it."""
    return _event(error.body)


def _chunk(job: Job, model: str, delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    extra = {"usage": None} if job.include_usage else {}
    return _event({**_head(job, "chat.completion.chunk", model), "choices": [choice], **extra})


def _head(job: Job, kind: str, model: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": model}


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
