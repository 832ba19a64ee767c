"""A checkpoint or a bundle that answers and scores: what every benchmark harness asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.models.moe_vlm import open_model
from ecmfq_export.models.torch_session import TorchSession
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.generate import GREEDY, Generator, Sampling, Session
from ecmfq_export.runtime.images import ImageInput
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.runtime_file import find_export, verify_export
from ecmfq_export.runtime.sample import ProcessedSample


class ScoringSession(Session, Protocol):
    """A session that can also score given answers."""

    def answer_logits(self, samples: Sequence[ProcessedSample]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Query:
    """One user turn: a text and images before it."""

    text: str
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class Likelihood:
    """How likely a given answer is.

    Attributes:
        log_prob: natural log of its probability after the prompt, the end of the turn not included.
        greedy: whether greedy decoding begins with exactly this answer.
        tokens: how many it has.
    """

    log_prob: float
    greedy: bool
    tokens: int


class Answerer:
    """Answers queries in batches of similar length.

    Args:
        path: a checkpoint directory (run in PyTorch, loaded whole), a bundle, or a bundle's ``onnx`` directory (run in ONNX Runtime).
        batch_size: prompts that run together.
        threads: CPU threads, 0: all cores. Of PyTorch this sets the whole process.

    Raises:
        UserError: nothing of that kind at `path`, or a damaged model.
    """

    def __init__(self, path: Path | str, batch_size: int = 1, threads: int = 0) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is out of range", "give at least 1")
        session, directory = _open(Path(path), threads)
        self.session = session
        self.processor = Processor(directory)
        self._generator = Generator.over(session, self.processor)
        self._batch_size = batch_size

    def generate(
        self, queries: Sequence[Query], max_new_tokens: int, stop: Sequence[str] = (), sampling: Sampling = GREEDY
    ) -> list[str]:
        """An answer to each query, ended by the end of the turn, a stop text (left out) or `max_new_tokens`.

        Raises:
            UserError: an image that cannot be used, or a prompt that does not fit the context.
        """
        samples = [self.processor.sample(q.text, q.images) for q in queries]
        answers: dict[int, str] = {}
        for rows in self._batches(samples):
            found = self._generator.generate_batch([samples[i] for i in rows], max_new_tokens, None, sampling, stop)
            answers.update((i, generation.text) for i, generation in zip(rows, found, strict=True))
        return [answers[i] for i in range(len(samples))]

    def score(self, queries: Sequence[Query], answers: Sequence[str]) -> list[Likelihood]:
        """How likely each answer is; it begins the assistant's turn.

        Raises:
            UserError: an answer without a token, an unusable image, or a prompt that does not fit the context.
        """
        samples = []
        for query, answer in zip(queries, answers, strict=True):
            sample = self.processor.sample(query.text, query.images, answer)
            if int(sample.answer_mask.sum()) < 2:
                raise UserError(f"the answer {answer!r} has no token to score", "give a text that is not empty")
            samples.append(sample)
        found: dict[int, Likelihood] = {}
        for rows in self._batches(samples):
            for i, logits in zip(rows, self.session.answer_logits([samples[i] for i in rows]), strict=True):
                # The last token is the end of the turn, which is no part of the answer's text.
                targets = samples[i].input_ids[samples[i].answer_mask][:-1]
                wide = logits[:-1].astype(np.float64)
                highest = wide.max(axis=-1, keepdims=True)
                log_probs = wide - highest - np.log(np.exp(wide - highest).sum(axis=-1, keepdims=True))
                total = float(log_probs[np.arange(len(targets)), targets].sum())
                found[i] = Likelihood(total, bool((wide.argmax(axis=-1) == targets).all()), len(targets))
        return [found[i] for i in range(len(samples))]

    def _batches(self, samples: Sequence[ProcessedSample]) -> list[list[int]]:
        # Longest first: what does not fit fails at once.
        order = sorted(range(len(samples)), key=lambda i: -samples[i].length)
        return [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]


def _open(path: Path, threads: int) -> tuple[Any, Path]:
    directory = find_export(path)
    if directory is not None:
        from ecmfq_export.engine.ort_runner import OrtRunner

        verify_export(directory)
        return DecoderSession(directory, lambda file: OrtRunner(file, threads=threads)), directory
    if not path.is_dir():
        raise UserError(f"no model at {path}", "give a checkpoint directory, a bundle, or a bundle's onnx directory")
    if threads:
        import torch

        torch.set_num_threads(threads)
    return TorchSession(open_model(path)), path
