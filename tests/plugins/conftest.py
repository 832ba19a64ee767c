"""The plugin library that is installed or built; without it these tests fail, they do not skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecmfq_export.engine.plugin_library import find_plugin_library


@pytest.fixture(scope="session")
def library() -> Path:
    return find_plugin_library()
