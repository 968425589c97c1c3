"""Splits a corpus into training and validation: by whole documents where they meet the share, else one document is cut."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from gptcore.data.corpus import Document

SOURCES_CHANGED = "the sources changed while they were being read; run it again"
SPLIT_VERSION = 2
"""The version of this way to split. Version 1 chose documents by their hash alone, whatever their size."""
TOLERANCE = 0.1
"""A document is cut when whole documents miss the wanted bytes by more than this share of the smaller split."""
TRAIN, VAL, CUT = 0, 1, 2
_MAX_KEY = (1 << 64) - 1

Advance = Callable[[int], None]
"""Moves a progress bar: called with the number of characters that were processed since the last call."""


@dataclass(frozen=True)
class Piece:
    """A piece of a document, which lies in one split."""

    text: str
    in_val: bool
    is_last: bool
    """Whether it ends its document or, if the document is cut, the part of it in this split."""


@dataclass(frozen=True)
class Split:
    """Which documents of a corpus are for validation."""

    sides: NDArray[np.uint8]
    """``TRAIN``, ``VAL`` or ``CUT`` for each document, in order, empty documents included."""
    cut: int
    """About how many bytes at the beginning of a cut document are for training; the rest is for validation."""
    slack: int
    """The cut may come up to this many bytes earlier, so that it falls on the end of a paragraph, a line or a word."""
    characters: int
    """Number of characters in the whole corpus."""
    empty: int
    """Number of documents without text."""

    @property
    def cut_documents(self) -> int:
        """Number of documents that are cut: none, one, or all copies of one."""
        return int((self.sides == CUT).sum())

    def pieces(self, corpus: Iterable[Document], advance: Advance) -> Iterator[Piece]:
        """Read the corpus again, and yield its pieces with the split that each belongs to.

        Raises ``RuntimeError`` if the number of documents is not that of `plan_split`.
        """
        for document, side in zip_longest(corpus, self.sides):
            if document is None or side is None:
                raise RuntimeError(SOURCES_CHANGED)
            in_val = bool(side == VAL)
            position = 0  # bytes of the document before this piece
            for text, is_last in _mark_last(document.pieces()):
                block = text.encode() if side == CUT and not in_val else b""
                if position < self.cut <= position + len(block):
                    cut = _cut_position(block, self.cut - position, self.slack)
                    if is_last and cut == len(block) and position:
                        cut = 0  # the piece is one character, which validation needs: training has the pieces before
                    yield Piece(block[:cut].decode(), False, True)
                    in_val = True
                    if rest := block[cut:].decode():
                        yield Piece(rest, True, is_last)
                else:
                    yield Piece(text, in_val, is_last)
                position += len(block)
                advance(len(text))


def plan_split(corpus: Iterable[Document], val_fraction: float, advance: Advance) -> Split:
    """Read every document once, and decide what is for validation. 16 bytes are kept per document.

    Documents are taken in the order of the hash of their text, so that neither names nor order matter and copies stay
    together, until ``val_fraction`` of all UTF-8 bytes is reached. A document that is larger than what is still missing
    is passed over, unless it exceeds it by less than the tolerance. If more than the tolerance is missing at the end, it
    is cut from the end of the largest document that is left.

    Raises:
        ValueError: if no document holds text, or there is only one, of a single character.
    """
    keys, sizes = array("Q"), array("Q")  # for each document the first 8 bytes of its hash, and its length in bytes
    characters = 0
    for document in corpus:
        digest, size = hashlib.blake2b(digest_size=16), 0
        for piece in document.pieces():
            block = piece.encode()
            digest.update(block)
            size += len(block)
            characters += len(piece)
            advance(len(piece))
        keys.append(int.from_bytes(digest.digest()[:8], "big"))
        sizes.append(size)
    if not characters:
        raise ValueError("the corpus is empty: its documents hold no text")
    if characters == 1:
        raise ValueError("the corpus is too short to split: it has 1 character, and 2 are needed")
    return _plan(np.frombuffer(keys, np.uint64), np.frombuffer(sizes, np.uint64), val_fraction, characters)


def _plan(keys: NDArray[np.uint64], sizes: NDArray[np.uint64], val_fraction: float, characters: int) -> Split:
    def total(chosen: NDArray[np.bool_]) -> int:
        return int(sizes.sum(where=chosen))

    free = sizes > 0  # documents that are neither taken nor passed over yet
    empty, whole = int((~free).sum()), int(sizes.sum())
    missing = min(max(round(whole * val_fraction), 1), whole - 1)
    slack = int(TOLERANCE * min(missing, whole - missing))
    sides = np.full(len(keys), TRAIN, dtype=np.uint8)
    while missing > slack and free.any():
        free &= sizes <= missing + slack
        low, high = 0, _MAX_KEY  # bisect for the highest key such that all free documents below it fit
        while low < high:
            middle = (low + high + 1) // 2
            fits = total(free & (keys < middle)) <= missing
            low, high = (middle, high) if fits else (low, middle - 1)
        taken = free & (keys < low)
        sides[taken] = VAL
        missing -= total(taken)
        free &= ~taken
        next_one = free & (keys == keys.min(where=free, initial=_MAX_KEY))  # and its copies, which have its key
        if missing > slack and 0 < total(next_one) <= missing + slack:
            sides[next_one] = VAL
            missing -= total(next_one)
        free &= ~next_one
    if missing <= slack:
        return Split(sides, 0, 0, characters, empty)
    left = sides == TRAIN
    largest = sizes.max(where=left, initial=0)
    left &= sizes == largest
    copies = keys == keys.min(where=left, initial=_MAX_KEY)
    sides[copies] = CUT
    count = int(copies.sum())
    end = min(max(round(missing / count), 1), int(largest) - 1)
    return Split(sides, int(largest) - end, slack // count, characters, empty)


def _cut_position(block: bytes, wanted: int, slack: int) -> int:
    """The offset at which to cut UTF-8 text.

    It is the last end of a paragraph within ``slack`` bytes before ``wanted``, else of a line, else of a word; else the
    boundary of characters that is nearest to ``wanted``. A text of one character is not cut: its length is returned.
    """
    for mark, kept in (b"\n\n", 2), (b"\n", 1), (b" ", 0):  # tokenizers join a space to the word after it
        found = block.rfind(mark, max(wanted - slack, 1), wanted)
        if found > 0:
            return found + kept
    near = range(max(wanted - 3, 1), min(wanted + 4, len(block)))
    boundaries = [offset for offset in near if block[offset] & 0xC0 != 0x80]  # not a UTF-8 continuation byte
    return min(boundaries, key=lambda offset: abs(offset - wanted), default=len(block))


def _mark_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Yield each text with whether it is the last."""
    text = next(texts, None)
    for following in texts:
        assert text is not None
        yield text, False
        text = following
    if text is not None:
        yield text, True
