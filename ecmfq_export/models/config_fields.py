"""Reading config fields so that none goes unnoticed: each is taken, known to be harmless, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ecmfq_export.errors import CheckpointError, UnsupportedError

BOOKKEEPING = {
    "architectures": "checked at the top level",
    "dtype": "tensors carry their own dtype",
    "torch_dtype": "tensors carry their own dtype",
    "transformers_version": "says who wrote the file",
    "_name_or_path": "says where the file came from",
    "name_or_path": "says where the file came from",
    "initializer_range": "initialization of training",
    "return_dict": "form of transformers' return value",
    "output_hidden_states": "form of transformers' return value",
    "output_attentions": "form of transformers' return value",
    "problem_type": "classification heads only",
    "id2label": "classification heads only",
    "label2id": "classification heads only",
    "use_cache": "whether transformers keeps a cache",
    "bos_token_id": "generation; the runtime reads the tokenizer and generation_config.json",
    "eos_token_id": "generation; the runtime reads the tokenizer and generation_config.json",
    "pad_token_id": "marks an embedding row that training leaves alone; inference reads it as any other",
}
"""Fields of any level that do not change inference, with the reason."""

_GENERATION = (
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "typical_p",
)  # fmt: skip

WRITTEN_BY_TRANSFORMERS_4 = dict.fromkeys(_GENERATION, "generation default that transformers 4 copied into configs; not read") | {
    "auto_map": "names remote code, which is never run",
    "finetuning_task": "says what the model was trained for",
    "torchscript": "how transformers 4 runs the model",
    "use_bfloat16": "how transformers 4 runs the model",
    "tf_legacy_loss": "TensorFlow only",
    "_attn_implementation": "how transformers runs the model",
    "_attn_implementation_autoset": "how transformers runs the model",
}
"""Fields that transformers 4 wrote into any section and that do not change inference, with the reason."""

_RESULTS = ("return_dict", "output_hidden_states", "output_attentions")

MAX_LAYERS = 10_000
"""A damaged count must not keep the machine building layers."""


class ConfigFields:
    """One JSON object of a config, with the defaults of transformers' own config class for what is absent.

    Args:
        where: how errors name the object, e.g. ``"text_config"``; empty for the top level.
        given: what the file says.
        defaults: an instance of transformers' config class, built from `given`; read for absent fields.
        aliases: other spellings of a field, e.g. ``{"num_experts": ("num_local_experts",)}``.
    """

    def __init__(
        self, where: str, given: Mapping[str, Any], defaults: Any, aliases: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.where = where
        self._given = given
        self._defaults = defaults
        self._aliases = aliases or {}
        self._taken: set[str] = set()

    def label(self, name: str) -> str:
        """The field's name as errors give it."""
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str) -> Any:
        """The field's value, from the file or from transformers' default.

        Raises:
            UnsupportedError: two spellings of the field disagree.
        """
        spellings = [name, *self._aliases.get(name, ())]
        present = [spelling for spelling in spellings if spelling in self._given]
        self._taken.update(spellings)
        if not present:
            return getattr(self._defaults, name, None)
        values = [self._given[spelling] for spelling in present]
        if any(value != values[0] for value in values[1:]):
            raise UnsupportedError(f"config.json: {self.label(present[0])} = {values[0]!r} but {present[1]} = {values[1]!r}")
        return values[0]

    def whole(self, name: str, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """An integer field.

        Raises:
            CheckpointError: no integer, or outside [`minimum`, `maximum`].
        """
        value = self.take(name)
        if type(value) is not int or not minimum <= value <= maximum:
            raise CheckpointError(f"config.json: {self.label(name)} = {value!r}", f"expected an integer from {minimum} to {maximum}")
        return value

    def number(self, name: str) -> float:
        """A positive finite number.

        Raises:
            CheckpointError: anything else.
        """
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json: {self.label(name)} = {value!r}", "expected a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """A boolean field.

        Raises:
            CheckpointError: anything else.
        """
        value = self.take(name)
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {self.label(name)} = {value!r}", "expected true or false")
        return value

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of non-negative integers.

        Raises:
            CheckpointError: anything else.
        """
        value = self.take(name)
        if not isinstance(value, list | tuple) or any(type(item) is not int or item < 0 for item in value):
            raise CheckpointError(f"config.json: {self.label(name)} = {value!r}", "expected a list of integers")
        return tuple(value)

    def expect(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a value that changes the model in a way that is not handled.

        Raises:
            UnsupportedError: the field (or its default) is none of `allowed`.
        """
        value = self.take(name)
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise UnsupportedError(
                f"config.json: {self.label(name)} = {value!r} is not supported: {why}",
                f"supported: {' or '.join(repr(item) for item in allowed)}",
            )

    def finish(self, harmless: Mapping[str, str]) -> None:
        """Refuse what was neither taken nor is known not to change inference.

        Args:
            harmless: field name to the reason why it may be ignored.

        Raises:
            UnsupportedError: an unknown field, with its value.
        """
        for name, value in self._given.items():
            if name not in self._taken and name not in harmless:
                shown = repr(value)
                raise UnsupportedError(
                    f"config.json: {self.label(name)} = {shown if len(shown) < 80 else shown[:77] + '...'} is unknown "
                    "and could change the model's results",
                    "if it does not, remove it from config.json; otherwise this model needs a newer version",
                )


def read_heads(text: ConfigFields, hidden_size: int, one_count: bool = False) -> tuple[int, int, int]:
    """Query heads, key/value heads and the size of a head of grouped-query attention.

    Args:
        one_count: whether a config without a number of key/value heads has as many as query heads.

    Raises:
        CheckpointError: counts or sizes that do not go together.
    """
    heads = text.whole("num_attention_heads")
    kv_heads = heads if one_count and text.take("num_key_value_heads") is None else text.whole("num_key_value_heads")
    size = text.whole("head_dim", 2) if text.take("head_dim") is not None else hidden_size // heads
    if heads % kv_heads or size % 2:
        raise CheckpointError(
            f"config.json: num_attention_heads = {heads} of head_dim = {size}, num_key_value_heads = {kv_heads}",
            "query heads must be a multiple of key/value heads, head_dim even",
        )
    return heads, kv_heads, size


def check_token(name: str, token: int, vocab_size: int) -> None:
    """Refuse a token that no embedding has.

    Raises:
        CheckpointError: `token`, the value of the field `name`, is no row of an embedding of `vocab_size`.
    """
    if token >= vocab_size:
        raise CheckpointError(f"config.json: {name} = {token} is outside vocab_size = {vocab_size}")


def finish_all(*sections: tuple[ConfigFields, Mapping[str, str]]) -> None:
    """:func:`refuse_unused`, then :meth:`ConfigFields.finish`, of each section and the fields in it that are known to be harmless.

    Raises:
        UnsupportedError: a field that was not taken and is not known to be harmless.
    """
    for section, harmless in sections:
        refuse_unused(section)
        section.finish(harmless)


def refuse_unused(section: ConfigFields) -> None:
    """Options of transformers' base class that no model here reads: only their neutral value is accepted.

    Raises:
        UnsupportedError: another value.
    """
    section.expect("chunk_size_feed_forward", 0, None, why="the family's layers are not chunked")
    for name in ("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"):
        section.expect(name, False, None, why="the family has no encoder-decoder form")
    section.expect("cross_attention_hidden_size", None, why="the family has no encoder-decoder form")
    section.expect("pruned_heads", {}, None, why="no head is pruned")


def subsection(value: Any, name: str) -> dict[str, Any]:
    """A section of a config as the file gives it; empty where the file has none (None, or transformers' instance of it).

    Raises:
        CheckpointError: it is no object.
    """
    if value is None or hasattr(value, "model_type"):
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} is no object")
    return value


