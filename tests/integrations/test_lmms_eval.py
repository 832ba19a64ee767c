"""The model in lmms-eval: against its documented interface always, against the package itself where it is installed."""

from __future__ import annotations

import abc
import importlib
import importlib.util
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecmfq_export.errors import UnsupportedError, UserError
from tests.tiny_models import make_qwen3_vl_moe

ADAPTER = "ecmfq_export.integrations.lmms_eval"
DOCS = {"test": [{"image": Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)), "question": f"q{i}?"} for i in range(3)]}


def _documented_interface() -> dict[str, types.ModuleType]:
    """lmms_eval.api.model and lmms_eval.models.registry_v2 as lmms-eval 0.7 documents them: what a model inherits and is asked."""

    class CacheHook:
        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            pass

    class lmms(abc.ABC):
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.cache_hook, self.task_dict = CacheHook(), {}

        @abc.abstractmethod
        def loglikelihood(self, requests: list) -> list: ...

        @abc.abstractmethod
        def generate_until(self, requests: list) -> list: ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests: list) -> list: ...

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
            args = dict(part.split("=", 1) for part in arg_string.split(",") if part)
            return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models",
                                                         "lmms_eval.models.registry_v2")}  # fmt: skip
    modules["lmms_eval.api.model"].lmms = lmms
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    return modules


@pytest.fixture(params=["documented", "installed"])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    if request.param == "installed":
        if importlib.util.find_spec("lmms_eval") is None:
            pytest.skip("lmms-eval is not installed")
    else:
        for name, module in _documented_interface().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    module = importlib.import_module(ADAPTER)
    yield module
    sys.modules.pop(ADAPTER, None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"), seed=5)


@dataclass
class Request:
    """The part of lmms_eval.api.instance.Instance that models read."""

    args: tuple


def _see(doc: dict) -> list:
    return [doc["image"]]


def _received(responses: list) -> list[tuple[float, bool]]:
    """Responses as lmms-eval's evaluator hands them to a task: unwrapped by its own function, where it is installed."""
    try:
        from lmms_eval.api.instance import unwrap_generation_output
    except ImportError:
        return responses
    return [unwrap_generation_output(response)[0] for response in responses]


def _model(adapter: types.ModuleType, checkpoint: Path, **config: Any) -> Any:
    model = adapter.EcmfqModel.create_from_arg_string(f"pretrained={checkpoint}", {"batch_size": "2", "device": None, **config})
    model.task_dict = {"task": DOCS}
    return model


def test_generate_until(adapter: types.ModuleType, checkpoint: Path) -> None:
    model = _model(adapter, checkpoint)
    assert model.rank == 0 if hasattr(type(model), "rank") else True
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "num_beams": 1, "until": ["\n\n"], "image_aspect_ratio": "pad"}
    requests = [Request((f"<image>\n{doc['question']}", dict(settings, max_new_tokens=4 + i % 2), _see, i, "task", "test"))
                for i, doc in enumerate(DOCS["test"])]  # fmt: skip
    found = model.generate_until(requests)
    query = adapter.Query
    for i, (doc, text) in enumerate(zip(DOCS["test"], found, strict=True)):
        assert text == model._answerer.generate([query(doc["question"], (doc["image"],))], 4 + i % 2, ["\n\n"])[0]
    assert settings["until"] == ["\n\n"], "a task's settings are not changed"


def test_loglikelihood(adapter: types.ModuleType, checkpoint: Path) -> None:
    """lmms-eval's multiple-choice tasks take the smallest score, so the likeliest choice must have it."""
    model = _model(adapter, checkpoint)
    choices = ["a", "b", "zz"]
    requests = [Request(("which?", f" {choice}", _see, 1, "task", "test")) for choice in choices]
    requests.append(Request(("which?", lambda doc: doc["question"], _see, 1, "task", "test")))
    found = _received(model.loglikelihood(requests))
    query = adapter.Query("which?", (DOCS["test"][1]["image"],))
    expected = model._answerer.score([query] * 4, [*choices, "q1?"])
    assert [score for score, _ in found] == pytest.approx([-e.log_prob for e in expected], abs=1e-5)
    assert int(np.argmin([score for score, _ in found[:3]])) == int(np.argmax([e.log_prob for e in expected[:3]]))
    assert all(isinstance(greedy, bool) for _, greedy in found)
    other = _model(adapter, checkpoint, score="log_prob")
    assert _received(other.loglikelihood(requests[:1]))[0][0] == pytest.approx(-found[0][0], abs=1e-5)


def test_text_only_and_nested_visuals(adapter: types.ModuleType, checkpoint: Path) -> None:
    model = _model(adapter, checkpoint)
    settings = {"max_new_tokens": 2}
    for visuals, images in ((None, 0), ([], 0), ([[DOCS["test"][0]["image"]], DOCS["test"][1]["image"]], 2)):
        request = Request(("hello", settings, lambda doc, visuals=visuals: visuals, 0, "task", "test"))
        assert len(model._query(request.args[0], request.args[2], "task", "test", 0).images) == images
        assert len(model.generate_until([request])) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [({"device": "cuda:0"}, "device 'cuda:0'"), ({"batch_size": "auto"}, "batch size 'auto'"), ({"score": "bits"}, "score 'bits'")],
)
def test_what_the_program_cannot_do_is_refused(adapter: types.ModuleType, checkpoint: Path, config: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        _model(adapter, checkpoint, **config)


def test_what_a_task_cannot_have_is_refused(adapter: types.ModuleType, checkpoint: Path) -> None:
    model = _model(adapter, checkpoint)

    def ask(settings: dict, visual: Any = None) -> None:
        model.generate_until([Request(("q", settings, lambda doc: [visual], 0, "task", "test"))])

    with pytest.raises(UnsupportedError, match="num_beams = 4"):
        ask({"num_beams": 4})
    with pytest.raises(UnsupportedError, match="settings repetition_penalty"):
        ask({"repetition_penalty": 1.2})
    with pytest.raises(UserError, match="'until' holds"):
        ask({"until": [3]})
    with pytest.raises(UnsupportedError, match="gives a dict as visual"):
        ask({}, {"array": [0.0], "sampling_rate": 16000})
    with pytest.raises(UnsupportedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_the_entry_point_names_the_model(adapter: types.ModuleType) -> None:
    from ecmfq_export.integrations.lmms_manifest import CLASS_PATH, MODEL_ID, manifest

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {MODEL_ID: "ecmfq_export.integrations.lmms_manifest:manifest"}
    found = manifest()
    assert (found.model_id, found.simple_class_path) == (MODEL_ID, CLASS_PATH)
    assert CLASS_PATH == f"{ADAPTER}.EcmfqModel"
    assert adapter.EcmfqModel.is_simple and not adapter.EcmfqModel.__abstractmethods__


def test_lmms_eval_resolves_the_model() -> None:
    registry = pytest.importorskip("lmms_eval.models.registry_v2", reason="lmms-eval is not installed")
    from ecmfq_export.integrations.lmms_manifest import MODEL_ID, manifest

    models = registry.ModelRegistryV2()
    models.register_manifest(manifest())
    assert models.get_model_class(MODEL_ID).__name__ == "EcmfqModel"
