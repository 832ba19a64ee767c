"""Text and images to a :class:`ProcessedSample`, and token ids back to text, from a checkpoint's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecmfq_export.errors import CheckpointError, UserError
from ecmfq_export.json_file import read_json
from ecmfq_export.runtime.chat import Turn, render
from ecmfq_export.runtime.images import ImageInput
from ecmfq_export.runtime.preprocessors import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, load_preprocessor
from ecmfq_export.runtime.sample import ProcessedSample

PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, "generation_config.json",
)  # fmt: skip
"""Every file that :class:`Processor` reads; the ones a checkpoint has are copied beside the graphs."""


class Processor:
    """Tokenizer, chat template and image preprocessing of a Hugging Face directory, without running its code.

    Reads ``tokenizer.json``, ``tokenizer_config.json``, the chat template (``chat_template.jinja``,
    ``chat_template.json`` or in the tokenizer's config), ``preprocessor_config.json`` and ``generation_config.json``.

    Attributes:
        image_token_id: the placeholder that stands for one merged image patch.
        eos_token_ids: tokens that end an answer, most usual first.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedError: an image processor that is not known, see runtime/preprocessors.py.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.tokenizer = _load_tokenizer(self.directory)
        self._images = load_preprocessor(self.directory)
        self.image_token_id = self._special(self._images.image_token)
        self._around = [self._special(token) for token in self._images.around]
        vocabulary = self.tokenizer.get_vocab()
        self._reserved = tuple(token for token in self._images.reserved_tokens if token in vocabulary)
        self.eos_token_ids = self._read_eos()

    def sample(self, text: str, images: Sequence[ImageInput] = (), answer: str | None = None) -> ProcessedSample:
        """One user turn (images first, then the text) in the chat template, up to where the assistant answers.

        Args:
            text: what the user says; any text but image and video placeholders.
            images: paths, PIL images or uint8 arrays.
            answer: where given, appended with the end-of-turn token and marked in ``answer_mask``.

        Raises:
            UserError: an image that cannot be used, or a placeholder token in the text.
        """
        patches, grids = self.preprocess(images) if images else (None, None)
        ids, answer_length = self.prompt_ids(text, len(images), answer)
        if grids is not None:
            ids = self.expand(ids, grids)
        mask = np.zeros(len(ids), bool)
        mask[len(ids) - answer_length :] = True
        return ProcessedSample(np.asarray(ids, np.int64), patches, grids, mask)

    def preprocess(self, images: Sequence[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """Patches and grids of at least one image, as :class:`ProcessedSample` holds them.

        Raises:
            UserError: an image that cannot be used.
        """
        return self._images(list(images))

    def prompt_ids(self, text: str, num_images: int = 0, answer: str | None = None) -> tuple[list[int], int]:
        """Token ids of :meth:`sample` with each image as one placeholder still, and how many of them are the answer's.

        Raises:
            UserError: a placeholder token in the text.
        """
        self._refuse_placeholders(text)
        self._refuse_placeholders(answer or "")
        ids = self._encode(self.prompt(text, num_images))
        if answer is None:
            return ids, 0
        answer_ids = [*self._encode(answer), self.eos_token_ids[0]]
        return [*ids, *answer_ids], len(answer_ids)

    def prompt(self, text: str, num_images: int) -> str:
        """The chat template's text for one user turn, one placeholder an image, the assistant's turn opened."""
        turn = Turn("user", (*[None] * num_images, text))
        try:
            return render(self.tokenizer, [turn], self._images.image_token)
        except UserError as error:  # one user turn is what every template must take
            raise CheckpointError(f"{self.directory}: {error.what}", error.fix) from None

    def chat(self, turns: Sequence[Turn], images: Sequence[ImageInput] = ()) -> ProcessedSample:
        """A conversation in the chat template, up to where the assistant answers.

        Args:
            images: as many as the turns have places for, in their order.

        Raises:
            UserError: an image that cannot be used, a placeholder token in a text, or turns that the template refuses.
        """
        for turn in turns:
            for part in turn.content:
                self._refuse_placeholders(part or "")
        ids = self._encode(render(self.tokenizer, turns, self._images.image_token))
        patches, grids = self.preprocess(images) if images else (None, None)
        if grids is not None:
            ids = self.expand(ids, grids)
        return ProcessedSample(np.asarray(ids, np.int64), patches, grids, np.zeros(len(ids), bool))

    def _refuse_placeholders(self, text: str) -> None:
        for token in self._reserved:
            if token in text:
                raise UserError(f"the text contains the placeholder {token}", "give images separately; the template places them")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def token_id(self, text: str) -> int:
        """The id of a text that must be exactly one token, e.g. ``"yes"``.

        Raises:
            UserError: it is more than one token.
        """
        ids = self._encode(text)
        if len(ids) != 1:
            raise UserError(f"'{text}' is {len(ids)} tokens in this tokenizer, one is needed")
        return ids[0]

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # transformers' checks and the Rust library's, all of them about the tokenizer's own files
            raise CheckpointError(f"the tokenizer of {self.directory} fails: {error}", "copy its files from the model again") from None

    def expand(self, ids: Sequence[int], grids: np.ndarray) -> list[int]:
        """`ids` with as many placeholders for each image as it has tokens, and what stands around them; grids [num_images, 3]."""
        counts = iter([self._images.num_tokens(grid) for grid in grids])
        before, behind = self._around[:1], self._around[1:]
        out: list[int] = []
        for token in ids:
            out.extend([*before, *[token] * next(counts), *behind] if token == self.image_token_id else [token])
        return out

    def _special(self, token: str) -> int:
        index = self.tokenizer.get_vocab().get(token)
        if index is None:
            raise CheckpointError(f"the tokenizer of {self.directory} has no token {token}")
        return int(index)

    def _read_eos(self) -> tuple[int, ...]:
        ids: list[int] = []
        if self.tokenizer.eos_token_id is not None:
            ids.append(int(self.tokenizer.eos_token_id))
        path = self.directory / "generation_config.json"
        if path.is_file():
            try:
                value = read_json(path).get("eos_token_id")
                ids += [] if value is None else [int(v) for v in (value if isinstance(value, list) else [value])]
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not ids:
            raise CheckpointError(
                f"{self.directory}: no end-of-sequence token", "set eos_token in tokenizer_config.json"
            )
        return tuple(dict.fromkeys(ids))


def _load_tokenizer(directory: Path):
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json", "copy it from the model")
    # tokenizer.json is the whole tokenizer; the generic class reads it without looking up a class by the model's name.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust reader raises bare Exception
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from None
    if not tokenizer.chat_template:
        path = directory / "chat_template.json"
        try:
            tokenizer.chat_template = read_json(path)["chat_template"]
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} has no chat template", "add chat_template.jinja from the model"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    return tokenizer
