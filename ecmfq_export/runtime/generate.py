"""Text from a prompt and images: prefill once, then one token at a time, streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ecmfq_export.engine.runner import Runner
from ecmfq_export.errors import UserError
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.images import ImageInput
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.sample import ProcessedSample

Stop = Literal["eos", "length", "context", "text", "cancelled"]


@dataclass(frozen=True)
class Generation:
    """What came out of one prompt.

    Attributes:
        text: decoded answer, special tokens left out.
        token_ids: [new tokens], the end-of-turn token included where it came.
        stop: ``eos``; ``length``: max_new_tokens reached; ``context``: the cache is full; ``text``: a stop text came, and the text
            ends before it; ``cancelled``: the caller did not want the rest.
        prompt_tokens: length of the prompt, image tokens included.
        first_token_seconds: from the call to the first token of the batch (preprocessing of images not included).
        tokens_per_second: of this prompt while decoding, the first token not counted; 0 where there was only that one.
    """

    text: str
    token_ids: tuple[int, ...]
    stop: Stop
    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Sampling:
    """How a token is picked from logits.

    Attributes:
        temperature: 0 takes the largest logit (greedy).
        top_p: sample from the fewest tokens whose probabilities reach this sum.
        seed: of the draws; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} is out of range", "0 is greedy; 0.7 is usual for sampling")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p} is out of range", "a fraction in (0, 1]; 1 keeps every token")


GREEDY = Sampling()


class Session(Protocol):
    """What generating needs of a model; ``DecoderSession`` is one, over an export's graphs."""

    max_seq_len: int

    def check_length(self, sample: ProcessedSample, room: int = 0) -> None: ...

    def prefill(self, samples: Sequence[ProcessedSample]) -> tuple[np.ndarray, Any]: ...

    def step(self, tokens: np.ndarray, state: Any, active: np.ndarray | None = None) -> np.ndarray: ...


