"""Buffers, the cache on the device and CUDA graphs, over a CPU in CUDA's place: results are a plain runner's, whatever is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.engine.bound_engine import BoundEngine, DeviceTensor
from ecmfq_export.engine.runner import Runner
from ecmfq_export.errors import BuildError, UserError
from tests.engine.fake_engine import CACHE, KINDS, FakeCuda, FakeEngine, NumpyRunner

MODES = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copy"])


def opened(in_place: bool, **options: bool) -> tuple[BoundEngine, FakeEngine, FakeCuda]:
    cuda = FakeCuda()
    engine = FakeEngine(cuda, in_place=in_place, two_profiles=options.pop("two_profiles", True))
    return BoundEngine(engine, cuda, kv_cache="in_place" if in_place else "copy", **options), engine, cuda


def feeds(tokens: list[list[float]], starts: list[int], cache: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    empty = np.zeros((len(tokens), CACHE), np.float32)
    return {"tokens": np.array(tokens, np.float32), "write_indices": np.array(starts, np.int64),
            **(cache or {f"past_{kind}_0": empty for kind in KINDS})}


def taken(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"past_{kind}_0": outputs[f"present_{kind}_0"] for kind in KINDS}


Conversation = tuple[int, int, int]  # rows, tokens of the prompt, steps


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 7)), min_size=1, max_size=4), st.booleans(), st.booleans(),
       st.booleans(), st.integers(0, 99))
def test_any_conversations_answer_as_a_plain_runner(conversations: list[Conversation], in_place: bool, graphs: bool, two: bool,
                                                    seed: int) -> None:
    bound, _, cuda = opened(in_place, graphs=graphs, two_profiles=two)
    allocated = cuda.allocations
    plain, random = NumpyRunner(), np.random.default_rng(seed)
    for rows, prompt, steps in conversations:
        tokens, starts = random.integers(1, 9, (rows, prompt)).tolist(), [0] * rows
        a, b = bound.run(feeds(tokens, starts)), plain.run(feeds(tokens, starts))
        np.testing.assert_array_equal(a["answer"], b["answer"])
        starts = random.integers(1, prompt + 1, rows).tolist()  # rows of different lengths, as right padding leaves them
        for _ in range(steps):
            tokens = random.integers(1, 9, (rows, 1)).tolist()
            a, b = bound.run(feeds(tokens, starts, taken(a))), plain.run(feeds(tokens, starts, taken(b)))
            np.testing.assert_array_equal(a["answer"], b["answer"])
            starts = [min(start + 1, CACHE - 1) for start in starts]
        np.testing.assert_array_equal(a["present_value_0"], b["present_value_0"])
    assert cuda.allocations == allocated, "everything was allocated before the first call"
    assert graphs and two or not cuda.graphs


@MODES
def test_buffers(in_place: bool) -> None:
    bound, _, cuda = opened(in_place)
    assert isinstance(bound, Runner)
    caches = 2 * (1 if in_place else 2)
    assert cuda.allocations == 3 + caches, "tokens, write_indices, answer and the caches"
    assert bound.buffer_bytes == 3 * CACHE * 4 + 3 * 8 + 3 * 4 + caches * 3 * CACHE * 4
    assert bound.device_bytes == 1000 + bound.buffer_bytes
    bound.close()
    assert not cuda.memory_at


@MODES
def test_the_cache_does_not_leave_the_device(in_place: bool) -> None:
    bound, _, cuda = opened(in_place)
    outputs = bound.run(feeds([[1, 2, 3]], [0]))
    assert isinstance(outputs["present_key_0"], DeviceTensor) and isinstance(outputs["answer"], np.ndarray)
    assert cuda.uploaded_bytes == 3 * 4 + 8, "an empty cache is cleared on the device, not sent"
    bound.run(feeds([[4]], [3], taken(outputs)))
    assert cuda.uploaded_bytes == 3 * 4 + 8 + 4 + 8


@MODES
def test_decode_steps_become_graphs(in_place: bool) -> None:
    """One graph in place; two where the buffers change places, since a graph holds addresses."""
    bound, engine, cuda = opened(in_place)
    outputs = bound.run(feeds([[1, 2]], [0]))
    for at in range(2, 10):
        outputs = bound.run(feeds([[1]], [at], taken(outputs)))
    graphs = 1 if in_place else 2
    assert bound.calls == {"direct": 1 + graphs, "captured": graphs, "replayed": 8 - graphs}
    assert len(cuda.graphs) == graphs
    assert engine.contexts[1].enqueued == 2 * graphs and engine.contexts[0].enqueued == 1


def test_graphs_end_with_their_shapes() -> None:
    """Another batch, then the first again: what was captured before is not used again, and runs directly first."""
    bound, _, cuda = opened(True)
    for rows in (1, 2, 1):
        outputs = bound.run(feeds([[1, 2]] * rows, [0] * rows))
        for at in range(2, 6):
            outputs = bound.run(feeds([[1]] * rows, [at] * rows, taken(outputs)))
    assert len(cuda.graphs) == 3 and cuda.dropped == 2
    assert bound.calls["direct"] == 3 + 3


def test_without_graphs_every_call_is_direct() -> None:
    for options in ({"graphs": False}, {"two_profiles": False}):
        bound, _, cuda = opened(True, **options)
        outputs = bound.run(feeds([[1, 2]], [0]))
        for at in range(2, 8):
            outputs = bound.run(feeds([[1]], [at], taken(outputs)))
        assert bound.calls == {"direct": 7, "captured": 0, "replayed": 0} and not cuda.graphs


@MODES
def test_a_state_that_was_written_over_is_refused(in_place: bool) -> None:
    """A second prompt takes the buffers; going on from the first one would read the second's keys."""
    bound, _, _ = opened(in_place)
    first = bound.run(feeds([[1, 2]], [0]))
    kept = {name: np.asarray(value) for name, value in taken(first).items()}
    bound.run(feeds([[5, 6]], [0]))
    with pytest.raises(UserError, match=r"present_key_0 of an earlier call was written over.*\n.*take\(\)"):
        bound.run(feeds([[3]], [2], taken(first)))
    with pytest.raises(UserError, match="written over"):
        np.asarray(first["present_value_0"])
    plain = NumpyRunner()
    wanted = plain.run(feeds([[3]], [2], taken(plain.run(feeds([[1, 2]], [0])))))
    np.testing.assert_array_equal(bound.run(feeds([[3]], [2], kept))["answer"], wanted["answer"])


