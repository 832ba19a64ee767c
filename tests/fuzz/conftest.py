"""One bundle a session, one copy of it a test file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.subject import Subject, make


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def subject(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(small_bundle, tmp_path_factory.mktemp("subject"))
