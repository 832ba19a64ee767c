"""Prompts as a model is asked to run them, and the token prefixes that prompts of one image share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["logits", "state", "log_odds"]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and what is wanted of it.

    Attributes:
        ids: int64 [S], every token that is fed; an image is one placeholder still. Of an answer all tokens but the last are fed.
        image: index of its image, or None.
        kind: what is read at the last ``reads`` positions: ``logits`` over the vocabulary, the ``state`` before the final norm, or
            the ``log_odds`` of two tokens.
        targets: int64 [reads], the token that follows each position that is read; [-1] where that means nothing.
        pool: prompts of one image and one pool share a prefix. Prompts that are alike should be in one pool.
    """

    ids: np.ndarray
    image: int | None
    kind: Kind
    targets: np.ndarray
    pool: str = ""

    @property
    def reads(self) -> int:
        return len(self.targets)

    @classmethod
    def answered(cls, ids: Sequence[int], answer_length: int, image: int | None) -> Request:
        """Logits that predict the last `answer_length` of `ids`."""
        array = np.asarray(ids, np.int64)
        return cls(array[:-1], image, "logits", array[len(array) - answer_length :])

    @classmethod
    def last(cls, ids: np.ndarray, image: int | None, kind: Kind, pool: str = "") -> Request:
        """What stands after the prompt's last token."""
        return cls(ids, image, kind, np.full(1, -1, np.int64), pool)


@dataclass(frozen=True, eq=False)
class PrefixGroup:
    """Requests that begin with the same image and tokens.

    Attributes:
        image: its index, or None for a single text-only request, whose prefix is empty.
        prefix: int64 [P], image placeholder included; no position that is read lies in it.
        members: indices of requests.
    """

    image: int | None
    prefix: np.ndarray
    members: tuple[int, ...]


def prefix_groups(requests: Sequence[Request], placeholder: int) -> list[PrefixGroup]:
    """Group requests by image and pool, each group with the longest prefix that its members share; text-only ones stay alone.

    Args:
        placeholder: the image token.

    Raises:
        ValueError: a request whose image is read at or after a position that is read.
    """
    pools: dict[tuple[int, str], list[int]] = {}
    groups = []
    for index, request in enumerate(requests):
        if request.image is None:
            groups.append(PrefixGroup(None, request.ids[:0], (index,)))
        else:
            pools.setdefault((request.image, request.pool), []).append(index)
    for (image, _), members in sorted(pools.items()):
        length = _shared_length([requests[i] for i in members])
        prefix = requests[members[0]].ids[:length]
        if not (prefix == placeholder).any():
            raise ValueError(f"prompts of image {image} share no prefix with the image in it")
        groups.append(PrefixGroup(image, prefix, tuple(members)))
    return groups


def _shared_length(requests: Sequence[Request]) -> int:
    longest = min(len(r.ids) - r.reads for r in requests)
    first = requests[0].ids[:longest]
    for request in requests[1:]:
        differs = np.flatnonzero(request.ids[: len(first)] != first)
        if len(differs):
            first = first[: differs[0]]
    return len(first)
