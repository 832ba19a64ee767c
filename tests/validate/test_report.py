"""Checks, verdict, terminal form and page of a report with made-up figures."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from ecmfq_export.errors import UserError
from ecmfq_export.validate.html_report import render
from ecmfq_export.validate.report import failures, finite, print_report, require_passed, verdict
from tests.validate.example_report import example_report


@pytest.fixture(scope="module")
def report():
    return example_report()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.new("RGB", (200, 100), (10, 200, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def page(report, image) -> str:
    return render(report, [image])


def test_a_good_report_passes(report):
    assert verdict(report) and failures(report) == []
    assert [c["passed"] for c in report["checks"]] == [True] * 7
    require_passed(report)


@pytest.mark.parametrize(
    ("path", "value", "row"),
    [
        (("logits", "quantized_vs_onnx", "top1_decisive"), 0.985, "ONNX Runtime picks PyTorch's token: 0.985, must be >= 0.99"),
        (("logits", "quantized_vs_onnx", "kl_mean"), 0.02, "KL, quantized PyTorch to ONNX Runtime: 0.02, must be <= 0.01"),
        (("logits", "prefill_vs_decode", "kl_mean"), 0.02, "KL, ONNX Runtime's prefill to its decode steps"),
        (("logits", "float_vs_quantized", "kl_mean"), 0.3, "KL, floating point to quantized"),
        (("bytes", "layers", "w4a8", "ratio"), 0.27, "bytes of W4A8 layers / float16"),
        (("retention", "quantized"), 0.96, "accuracy kept, quantized PyTorch"),
        (("retention", "onnx"), 0.9, "accuracy kept, ONNX Runtime"),
    ],
)
def test_each_limit_fails_by_its_own_row(path, value, row):
    base = example_report()
    changed = {path[0]: copy.deepcopy(base[path[0]])}
    target = changed[path[0]]
    for key in path[1:-1]:
        target = target[key]
    target[path[-1]] = value
    report = example_report(**changed)
    assert not verdict(report)
    assert len(failures(report)) == 1 and failures(report)[0].startswith(row)
    with pytest.raises(UserError, match=re.escape(row.split(":")[0])):
        require_passed(report)


def test_retention_of_few_questions_is_not_judged():
    report = example_report(questions=20, retention={"quantized": 0.9, "onnx": 0.9})
    rows = [c for c in report["checks"] if c["name"].startswith("accuracy")]
    assert [c["passed"] for c in rows] == [None, None] and "not judged below 100" in rows[0]["detail"]
    assert verdict(report)


def test_without_questions():
    report = example_report(accuracy=None, retention=None, paired=None, same_answers=None, retrieval=None, engines=None, items=[])
    assert len(report["checks"]) == 5 and verdict(report)
    assert "Accuracy by question type" not in render(report)
    print_report(report, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("name", "change", "passes"),
    [
        ("quantized_vs_onnx", {"kl_mean": 0.05, "top1_decisive": 0.97}, True),  # a few positions of a chaotic answer
        ("quantized_vs_onnx", {"kl_median": 0.05}, False),
        ("quantized_vs_onnx", {"top1_decisive": 0.9}, False),
        ("float_vs_quantized", {"kl_mean": 0.3}, True),
        ("float_vs_quantized", {"kl_median": 0.3}, False),
        ("prefill_vs_decode", {"kl_median": 0.05}, False),
    ],
)
def test_made_up_answers_are_judged_by_medians(name, change, passes):
    none = dict.fromkeys(("accuracy", "retention", "paired", "same_answers", "retrieval", "engines")) | {"items": []}
    logits = example_report()["logits"]
    report = example_report(**none, logits={**logits, name: {**logits[name], **change}})
    assert verdict(report) is passes
    assert [c["name"].startswith("median KL") for c in report["checks"]] == [False, True, True, True, False]


@pytest.mark.parametrize(("differ", "passes"), [(1, True), (2, False)])
def test_one_of_few_positions_may_differ(differ, passes):
    logits = example_report()["logits"]
    few = {"decisive_positions": 21, "decisive_disagreements": differ, "top1_decisive": 1 - differ / 21}
    assert verdict(example_report(logits={**logits, "quantized_vs_onnx": {**logits["quantized_vs_onnx"], **few}})) is passes


def test_a_float_checkpoint_has_no_quantized_layers():
    sizes = {**example_report()["bytes"], "layers": {}}
    report = example_report(bytes=sizes)
    assert len(report["checks"]) == 6 and "<svg" in render(report)


def test_terminal_tables(report):
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=160))
    text = stream.getvalue()
    for expected in ("validation passed", "25.52%", "equal", "<b>odd</b> & $x$", "image to text R@1"):
        assert expected in text
    stream = io.StringIO()
    print_report(example_report(retention={"quantized": 0.5, "onnx": 1.0}), Console(file=stream, width=160))
    assert "validation failed" in stream.getvalue() and "accuracy kept, quantized PyTorch: 0.5, must be >= 0.97" in stream.getvalue()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_page_needs_nothing_from_outside(page):
    parsed = _Page()
    parsed.feed(page)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert parsed.links and all(link.startswith(("data:image/png;base64,", "#")) for link in parsed.links)
    assert "http" not in page and "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_escapes_what_comes_from_data(page):
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<i>b</i>" not in page and "<b>odd</b>" not in page


def test_page_shows_every_part(page):
    parsed = _Page()
    parsed.feed(page)
    text = " ".join(parsed.text)
    for expected in ("Validation passed", "Final logits", "Hidden states after each layer", "Caption retrieval", "Expert usage",
                     "Where quantization changed most", "Engines for rtx", "25.52%", "59.40%", "vision: image features",
                     "Quantization with method ecmfq", "log10 of relative error", "Smoothing scales",
                     "Token weighting chosen by layer", "Calibration samples", "4 experts saw none"):
        assert expected in text, expected
    assert parsed.tags.count("svg") == 9 and parsed.tags.count("img") == 1


def test_page_names_the_failed_rows():
    page = render(example_report(retention={"quantized": 0.5, "onnx": 1.0}))
    assert "Validation failed" in page and '<span class="bad">FAIL</span>' in page


def test_figures_do_not_share_ids(page):
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0


def test_page_is_reproducible(report, image, page):
    assert render(report, [image]) == page


def test_reports_are_json_that_any_reader_takes(report):
    text = json.dumps(finite({"a": float("inf"), "b": [float("nan"), 1.0]}), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": [None, 1.0]}
    json.dumps(report, allow_nan=False)