def test_rows_are_copied_to_the_host() -> None:
    bound, _, _ = opened(True)
    outputs = bound.run(feeds([[1, 2], [3, 4]], [0, 0]))
    rows = outputs["present_key_0"][np.array([1, 1, 0])]
    assert isinstance(rows, np.ndarray) and rows[:, :2].tolist() == [[3, 4], [3, 4], [1, 2]]


def test_a_cache_in_the_wrong_place_is_refused() -> None:
    bound, _, _ = opened(True)
    outputs = taken(bound.run(feeds([[1, 2]], [0])))
    swapped = {"past_key_0": outputs["past_value_0"], "past_value_0": outputs["past_key_0"]}
    with pytest.raises(UserError, match="input 'past_key_0' was given present_value_0"):
        bound.run(feeds([[1]], [2], swapped))


def test_shapes_beyond_the_profiles() -> None:
    bound, _, _ = opened(True)
    with pytest.raises(UserError, match=r"no profile .*'tokens' is \[4, 2\], allowed \[1, 1\] to \[3, 12\]"):
        bound.run(feeds([[1, 2]] * 4, [0] * 4))
    with pytest.raises(UserError, match="inputs missing: write_indices"):
        bound.run({name: value for name, value in feeds([[1]], [0]).items() if name != "write_indices"})


def test_failures_carry_the_engine_s_words() -> None:
    bound, engine, _ = opened(True)
    engine.fails = True
    with pytest.raises(BuildError, match="the engine failed: the fake failed"):
        bound.run(feeds([[1, 2]], [0]))
    engine.fails = False
    outputs = bound.run(feeds([[1]], [0]))
    engine.fails = True
    with pytest.raises(BuildError, match="while its calls were captured: the fake failed"):
        bound.run(feeds([[1]], [1], taken(outputs)))


def test_output_without_its_input() -> None:
    cuda = FakeCuda()
    engine = FakeEngine(cuda, in_place=True)
    engine.outputs = {**engine.outputs, "present_key_9": engine.outputs["present_key_0"]}
    with pytest.raises(BuildError, match="output present_key_9 and no input past_key_9"):
        BoundEngine(engine, cuda, kv_cache="in_place")


@MODES
def test_weights_are_bound_once(in_place: bool) -> None:
    """An input that stays the same: on the device from the start, and nothing that a caller gives."""
    cuda = FakeCuda()
    engine = FakeEngine(cuda, in_place=in_place)
    weight = np.arange(12, dtype=np.int8).reshape(3, 4)
    engine.inputs = {**engine.inputs, "experts": (np.dtype(np.int8), (3, 4))}
    for profile in engine.profiles:
        profile["experts"] = ((3, 4), (3, 4))
    mode = "in_place" if in_place else "copy"
    bound = BoundEngine(engine, cuda, kv_cache=mode, weights={"experts": weight})
    assert cuda.uploaded_bytes == weight.nbytes and "experts" not in bound.input_names
    outputs = bound.run(feeds([[1.0, 2.0]], [0]))
    address = engine.contexts[0].addresses["experts"]
    np.testing.assert_array_equal(cuda.view(address, (3, 4), np.dtype(np.int8)), weight)
    before = cuda.uploaded_bytes
    for start in range(2, 5):
        outputs = bound.run(feeds([[3.0]], [start], taken(outputs)))
    assert engine.contexts[-1].addresses["experts"] == address
    assert cuda.uploaded_bytes - before == 3 * (4 + 8), "a token and its place, each call"
    for wrong in (weight.astype(np.float32), weight[:2]):
        with pytest.raises(BuildError, match=r"takes 'experts' as int8\[3, 4\]"):
            BoundEngine(engine, cuda, kv_cache=mode, weights={"experts": wrong})
    with pytest.raises(BuildError, match="takes 'other'"):
        BoundEngine(engine, cuda, kv_cache=mode, weights={"other": weight})


def test_only_wanted_outputs_come_back() -> None:
    bound, _, _ = opened(True)
    assert list(bound.run(feeds([[1.0]], [0]), ["answer"])) == ["answer"]
