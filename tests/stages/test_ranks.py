"""Two processes at one run: the bytes of one process, with the work really shared out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ecmfq_export import bundle, workflow
from ecmfq_export.config import QuantConfig
from ecmfq_export.errors import UserError
from ecmfq_export.progress import Silent
from ecmfq_export.stages import calibrate as calibrate_stage
from ecmfq_export.stages import expert_chunks, streams
from ecmfq_export.stages import quantize as quantize_stage
from ecmfq_export.stages.ranks import ALONE, Ranks, join_ranks, leave_ranks
from ecmfq_export.stages.resources import Resources
from tests.forking import fork
from tests.stages.common import SETTINGS, file_hashes

STAGES = ("calibration", "smoothing", "quantized")
QUICK = replace(SETTINGS, smoothing="smoothquant", weighting="rho_g_phi", num_samples=6)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several to share out."""
    monkeypatch.setitem(streams.prepare_batches.__kwdefaults__, "batch_tokens", 64)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def run_ranks(size: int, action: Callable[[Ranks], None]) -> list[int]:
    """`action` in `size` forked processes that meet as torchrun's do; their exit codes."""
    port, children = free_port(), []
    for rank in range(size):
        pid = fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
                os.environ["MASTER_PORT"] = str(port)
                ranks, device = join_ranks("cpu")
                assert (ranks.rank, ranks.size, device) == (rank, size, "cpu")
                action(ranks)
                leave_ranks(ranks)
                code = 0
            except UserError as error:
                print(error, file=sys.stderr)
                code = 2
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def run(model: Path, pool: Path, out: Path, config: QuantConfig, ranks: Ranks = ALONE) -> None:
    workflow.quantize_model(model, pool, out / "quantized", config, Silent(), Resources(ranks=ranks))


def results(out: Path) -> dict[str, dict[str, str]]:
    return {stage: file_hashes(out / stage) for stage in STAGES if (out / stage).is_dir()}


@pytest.mark.parametrize("change", [{}, {"selection": "balanced", "weighting": "rho", "gamma_text": 0.0}], ids=["macs", "likelihood"])
def test_two_ranks_give_the_bytes_of_one(change: dict, tiny, pool, tmp_path, small_batches, monkeypatch) -> None:
    config = replace(QUICK, **change)
    run(tiny, pool, tmp_path / "one", config)
    score = calibrate_stage._score_batch

    def note(model, layer, place, projection, batch, *rest):
        with (tmp_path / f"scored.{os.environ['RANK']}").open("a") as file:
            file.write(f"{layer.spec.index} {batch.index}\n")
        score(model, layer, place, projection, batch, *rest)

    quantize_weight = expert_chunks.quantize_weight

    def count(weight, *rest, **named):
        with (tmp_path / f"quantized.{os.environ['RANK']}").open("a") as file:
            file.write(f"{len(weight)}\n")
        return quantize_weight(weight, *rest, **named)

    monkeypatch.setattr(calibrate_stage, "_score_batch", note)
    monkeypatch.setattr(expert_chunks, "quantize_weight", count)
    assert run_ranks(2, partial(run, tiny, pool, tmp_path / "two", config)) == [0, 0]
    assert results(tmp_path / "two") == results(tmp_path / "one") and len(results(tmp_path / "one")) == 3
    first, second = ({tuple(map(int, line.split())) for line in (tmp_path / f"scored.{rank}").read_text().splitlines()} for rank in (0, 1))
    assert len(second) >= 4 and not first & second
    for rank in (0, 1):
        shares = [int(line) for line in (tmp_path / f"quantized.{rank}").read_text().split()]
        assert sum(shares) == 2 * 2 * 4, "of 8 experts, gate-up and down of two layers, each rank has half"
    assert not list((tmp_path / "two").rglob(".activations*"))


@pytest.mark.slow
def test_killed_ranks_are_continued_by_one_and_the_other_way_round(tiny, pool, tmp_path, small_batches) -> None:
    run(tiny, pool, tmp_path / "whole", QUICK)
    for number, (before, after) in enumerate(((2, 1), (1, 2))):
        out = tmp_path / str(number)
        state = bundle.partial_dir(out / "calibration") / ".state.1"

        def killed(ranks: Ranks, out: Path = out, state: Path = state) -> None:
            def watch(event: str, arguments: tuple) -> None:
                if event == "os.rename" and os.fspath(arguments[1]) == str(state.with_name(".state.2")):
                    os._exit(9)

            sys.addaudithook(watch)
            run(tiny, pool, out, QUICK, ranks)

        assert 9 in (run_ranks(before, killed) if before > 1 else [_alone(killed)])
        assert state.is_dir()
        # One process with two ranks' files, or two with one's.
        go_on = partial(run, tiny, pool, out, QUICK)
        assert set(run_ranks(after, go_on) if after > 1 else [_alone(go_on)]) == {0}
        assert results(out) == results(tmp_path / "whole")


def _alone(action: Callable[[Ranks], None]) -> int:
    pid = fork()
    if pid == 0:
        code = 1
        try:
            action(ALONE)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_error_of_the_first_rank_ends_the_others(tiny, tmp_path) -> None:
    def action(ranks: Ranks) -> None:
        ranks.from_first(lambda: (_ for _ in ()).throw(UserError("no such thing")))

    assert run_ranks(2, action) == [2, 2]


def test_parts_and_sums(tmp_path) -> None:
    def action(ranks: Ranks) -> None:
        whole = torch.arange(15.0).view(5, 3)
        assert torch.equal(ranks.gather(whole[ranks.share(5)], 5), whole)
        assert torch.equal(ranks.gather(whole[:1][ranks.share(1)].to(torch.int8), 1), whole[:1].to(torch.int8))
        own = torch.zeros(5, 3)
        own[ranks.share(5)] = whole[ranks.share(5)]
        assert torch.equal(ranks.add_disjoint(own), whole)
        assert ranks.from_first(lambda: {"é": [1, None]}) == {"é": [1, None]}

    assert run_ranks(3, action) == [0, 0, 0]
    assert [Ranks(r, 3).share(5) for r in range(3)] == [slice(0, 1), slice(1, 3), slice(3, 5)]


def test_more_processes_than_experts(tiny, pool, tmp_path) -> None:
    with pytest.raises(UserError, match="9 processes share layers of 8 experts"):
        quantize_stage.quantize(tiny, None, None, tmp_path / "q", QuantConfig(method="rtn"), Silent(), Resources(ranks=_Nobody(0, 9)))


class _Nobody(Ranks):
    """Ranks that never meet."""

    def from_first(self, make):
        return make()


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE = 2, but the processes do not meet"):
        join_ranks("cpu")


def test_torchrun(tiny, pool, tmp_path) -> None:
    """The command line itself under torchrun."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    arguments = ["ecmfq_export.cli", "quantize", str(tiny), "--data", str(pool), "--set", "num_samples=6", "--set", "smoothing=smoothquant"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for name, start in (("one", []), ("two", launcher)):
        command = [sys.executable, "-m", *start, *arguments, "-o", str(tmp_path / name / "quantized")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("quantized checkpoint:") == 1
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "quantized" / "manifest.json").read_text())["stage"] == "quantize"
