"""docs/families.md is what its script makes of the registry, and what it says is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.models.families_page import render
from ecmfq_export.models.family_facts import FACTS, REFUSED
from ecmfq_export.models.registry import SUPPORTED, family_of

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_script_makes() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == render(), "run: python -m ecmfq_export.models.families_page > docs/families.md"


def test_every_family_has_facts_and_a_line_in_the_readme() -> None:
    assert set(FACTS) == set(SUPPORTED) and not set(REFUSED) & set(SUPPORTED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in SUPPORTED)
    assert all(bool(SUPPORTED[name].unused) == bool(facts.left_out) for name, facts in FACTS.items())


def test_headers_that_are_named_are_checked() -> None:
    published = json.loads((ROOT / "tests" / "models" / "published_tensors.json").read_text())
    named = {facts.headers: name for name, facts in FACTS.items() if facts.headers}
    assert {checkpoint: published[checkpoint]["config"]["model_type"] for checkpoint in named} == named


@pytest.mark.parametrize("name", REFUSED)
def test_known_models_are_refused_with_a_reason(name: str) -> None:
    # One is told by remote code's name.
    assert name in CONFIG_MAPPING or name == "ernie4_5_moe_vl"
    with pytest.raises(UnsupportedError, match=name) as error:
        family_of({"model_type": name})
    assert REFUSED[name] in str(error.value)
