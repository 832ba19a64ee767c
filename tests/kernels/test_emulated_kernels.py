"""The kernels, compiled for the CPU and run under AddressSanitizer and UBSan: every integer and every output bit against NumPy.

CASES random cases a run, each with one layout and one plan; the emulator also shuffles the order of threads between barriers.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import emulator as em
from tests.kernels.cases import ROUTINGS, Shape, make_case, with_values
from tests.kernels.reference import Result, routed_moe

CASES = 320

pytestmark = pytest.mark.skipif(em.compiler() is None, reason="no C++ compiler: the emulated kernels cannot be built")


@pytest.fixture(scope="module")
def emulator() -> Iterator[em.Emulator]:
    with em.Emulator(em.build("server")) as running:
        yield running


def differences(got: Result, want: Result) -> list[str]:
    """Names of the stages that differ in any bit; NaNs are equal to each other whatever their payload."""
    names = []
    for field in dataclasses.fields(Result):
        a, b = getattr(got, field.name), getattr(want, field.name)
        same = a.shape == b.shape and a.dtype == b.dtype
        if same and a.dtype.kind not in "iu":
            nan = np.isnan(b.astype(np.float32))
            same = bool((np.isnan(a.astype(np.float32)) == nan).all()) and a[~nan].tobytes() == b[~nan].tobytes()
        elif same:
            same = a.tobytes() == b.tobytes()
        if not same:
            names.append(field.name)
    return names


@st.composite
def shapes(draw: st.DrawFn, grouped: bool) -> Shape:
    unit = 128 if grouped else 32
    # One case in a few has many tokens; those stay small otherwise, to keep a run short.
    many = draw(st.integers(0, 5)) == 0
    tokens = draw(st.integers(33, 300)) if many else draw(st.integers(1, 32))
    sizes = st.integers(1, 2 if grouped or many else 9)
    experts = draw(st.integers(1, 12))
    return Shape(
        num_tokens=tokens,
        num_experts=experts,
        top_k=draw(st.integers(1, 2 if many else min(experts, 4))),
        hidden_size=unit * draw(sizes),
        intermediate_size=unit * draw(sizes),
        group_size=128 if grouped else -1,
        dtype=draw(st.integers(0, 1)),
        routing=draw(st.sampled_from(ROUTINGS)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


plans = st.builds(em.Forced, tiling=st.integers(-1, 2), term_columns=st.sampled_from([0, 32, 64, 96]),
                  persistent_blocks=st.integers(0, 3), seed=st.integers(0, 2**31 - 1))


sweep = settings(max_examples=CASES // 2, deadline=None, suppress_health_check=list(HealthCheck))
layouts = st.sampled_from([em.ROW_MAJOR, em.MMA_S8])


@sweep
@given(shape=shapes(grouped=False), plan=plans, layout=layouts)
def test_every_bit_equals_the_reference_per_channel(emulator: em.Emulator, shape: Shape, plan: em.Forced, layout: int) -> None:
    case = make_case(shape)
    assert differences(emulator.run(case, layout, plan), routed_moe(case)) == []


@sweep
@given(shape=shapes(grouped=True), plan=plans, layout=layouts)
def test_every_bit_equals_the_reference_in_groups(emulator: em.Emulator, shape: Shape, plan: em.Forced, layout: int) -> None:
    case = make_case(shape)
    assert differences(emulator.run(case, layout, plan), routed_moe(case)) == []


EDGES = {
    "one token, one expert": Shape(1, 1, 1, 32, 32),
    "300 tokens on one expert": Shape(300, 5, 1, 64, 96, routing="hot"),
    "a token names an expert twice": Shape(8, 3, 3, 96, 64, routing="repeated"),
    "every slot padded": Shape(9, 4, 2, 64, 64, routing="none"),
    "more experts than pairs": Shape(3, 64, 2, 64, 32),
    "an odd number of column tiles": Shape(70, 2, 1, 160, 224),
    "more than 8 row tiles": Shape(65, 2, 2, 288, 160),
    "groups": Shape(66, 3, 2, 384, 256, group_size=128),
    "bf16, groups": Shape(20, 3, 2, 256, 384, group_size=128, dtype=1),
}


@pytest.mark.parametrize("layout", [em.ROW_MAJOR, em.MMA_S8], ids=["row_major", "mma_s8"])
@pytest.mark.parametrize("tiling", [em.DECODE_8, em.DECODE_32, em.PREFILL], ids=["decode8", "decode32", "prefill"])
@pytest.mark.parametrize("name", EDGES)
def test_edges(emulator: em.Emulator, name: str, tiling: int, layout: int) -> None:
    case = make_case(EDGES[name])
    assert differences(emulator.run(case, layout, em.Forced(tiling=tiling)), routed_moe(case)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tiling", [em.DECODE_8, em.DECODE_32, em.PREFILL])
def test_a_non_finite_value_stays_in_its_token(emulator: em.Emulator, tiling: int, value: float) -> None:
    clean = make_case(Shape(12, 4, 2, 64, 96, seed=5))
    dirty = with_values(clean, 7, 33, value)
    got = emulator.run(dirty, em.MMA_S8, em.Forced(tiling=tiling))
    others = np.arange(12) != 7
    assert np.isnan(got.output[7]).all()
    assert got.output[others].tobytes() == routed_moe(clean).output[others].tobytes()
    assert differences(got, routed_moe(dirty)) == []


def test_tilings_and_repeats_agree(emulator: em.Emulator) -> None:
    case = make_case(Shape(40, 6, 3, 128, 128, group_size=128, routing="skewed", seed=11))
    outputs = {emulator.run(case, layout, em.Forced(tiling=tiling, seed=seed)).output.tobytes()
               for layout in (em.ROW_MAJOR, em.MMA_S8) for tiling in (-1, 0, 1, 2) for seed in (1, 2)}
    assert len(outputs) == 1


@pytest.mark.parametrize("tiling,tokens", [(em.DECODE_8, 8), (em.DECODE_32, 32)])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_decode_reads_every_touched_weight_once(emulator: em.Emulator, tiling: int, tokens: int, group_size: int) -> None:
    """With up to as many tokens an expert as the tiling has columns: no byte of a touched expert twice, none of another at all."""
    case = make_case(Shape(tokens, 24, 1, 256, 384, group_size, routing="skewed", seed=tokens))
    assert differences(emulator.run(case, em.MMA_S8, em.Forced(tiling=tiling)), routed_moe(case)) == []
    touched = len(np.unique(case.topk_ids))
    assert 1 < touched < 24
    assert emulator.streamed_bytes == touched * 3 * 256 * 384 // 2


def test_largest_sums_do_not_overflow(emulator: em.Emulator) -> None:
    """Every weight -8, every activation at its limit, both group modes' largest widths but for memory: 16384 and 4096 columns."""
    for hidden, group in ((16384, 128), (16384, -1)):
        case = make_case(Shape(2, 1, 1, hidden, 128, group_size=group))
        everywhere = dataclasses.replace(
            case,
            hidden_states=np.ones_like(case.hidden_states),
            gate_up_qweight=np.full_like(case.gate_up_qweight, np.int8(-120)),  # 0x88: two nibbles of -8
            gate_up_multiplier=None if group < 0 else np.full_like(case.gate_up_multiplier, 127),
            gate_up_scale=np.full_like(case.gate_up_scale, 1e-9),
        )
        for tiling in (em.DECODE_8, em.PREFILL):
            got = emulator.run(everywhere, em.MMA_S8, em.Forced(tiling=tiling))
            assert differences(got, routed_moe(everywhere)) == []