class Generator:
    """A model with its processor, ready to answer.

    Args:
        directory: the ``onnx`` directory of an export (graphs, embeddings, ``runtime.json``, tokenizer files).
        runner_factory: opens a graph, e.g. ``lambda path: OrtRunner(path)``; see :class:`DecoderSession`.
    """

    def __init__(self, directory: Path | str, runner_factory: Callable[[Path], Runner]) -> None:
        # The session first: of a directory that is no export at all, it says so.
        self.session: Session = DecoderSession(directory, runner_factory)
        self.processor = Processor(directory)

    @classmethod
    def over(cls, session: Session, processor: Processor) -> Generator:
        """A generator over a session that is open already."""
        generator = cls.__new__(cls)
        generator.session, generator.processor = session, processor
        return generator

    def generate(
        self,
        text: str,
        images: Sequence[ImageInput] = (),
        max_new_tokens: int = 64,
        on_token: Callable[[str], None] | None = None,
        sampling: Sampling = GREEDY,
    ) -> str:
        """Answer one prompt; `on_token` gets each piece of text as soon as it is whole characters.

        Raises:
            UserError: an unusable image, or a prompt that leaves no room in the context.
        """
        sample = self.processor.sample(text, images)
        callback = None if on_token is None else lambda _row, piece: on_token(piece)
        return self.generate_batch([sample], max_new_tokens, callback, sampling)[0].text

    def generate_batch(
        self,
        samples: Sequence[ProcessedSample],
        max_new_tokens: int = 64,
        on_token: Callable[[int, str], None] | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Generation]:
        """Answer several prompts in one batch of right-padded rows; each gets what it would get alone.

        Args:
            samples: from :meth:`Processor.sample`, without answers.
            max_new_tokens: at least 1.
            on_token: gets (row, piece of text); text that may turn out to begin a stop text is held back until it is known.
            sampling: each row draws from its own stream, seeded by (seed, row).
            stop: texts that end an answer before them, besides the end-of-turn token.
            cancelled: asked between tokens; once it says True, every row ends as it stands.

        Raises:
            UserError: a prompt that leaves no room in the context.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} is out of range", "ask for at least 1")
        for sample in samples:
            self.session.check_length(sample, room=1)
        rows = [_Row(self.processor, sample.length, on_token, i, stop) for i, sample in enumerate(samples)]
        draws = [np.random.default_rng([sampling.seed, i]) for i in range(len(rows))]
        start = time.perf_counter()
        logits, state = self.session.prefill(samples)
        first = None
        while True:
            now = time.perf_counter()
            first = first or now - start
            for i, row in enumerate(rows):
                if row.stop is None:
                    row.take(pick(logits[i], sampling, draws[i]), now, max_new_tokens, self.session.max_seq_len)
            if cancelled():
                for row in rows:
                    row.stop = row.stop or "cancelled"
            active = np.array([row.stop is None for row in rows])
            if not active.any():
                return [row.result(first) for row in rows]
            logits = self.session.step(np.array([row.ids[-1] for row in rows]), state, active)


class _Row:
    """One prompt's tokens so far, and its text on the way out."""

    def __init__(
        self, processor: Processor, prompt: int, on_token: Callable[[int, str], None] | None, index: int, stop: Sequence[str] = ()
    ) -> None:
        self.ids: list[int] = []
        self.stop: Stop | None = None
        self._stop_texts = tuple(text for text in stop if text)
        self._processor, self._prompt, self._on_token, self._index = processor, prompt, on_token, index
        self._shown = self._window = 0
        self._held = ""
        self._times: list[float] = []

    def take(self, token: int, now: float, max_new_tokens: int, max_seq_len: int) -> None:
        self.ids.append(token)
        self._times.append(now)
        if token in self._processor.eos_token_ids:
            self.stop = "eos"
        elif self._stop_texts and self._cut(text := self._processor.decode(self.ids)) != text:
            self.stop = "text"
        elif len(self.ids) == max_new_tokens:
            self.stop = "length"
        elif self._prompt + len(self.ids) > max_seq_len:
            # The token just taken has no slot in the cache, so nothing can follow it.
            self.stop = "context"
        self._show()

    def _cut(self, text: str) -> str:
        """`text` up to the first stop text in it."""
        places = [at for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _show(self) -> None:
        # A character may span tokens, and a token's text may depend on the one before: decode a window that starts at the
        # last token shown, and hold back while it ends inside a character (U+FFFD).
        if self._on_token is None:
            return
        before = self._processor.decode(self.ids[self._window : self._shown])
        text = self._processor.decode(self.ids[self._window :])
        if self.stop is None and text.endswith("\ufffd"):
            return
        self._held += text[len(before) :]
        self._window, self._shown = self._shown, len(self.ids)
        piece = self._cut(self._held)
        if self.stop is None:
            piece = piece[: len(piece) - self._begun(piece)]
        self._held = self._held[len(piece) :]
        if piece:
            self._on_token(self._index, piece)

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop_texts), default=0)
        return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop_texts)), 0)

    def result(self, first: float) -> Generation:
        assert self.stop is not None
        span = self._times[-1] - self._times[0]
        rate = (len(self.ids) - 1) / span if span > 0 else 0.0
        return Generation(self._cut(self._processor.decode(self.ids)), tuple(self.ids), self.stop, self._prompt, first, rate)


def pick(logits: np.ndarray, sampling: Sampling, draws: np.random.Generator) -> int:
    """One token id from logits [vocab].

    Raises:
        UserError: logits that are NaN.
    """
    if np.isnan(logits).any():
        raise UserError(
            "the model's logits are NaN", "an activation overflowed its type, or a weight file is damaged; see 'validate'"
        )
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a temperature next to zero leaves the largest logit alone
        probabilities = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    # Keep a token while the sum before it is below top_p: the fewest whose sum reaches it, never none.
    ranked = probabilities[order]
    kept = order[np.cumsum(ranked) - ranked < sampling.top_p]
    return int(draws.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
