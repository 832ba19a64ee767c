"""What a server refuses: each time with the status and the field that a client can act on, and the server goes on."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from benchmarks.serve.traffic import data_uri, picture
from tests.server.conftest import CONTEXT, running
from tests.server.raw_http import PATH, begin, body, post, status_of


def _user(*content: object) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def _image(url: object, **more: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def _tiff() -> str:
    file = io.BytesIO()
    picture(1).save(file, "TIFF")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _cut(uri: str) -> str:
    """A whole number of base64 groups, but half the image."""
    head, data = uri.split(",")
    return f"{head},{data[: len(data) // 8 * 4]}"


URL = "messages[0].content[0].image_url.url"
FIELDS = {
    "unknown field": ({"top_k": 5}, "top_k", "unknown_parameter"),
    "several choices": ({"n": 2}, "n", "unsupported_parameter"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    "forced tool": ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    "JSON mode": ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    "logprobs": ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
    "bias": ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    "reasoning": ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    "temperature": ({"temperature": 2.5}, "temperature", None),
    "temperature as text": ({"temperature": "hot"}, "temperature", None),
    "top_p": ({"top_p": 0}, "top_p", None),
    "seed": ({"seed": 1.5}, "seed", None),
    "no tokens": ({"max_tokens": 0}, "max_tokens", None),
    "truth for a number": ({"max_tokens": True}, "max_tokens", None),
    "too many tokens": ({"max_tokens": CONTEXT + 1}, "max_tokens", None),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", None),
    "five stops": ({"stop": list("abcde")}, "stop", None),
    "empty stop": ({"stop": ""}, "stop[0]", None),
    "usage without stream": ({"stream_options": {"include_usage": True}}, "stream_options", None),
    "no messages": ({"messages": []}, "messages", None),
    "too many messages": ({"messages": _user({"type": "text", "text": "a"}) * 6000}, "messages", None),
    "endless kind of part": ({"messages": _user({"type": "x" * 10_000})}, "messages[0].content[0]", None),
    "temperature beyond floats": ({"temperature": 10**400}, "temperature", None),
    "message of no type": ({"messages": ["hi"]}, "messages[0]", None),
    "tool message": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", None),
    "named message": ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name", "unknown_parameter"),
    "tool calls": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls",
                   "unsupported_parameter"),
    "nothing said": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", None),
    "empty content": ({"messages": _user()}, "messages[0].content", None),
    "number for text": ({"messages": _user({"type": "text", "text": 7})}, "messages[0].content[0].text", None),
    "audio": ({"messages": _user({"type": "input_audio", "input_audio": {}})}, "messages[0].content[0]", None),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text", None),
    "placeholder": ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "messages", None),
    "web image": ({"messages": _user(_image("https://example.com/cat.png"))}, URL, "invalid_image_url"),
    "file": ({"messages": _user(_image("file:///etc/passwd"))}, URL, "invalid_image_url"),
    "path": ({"messages": _user(_image("/etc/passwd"))}, URL, "invalid_image_url"),
    "SVG": ({"messages": _user(_image("data:image/svg+xml;base64,PHN2Zy8+"))}, URL, "invalid_image_url"),
    "no base64": ({"messages": _user(_image("data:image/png;base64,&&&&"))}, URL, "invalid_base64"),
    "cut base64": ({"messages": _user(_image(data_uri(picture(1))[:-3]))}, URL, "invalid_base64"),
    "cut image": ({"messages": _user(_image(_cut(data_uri(picture(1, width=400, height=300), "JPEG"))))}, URL, "invalid_image"),
    "no image": ({"messages": _user(_image("data:image/png;base64,aGVsbG8="))}, URL, "invalid_image"),
    "another format": ({"messages": _user(_image(_tiff()))}, URL, "invalid_image"),
    "huge image": ({"messages": _user(_image(data_uri(Image.new("1", (5000, 5000)))))}, URL, "invalid_image"),
    "low detail": ({"messages": _user(_image(data_uri(picture(1)), detail="low"))}, "messages[0].content[0].image_url.detail", None),
    "many images": ({"messages": _user(*[_image(data_uri(picture(1)))] * 9)}, "messages", "too_many_images"),
    "system image": ({"messages": [{"role": "system", "content": [_image(data_uri(picture(1)))]}]}, "messages[0].content[0]", None),
    "long prompt": ({"messages": _user({"type": "text", "text": "a" * CONTEXT})}, "messages", "context_length_exceeded"),
    "endless prompt": ({"messages": _user({"type": "text", "text": "a" * 100_000})}, "messages", "context_length_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields(server, name):
    fields, param, code = FIELDS[name]
    status, headers, answer = post(server.url, body(**fields))
    assert status == 400, answer
    error = answer["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error
    assert len(error["message"]) < 400 and headers["x-request-id"]


BODIES = {
    "nothing": b"", "half": b'{"model": "tiny", "messages": [', "list": b"[]", "text": b'"hi"',
    "NaN": body()[:-1] + b', "temperature": NaN}', "deep": b"[" * 100_000,
    "Latin-1": '{"model": "\xe9"}'.encode("latin-1"), "large number": b'{"model": ' + b"9" * 5000 + b"}",
    "binary": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server, name):
    status, _, answer = post(server.url, BODIES[name])
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_what_is_left_out_is_named(server):
    for missing in ("model", "messages"):
        fields = json.loads(body())
        del fields[missing]
        status, _, answer = post(server.url, json.dumps(fields).encode())
        assert status == 400 and answer["error"]["param"] == missing


def test_types_of_content(server):
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}, {"Content-Encoding": "gzip"}):
        status, _, answer = post(server.url, body(), headers)
        assert status == 415 and answer["error"]["message"]


def test_urls_and_methods(server):
    status, _, answer = post(server.url, None, path="/v1/embeddings", method="GET")
    assert status == 404 and answer["error"]["code"] == "unknown_url"
    status, headers, answer = post(server.url, None, method="GET")
    assert status == 405 and headers["allow"] == "POST" and answer["error"]["type"] == "invalid_request_error"
    status, _, answer = post(server.url, None, path="/v1/chat/completions%0d%0aX:y", method="GET")
    assert status == 404


def test_a_web_page_gets_nothing(server):
    """A page may make a browser send to localhost, under its own name (DNS rebinding) or as a simple request."""
    assert post(server.url, body(), {"Host": "evil.example:8000"})[0] == 403
    assert post(server.url, body(), {"Host": "[broken"})[0] == 403
    assert post(server.url, body(), {"Content-Type": "text/plain", "Origin": "https://evil.example"})[0] == 415
    assert post(server.url, body(), {"Host": "localhost:1"})[0] == 200


@pytest.fixture(scope="module")
def strict(generator):
    with running(generator, max_request_bytes=2000, body_seconds=0.2, max_prompt_tokens=40, max_new_tokens=6, max_images=0) as server:
        yield server


def test_size_is_bounded_with_and_without_a_length(strict):
    large = body(user="x" * 300_000)
    for data in (large, iter([large[:1000], large[1000:]])):
        status, _, answer = post(strict.url, data)
        assert status == 413 and answer["error"]["code"] == "request_too_large"
    with begin(strict.url, b"x", length=10**15) as connection:
        assert status_of(connection) == 413
    assert post(strict.url, body(user="x" * 1500))[0] == 200


def test_a_slow_body_is_given_up(strict):
    with begin(strict.url, b'{"model"', length=100) as connection:
        assert status_of(connection) == 408
    assert strict.chat.worker.occupied == 0


def test_limits_of_a_server(strict):
    assert post(strict.url, body(max_tokens=7))[2]["error"]["param"] == "max_tokens"
    assert post(strict.url, body(max_completion_tokens=7, max_tokens=None))[2]["error"]["param"] == "max_completion_tokens"
    _, _, answer = post(strict.url, body(max_tokens=None))
    assert answer["usage"]["completion_tokens"] <= 6
    status, _, answer = post(strict.url, body(messages=_user({"type": "text", "text": "a" * 40})))
    assert status == 400 and "limit of 40 prompt tokens" in answer["error"]["message"]
    assert post(strict.url, body(messages=_user(_image("data:,"))))[2]["error"]["code"] == "too_many_images"


def test_garbage_is_no_http(server):
    with begin(server.url, b"") as connection:
        connection.sendall(b"\x00\xff" * 1000 + b"\r\n\r\n")
        connection.recv(1000)
    assert post(server.url, body())[0] == 200


def test_a_large_request_to_a_wrong_place_is_answered(server):
    """The answer comes although the client is still sending."""
    assert post(server.url, b"x" * 3_000_000, path="/v1/nothing")[0] == 404
    assert post(server.url, b"x" * 3_000_000, {"Content-Type": "text/plain"}, path=PATH)[0] == 415
