"""Conversations in the chat template: as transformers' own processor renders them, and nothing gets lost unseen."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from ecmfq_export.errors import CheckpointError, UserError
from ecmfq_export.runtime.chat import Turn
from ecmfq_export.runtime.processor import Processor
from tests.tiny_models import IMAGE_TOKEN_ID, qwen3_vl_moe_config, write_processor_files

GREY = Image.new("RGB", (24, 16), (90, 90, 90))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    write_processor_files(path, qwen3_vl_moe_config())
    return path


@pytest.fixture(scope="module")
def processor(directory) -> Processor:
    return Processor(directory)


def _with_template(directory: Path, tmp_path: Path, template: str) -> Processor:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(template)
    return Processor(copy)


def test_a_conversation_is_what_the_template_makes_of_it(directory, processor):
    turns = [Turn("system", ("Be brief.",)), Turn("user", ("a ", None, " b")), Turn("assistant", ("c",)), Turn("user", (None, "d"))]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "d"}]},
    ]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    once = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    sample = processor.chat(turns, [GREY, Image.new("RGB", (8, 40))])
    assert sample.image_grid_thw.shape == (2, 3) and not sample.answer_mask.any()
    np.testing.assert_array_equal(sample.input_ids, processor.expand(once, sample.image_grid_thw))


def test_one_user_turn_is_a_sample(processor):
    one, other = processor.sample("What?", [GREY]), processor.chat([Turn("user", (None, "What?"))], [GREY])
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.pixel_values, other.pixel_values)
    assert int((one.input_ids == IMAGE_TOKEN_ID).sum()) > 0


def test_a_template_may_change_the_order(directory, tmp_path):
    processor = _with_template(directory, tmp_path, "{{ messages[1].content[0].text }}{{ messages[0].content }}")
    assert processor.chat([Turn("system", ("first",)), Turn("user", ("second",))]).length == len("secondfirst")


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_placeholders_are_refused_in_every_turn(processor, role):
    with pytest.raises(UserError, match="placeholder"):
        processor.chat([Turn("user", ("hi",)), Turn(role, ("<|video_pad|>",))])


def test_a_refusal_of_the_template_is_told(directory, tmp_path):
    template = "{%- if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{%- endif %}{{ messages[0].content[0].text }}"
    processor = _with_template(directory, tmp_path, template)
    assert processor.chat([Turn("user", ("hi",))]).length == 2
    with pytest.raises(UserError, match="the user begins"):
        processor.chat([Turn("system", ("x",)), Turn("user", ("hi",))])


def test_what_the_template_leaves_out_is_told(directory, tmp_path):
    template = "{%- for m in messages %}{%- if m.role == 'user' %}{{ m.content[0].text | trim }}{%- endif %}{%- endfor %}"
    processor = _with_template(directory, tmp_path, template)
    assert processor.chat([Turn("user", (" hi ",)), Turn("assistant", ("<think>",)), Turn("user", ("ho",))]).length == 4
    with pytest.raises(UserError, match="leaves out what the system says"):
        processor.chat([Turn("system", ("Be brief.",)), Turn("user", ("hi",))])
    with pytest.raises(UserError, match="placed 0 x"):
        processor.chat([Turn("user", ("hi", None))], [GREY])
    with pytest.raises(CheckpointError, match="placed 0 x"):
        processor.sample("hi", [GREY])
