"""Puts examples of different lengths into rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptcore.nn import Documents
from gptcore.tasks.language_model import LanguageModelBatch

IGNORED = -100
"""The target of tokens that nothing is learnt from."""


class Piece(NamedTuple):
    """The tokens of an example, and for each the next one if it is to be learnt."""

    tokens: Tensor
    """``(n,)`` int32 ids."""
    targets: Tensor
    """``(n,)`` int32: the id after each token, or `IGNORED`."""

    @classmethod
    def of(cls, ids: Sequence[int], learnt: Sequence[range], longest: int) -> Piece:
        """Makes the example with these `ids`, of which those at the indices `learnt` are targets; at most `longest` tokens."""
        tokens = torch.tensor(ids, dtype=torch.int32)
        targets = torch.full_like(tokens, IGNORED)
        for span in learnt:
            targets[span.start : span.stop] = tokens[span.start : span.stop]
        return cls(tokens[:-1][:longest], targets[1:][:longest])


def first_fit(lengths: Sequence[Sequence[int]], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Returns bins of items: each item goes, in `order`, into the first bin that has room for it, else into a new one.

    Args:
        lengths: ``(items, k)``: an item takes room in each of the k parts of a bin.
        capacity: of each part.
        order: the items.

    Source: first fit in Johnson et al., "Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms",
    SIAM J. Comput. 3 (4), 1974, here with k dimensions.
    """
    sizes = np.asarray(lengths)
    bins: list[list[int]] = []
    room = np.full((len(sizes), sizes.shape[1]), capacity)  # of each bin that may come to be
    for item in order:
        fits = (room[: len(bins)] >= sizes[item]).all(axis=1)
        place = int(fits.argmax()) if fits.any() else len(bins)
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        room[place] -= sizes[item]
    return bins


def packed(rows: Sequence[Sequence[Piece]], length: int, pad: int) -> LanguageModelBatch:
    """Returns rows of `length` tokens, in which the pieces stand one after another; each is a document of its own.

    The rest of a row is `pad`, whose targets are ignored.
    """
    batch = padded([_joined(row) for row in rows], length, pad)
    documents = Documents.from_lengths([[len(piece.tokens) for piece in row] for row in rows], length)
    return batch._replace(documents=documents)


def padded(pieces: Sequence[Piece], length: int, pad: int) -> LanguageModelBatch:
    """Returns a row of `length` tokens for each piece; the rest is `pad`, to the right, whose targets are ignored."""
    tokens = torch.full((len(pieces), length), pad)
    targets = torch.full_like(tokens, IGNORED)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece.tokens)] = piece.tokens
        targets[row, : len(piece.targets)] = piece.targets
    return LanguageModelBatch(tokens, targets, None)


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(torch.cat([piece.tokens for piece in pieces]), torch.cat([piece.targets for piece in pieces]))


def spread(count: int, limit: int | None) -> Sequence[int]:
    """Returns `limit` of the indices below `count`, spread evenly; all for None."""
    if limit is None or limit >= count:
        return range(count)
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]
