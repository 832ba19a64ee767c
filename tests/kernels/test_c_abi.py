"""The C ABI's checks, through ctypes on the emulated library: every refusal has its status, and nothing is launched."""

from __future__ import annotations

import ctypes
import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import emulator as em
from tests.kernels.c_abi import STATUS, EcmfqMoeParams, load

pytestmark = pytest.mark.skipif(em.compiler() is None, reason="no C++ compiler: the C ABI cannot be built")

ALIGNED = 1 << 20  # an address that is never touched: every case here is refused first, or asks for sizes alone


@functools.cache
def built() -> ctypes.CDLL:
    return load(em.build("library"))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return built()


def params(**changes: int) -> EcmfqMoeParams:
    fields: dict[str, int] = dict(
        abi_version=1, struct_size=ctypes.sizeof(EcmfqMoeParams), num_tokens=4, num_experts=8, top_k=2, hidden_size=256,
        intermediate_size=128, group_size=-1, activation=0, dtype=0, weight_layout=1, compute_capability=87, num_sms=16,
        max_smem_per_block=166912, hidden_states=ALIGNED, topk_ids=ALIGNED, topk_weights=ALIGNED, gate_up_qweight=ALIGNED,
        gate_up_scale=ALIGNED, down_qweight=ALIGNED, down_scale=ALIGNED, output=ALIGNED)
    fields.update(changes)
    return EcmfqMoeParams(**fields)


def size_of(library: ctypes.CDLL, p: EcmfqMoeParams) -> int:
    size = ctypes.c_size_t()
    assert library.ecmfq_routed_moe_workspace_size(ctypes.byref(p), ctypes.byref(size)) == STATUS["OK"]
    return size.value


def test_header_and_python_agree() -> None:
    header = (em.PLUGINS / "capi" / "ecmfq.h").read_text()
    assert {name: int(value) for name, value in re.findall(r"ECMFQ_ERROR_(\w+) = (\d+)", header)} | {"OK": 0} == STATUS
    body = header[header.index("typedef struct EcmfqMoeParams"):header.index("} EcmfqMoeParams;")]
    names = re.findall(r"^    (?:const )?\w+\*? (\w+);", body, re.MULTILINE)
    assert names == [name for name, _ in EcmfqMoeParams._fields_]


def test_every_status_has_its_own_sentence(library: ctypes.CDLL) -> None:
    sentences = [library.ecmfq_status_string(code).decode() for code in STATUS.values()]
    assert len(set(sentences)) == len(sentences) and all(sentences)
    assert library.ecmfq_status_string(-1) == library.ecmfq_status_string(999) == b"unknown status"
    assert library.ecmfq_abi_version() == 1


REFUSED = [
    ("ABI_VERSION", dict(abi_version=2)),
    ("ABI_VERSION", dict(struct_size=8)),
    ("SHAPE", dict(num_tokens=-1)),
    ("SHAPE", dict(num_experts=0)),
    ("SHAPE", dict(num_experts=1025)),
    ("SHAPE", dict(top_k=0)),
    ("SHAPE", dict(top_k=65)),
    ("SHAPE", dict(num_tokens=2**31 - 1)),
    ("SHAPE", dict(hidden_size=0)),
    ("SHAPE", dict(hidden_size=-32)),
    ("SHAPE", dict(hidden_size=48)),
    ("SHAPE", dict(intermediate_size=40)),
    ("SHAPE", dict(hidden_size=65536 + 32)),
    ("SHAPE", dict(hidden_size=160, group_size=128)),
    ("SHAPE", dict(intermediate_size=96, group_size=128)),
    ("SHAPE", dict(hidden_size=16384 + 128, group_size=128)),
    ("GROUP_SIZE", dict(group_size=0)),
    ("GROUP_SIZE", dict(group_size=64)),
    ("ACTIVATION", dict(activation=1)),
    ("ACTIVATION", dict(activation=-1)),
    ("DTYPE", dict(dtype=2)),
    ("DTYPE", dict(dtype=-1)),
    ("WEIGHT_LAYOUT", dict(weight_layout=2)),
    ("WEIGHT_LAYOUT", dict(weight_layout=-1)),
    ("DEVICE", dict(compute_capability=75)),
    ("DEVICE", dict(num_sms=0)),
    ("DEVICE", dict(max_smem_per_block=16384)),
]


@pytest.mark.parametrize("status,changes", REFUSED, ids=[f"{s}-{c}" for s, c in REFUSED])
def test_bad_values_are_refused_by_every_entry(library: ctypes.CDLL, status: str, changes: dict[str, int]) -> None:
    p = params(**changes)
    size = ctypes.c_size_t(123)
    assert library.ecmfq_routed_moe_check(ctypes.byref(p)) == STATUS[status]
    assert library.ecmfq_routed_moe_workspace_size(ctypes.byref(p), ctypes.byref(size)) == STATUS[status]
    assert size.value == 123
    assert library.ecmfq_routed_moe(ctypes.byref(p), ALIGNED, 1 << 40, None) == STATUS[status]