BREAKS = {
    # an index, a wait, a bound, a barrier: file, from, to
    "activation order": ("rows.cuh", "half[i & 1] |= byte", "half[(i >> 1) & 1] |= byte"),
    "wait one group less": ("gemm_prefill.cuh", "cp_async_wait<kPrefillStages - 2>();", "cp_async_wait<kPrefillStages - 1>();"),
    "no column bound": ("gemm_prefill.cuh", "const bool valid = copying && col < a.cols;", "const bool valid = copying;"),
    "no barrier before the sum": ("gemm_decode.cuh", "    block_barrier();\n    const int q = warp;", "    const int q = warp;"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_caught(name: str, tmp_path: Path) -> None:
    """The tests above can fail: each patch breaks one thing, and a handful of cases notices."""
    file, old, new = BREAKS[name]
    plugins = tmp_path / "plugins"
    for folder in ("include", "src", "capi"):
        shutil.copytree(em.PLUGINS / folder, plugins / folder)
    source = plugins / "include" / "ecmfq" / file
    text = source.read_text()
    assert len(re.findall(re.escape(old), text)) == 1, f"{file} changed: update this patch"
    source.write_text(text.replace(old, new))
    caught = []
    executable = em.build("server", plugins)
    for tiling in (em.DECODE_8, em.PREFILL):
        running = em.Emulator(executable)
        try:
            for shape in (Shape(9, 3, 2, 96, 64, seed=1), Shape(70, 3, 2, 64, 160, seed=2, routing="hot")):
                case = make_case(shape)
                caught += differences(running.run(case, em.MMA_S8, em.Forced(tiling=tiling)), routed_moe(case))
            running.close()
        except em.EmulationError as error:
            caught.append(str(error))
    assert caught
