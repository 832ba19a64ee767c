"""Errors in the form in which OpenAI's API answers them."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the request's field that is wrong, e.g. ``"messages[0].content"``.
        code: for programs, e.g. ``"context_length_exceeded"``.
        retry_after: seconds after which asking again makes sense.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
