"""The two graphs of a bundle behind three calls: prefill a batch of prompts, decode one token each, score answers.

Everything between the graphs is NumPy: embeddings are read from a memory-mapped file, image features are scattered into
their places, and the static KV cache goes from one call's outputs into the next one's inputs without a copy of ours.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecmfq_export.engine.runner import Runner
from ecmfq_export.errors import BundleError, UserError
from ecmfq_export.runtime import host_inputs as host
from ecmfq_export.runtime.embeddings import EmbeddingTable
from ecmfq_export.runtime.runtime_file import RUNTIME_JSON, read_runtime
from ecmfq_export.runtime.sample import ProcessedSample

_VISION_BATCH_PATCHES = 1024
"""Images share a vision call up to so many patches: attention there is quadratic in the patches of a call."""
_CACHED_IMAGES = 64
_CACHED_FEATURE_BYTES = 256 << 20
"""Features of images are kept for the next prompt with the same ones: so many images and bytes at most."""


@dataclass
class DecodeState:
    """Where a batch stands.

    Attributes:
        cached: [batch] int64, tokens in the cache of each row.
        deltas: [batch] int64, position of the next token minus ``cached`` (images advance positions by less than tokens).
        cache: ``past_key_{l}`` and ``past_value_{l}``, [batch, kv_heads, max_seq, head_dim] each.
    """

    cached: np.ndarray
    deltas: np.ndarray
    cache: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> DecodeState:
        """A state of `rows` [n], each as often as it is listed: many texts go on from one prompt."""
        return DecodeState(self.cached[rows], self.deltas[rows], {name: value[rows] for name, value in self.cache.items()})


class DecoderSession:
    """Graphs, embeddings and sizes of ``OUT/onnx``.

    Args:
        directory: what the export wrote, with ``runtime.json``.
        runner_factory: opens a graph file. It gets the reference graph (``model.ref.onnx``) where there is one, since
            ``model.onnx`` holds plugin nodes; a factory over engines may map the path to its engine.

    Raises:
        BundleError: a file is missing or does not say what is needed.
    """

    def __init__(self, directory: Path | str, runner_factory: Callable[[Path], Runner]) -> None:
        self.directory = Path(directory)
        runtime = read_runtime(self.directory)
        self.spec = host.HostSpec.from_runtime_json(runtime)
        self.dtype = self.spec.dtype
        self.max_seq_len = self.spec.max_seq_len
        self.num_layers, self.num_kv_heads = runtime["num_layers"], runtime["num_kv_heads"]
        self.head_dim, self.hidden_size = runtime["head_dim"], runtime["hidden_size"]
        self.image_token_id = runtime["image_token_id"]
        self.logits_last = runtime["logits"] == "last"
        self._max_patches = runtime.get("max_image_patches", 0)
        self._embeddings = EmbeddingTable(self.directory / "embed_tokens.safetensors")
        if self._embeddings.hidden_size != self.hidden_size:
            raise BundleError(
                f"{self.directory}: embeddings are {self._embeddings.hidden_size} wide, the decoder {self.hidden_size}",
                "files of two exports were mixed; export again",
            )
        self._decoder = runner_factory(graph_path(self.directory, "decoder"))
        self._check_graph(self._decoder)
        self._open_vision = lambda: runner_factory(graph_path(self.directory, "vision"))
        self._vision: Runner | None = None
        self._features: OrderedDict[bytes, list[np.ndarray]] = OrderedDict()
        self._feature_bytes = 0

    def _check_graph(self, decoder: Runner) -> None:
        """Whether the graph is the one that ``runtime.json`` describes, before its sizes are allocated."""
        cache = [f"past_{kind}_{layer}" for layer in range(self.num_layers) for kind in ("key", "value")]
        wanted = {"inputs_embeds", "rope_cos", "rope_sin", "attention_mask", "write_indices", *cache,
                  *(f"deepstack_{i}" for i in range(self.spec.num_deepstack)), *(["last_index"] if self.logits_last else []),
                  *(["router_types"] if self.spec.image_expert_ids else [])}
        wrong = sorted(wanted ^ set(decoder.input_names))
        if wrong:
            raise BundleError(f"{self.directory}: {len(wrong)} inputs differ between {RUNTIME_JSON} and the decoder's graph, first "
                              f"'{wrong[0]}'", "files of two exports were mixed; export again")
        # A runner over an engine may know names alone; check_feeds then compares shapes on the first run.
        shapes = getattr(decoder, "inputs", {})
        sizes = [self.num_kv_heads, self.max_seq_len, self.head_dim]
        for name in cache:
            seen = list(shapes[name][1])[1:] if name in shapes else sizes
            if seen != sizes:
                raise BundleError(f"{self.directory}: '{name}' of the decoder's graph is [batch, {', '.join(map(str, seen))}], "
                                  f"{RUNTIME_JSON} says {sizes}", "files of two exports were mixed; export again")

    @property
    def vocab_size(self) -> int:
        return self._embeddings.rows

    @property
    def cache_bytes(self) -> int:
        """Bytes of one prompt's static cache over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.max_seq_len * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def device_bytes(self) -> int:
        """Memory that the graphs hold on a device of their own; 0 on the CPU."""
        return self._decoder.device_bytes + (self._vision.device_bytes if self._vision is not None else 0)

    def release(self) -> None:
        """Let go of the vision graph, and of what the decoder's runner can open again."""
        self.release_vision()
        close = getattr(self._decoder, "release", None)
        if close is not None:
            close()

    def release_vision(self) -> None:
        """Let go of the vision graph, which ONNX Runtime holds in float32; features of the last images are kept, and it is opened again
        when it is needed."""
        self._vision = None

    def prefill(self, samples: Sequence[ProcessedSample]) -> tuple[np.ndarray, DecodeState]:
        """Run whole prompts (answers, where a sample has one, included).

        Returns:
            logits [batch, vocab] float32 after each prompt's last token, and the state to decode from.

        Raises:
            UserError: a prompt does not fit the context, or images and placeholders do not match.
        """
        outputs, state, lengths = self._run_prompts(samples)
        logits = outputs["logits"]
        return (logits[:, 0] if self.logits_last else logits[np.arange(len(samples)), lengths - 1]), state

    def forward(self, samples: Sequence[ProcessedSample]) -> list[np.ndarray]:
        """Logits [S, vocab] float32 at every position of each sample; needs a graph exported with ``logits="all"``."""
        if self.logits_last:
            raise UserError(f"{self.directory} was exported with logits = last", "export with logits = all")
        outputs, lengths = self.run_prompts(samples, ["logits"])
        return [outputs["logits"][row, :length] for row, length in enumerate(lengths)]

    def step(self, tokens: np.ndarray, state: DecodeState, active: np.ndarray | None = None) -> np.ndarray:
        """Append one token to each active row and return the logits [batch, vocab] after it; `state` moves on.

        Args:
            tokens: [batch] ids.
            state: from :meth:`prefill` or the last step; changed in place.
            active: [batch] bool; an inactive row computes too but does not advance, so its logits mean nothing.
        """
        ids = np.asarray(tokens, np.int64)[:, None]
        if int(state.cached.max()) >= self.max_seq_len and (active is None or state.cached[active].max() >= self.max_seq_len):
            raise UserError(f"the context of {self.max_seq_len} tokens is full", "export with a larger max_seq_len")
        # An inactive row may stand at the end of its cache; it writes to the last slot, which nobody reads any more.
        starts = np.minimum(state.cached, self.max_seq_len - 1)
        positions = host.decode_positions(starts, state.deltas)
        embeds = self._embeddings.rows_of(ids).astype(self.dtype)
        deepstack = [np.zeros(embeds.shape, self.dtype)] * self.spec.num_deepstack
        outputs = self._call(embeds, positions, starts, deepstack, np.zeros(len(ids), np.int64), state.cache, np.zeros_like(ids))
        self._take_cache(outputs, state)
        state.cached = state.cached + (1 if active is None else active.astype(np.int64))
        return outputs["logits"][:, -1]

    def extend(self, tokens: Sequence[np.ndarray], state: DecodeState) -> dict[str, np.ndarray]:
        """Append several tokens to each row in one call; `state` moves on.

        Args:
            tokens: ids [n] of each row, one at least.

        Returns:
            The graph's outputs but the cache: ``logits`` [batch, longest n, vocab], or [batch, 1, vocab] after each row's last
            token where the graph gives that one only.

        Raises:
            UserError: the tokens do not fit the context.
        """
        lengths = np.array([len(row) for row in tokens], np.int64)
        ids = np.zeros((len(tokens), int(lengths.max())), np.int64)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = row
        starts = state.cached
        # Padding is written too; it is overwritten by the next tokens before anything sees it.
        if int(starts.max()) + ids.shape[1] > self.max_seq_len:
            raise UserError(f"{int(starts.max())} cached and {ids.shape[1]} more tokens exceed the context of {self.max_seq_len}",
                            "shorten the prompt, or export with a larger max_seq_len")
        first = starts + state.deltas
        positions = np.broadcast_to(first[None, :, None] + np.arange(ids.shape[1]), (3, *ids.shape))
        embeds = self._embeddings.rows_of(ids).astype(self.dtype)
        deepstack = [np.zeros(embeds.shape, self.dtype)] * self.spec.num_deepstack
        kinds = host.router_types(ids, self.spec.image_expert_ids)
        outputs = self._call(embeds, positions, starts, deepstack, lengths - 1, state.cache, kinds)
        self._take_cache(outputs, state)
        state.cached = starts + lengths
        return {name: value for name, value in outputs.items() if not name.startswith("present_")}

    def answer_logits(self, samples: Sequence[ProcessedSample], stepwise: bool = False) -> list[np.ndarray]:
        """Logits [answer tokens, vocab] that predict each token of each sample's answer, with the answer as context.

        Args:
            samples: with ``answer_mask`` marking a run of tokens at the end.
            stepwise: prefill the prompt and decode the answer token by token through the cache, instead of one forward
                pass; always so where the graph gives the last position's logits only.
        """
        counts = np.array([int(s.answer_mask.sum()) for s in samples])
        if not (stepwise or self.logits_last):
            logits = self.forward(samples)
            return [rows[len(rows) - count - 1 : len(rows) - 1] for rows, count in zip(logits, counts, strict=True)]
        prompts = [_without_answer(s) for s in samples]
        last, state = self.prefill(prompts)
        out = [[last[row]] for row in range(len(samples))]
        for at in range(int(counts.max()) - 1):
            active = at < counts - 1
            tokens = np.array([s.input_ids[p.length + at] if a else 0
                               for s, p, a in zip(samples, prompts, active, strict=True)])  # fmt: skip
            logits = self.step(tokens, state, active)
            for row in np.flatnonzero(active):
                out[row].append(logits[row])
        return [np.stack(rows[:count]) for rows, count in zip(out, counts, strict=True)]

    def run_prompts(self, samples: Sequence[ProcessedSample], wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Outputs of the decoder graph by name, [batch, longest prompt, ...] each, and the prompts' lengths [batch]: for validation,
        which looks at more than logits."""
        outputs, _, lengths = self._run_prompts(samples, wanted)
        return outputs, lengths

    def read_images(self, samples: Sequence[ProcessedSample]) -> int:
        """Run the vision graph over the images of the first samples, as many as are kept, and return how many samples that is.

        Another run of these prompts needs the decoder alone: with :meth:`release_vision` between, one graph is in memory at a time.
        """
        kept, size = 0, 0
        for count, sample in enumerate(samples):
            if sample.image_grid_thw is not None:
                merged = int(sample.image_grid_thw.prod(axis=1).sum()) // self.spec.vision.spatial_merge_size**2
                kept += 1
                size += merged * self.hidden_size * np.dtype(self.dtype).itemsize * (1 + self.spec.num_deepstack)
                if count and (kept > _CACHED_IMAGES or size > _CACHED_FEATURE_BYTES):
                    return count
                self.image_features(sample)
        return len(samples)

    def check_length(self, sample: ProcessedSample, room: int = 0) -> None:
        """Raise UserError unless `sample` and `room` more tokens fit the context, with the numbers."""
        if sample.length + room > self.max_seq_len:
            images = int((sample.input_ids == self.image_token_id).sum())
            more = f" leaves no room for {room} more" if room and sample.length <= self.max_seq_len else " is too long"
            raise UserError(
                f"a prompt of {sample.length} tokens ({images} of them for images){more} in a context of {self.max_seq_len}",
                "shorten the prompt, scale its images down, or export with a larger max_seq_len",
            )

    def check_patches(self, grids: np.ndarray) -> None:
        """Raise UserError unless the vision graph takes images of these grids [num_images, 3], with the numbers."""
        largest = int(self._shown(grids).prod(axis=1).max())
        if self._max_patches and largest > self._max_patches:
            raise UserError(f"an image makes {largest} patches, the vision graph takes {self._max_patches}",
                            "scale it down, or export with a larger max_image_patches")

    def _run_prompts(
        self, samples: Sequence[ProcessedSample], wanted: Sequence[str] | None = None
    ) -> tuple[dict[str, np.ndarray], DecodeState, np.ndarray]:
        """Outputs, of these names alone where some are given (the state then has no cache), the state behind the prompts, lengths."""
        if not samples:
            raise ValueError("no samples")
        for sample in samples:
            self.check_length(sample)
        lengths = np.array([s.length for s in samples], np.int64)
        ids = np.zeros((len(samples), int(lengths.max())), np.int64)
        for row, sample in enumerate(samples):
            ids[row, : sample.length] = sample.input_ids
        types = host.token_types(ids, self.image_token_id)
        types[np.arange(ids.shape[1]) >= lengths[:, None]] = 0
        grids = [s.image_grid_thw for s in samples if s.image_grid_thw is not None]
        positions, deltas = host.decoder_positions(
            types, lengths, np.concatenate(grids) if grids else None, self.spec.vision.spatial_merge_size, self.spec.rope.kind,
            self.spec.vision.queries,
        )
        embeds = self._embeddings.rows_of(ids).astype(self.dtype)
        deepstack = [np.zeros(embeds.shape, self.dtype)] * self.spec.num_deepstack
        if grids:
            features = [self.image_features(s) for s in samples if s.image_grid_thw is not None]
            merged = [np.concatenate(parts) for parts in zip(*features, strict=True)]
            embeds = host.scatter_features(types, merged[0], embeds)
            deepstack = [host.scatter_features(types, feature) for feature in merged[1:]]
        shape = (len(samples), self.num_kv_heads, self.max_seq_len, self.head_dim)
        try:
            empty = np.zeros(shape, self.dtype)  # one array for every input: graphs do not write into their inputs
        except MemoryError:
            raise UserError(f"no memory for a KV cache of {list(shape)} a layer", "run fewer prompts at once, or export with a smaller "
                            "max_seq_len") from None
        cache = {f"past_{kind}_{layer}": empty for layer in range(self.num_layers) for kind in ("key", "value")}
        state = DecodeState(lengths, deltas, cache)
        kinds = host.router_types(ids, self.spec.image_expert_ids)
        outputs = self._call(embeds, positions, np.zeros(len(samples), np.int64), deepstack, lengths - 1, cache, kinds, wanted)
        if wanted is None:
            self._take_cache(outputs, state)
        else:
            state.cache = {}
        return outputs, state, lengths

    def _call(
        self, embeds: np.ndarray, positions: np.ndarray, starts: np.ndarray, deepstack: list[np.ndarray],
        last_index: np.ndarray, cache: dict[str, np.ndarray], router_types: np.ndarray, wanted: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        cos, sin = host.rope_tables(self.spec.rope, positions, self.dtype)
        feeds: dict[str, np.ndarray] = {
            "inputs_embeds": embeds,
            "rope_cos": cos,
            "rope_sin": sin,
            "attention_mask": host.attention_mask(starts, embeds.shape[1], self.max_seq_len, self.dtype),
            "write_indices": np.asarray(starts, np.int64),
            **{f"deepstack_{i}": feature for i, feature in enumerate(deepstack)},
            **cache,
        }
        if self.spec.image_expert_ids:
            feeds["router_types"] = router_types
        if self.logits_last:
            feeds["last_index"] = np.asarray(last_index, np.int64)
        return self._decoder.run(feeds) if wanted is None else self._decoder.run(feeds, wanted)

    def _take_cache(self, outputs: dict[str, np.ndarray], state: DecodeState) -> None:
        state.cache = {
            f"past_{kind}_{layer}": outputs[f"present_{kind}_{layer}"]
            for layer in range(self.num_layers) for kind in ("key", "value")
        }  # fmt: skip

    def _shown(self, grids: np.ndarray) -> np.ndarray:
        """What the vision graph is given at least at a time, [n, 3]: images, or tiles where an image is cut into some."""
        if not self.spec.vision.class_token:
            return grids
        tiles = np.repeat(grids, grids[:, 0], axis=0)
        tiles[:, 0] = 1
        return tiles

    def image_features(self, sample: ProcessedSample) -> list[np.ndarray]:
        """image_features and deepstack_{i} of a sample's images, [merged patches, hidden] each; kept for a while."""
        patches, grids = sample.pixel_values, sample.image_grid_thw
        key = hashlib.sha256(grids.tobytes() + patches.tobytes()).digest()
        if key not in self._features:
            self._features[key] = self._run_vision(patches, grids)
            self._feature_bytes += _nbytes(self._features[key])
            while len(self._features) > _CACHED_IMAGES or (self._feature_bytes > _CACHED_FEATURE_BYTES and len(self._features) > 1):
                self._feature_bytes -= _nbytes(self._features.popitem(last=False)[1])
        self._features.move_to_end(key)
        return self._features[key]

    def _run_vision(self, patches: np.ndarray, grids: np.ndarray) -> list[np.ndarray]:
        self.check_patches(grids)
        grids = self._shown(grids)
        sizes = grids.prod(axis=1)
        if self._vision is None:
            self._vision = self._open_vision()
        names = ["image_features", *(f"deepstack_{i}" for i in range(self.spec.num_deepstack))]
        parts: list[list[np.ndarray]] = []
        start = at = 0
        # An engine's profile has room for the queries of one image.
        together = 0 if self.spec.vision.queries else min(_VISION_BATCH_PATCHES, self._max_patches or _VISION_BATCH_PATCHES)
        while start < len(grids):
            stop = start + 1
            while stop < len(grids) and sizes[start : stop + 1].sum() <= together:
                stop += 1
            count = int(sizes[start:stop].sum())
            feeds = host.vision_inputs(grids[start:stop], self.spec.vision, self.dtype)
            ordered = host.merge_block_order(patches[at : at + count], grids[start:stop], self.spec.vision)
            feeds["patches"] = ordered.astype(self.dtype)
            outputs = self._vision.run(feeds)
            parts.append([outputs[name] for name in names])
            start, at = stop, at + count
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _nbytes(arrays: Sequence[np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays)


def graph_path(directory: Path, part: str) -> Path:
    """The graph of ``decoder`` or ``vision`` that runs without plugins: the reference copy where there is one."""
    reference, plain = directory / part / "model.ref.onnx", directory / part / "model.onnx"
    if reference.is_file():
        return reference
    if not plain.is_file():
        raise BundleError(f"no graph at {plain}", "pass the 'onnx' directory of a finished export")
    return plain


def _without_answer(sample: ProcessedSample) -> ProcessedSample:
    keep = sample.length - int(sample.answer_mask.sum())
    return ProcessedSample(
        sample.input_ids[:keep], sample.pixel_values, sample.image_grid_thw, np.zeros(keep, bool)
    )
