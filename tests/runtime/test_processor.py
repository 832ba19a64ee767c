"""The processor against transformers' own, and what it says about bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.runtime.images import decode_rgb, load_rgb
from ecmfq_export.runtime.processor import Processor
from tests.tiny_models import IMAGE_TOKEN_ID, qwen3_vl_moe_config, write_processor_files


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    write_processor_files(path, qwen3_vl_moe_config())
    return path


@pytest.fixture(scope="module")
def processor(directory) -> Processor:
    return Processor(directory)


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class _Stock(Qwen3VLProcessor):
    """transformers' processor without its video part, which needs torchvision."""

    def check_argument_for_proper_class(self, *args, **kwargs):
        pass


def test_equals_transformers_on_mixed_sizes(directory, processor):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    stock = _Stock(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(directory), tokenizer=tokenizer, video_processor=None,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    images = [_noise(30, 50), _noise(8, 8, 1), _noise(200, 17, 2), _noise(33, 33, 3).convert("RGBA")]
    for chosen in ([], images[:1], images[1:3], images):
        content = [{"type": "image", "image": im} for im in chosen] + [{"type": "text", "text": "What is  this?\nyes"}]
        expected = stock.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="np",
        )  # fmt: skip
        sample = processor.sample("What is  this?\nyes", chosen)
        np.testing.assert_array_equal(sample.input_ids, expected["input_ids"][0])
        assert not sample.answer_mask.any()
        if chosen:
            np.testing.assert_array_equal(sample.pixel_values, expected["pixel_values"])
            np.testing.assert_array_equal(sample.image_grid_thw, expected["image_grid_thw"])
            merged = int(sample.image_grid_thw.prod(axis=1).sum()) // 4
            assert int((sample.input_ids == IMAGE_TOKEN_ID).sum()) == merged
        else:
            assert sample.pixel_values is None and sample.image_grid_thw is None


def test_answer_is_appended_and_marked(processor):
    prompt = processor.sample("hi", [_noise(20, 20)])
    sample = processor.sample("hi", [_noise(20, 20)], answer="a cat")
    assert sample.length == prompt.length + 6
    np.testing.assert_array_equal(sample.input_ids[: prompt.length], prompt.input_ids)
    assert processor.decode(sample.input_ids[sample.answer_mask]) == "a cat"
    assert sample.input_ids[-1] == processor.eos_token_ids[0] and sample.answer_mask[-1]


def test_file_array_and_pil_image_are_the_same(processor, tmp_path):
    image = _noise(40, 24)
    image.save(tmp_path / "a.png")
    samples = [processor.sample("x", [i]) for i in (image, np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png"))]
    for sample in samples[1:]:
        np.testing.assert_array_equal(sample.pixel_values, samples[0].pixel_values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "RGBA"])
def test_modes_become_rgb(mode):
    assert load_rgb(_noise(9, 7).convert(mode)).mode == "RGB"


def test_16_bit_grey_keeps_its_levels():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    converted = np.asarray(load_rgb(Image.fromarray(grey)))[..., 0]
    np.testing.assert_array_equal(converted, grey >> 8)


def test_transparency_goes_onto_white():
    assert np.asarray(load_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).min() == 255


def test_exif_orientation_is_applied(tmp_path):
    image, exif = _noise(20, 10), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_rgb(tmp_path / "turned.jpg").size == (10, 20)


def test_bad_images_are_named(processor, tmp_path):
    whole = tmp_path / "whole.png"
    _noise(64, 64).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:5000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path in (cut, text, empty, tmp_path / "missing.png", tmp_path):
        with pytest.raises(UserError) as caught:
            processor.sample("x", [path])
        assert str(path) in str(caught.value)


def test_pixel_bombs_are_refused_from_the_header(tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb)
    with pytest.raises(UserError, match=r"bomb\.png"):
        load_rgb(bomb)
    large = tmp_path / "large.png"
    Image.new("1", (9_000, 9_000)).save(large)
    with pytest.raises(UserError, match="81.0 megapixels, more than the limit of 64"):
        load_rgb(large)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_bytes_are_read_as_the_file_is(tmp_path, kind):
    path = tmp_path / "image"
    _noise(20, 10).save(path, kind)
    np.testing.assert_array_equal(np.asarray(decode_rgb(path.read_bytes(), "it")), np.asarray(load_rgb(path)))
    with pytest.raises(UserError, match="image 3"):
        decode_rgb(path.read_bytes()[:40], "image 3")
    with pytest.raises(UserError, match="image 3 has 20x10"):
        decode_rgb(path.read_bytes(), "image 3", max_pixels=199)


def test_bytes_of_other_formats_are_not_tried(tmp_path):
    for kind in ("TIFF", "ICO", "PPM"):
        _noise(16, 16).save(tmp_path / "image", kind)
        load_rgb(tmp_path / "image")
        with pytest.raises(UserError, match="no format that is read here"):
            decode_rgb((tmp_path / "image").read_bytes(), "it")


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_odd_arrays_are_refused(array):
    with pytest.raises(UserError, match="image array of shape"):
        load_rgb(array)


def test_extreme_aspect_ratio_is_refused(processor):
    with pytest.raises(UserError, match="2x900"):
        processor.sample("x", [_noise(2, 900)])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_placeholders_in_text_are_refused(processor, token):
    with pytest.raises(UserError, match="placeholder"):
        processor.sample(f"see {token}")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja"])
def test_missing_files_are_named(directory, tmp_path, name):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match="chat template" if name.startswith("chat") else name):
        Processor(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "generation_config.json"])
def test_damaged_files_are_named(directory, tmp_path, name):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / name).write_text("{ damaged")
    with pytest.raises(CheckpointError, match="copy"):
        Processor(copy)


def test_other_image_processors_and_unknown_settings_are_refused(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(UnsupportedError, match="CLIPImageProcessor"):
        Processor(copy)
    path.write_text(json.dumps({**config, "sharpen": True}))
    with pytest.raises(UnsupportedError, match="sharpen"):
        Processor(copy)


def test_eos_from_generation_config(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    assert Processor(copy).eos_token_ids == (258, 256)


def test_token_id_needs_exactly_one_token(processor):
    assert processor.decode([processor.token_id("y")]) == "y"
    with pytest.raises(UserError, match="3 tokens"):
        processor.token_id("yes")


def test_image_settings_inside_the_processor_s_file(directory, processor, tmp_path):
    """What transformers 5 saves for a processor, as GPTQModel does: no file of the image settings' own."""
    shutil.copytree(directory, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    (tmp_path / "saved" / "preprocessor_config.json").unlink()
    saved = {"image_processor": settings, "processor_class": "Qwen3VLProcessor"}
    (tmp_path / "saved" / "processor_config.json").write_text(json.dumps(saved))
    ours, theirs = (p.sample("x", [_noise(40, 24)]) for p in (Processor(tmp_path / "saved"), processor))
    assert np.array_equal(ours.pixel_values, theirs.pixel_values) and np.array_equal(ours.input_ids, theirs.input_ids)
    (tmp_path / "saved" / "processor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no image_processor"):
        Processor(tmp_path / "saved")
