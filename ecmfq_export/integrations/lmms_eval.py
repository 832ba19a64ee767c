"""Our models in lmms-eval (0.7): ``python -m lmms_eval --model ecmfq --model_args pretrained=./bundle --tasks mme``.

Importing this module needs lmms-eval, which brings the benchmarks and their data; whoever runs them installs it. It finds the model
through this package's entry point, see lmms_manifest.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image

from ecmfq_export.errors import UnsupportedError, UserError
from ecmfq_export.integrations.answering import Answerer, Query
from ecmfq_export.runtime.generate import GREEDY, Sampling

_MAX_NEW_TOKENS = 1024
_KNOWN = {"until", "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "image_aspect_ratio"}
"""Of these image_aspect_ratio belongs to other models' preprocessing: ours always keeps the ratio."""
_IMAGE_MARK = "<image>"


class EcmfqModel(lmms):
    """A checkpoint or a bundle behind lmms-eval's interface (``lmms_eval.api.model.lmms``, the simple form)."""

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str | None = 1, threads: int = 0, score: str = "loss", device: str | None = None,
        max_batch_size: int | str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """Open a model.

        Args:
            pretrained: a checkpoint (PyTorch), a bundle or its ``onnx`` directory (ONNX Runtime).
            batch_size: prompts that run together.
            threads: CPU threads; 0: all cores.
            score: what :meth:`loglikelihood` gives. ``loss``, minus the log-probability, is what lmms-eval's multiple-choice tasks take
                the smallest of, as its own models give it; ``log_prob`` is what the documentation of its base class says.
            device: None or ``cpu``.
            max_batch_size: lmms-eval passes it; it belongs to automatic batch sizes, which are refused.
            seed: of sampling, where a task asks for it.

        Raises:
            UnsupportedError: another device, an automatic batch size, or another score.
            UserError: no model at `pretrained`.
        """
        super().__init__()
        if device not in (None, "cpu"):
            raise UnsupportedError(f"device '{device}' is not supported", "leave --device out: models run on the CPU")
        if not str(batch_size or 1).isdigit():
            raise UnsupportedError(f"batch size '{batch_size}' is not supported", "give a number")
        if score not in ("loss", "log_prob"):
            raise UnsupportedError(f"score '{score}' is not known", "score=loss or score=log_prob")
        self._answerer = Answerer(Path(pretrained), int(batch_size or 1), int(threads))
        self._sign = -1.0 if score == "loss" else 1.0
        self._seed = int(seed)
        self.batch_size = int(batch_size or 1)
        self.device = "cpu"

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to requests of ``(context, generation_kwargs, doc_to_visual, doc_id, task, split)``.

        Raises:
            UnsupportedError: beam search, a generation setting that is not known, or a visual that is no image.
            UserError: a prompt that does not fit the context.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        queries = []
        for index, request in enumerate(requests):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            queries.append(self._query(context, doc_to_visual, task, split, doc_id))
            groups.setdefault(_generation(settings, self._seed), []).append(index)
        answers = [""] * len(requests)
        for (until, max_new_tokens, sampling), members in groups.items():
            found = self._answerer.generate([queries[i] for i in members], max_new_tokens, until, sampling)
            for index, text in zip(members, found, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Scores of requests of ``(context, continuation or function of the document, doc_to_visual, doc_id, task, split)``, and whether
        greedy decoding gives the continuation. Blanks around a continuation are left out: it begins the assistant's turn."""
        queries, answers = [], []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            queries.append(self._query(context, doc_to_visual, task, split, doc_id))
            text = continuation if isinstance(continuation, str) else continuation(self.task_dict[task][split][doc_id])
            answers.append(str(text).strip())
        return [_kept_whole((self._sign * found.log_prob, found.greedy)) for found in self._answerer.score(queries, answers)]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise UnsupportedError("tasks of several rounds are not supported", "choose tasks of one question and one answer")

    def _query(self, context: Any, doc_to_visual: Any, task: str, split: str, doc_id: Any) -> Query:
        text = context[0] if isinstance(context, list) else context
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual is not None else None
        # Images stand before the text in our prompts; a mark in the text would be read as letters.
        return Query(str(text).replace(_IMAGE_MARK, "").strip(), tuple(_images(visuals, task)))


def _kept_whole(pair: tuple[float, bool]) -> Any:
    """`pair` in a form that lmms-eval hands on as it is.

    The evaluator of 0.7.2 unwraps every response as if it were generated text and makes a string of a pair of numbers, so that its
    own multiple-choice tasks fail; what stands in its ``GenerationResult`` passes.
    """
    try:
        from lmms_eval.api.instance import GenerationResult, unwrap_generation_output
    except ImportError:  # a version that has no such step
        return pair
    return pair if unwrap_generation_output(pair)[0] == pair else GenerationResult(pair)


def _images(visuals: Any, task: str) -> Iterable[Any]:
    if visuals is None:
        return
    for visual in visuals if isinstance(visuals, list | tuple) else [visuals]:
        if isinstance(visual, list | tuple):
            yield from _images(visual, task)
        elif isinstance(visual, str | Path | Image.Image | np.ndarray):
            yield visual
        elif visual is not None:
            raise UnsupportedError(f"task {task} gives a {type(visual).__name__} as visual", "choose tasks with images")


def _generation(settings: dict[str, Any], seed: int) -> tuple[tuple[str, ...], int, Sampling]:
    """(stop texts, new tokens, sampling) of lmms-eval's generation_kwargs."""
    unknown = sorted(set(settings) - _KNOWN)
    if unknown:
        raise UnsupportedError(f"generation settings {', '.join(unknown)} are not known", f"known: {', '.join(sorted(_KNOWN))}")
    if int(settings.get("num_beams") or 1) != 1:
        raise UnsupportedError(f"beam search (num_beams = {settings['num_beams']}) is not supported", "set num_beams=1")
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(text, str) for text in until):
        raise UserError(f"'until' holds something else than texts: {until}")
    temperature = float(settings.get("temperature") or 0.0)
    sampling = GREEDY
    if settings.get("do_sample", temperature > 0) and temperature > 0:
        sampling = Sampling(temperature, float(settings.get("top_p") or 1.0), seed)
    return until, int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS), sampling
