"""A chat request read from JSON: fields that are served, fields that change nothing, and all others refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ecmfq_export.server.api_error import ApiError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",),
}  # fmt: skip
"""Fields that would change the answer in a way that is not served; null and these values ask for nothing."""

WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip
"""Fields that leave the answer as it is: accounting, caching, and speed."""

_SAID = {"refusal": (), "annotations": ([],), "audio": (), "tool_calls": ([],), "function_call": (), "reasoning_content": ()}
"""Of an assistant's message that a client sends back as it got it."""


MAX_PARTS = 10_000
"""Messages and parts of messages: objects of a hundred times the memory of the shortest JSON that asks for them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _whole(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return value


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_whole)]


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "high"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(_Strict):
    """One message; a plain text counts as one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


class ChatRequest(_Strict):
    """The fields that are served, as OpenAI's reference defines them; numbers as they are given."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopText], BeforeValidator(_texts), Field(max_length=4)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def new_tokens(self) -> int | None:
        """The most tokens that are asked for, under either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: 400, with the field at fault in ``param``: no JSON, a missing, unknown or malformed field, or one that is not served.
    """
    data = _read_json(body)
    _refuse(data, NEUTRAL, "")
    if (count := _count_parts(data.get("messages"))) > MAX_PARTS:
        raise ApiError(400, f"{count} messages and parts of messages; this server's limit is {MAX_PARTS}", param="messages")
    fields = {key: value for key, value in data.items() if key not in NEUTRAL and key not in WITHOUT_EFFECT}
    fields["messages"] = _without_echo(data.get("messages"))
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        _raise_first(error)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise ApiError(400, f"max_tokens {request.max_tokens} and max_completion_tokens {request.max_completion_tokens} differ",
                       param="max_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options are for stream = true", param="stream_options")
    return request


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError's text holds the body's bytes; the others name a place only.
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ApiError(400, f"the request's body is no readable JSON: {what}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the request's body is no JSON object")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _refuse(data: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str) -> None:
    for key, values in neutral.items():
        if data.get(key) is not None and data[key] not in values:
            allowed = " or ".join(json.dumps(value) for value in (*values, None))
            raise ApiError(400, f"'{where}{key}' is not supported by this server with that value; supported: {allowed}",
                           param=where + key, code="unsupported_parameter")


def _count_parts(messages: Any) -> int:
    if not isinstance(messages, list):
        return 0
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return len(messages) + sum(len(content) for content in contents if isinstance(content, list))


def _without_echo(messages: Any) -> Any:
    """Messages without the empty fields that an answer brings along when it is sent back."""
    if not isinstance(messages, list):
        return messages
    out: list[Any] = []
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "assistant":
            _refuse(message, _SAID, f"messages[{i}].")
            message = {key: value for key, value in message.items() if key not in _SAID}
        if isinstance(message, dict) and message.get("name", "") is None:
            message = {key: value for key, value in message.items() if key != "name"}
        out.append(message)
    return out


def _raise_first(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path, kind_follows = "", False
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
            kind_follows = ".content[" in path
        elif kind_follows:
            kind_follows = False  # the name of a part's kind, which is no field
        else:
            path += f".{step}" if path else step
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"'{path[:200]}' is not known to this server", param=path[:200], code="unknown_parameter")
    raise ApiError(400, f"'{path}': {first['msg'][:300]}", param=path)