def test_null_pointers(library: ctypes.CDLL) -> None:
    p = params()
    null = STATUS["NULL_POINTER"]
    assert library.ecmfq_routed_moe_check(None) == null
    assert library.ecmfq_routed_moe_workspace_size(None, None) == null
    assert library.ecmfq_routed_moe_workspace_size(ctypes.byref(p), None) == null
    assert library.ecmfq_routed_moe(None, ALIGNED, 1 << 40, None) == null
    for name, kind in EcmfqMoeParams._fields_:
        if kind is ctypes.c_void_p and not name.endswith("_multiplier"):
            broken = params(**{name: 0})
            assert library.ecmfq_routed_moe(ctypes.byref(broken), ALIGNED, 1 << 40, None) == null, name


def test_a_missing_multiplier(library: ctypes.CDLL) -> None:
    for name in ("gate_up_multiplier", "down_multiplier"):
        given_one = {"gate_up_multiplier": ALIGNED, "down_multiplier": ALIGNED, name: 0}
        p = params(group_size=128, **given_one)
        assert library.ecmfq_routed_moe_check(ctypes.byref(p)) == STATUS["OK"]  # pointers are not its business
        assert library.ecmfq_routed_moe(ctypes.byref(p), ALIGNED, 1 << 40, None) == STATUS["GROUP_SIZE"]


def test_misaligned_tensors(library: ctypes.CDLL) -> None:
    for name in ("hidden_states", "gate_up_qweight", "down_scale", "output", "topk_ids"):
        p = params(**{name: ALIGNED + 4})
        assert library.ecmfq_routed_moe(ctypes.byref(p), ALIGNED, 1 << 40, None) == STATUS["ALIGNMENT"], name


def test_workspace(library: ctypes.CDLL) -> None:
    p = params()
    needed = size_of(library, p)
    for address, size in ((0, needed), (ALIGNED + 16, needed), (ALIGNED, needed - 1), (ALIGNED, 0)):
        assert library.ecmfq_routed_moe(ctypes.byref(p), address, size, None) == STATUS["WORKSPACE"]


def test_no_tokens_is_no_work(library: ctypes.CDLL) -> None:
    p = params(num_tokens=0, hidden_states=0, output=0)
    assert library.ecmfq_routed_moe(ctypes.byref(p), None, 0, None) == STATUS["OK"]


def test_a_layer_runs_through_ctypes(library: ctypes.CDLL) -> None:
    """The same call that the GPU benchmark makes, on host memory."""
    from tests.kernels.cases import Shape, make_case
    from tests.kernels.reference import routed_moe

    case = make_case(Shape(5, 4, 2, 64, 96))
    keep = [aligned(a) for a in (case.hidden_states, case.topk_ids, case.topk_weights, case.gate_up_qweight, case.gate_up_scale,
                                 case.down_qweight, case.down_scale, np.empty_like(case.hidden_states))]
    names = ("hidden_states", "topk_ids", "topk_weights", "gate_up_qweight", "gate_up_scale", "down_qweight", "down_scale", "output")
    p = params(num_tokens=5, num_experts=4, top_k=2, hidden_size=64, intermediate_size=96, weight_layout=0,
               **{name: array.ctypes.data for name, array in zip(names, keep, strict=True)})
    workspace = aligned(np.empty(size_of(library, p), np.uint8), 256)
    assert library.ecmfq_routed_moe(ctypes.byref(p), workspace.ctypes.data, workspace.nbytes, None) == STATUS["OK"]
    assert keep[-1].tobytes() == routed_moe(case).output.tobytes()


def aligned(array: np.ndarray, to: int = 64) -> np.ndarray:
    """A copy at an address that is a multiple of `to`."""
    raw = np.empty(array.nbytes + to, np.uint8)
    start = -raw.ctypes.data % to
    copy = raw[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 128), st.integers(1, 16), st.integers(1, 80), st.integers(1, 80))
def test_workspace_grows_with_tokens(a: int, b: int, experts: int, top_k: int, hidden: int, inter: int) -> None:
    few, many = sorted((a, b))
    sizes = [size_of(built(), params(num_tokens=t, num_experts=experts, top_k=top_k, hidden_size=32 * hidden, intermediate_size=32 * inter))
             for t in (few, many)]
    assert sizes[0] <= sizes[1]


def plan(library: ctypes.CDLL, tokens: int, experts: int, top_k: int, hidden: int, inter: int) -> tuple[int, int]:
    tiling, columns = ctypes.c_int32(), ctypes.c_int32()
    library.probe_plan(tokens, experts, top_k, hidden, inter, ctypes.byref(tiling), ctypes.byref(columns))
    return tiling.value, columns.value


def test_planner(library: ctypes.CDLL) -> None:
    """Qwen3-VL-30B-A3B: decode up to 16 pairs an expert, then prefill; terms of the down projection stay within 32 MiB."""
    tilings = [plan(library, t, 128, 8, 2048, 768)[0] for t in (1, 4, 8, 16, 64, 256, 257, 1024, 4096)]
    assert tilings == [em.DECODE_8] * 3 + [em.DECODE_32] * 3 + [em.PREFILL] * 3
    for tokens in (1, 100, 512, 513, 4096, 100_000):
        columns = plan(library, tokens, 128, 8, 2048, 768)[1]
        assert columns % 32 == 0 and 128 <= columns <= 2048
        assert columns == 128 or tokens * 8 * columns * 4 <= 32 << 20
