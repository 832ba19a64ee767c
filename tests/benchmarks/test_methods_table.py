"""Tables of methods: the arithmetic, and that the docs' tables are those of the committed figures."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
BY_MODEL = PAGE.with_name("results_by_model.md")


@pytest.fixture(scope="module")
def table():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "benchmarks" / "methods" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    sys.modules.pop("variants", None)


def row(variant: str, seed: int, ranks: list[int], correct: list[bool], kl: float = 1e-3, stress: str = "plain", model: str = "a") -> dict:
    """A row of run.py for len(ranks) pairs, with the same ranks both ways."""
    recalls = {f"embedding.{way}_r@{k}": sum(r <= k for r in ranks) / len(ranks)
               for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    headlines = {**recalls, "embedding.mean": sum(recalls.values()) / 6, "vqa.accuracy": sum(correct) / len(correct), "p_yes.mean": 0.25,
                 "kl.answers": 0.0 if variant == "float" else kl}
    return {"model": model, "stress": stress, "variant": variant, "seed": seed, "headlines": headlines,
            "quantized_bytes": 26, "quantized_bytes_in_16_bits": 100,
            "items": {"answers": {"correct": correct}, "embedding": {"image_ranks": ranks, "text_ranks": ranks}}}


def test_retention_is_the_mean_of_two_ratios(table) -> None:
    rows = [row("float", 0, [1, 1, 1, 1], [True] * 4), row("gptq", 0, [1, 1, 11, 11], [True, True, True, False])]
    found = table.summarize(rows, ["plain"])["gptq"]
    assert found["vqa"]["mean"] == 75.0 and found["recall"]["mean"] == 50.0 and found["retention"]["mean"] == 62.5
    assert found["bytes"]["mean"] == 26.0 and found["kl"]["half_width"] is None


def test_intervals_over_seeds_and_means_over_forms(table) -> None:
    rows = [row("float", 0, [1], [True], stress=stress) for stress in ("plain", "strong")]
    rows += [row("gptq", seed, [1], [True], kl, stress) for stress, kls in (("plain", (1e-3, 3e-3)), ("strong", (4e-3, 12e-3)))
             for seed, kl in enumerate(kls)]
    found = table.summarize(rows, ["plain", "strong"])["gptq"]
    assert found["seeds"] == [0, 1] and found["model_forms"] == 2
    assert found["kl"]["mean"] == pytest.approx((2.5 + 7.5) / 2)
    assert found["kl"]["half_width"] == pytest.approx(12.706 * 5.0 / 2, rel=1e-3)  # s / sqrt(n) = (5 / sqrt 2) / sqrt 2
    assert found["kl_geometric"]["mean"] == pytest.approx((2.0 + 6.0) / 2)


def test_a_seed_that_lacks_a_form_is_left_out(table) -> None:
    rows = [row("float", 0, [1], [True], stress=stress) for stress in ("plain", "strong")]
    rows += [row("gptq", 0, [1], [True], stress="plain"), row("gptq", 0, [1], [True], stress="strong"), row("gptq", 1, [1], [True])]
    assert table.summarize(rows, ["plain", "strong"])["gptq"]["seeds"] == [0]


def test_paired_bootstrap_sees_a_difference_and_no_difference(table) -> None:
    same = [row("ecmfq", s, [1, 2] * 50, [True, False] * 50) for s in (0, 1)]
    same += [{**r, "variant": "gptq"} for r in same]
    assert table.against(same, "ecmfq", "gptq", ["plain"])["recall"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    better = [row("ecmfq", 0, [1] * 100, [True] * 100), row("gptq", 0, [1] * 80 + [11] * 20, [True] * 100)]
    found = table.against(better, "ecmfq", "gptq", ["plain"])
    assert found["recall"]["difference"] == pytest.approx(20.0)
    assert 10.0 < found["recall"]["low"] < 20.0 < found["recall"]["high"] < 30.0 and found["vqa"]["high"] == 0.0


def test_best_baselines_are_named_and_ours_is_none_of_them(table) -> None:
    rows = [row("float", 0, [1] * 10, [True] * 10), row("rtn", 0, [1] * 5 + [11] * 5, [True] * 10, 9e-3),
            row("gptq", 0, [1] * 8 + [11] * 2, [True] * 8 + [False] * 2, 1e-3), row("ecmfq", 0, [1] * 9 + [11], [True] * 10, 1e-4)]
    best = table.tabulate(rows)["against"]["all"]["best"]
    assert best == {"retention": "gptq", "recall": "gptq", "kl_geometric": "gptq"}


def committed() -> dict[str, dict]:
    """Results that the page's tables are of, by mark."""
    page = PAGE.read_text(encoding="utf-8")
    files = dict.fromkeys(re.findall(r"results/([\w.-]+-methods-[\w.-]+?\.json)", page))
    found = [json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")) for name in files]
    return {result["mark"]: result for result in found}


def blocks(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"<!-- tables: (\S+) -->\n(.*?)<!-- end of tables -->", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_shows_the_committed_figures(table) -> None:
    results = committed()
    assert [mark for mark, _ in blocks(PAGE)] == list(results) != []
    for mark, text in blocks(PAGE):
        assert table.page(results[mark], results[mark]["columns"]).strip() == text.strip()


def test_the_page_by_model_shows_the_committed_figures(table) -> None:
    results = committed()
    assert [mark for mark, _ in blocks(BY_MODEL)] == ["methods", "strict"]
    for mark, text in blocks(BY_MODEL):
        assert table.page_by_model(results[mark], results[mark]["columns"]).strip() == text.strip()
        assert text.count("\n### ") + text.startswith("### ") == 8


def test_a_table_by_model_has_that_model_and_form_alone(table) -> None:
    rows = [row(variant, 0, [1], [True], kl, model=model)
            for model, kl in (("a", 1e-3), ("b", 3e-3)) for variant in ("float", "gptq")]
    found = table.tabulate(rows)["models"]
    assert list(found) == ["a, plain", "b, plain"]
    assert [found[place]["gptq"]["kl"]["mean"] for place in found] == [1.0, 3.0]
    assert "| gptq | **1.00** |" in table.page_by_model({"models": found}, ["kl", "kl_geometric"])
