"""From a request's body to a job: everything that can be refused is refused here, before the request takes the model's time."""

from __future__ import annotations

import secrets

from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.chat import Turn
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.generate import Sampling
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.server.api_error import ApiError
from ecmfq_export.server.chat_request import ChatRequest, ImagePart, TextPart, parse_chat_request
from ecmfq_export.server.image_data import decode_image
from ecmfq_export.server.job import Job
from ecmfq_export.server.settings import Limits


class Preparer:
    """Makes jobs of requests, one at a time: only one request's decoded images are in memory.

    Args:
        model_name: what requests must call the model.
    """

    def __init__(self, processor: Processor, session: DecoderSession, model_name: str, limits: Limits) -> None:
        self._processor, self._session, self._model_name, self._limits = processor, session, model_name, limits
        context = session.max_seq_len
        self._max_prompt = min(limits.max_prompt_tokens or context, context)
        self._max_new = min(limits.max_new_tokens or context, context)
        # No text of so many characters can fit, and a tokenizer need not spend seconds to say so.
        self._max_characters = self._max_prompt * max(map(len, processor.tokenizer.get_vocab()))

    def __call__(self, body: bytes, job_id: str) -> Job:
        """Read, check and tokenize one request.

        Raises:
            ApiError: 400 or 404; whatever is wrong with the request.
        """
        request = parse_chat_request(body)
        if request.model != self._model_name:
            raise unknown_model(request.model, self._model_name)
        if request.new_tokens is not None and request.new_tokens > self._max_new:
            raise ApiError(400, f"{request.new_tokens} new tokens are asked for; this server's limit is {self._max_new}",
                           param="max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens")
        turns, images = self._conversation(request)
        try:
            sample = self._processor.chat(turns, images)
            if sample.image_grid_thw is not None:
                self._session.check_patches(sample.image_grid_thw)
        except UserError as error:
            raise ApiError(400, str(error).replace("\n  fix: ", "; "), param="messages") from None
        self._check_length(sample)
        return Job(
            job_id, sample, request.new_tokens or self._max_new, _sampling(request), tuple(request.stop), bool(request.stream),
            request.include_usage, len(images),
        )  # fmt: skip

    def _conversation(self, request: ChatRequest) -> tuple[list[Turn], list[Image.Image]]:
        places = [(i, j, part.image_url.url) for i, message in enumerate(request.messages)
                  for j, part in enumerate(message.content) if isinstance(part, ImagePart)]  # fmt: skip
        if len(places) > self._limits.max_images:
            raise ApiError(400, f"{len(places)} images in one request; this server's limit is {self._limits.max_images}",
                           param="messages", code="too_many_images")
        characters = sum(len(part.text) for message in request.messages for part in message.content if isinstance(part, TextPart))
        if characters > self._max_characters:
            raise self._too_long(f"{characters} characters of text")
        for i, j, _ in places:
            if request.messages[i].role != "user":
                raise ApiError(400, f"an image in a {request.messages[i].role} message; images are for user messages",
                               param=f"messages[{i}].content[{j}]")
        images = [decode_image(url, f"messages[{i}].content[{j}].image_url.url", self._limits.max_image_pixels) for i, j, url in places]
        turns = [Turn("system" if message.role == "developer" else message.role,
                      tuple(part.text if isinstance(part, TextPart) else None for part in message.content))
                 for message in request.messages]  # fmt: skip
        return turns, images

    def _check_length(self, sample: ProcessedSample) -> None:
        if sample.length > self._max_prompt:
            raise self._too_long(f"a prompt of {sample.length} tokens")
        if sample.length + 1 > self._session.max_seq_len:
            raise self._too_long(f"a prompt of {sample.length} tokens leaves no room for an answer:")

    def _too_long(self, what: str) -> ApiError:
        return ApiError(400, f"{what} exceeds this server's limit of {self._max_prompt} prompt tokens in a context of "
                        f"{self._session.max_seq_len} (images count too)", param="messages", code="context_length_exceeded")


def unknown_model(name: str, served: str) -> ApiError:
    """404 for a model that is not the one served."""
    return ApiError(404, f"the model {name[:200]!r} does not exist; this server has {served!r}", param="model", code="model_not_found")


def _sampling(request: ChatRequest) -> Sampling:
    # Without a seed every answer draws its own; greedy answers draw nothing.
    seed = secrets.randbits(63) if request.seed is None else request.seed & (2**64 - 1)
    return Sampling(request.temperature or 0.0, 1.0 if request.top_p is None else request.top_p, seed)
