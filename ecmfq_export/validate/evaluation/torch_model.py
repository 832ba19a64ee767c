"""A whole model over many prompts in PyTorch, one decoder layer in memory at a time; prompts of one image share its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.models.inputs import embed_tokens, rotary_tables
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.models.spec import ModelSpec
from ecmfq_export.models.torch_decoder import DecoderLayer, LayerCache, load_layer
from ecmfq_export.progress import Progress
from ecmfq_export.runtime import host_inputs
from ecmfq_export.validate.evaluation.images import ImageFeatures, ModelImages
from ecmfq_export.validate.evaluation.requests import PrefixGroup, Request, prefix_groups
from ecmfq_export.validate.torch_lockstep import batch_rows

MEMORY_LIMIT = 1 << 30
"""Bytes of hidden states that are on their way through the decoder together."""
_BATCH_TOKENS = 2048
"""Padded tokens of a batch; one sequence at least."""

LoadLayer = Callable[[MoEVLM, int], DecoderLayer]


@dataclass
class _Rows:
    """Right-padded sequences, B of them, S tokens of the longest.

    Attributes:
        hidden: float32 [B, S, hidden].
        cos, sin: [B, S, head_dim].
        mask: [B, 1, S, S_kv], S_kv counting the prefix where there is one.
        deepstack: float32 [layers, B, S, hidden], or None.
        owner: int64 [B], the prefix that each row goes on from; None for prefixes and rows without one.
        read: int64 [reads], flattened positions (row * S + column) that are read after the last layer.
        target: int64 [reads], where they go in the result.
        router_types: int64 [B, S], whose routed experts a token chooses from.
    """

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor
    deepstack: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    read: torch.Tensor | None = None
    target: torch.Tensor | None = None
    router_types: torch.Tensor | None = None


@dataclass
class _Family:
    """Prefixes that run together, and all that goes on from them; without `prefixes`, sequences of their own."""

    prefixes: _Rows | None
    followers: list[_Rows] = field(default_factory=list)
    size: int = 0


class TorchRunner:
    """Runs requests through a model.

    Hidden states of at most `memory_limit` bytes are held; requests beyond that follow in another round, for which the layers are
    read again.

    Args:
        model: floating-point or quantized.
        images: what the requests' image indices mean.
        layer: loads a decoder layer; :func:`load_layer` reads it from disk.
        memory_limit: bytes.
    """

    def __init__(self, model: MoEVLM, images: ModelImages, layer: LoadLayer = load_layer, memory_limit: int = MEMORY_LIMIT) -> None:
        self._model, self._images, self._load, self._limit = model, images, layer, memory_limit

    @torch.no_grad()
    def states(self, requests: Sequence[Request], progress: Progress, description: str) -> torch.Tensor:
        """States after the last layer, before the final norm, float32 [sum of reads, hidden], the positions of each request in order.

        Raises:
            UserError: a prompt longer than the model's positions, token ids outside the vocabulary, or an image that cannot be used.
        """
        spec = self._model.spec
        groups = sorted(prefix_groups(requests, spec.image_token_id), key=lambda g: -1 if g.image is None else g.image)
        out = torch.empty(sum(r.reads for r in requests), spec.hidden_size)
        starts = np.cumsum([0, *(r.reads for r in requests)])
        embeddings = _Embeddings(self._model, requests)
        for _ in progress.track(self._work(groups, requests, starts, embeddings, out), description, len(groups) * spec.num_layers):
            pass
        return out

    def _work(
        self, groups: list[PrefixGroup], requests: Sequence[Request], starts: np.ndarray, embeddings: _Embeddings, out: torch.Tensor
    ) -> Iterator[None]:
        """Yields once for each group and layer that is done."""
        for chosen, features in self._rounds(groups, requests):
            families = list(_families(self._model.spec, chosen, features, requests, starts, embeddings))
            del features
            for index in range(self._model.spec.num_layers):
                layer = self._load(self._model, index)
                last = index == self._model.spec.num_layers - 1
                for family in families:
                    _advance(layer, family, last, out)
                    yield from [None] * family.size

    def _rounds(
        self, groups: list[PrefixGroup], requests: Sequence[Request]
    ) -> Iterator[tuple[list[PrefixGroup], dict[int, ImageFeatures]]]:
        spec = self._model.spec
        width = 4 * (spec.hidden_size + 2 * spec.rope.head_dim)
        deepstack = 4 * spec.hidden_size * spec.num_deepstack
        chosen: list[PrefixGroup] = []
        features: dict[int, ImageFeatures] = {}
        held = 0
        for start in range(0, len(groups), 64):
            block = groups[start : start + 64]
            loaded = self._images.load([g.image for g in block if g.image is not None])
            for group in block:
                tokens = sum(len(requests[i].ids) - len(group.prefix) for i in group.members)
                size = tokens * width
                if group.image is not None:
                    size += (len(group.prefix) - 1 + loaded[group.image].tokens) * (width + deepstack)
                if chosen and held + size > self._limit:
                    yield chosen, features
                    chosen, features, held = [], {}, 0
                chosen.append(group)
                held += size
                if group.image is not None:
                    features[group.image] = loaded[group.image]
        if chosen:
            yield chosen, features


class _Embeddings:
    """The rows of the embedding table that some requests need."""

    def __init__(self, model: MoEVLM, requests: Sequence[Request]) -> None:
        spec = model.spec
        ids = np.unique(np.concatenate([r.ids for r in requests]))
        if len(ids) and (ids[0] < 0 or ids[-1] >= spec.vocab_size):
            raise UserError(f"token id {ids[-1] if ids[0] >= 0 else ids[0]} is outside the vocabulary of {spec.vocab_size}",
                            "the tokenizer is another model's")
        self._place = np.zeros(spec.vocab_size, np.int64)
        self._place[ids] = np.arange(len(ids))
        self._rows = embed_tokens(model, torch.from_numpy(ids)).float()

    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        """Float32 [..., hidden]."""
        return self._rows[torch.from_numpy(self._place[ids])]


def _advance(layer: DecoderLayer, family: _Family, last: bool, out: torch.Tensor) -> None:
    cache = LayerCache()
    if family.prefixes is not None:
        _attend(layer, family.prefixes, cache)
        if not last:  # after the last layer nobody reads a prefix; only its keys and values were needed
            _feed_forward(layer, family.prefixes)
    for rows in family.followers:
        _attend(layer, rows, None if rows.owner is None else cache.take(rows.owner))
        if last:
            assert rows.read is not None and rows.target is not None
            rows.hidden = rows.hidden.flatten(0, 1)[rows.read].unsqueeze(0)
            rows.router_types = None if rows.router_types is None else rows.router_types.flatten()[rows.read].unsqueeze(0)
            rows.deepstack = None if rows.deepstack is None else rows.deepstack.flatten(1, 2)[:, rows.read].unsqueeze(1)
        _feed_forward(layer, rows)
        if last:
            out[rows.target] = rows.hidden[0]


def _attend(layer: DecoderLayer, rows: _Rows, cache: LayerCache | None) -> None:
    added, _ = layer.attend(layer.attention_input(rows.hidden), rows.cos, rows.sin, rows.mask, cache)
    rows.hidden = rows.hidden + added


def _feed_forward(layer: DecoderLayer, rows: _Rows) -> None:
    rows.hidden = rows.hidden + layer.mlp(layer.moe_input(rows.hidden), rows.router_types)
    if rows.deepstack is not None and layer.spec.index < len(rows.deepstack):
        rows.hidden = rows.hidden + rows.deepstack[layer.spec.index]


def _families(
    spec: ModelSpec, groups: list[PrefixGroup], features: dict[int, ImageFeatures], requests: Sequence[Request], starts: np.ndarray,
    embeddings: _Embeddings,
) -> Iterator[_Family]:  # fmt: skip
    alone = [g for g in groups if g.image is None]
    if alone:
        family = _Family(None, size=len(alone))
        family.followers = list(_followers(spec, [(g.members[0], 0) for g in alone], None, requests, starts, embeddings))
        yield family
    with_image = [g for g in groups if g.image is not None]
    lengths = [len(g.prefix) - 1 + features[g.image].tokens for g in with_image]  # type: ignore[index]
    for batch in batch_rows(lengths, _BATCH_TOKENS):
        chosen = [with_image[i] for i in batch]
        prefix = _Prefixes(spec, chosen, [features[g.image] for g in chosen], embeddings)  # type: ignore[index]
        members = [(member, row) for row, group in enumerate(chosen) for member in group.members]
        yield _Family(prefix.rows, list(_followers(spec, members, prefix, requests, starts, embeddings)), len(chosen))


class _Prefixes:
    """A batch of prefixes with their images in place.

    Attributes:
        rows: ready to run.
        lengths: int64 [B]; deltas: int64 [B], position of the next token minus `lengths`.
        skipped: for each row, how many tokens of a request it holds.
    """

    def __init__(self, spec: ModelSpec, groups: list[PrefixGroup], features: list[ImageFeatures], embeddings: _Embeddings) -> None:
        expanded = [np.repeat(g.prefix, np.where(g.prefix == spec.image_token_id, f.tokens, 1))
                    for g, f in zip(groups, features, strict=True)]  # fmt: skip
        self.lengths = np.array([len(ids) for ids in expanded], np.int64)
        self.skipped = [len(g.prefix) for g in groups]
        ids, types = _padded(expanded), np.zeros((len(groups), int(self.lengths.max())), np.int64)
        for row, tokens in enumerate(expanded):
            types[row, : len(tokens)] = host_inputs.token_types(tokens, spec.image_token_id)
        grids = np.concatenate([f.grid for f in features])
        positions, self.deltas = host_inputs.decoder_positions(
            types, self.lengths, grids, spec.vision.spatial_merge_size, spec.rope.kind, spec.vision.queries)
        stacked = torch.cat([f.features for f in features], dim=1)
        where = torch.from_numpy(types).bool()
        if int(where.sum()) != stacked.shape[1]:
            raise UserError(f"{int(where.sum())} image tokens for {stacked.shape[1]} image features")
        hidden = embeddings(ids)
        hidden[where] = stacked[0]
        deepstack = None
        if len(stacked) > 1:
            deepstack = hidden.new_zeros(len(stacked) - 1, *hidden.shape)
            deepstack[:, where] = stacked[1:]
        length = ids.shape[1]
        mask = torch.from_numpy(host_inputs.attention_mask(np.zeros(1, np.int64), length, length, np.float32))
        kinds = torch.from_numpy(host_inputs.router_types(ids, spec.image_expert_ids))
        self.rows = _Rows(hidden, *rotary_tables(spec, positions), mask, deepstack, router_types=kinds)


def _followers(
    spec: ModelSpec, members: list[tuple[int, int]], prefix: _Prefixes | None, requests: Sequence[Request], starts: np.ndarray,
    embeddings: _Embeddings,
) -> Iterator[_Rows]:  # fmt: skip
    """Batches of (request, row of its prefix)."""
    tails = [requests[i].ids[prefix.skipped[row] if prefix else 0 :] for i, row in members]
    for batch in batch_rows([len(tail) for tail in tails], _BATCH_TOKENS):
        owner = np.array([members[i][1] for i in batch], np.int64)
        lengths = np.array([len(tails[i]) for i in batch], np.int64)
        before = prefix.lengths[owner] if prefix else np.zeros(len(batch), np.int64)
        if int((before + lengths).max()) > spec.max_position_embeddings:
            raise UserError(f"a prompt has {int((before + lengths).max())} tokens, the model takes {spec.max_position_embeddings}",
                            "use smaller images or shorter texts")
        ids = _padded([tails[i] for i in batch])
        first = before + (prefix.deltas[owner] if prefix else 0)
        positions = np.broadcast_to(first[:, None] + np.arange(ids.shape[1]), (3, *ids.shape))
        reads, targets = [], []
        for row, i in enumerate(batch):
            request = members[i][0]
            count = requests[request].reads
            reads.append(row * ids.shape[1] + lengths[row] - count + np.arange(count))
            targets.append(starts[request] + np.arange(count))
        yield _Rows(
            embeddings(ids), *rotary_tables(spec, positions),
            _continued_mask(before if prefix else None, len(prefix.rows.mask[0, 0]) if prefix else 0, ids.shape[1]),
            owner=torch.from_numpy(owner) if prefix else None,
            read=torch.from_numpy(np.concatenate(reads)), target=torch.from_numpy(np.concatenate(targets)),
            router_types=torch.from_numpy(host_inputs.router_types(ids, spec.image_expert_ids)),
        )  # fmt: skip


def _continued_mask(before: np.ndarray | None, width: int, length: int) -> torch.Tensor:
    """Additive mask [B or 1, 1, S, width + S]: a row sees its own prefix (not the padding after it) and what comes before in itself."""
    causal = host_inputs.attention_mask(np.zeros(1, np.int64), length, length, np.float32)
    if before is None:
        return torch.from_numpy(causal)
    seen = np.where(np.arange(width) < before[:, None], 0.0, host_inputs.MASKED).astype(np.float32)
    shape = (len(before), 1, length)
    parts = (np.broadcast_to(seen[:, None, None, :], (*shape, width)), np.broadcast_to(causal, (*shape, length)))
    return torch.from_numpy(np.concatenate(parts, axis=-1))


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
