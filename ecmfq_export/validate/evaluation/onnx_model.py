"""An exported bundle in ONNX Runtime, asked the same requests; prompts of one image go on from one prefill of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecmfq_export.progress import Progress
from ecmfq_export.runtime.decoder_session import DecoderSession, DecodeState, graph_path
from ecmfq_export.runtime.embeddings import EmbeddingTable
from ecmfq_export.runtime.runtime_file import read_runtime, verify_export
from ecmfq_export.runtime.sample import ProcessedSample
from ecmfq_export.validate.evaluation.evalset import EvalSet
from ecmfq_export.validate.evaluation.requests import PrefixGroup, Request, prefix_groups
from ecmfq_export.validate.torch_lockstep import batch_rows

_BATCH_PROMPTS, _BATCH_TOKENS = 16, 2048
"""The static cache is [batch, kv_heads, max_seq, head_dim] a layer, so a batch costs memory however short its prompts are."""
_HELD_BYTES = 1 << 28


class OnnxModel:
    """The graphs of an export.

    Args:
        directory: the ``onnx`` directory.
        threads: of ONNX Runtime; 0: all cores.

    Raises:
        BundleError: a file is missing or does not say what is needed.
    """

    def __init__(self, directory: Path, threads: int = 0) -> None:
        self._directory, self._threads = Path(directory), threads
        verify_export(self._directory)
        self._runtime = read_runtime(self._directory)
        self._state = f"hidden_{self._runtime['num_layers'] - 1}"  # see graph/decoder.py

    def describe(self) -> dict[str, Any]:
        """Path, form, family, vocabulary and the type of the graphs."""
        moe, embeddings = self._runtime.get("moe") or {}, EmbeddingTable(self._directory / "embed_tokens.safetensors")
        return {"path": str(self._directory), "form": "ONNX Runtime", "family": self._runtime.get("family"),
                "vocab_size": embeddings.rows, "quantized": moe.get("op") in ("EcmfqRoutedMoE", "QMoE"),
                "dtype": self._runtime.get("dtype")}  # fmt: skip

    def run(self, evalset: EvalSet, progress: Progress) -> RowOutputs:
        """Run every request.

        Raises:
            UserError: a prompt that does not fit the context, or an image that cannot be used.
        """
        requests = evalset.requests
        run = _Run(self._open(any(r.kind == "state" for r in requests)), evalset, self._state)
        groups = prefix_groups(requests, evalset.processor.image_token_id)
        alone = [g.members[0] for g in groups if g.image is None]
        with_image = [g for g in groups if g.image is not None]
        for _ in progress.track(run.work(alone, with_image), "evaluate: ONNX Runtime", len(alone) + len(with_image)):
            pass
        return run.outputs

    def _open(self, with_states: bool) -> DecoderSession:
        from ecmfq_export.engine.ort_runner import OrtRunner

        taps, decoder = (self._state,) if with_states else (), graph_path(self._directory, "decoder")
        return DecoderSession(self._directory,
                              lambda path: OrtRunner(path, threads=self._threads, extra_outputs=taps if path == decoder else ()))


class Rows:
    """Logits at P positions, in a temporary file where they are many."""

    def __init__(self, positions: int, vocab: int) -> None:
        self.shape = (positions, vocab)
        if positions * vocab * 4 > _HELD_BYTES:
            self._file = tempfile.TemporaryFile(prefix="ecmfq-logits-")
            self.values: np.ndarray = np.memmap(self._file, np.float32, "w+", shape=self.shape)
        else:
            self.values = np.empty(self.shape, np.float32)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Float32 [stop - start, vocab]."""
        return torch.from_numpy(np.array(self.values[start:stop]))


class RowOutputs:
    """What was read for each request (a ``ModelOutputs``)."""

    def __init__(self, requests: Sequence[Request], vocab: int, hidden: int) -> None:
        self._place: dict[int, int] = {}
        totals = {"logits": 0, "state": 0, "log_odds": 0}
        for index, request in enumerate(requests):
            self._place[index] = totals[request.kind]
            totals[request.kind] += request.reads
        self._kinds = [r.kind for r in requests]
        self._logits = Rows(totals["logits"], vocab)
        self._states = np.empty((totals["state"], hidden), np.float32)
        self._odds = np.empty(totals["log_odds"])

    def put(self, index: int, kind: str, values: np.ndarray) -> None:
        """Keep what was read for request `index`: [reads, ...]."""
        target = {"logits": self._logits.values, "state": self._states, "log_odds": self._odds}[kind]
        target[self._place[index] : self._place[index] + len(values)] = values

    def distributions(self, start: int, stop: int) -> _Slice:
        return _Slice(self._logits, *self._bounds(start, stop, len(self._logits.values)))

    def states(self, start: int, stop: int) -> np.ndarray:
        return self._states[slice(*self._bounds(start, stop, len(self._states)))]

    def log_odds(self, start: int, stop: int) -> np.ndarray:
        return self._odds[slice(*self._bounds(start, stop, len(self._odds)))]

    def _bounds(self, start: int, stop: int, total: int) -> tuple[int, int]:
        kind = self._kinds[start]
        after = next((i for i in range(stop, len(self._kinds)) if self._kinds[i] == kind), None)
        return self._place[start], total if after is None else self._place[after]


