"""Tokenizer and processor files of the test bed's models, in Qwen3-VL's and in Kimi-VL's form.

One byte-level BPE, trained on our own text, under each family's special tokens and chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import SPLITS, make_scene
from dialogue import IMAGE_EMBEDDING_PROMPT, QUESTIONS, TEXT_EMBEDDING_PROMPT, ask_text, caption
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 2
VOCAB_SIZE = 512
MAX_TOKENS = 2048

# Qwen's own pre-tokenizer pattern.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class ChatForm:
    """A family's special tokens and how one user turn is written.

    Attributes:
        opening: before the user's content.
        image: (before, placeholder, after) of an image.
        turn: from the end of the user's content to where the assistant answers.
    """

    special: tuple[str, ...]
    pad: str
    opening: str
    image: tuple[str, str, str]
    turn: str
    template: str


QWEN = ChatForm(
    special=(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
        "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    ),
    pad="<|endoftext|>",
    opening="<|im_start|>user\n",
    image=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    turn="<|im_end|>\n<|im_start|>assistant\n",
    template="""\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
)  # fmt: skip

KIMI = ChatForm(
    special=(
        "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
        "<|media_start|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>", "[PAD]",
    ),
    pad="[PAD]",
    opening="<|im_user|>user<|im_middle|>",
    image=("<|media_start|>image<|media_content|>", "<|media_pad|>", "<|media_end|>"),
    turn="<|im_end|><|im_assistant|>assistant<|im_middle|>",
    template="""\
{%- for message in messages %}
    {{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content -%}
                <|media_start|>image<|media_content|><|media_pad|><|media_end|>
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_assistant|>assistant<|im_middle|>' }}
{%- endif %}
""",
)  # fmt: skip

FORMS = {"qwen": QWEN, "kimi": KIMI}


def _corpus(samples: int = 1500) -> list[str]:
    rng = np.random.default_rng(0)
    lines = ["user", "assistant", "system", "image", IMAGE_EMBEDDING_PROMPT, "\n"] * samples
    for seed in SPLITS["train"][:samples]:
        scene = make_scene(seed)
        asked = [ask(scene, rng) for ask in QUESTIONS.values()] + [ask_text(rng), ask_text(rng)]
        lines += [text for qa in asked for text in (qa.question, qa.answer)]
        lines.append(TEXT_EMBEDDING_PROMPT.format(text=caption(scene)))
    return lines


def build_tokenizer(form: ChatForm) -> PreTrainedTokenizerFast:
    """Train the BPE on a fixed sample of the training split; the same tokens on every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(form.special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(list(form.special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=form.pad,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        chat_template=form.template,
    )


_PREPROCESSORS = {
    "qwen": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 16 * 32, "longest_edge": 96 * 96},
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "kimi": {
        "image_processor_type": "KimiVLImageProcessor",
        "processor_class": "KimiVLProcessor",
        "in_token_limit": 144,
        "patch_size": PATCH_SIZE,
        "merge_kernel_size": [MERGE_SIZE, MERGE_SIZE],
        "pad_input": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def write_processor_files(directory: Path, family: str) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and preprocessor_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer(FORMS[family]).save_pretrained(directory)
    text = json.dumps(_PREPROCESSORS[family], indent=2) + "\n"
    (directory / "preprocessor_config.json").write_text(text)
