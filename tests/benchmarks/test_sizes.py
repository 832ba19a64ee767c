"""The size benchmark: its checkpoints have the published shapes, and its meter sees what a process takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "sizes"))

import checkpoint  # noqa: E402
import edge_llm  # noqa: E402
import fit  # noqa: E402
import limits  # noqa: E402
from measure import run_measured, running_stage  # noqa: E402

from ecmfq_export.models.moe_vlm import open_model  # noqa: E402
from ecmfq_export.models.registry import family_of  # noqa: E402
from tests.models.test_config_fields import PUBLISHED  # noqa: E402


def test_the_config_is_the_published_one_with_other_token_ids() -> None:
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ours, published = checkpoint.config_of(48), json.loads(json.dumps(PUBLISHED))
    for config in (ours, published):
        for name in (*ids, "transformers_version"):
            config.pop(name, None)
        for name in ("bos_token_id", "eos_token_id"):
            config["text_config"].pop(name)
    assert ours == published


def test_fewer_layers_keep_every_shape() -> None:
    spec = family_of(checkpoint.CONFIG).read_spec(checkpoint.config_of(2))
    full = family_of(checkpoint.CONFIG).read_spec(checkpoint.config_of(48))
    assert spec.layers == full.layers[:2] and spec.num_deepstack == 2 and full.num_deepstack == 3
    assert (spec.hidden_size, spec.vocab_size) == (full.hidden_size, full.vocab_size)


def test_small_shapes_are_a_model_too() -> None:
    spec = family_of(checkpoint.CONFIG).read_spec(checkpoint.config_of(4, small=True))
    assert spec.num_layers == 4 and spec.num_deepstack == 3 and spec.hidden_size == 512


def test_a_written_checkpoint_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer itself, on a config of small numbers."""
    config = checkpoint.config_of(2)
    config["text_config"] |= {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512,
                              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                              "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}}
    config["vision_config"] |= {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                                "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    monkeypatch.setattr(checkpoint, "config_of", lambda layers, small: config)
    model = open_model(checkpoint.write_checkpoint(tmp_path / "model", 2))
    assert model.spec.num_layers == 2 and len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    experts = model.tensor("layers.1.mlp.experts.gate_up_proj")
    assert experts.shape == (4, 96, 64) and experts.dtype == torch.bfloat16
    assert 0.8 < float(experts.float().std()) * 64**0.5 < 1.2


def test_the_meter_sees_memory_time_and_stages(tmp_path: Path) -> None:
    program = """
import pathlib, sys, time
work = pathlib.Path(sys.argv[1]) / "stages" / ".quantized.partial"
work.mkdir(parents=True)
time.sleep(0.5)  # longer than the meter's step, which is how well it knows where a stage begins
held = bytearray(200 << 20)
time.sleep(0.8)
del held
time.sleep(0.3)
work.rename(work.with_name("quantized"))
time.sleep(0.6)
"""
    cost = run_measured([sys.executable, "-c", program, str(tmp_path)], tmp_path / "log", tmp_path)
    assert cost.returncode == 0 and cost.whole.seconds > 1.9 and 0 < cost.whole.cpu_seconds < cost.whole.seconds + 1
    assert cost.stages["quantize"].peak_bytes > 200 << 20 and cost.stages["quantize"].anonymous_bytes > 200 << 20
    assert cost.whole.peak_bytes >= cost.stages["quantize"].peak_bytes
    assert cost.stages["between stages"].peak_bytes < 100 << 20, "the mark starts again with the stage"


def test_stages_are_told_by_their_working_directories(tmp_path: Path) -> None:
    assert running_stage(tmp_path) == "between stages" and running_stage(None) == "run"
    (tmp_path / "engines" / ".rtx.partial").mkdir(parents=True)
    assert running_stage(tmp_path) == "build engines"


def _run(layers: int, seconds: float, peak: float, **more: object) -> dict:
    cost = {"cpu_seconds": seconds, "seconds": 2 * seconds, "peak_bytes": peak, "anonymous_bytes": peak / 2}
    return {"layers": layers, "returncode": 0, "whole": cost, "stages": {"quantize": cost}, **more}


def test_lines_through_depths() -> None:
    """Exact on a straight line, last run of a depth first, unfinished ones left out."""
    runs = [_run(4, 1.0, 9e9), _run(4, 50 + 4 * 10, 4e9), _run(16, 50 + 16 * 10, 4.2e9), _run(8, 50 + 8 * 10, 4.1e9),
            _run(32, 1.0, 1e9, finished=False)]
    summary = fit.summarize(runs)
    cpu = summary["whole"]["cpu_seconds"]
    assert summary["layers"] == [4, 8, 16] and (cpu["a"], cpu["b"], cpu["at_48"]) == (50, 10, 530) and cpu["largest_residual"] == 0
    assert summary["stages"]["quantize"]["seconds"]["at_48"] == 1060
    assert summary["whole"]["peak_bytes"] == {"values": [4e9, 4.1e9, 4.2e9], "spread": 0.05, "bytes_a_layer": pytest.approx(16071429)}
    assert "50 + 10.0 L" in fit.table(summary) and "5.0%" in fit.table(summary)
    assert fit.summarize(runs[:2]) is None
    bent = fit.line([1, 2, 3], [1.0, 2.0, 4.0])
    assert bent["residuals"] == [pytest.approx(0.167, abs=1e-3), pytest.approx(-0.333, abs=1e-3), pytest.approx(0.167, abs=1e-3)]


def test_out_of_memory_is_called_that() -> None:
    assert [edge_llm.how_it_ended(*case) for case in ((0, ""), (-9, ""), (1, "DefaultCPUAllocator: can't allocate"), (1, "KeyError"))] \
        == ["finished", "out of memory", "out of memory", "error"]


def test_sizes_are_read() -> None:
    assert [limits.parse_size(text) for text in ("512", "8G", "6500M")] == [512, 8 << 30, 6500 << 20]
    with pytest.raises(SystemExit, match="no size"):
        limits.parse_size("8 GB")
    with limits.limited(["true"], None) as (command, facts):
        assert command == ["true"] and facts == {}