class _Slice:
    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self._rows, self._start = rows, start
        self.shape = (stop - start, rows.shape[1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._rows.rows(self._start + start, self._start + stop)


class _Run:
    """One pass over all requests."""

    def __init__(self, session: DecoderSession, evalset: EvalSet, state: str) -> None:
        self._state = state
        self._session, self._evalset, self._requests = session, evalset, evalset.requests
        self.outputs = RowOutputs(evalset.requests, session.vocab_size, session.hidden_size)

    def work(self, alone: list[int], groups: list[PrefixGroup]) -> Iterator[None]:
        """Yields once for each text-only request and each group that is done."""
        for rows in batch_rows([len(self._requests[i].ids) for i in alone], _BATCH_TOKENS):
            for start in range(0, len(rows), _BATCH_PROMPTS):
                part = [alone[r] for r in rows[start : start + _BATCH_PROMPTS]]
                # The first token alone is the prefix: what follows goes the same way as after an image.
                first = [self._sample(self._requests[i].ids[:1], None) for i in part]
                self._follow(part, [self._requests[i].ids[1:] for i in part], first, np.arange(len(part)))
                yield from [None] * len(part)
        for group in groups:
            assert group.image is not None
            first = [self._sample(group.prefix, group.image)]
            tails = [self._requests[i].ids[len(group.prefix) :] for i in group.members]
            self._follow(list(group.members), tails, first, np.zeros(len(tails), np.int64))
            yield

    def _sample(self, ids: np.ndarray, image: int | None) -> ProcessedSample:
        patches = grid = None
        tokens: Sequence[int] = ids.tolist()
        if image is not None:
            patches, grid = self._evalset.images.patches(image)
            tokens = self._evalset.processor.expand(tokens, grid)
        return ProcessedSample(np.array(tokens, np.int64), patches, grid, np.zeros(len(tokens), bool))

    def _follow(self, members: list[int], tails: list[np.ndarray], prefixes: list[ProcessedSample], owner: np.ndarray) -> None:
        _, state = self._session.prefill(prefixes)
        order = sorted(range(len(members)), key=lambda i: len(tails[i]))
        for start in range(0, len(order), _BATCH_PROMPTS):
            chosen = order[start : start + _BATCH_PROMPTS]
            requests = [self._requests[members[i]] for i in chosen]
            read = self._read([tails[i] for i in chosen], requests, state.take(owner[chosen]))
            for i, request, values in zip(chosen, requests, read, strict=True):
                if request.kind == "log_odds":
                    assert self._evalset.yes_no is not None
                    wide = values[:, list(self._evalset.yes_no)].astype(np.float64)
                    values = wide[:, 0] - wide[:, 1]
                self.outputs.put(members[i], request.kind, values)

    def _read(self, tails: list[np.ndarray], requests: list[Request], state: DecodeState) -> list[np.ndarray]:
        """Logits or states [reads, ...] at the last positions of each row."""
        if not self._session.logits_last:
            outputs = self._session.extend(tails, state)
            return [outputs[self._state if r.kind == "state" else "logits"][row, len(t) - r.reads : len(t)]
                    for row, (t, r) in enumerate(zip(tails, requests, strict=True))]  # fmt: skip
        # The graph shows the last position only: everything up to the first one that is read, then token by token.
        heads = [len(t) - r.reads + 1 for t, r in zip(tails, requests, strict=True)]
        outputs = self._session.extend([t[:n] for t, n in zip(tails, heads, strict=True)], state)
        found = [[outputs[self._state][row, n - 1] if r.kind == "state" else outputs["logits"][row, 0]]
                 for row, (r, n) in enumerate(zip(requests, heads, strict=True))]  # fmt: skip
        for at in range(max(r.reads for r in requests) - 1):
            active = np.array([at < r.reads - 1 for r in requests])
            tokens = np.array([t[n + at] if a else 0 for t, n, a in zip(tails, heads, active, strict=True)])
            logits = self._session.step(tokens, state, active)
            for row in np.flatnonzero(active):
                found[row].append(logits[row])
        return [np.stack(rows) for rows in found]

