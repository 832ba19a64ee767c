"""Answers over HTTP, with OpenAI's own client, are those of the model called directly."""

from __future__ import annotations

import openai
import pytest

from benchmarks.serve.traffic import data_uri, picture
from ecmfq_export.runtime.chat import Turn
from ecmfq_export.runtime.generate import Sampling
from tests.server.conftest import CONTEXT


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def _image(seed: int, **size: int) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(picture(seed, **size)), "detail": "auto"}}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


CONVERSATIONS = {
    "text": ([{"role": "user", "content": "Hello there"}], [Turn("user", ("Hello there",))], []),
    "image": ([{"role": "user", "content": [_image(1), _text("What is it?")]}], [Turn("user", (None, "What is it?"))], [1]),
    "two images between texts": (
        [{"role": "user", "content": [_text("a"), _image(2), _text("b"), _image(3)]}], [Turn("user", ("a", None, "b", None))], [2, 3],
    ),
    "turns": (
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [_image(4), _text("What?")]},
         {"role": "assistant", "content": "A cat."}, {"role": "user", "content": [_text("Sure? "), _text("漢字")]}],
        [Turn("system", ("Be brief.",)), Turn("user", (None, "What?")), Turn("assistant", ("A cat.",)),
         Turn("user", ("Sure? ", "漢字"))],
        [4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_the_models(client, direct, name):
    messages, turns, seeds = CONVERSATIONS[name]
    expected = direct(turns, [picture(seed) for seed in seeds], 24)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=24)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == expected.text
    assert choice.finish_reason == {"eos": "stop", "length": "length"}[expected.stop]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id == answer._request_id

    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, stream=True,
                                                 stream_options={"include_usage": True}))  # fmt: skip
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
    assert pieces[0].choices[0].delta.role == "assistant"
    assert last.choices == [] and last.usage.model_dump() == answer.usage.model_dump()
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(pieces) > 4, "the text comes piece by piece"


def test_run_and_serve_agree(client, generator):
    """The command `run` puts images first; so may a request."""
    text = generator.generate("What is it?", [picture(5)], max_new_tokens=12)
    messages = [{"role": "user", "content": [_image(5), _text("What is it?")]}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=12).choices[0].message.content == text


def test_an_answer_may_be_sent_back(client, direct):
    first = [{"role": "user", "content": "hi"}]
    message = client.chat.completions.create(model="tiny", messages=first, max_tokens=5).choices[0].message
    turns = [Turn("user", ("hi",)), Turn("assistant", (message.content,)), Turn("user", ("more",))]
    for echo in (message, message.model_dump()):
        answer = client.chat.completions.create(model="tiny", max_tokens=8, messages=[*first, echo, {"role": "user", "content": "more"}])
        assert answer.choices[0].message.content == direct(turns, max_new_tokens=8).text


def test_sampling(client, direct):
    messages, turns = [{"role": "user", "content": "hi"}], [Turn("user", ("hi",))]

    def ask(**options) -> str:
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, **options).choices[0].message.content

    hot = ask(temperature=1.5, top_p=0.9, seed=7)
    assert hot == ask(temperature=1.5, top_p=0.9, seed=7) == direct(turns, sampling=Sampling(1.5, 0.9, 7)).text
    assert ask(temperature=1.5, seed=-1) == direct(turns, sampling=Sampling(1.5, 1.0, 2**64 - 1)).text
    assert ask(temperature=2) != ask(temperature=2), "without a seed every answer is drawn anew"
    assert ask() == ask(temperature=0, top_p=0.5, seed=3) == direct(turns).text


def test_stop_texts(client, direct):
    messages, turns = [{"role": "user", "content": "Hello there"}], [Turn("user", ("Hello there",))]
    whole = direct(turns, max_new_tokens=32).text
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=32, stop=["never said", stop])
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=32, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_without_a_limit_the_context_is_the_limit(client, direct):
    messages = [{"role": "user", "content": "a" * (CONTEXT - 80)}]
    answer = client.chat.completions.create(model="tiny", messages=messages)
    expected = direct([Turn("user", (messages[0]["content"],))], max_new_tokens=CONTEXT)
    assert answer.choices[0].message.content == expected.text
    assert expected.stop == "context" and answer.choices[0].finish_reason == "length"


def test_fields_without_effect_are_taken(client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=2, n=1, user="me", metadata={"a": "b"}, store=False,
        presence_penalty=0, frequency_penalty=0.0, logprobs=False, logit_bias={}, response_format={"type": "text"}, tools=[],
        tool_choice="none", modalities=["text"], parallel_tool_calls=True, service_tier="auto",
    )  # fmt: skip
    assert answer.usage.completion_tokens == 2


def test_models(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ecmfq-export"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