def built(kind: Any, given: Mapping[str, Any], without: Iterable[str] = ()) -> Any:
    """An instance of transformers' config class `kind`, whose fields are the defaults of what a file leaves out.

    Args:
        given: what the file says; it is copied, since transformers edits what it is given.
        without: names that are not handed over, beside ``model_type``, the quantization, which is ours to read, and what gives
            transformers' modules another form of return value than the one we read.

    Raises:
        CheckpointError: transformers refuses a value.
    """
    left_out = {"model_type", "quantization_config", *without}
    try:
        return kind(**{key: value for key, value in _with_plain_results(given).items() if key not in left_out})
    except Exception as error:  # validation of huggingface_hub raises several unrelated types
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json is refused by transformers: {reason[:300]}") from None


def _with_plain_results(section: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without ``_RESULTS``, at any depth."""
    kept = {key: value for key, value in section.items() if key not in _RESULTS}
    return {key: _with_plain_results(value) if isinstance(value, dict) else copy.deepcopy(value) for key, value in kept.items()}


def one_rope_spelling(text: ConfigFields, given: Mapping[str, Any]) -> None:
    """Take the three historical spellings of rotary settings, which transformers merges, and refuse those that disagree.

    Args:
        text: the text section.
        given: what the file says in it.

    Raises:
        UnsupportedError: two spellings of one setting.
    """
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        text.take(name)
    spelled = [given[name] for name in ("rope_parameters", "rope_scaling") if given.get(name) is not None]
    thetas = [section["rope_theta"] for section in spelled if isinstance(section, dict) and "rope_theta" in section]
    thetas += [given["rope_theta"]] if given.get("rope_theta") is not None else []
    if len(spelled) > 1 or any(theta != thetas[0] for theta in thetas[1:]):
        raise UnsupportedError(
            f"config.json: rope_parameters, rope_scaling and rope_theta of {text.where} contradict each other",
            "keep one of rope_parameters and rope_scaling, and one rope_theta",
        )


def expect_axial_rope(vision: ConfigFields, defaults: Any) -> None:
    """Take a vision config's rotary fields, and refuse all but the axial embedding that the host computes.

    Args:
        defaults: transformers' config, in which the spellings of older files are one ``rope_parameters``.

    Raises:
        UnsupportedError: another type or base, or a field that is not known.
    """
    rope = ConfigFields(vision.label("rope_parameters"), dict(defaults.rope_parameters or {}), None)
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        vision.take(name)
    rope.expect("rope_type", "axial", why="transformers' tower knows no other")
    rope.expect("rope_theta", 10000.0, 10000, why="the host computes the tower's angles with it")
    rope.finish({})
