from pathlib import Path

import pytest
import torch

from ecmfq_export.progress import Silent
from ecmfq_export.stages.calibrate import calibrate
from ecmfq_export.stages.smooth import smooth
from tests.stages.common import SETTINGS, make_pool, plant_outliers
from tests.tiny_models import make_qwen3_vl_moe


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Results are the same for the same number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="session")
def fresh_pool(tmp_path_factory) -> Path:
    """Samples that no calibration has seen."""
    return make_pool(tmp_path_factory.mktemp("fresh"), size=8, seed=9)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random model with planted outlier channels."""
    directory = make_qwen3_vl_moe(tmp_path_factory.mktemp("tiny"), seed=1)
    plant_outliers(directory)
    return directory


@pytest.fixture(scope="session")
def calibrated(tiny, pool, tmp_path_factory) -> Path:
    return calibrate(tiny, pool, tmp_path_factory.mktemp("stages") / "calibration", SETTINGS, Silent())


@pytest.fixture(scope="session")
def smoothed(tiny, calibrated) -> Path:
    return smooth(tiny, calibrated, calibrated.with_name("smoothing"), SETTINGS, Silent())
