"""What of a corpus is for validation: whole documents as far as that meets the share, and otherwise the end of one."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from gptcore.data.corpus import Document

CHANGED = "the sources changed while they were being read; run it again"
RULE = 2
"""Which way to split this is: 1, of earlier versions, took each document by its hash alone, whatever its size."""
TOLERANCE = 0.1
"""How far whole documents may miss the smaller side's bytes, as a share of them, before a document is cut."""
TRAIN, VAL, CUT = 0, 1, 2
_HIGHEST = (1 << 64) - 1

Advance = Callable[[int], None]
"""Called with a number of characters as they are done."""


@dataclass(frozen=True)
class Piece:
    text: str
    in_val: bool
    is_last: bool
    """Of its document, or of the part of it that is in this split."""


@dataclass(frozen=True)
class Split:
    """Which documents of a corpus are for validation."""

    sides: NDArray[np.uint8]
    """``TRAIN``, ``VAL`` or ``CUT``, for each document, in order, empty ones included."""
    cut: int
    """About so many bytes of a document that is cut are for training, and the rest for validation."""
    slack: int
    """The cut may come up to so many bytes earlier, for a paragraph, a line or a word to end there."""
    characters: int
    """In the whole corpus."""
    empty: int
    """Documents without text."""

    @property
    def cut_documents(self) -> int:
        """How many documents are cut: none, one, or all copies of one."""
        return int((self.sides == CUT).sum())

    def pieces(self, corpus: Iterable[Document], advance: Advance) -> Iterator[Piece]:
        """Read the corpus again, and tell where each piece of it belongs.

        Raises ``RuntimeError`` if there are not as many documents as were surveyed.
        """
        for document, side in zip_longest(corpus, self.sides):
            if document is None or side is None:
                raise RuntimeError(CHANGED)
            in_val, position = bool(side == VAL), 0  # bytes of the document so far
            for text, is_last in _mark_last(document.pieces()):
                block = text.encode() if side == CUT and not in_val else b""
                if position < self.cut <= position + len(block):
                    at = _place(block, self.cut - position, self.slack)
                    if is_last and at == len(block) and position:  # one character, and the rest is for training
                        at = 0
                    yield Piece(block[:at].decode(), False, True)
                    in_val = True
                    if rest := block[at:].decode():
                        yield Piece(rest, True, is_last)
                else:
                    yield Piece(text, in_val, is_last)
                position += len(block)
                advance(len(text))


def survey(corpus: Iterable[Document], val_fraction: float, advance: Advance) -> Split:
    """Read every document once, and decide what is for validation; of each, 16 bytes are kept meanwhile.

    Documents are taken by the hash of their text, the smallest first, so that neither names nor order matter and copies
    stay together, as long as they fit into what is missing of ``val_fraction`` of all UTF-8 bytes; one that does not is
    passed over, unless it exceeds that by less than the tolerance. If more than the tolerance is still missing then, it
    is taken from the end of the largest document left.

    Raises:
        ValueError: if no document holds text, or there is only one, of a single character.
    """
    keys, sizes = array("Q"), array("Q")  # the first 8 bytes of a hash; bytes of UTF-8
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

    free = sizes > 0  # neither taken nor passed over
    empty, whole = int((~free).sum()), int(sizes.sum())
    missing = min(max(round(whole * val_fraction), 1), whole - 1)
    slack = int(TOLERANCE * min(missing, whole - missing))
    sides = np.full(len(keys), TRAIN, dtype=np.uint8)
    while missing > slack and free.any():
        free &= sizes <= missing + slack
        low, high = 0, _HIGHEST  # bisect for the highest key below which all free documents fit
        while low < high:
            middle = (low + high + 1) // 2
            fits = total(free & (keys < middle)) <= missing
            low, high = (middle, high) if fits else (low, middle - 1)
        taken = free & (keys < low)
        sides[taken] = VAL
        missing -= total(taken)
        free &= ~taken
        following = free & (keys == keys.min(where=free, initial=_HIGHEST))
        if missing > slack and 0 < total(following) <= missing + slack:
            sides[following] = VAL
            missing -= total(following)
        free &= ~following
    if missing <= slack:
        return Split(sides, 0, 0, characters, empty)
    left = sides == TRAIN
    largest = sizes.max(where=left, initial=0)
    left &= sizes == largest
    copies = keys == keys.min(where=left, initial=_HIGHEST)
    sides[copies] = CUT
    count = int(copies.sum())
    end = min(max(round(missing / count), 1), int(largest) - 1)
    return Split(sides, int(largest) - end, slack // count, characters, empty)


def _place(block: bytes, wanted: int, slack: int) -> int:
    """Where to cut UTF-8 text: at the end of a paragraph, of a line or of a word up to ``slack`` bytes before
    ``wanted``; otherwise between the characters nearest to it. The whole length if there is but one character."""
    for mark, kept in (b"\n\n", 2), (b"\n", 1), (b" ", 0):  # tokenizers join a space to the word after it
        found = block.rfind(mark, max(wanted - slack, 1), wanted)
        if found > 0:
            return found + kept
    near = range(max(wanted - 3, 1), min(wanted + 4, len(block)))
    starts = [place for place in near if block[place] & 0xC0 != 0x80]  # of a character: not a continuation byte
    return min(starts, key=lambda place: abs(place - wanted), default=len(block))


def _mark_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each text, with whether no other follows."""
    text = next(texts, None)
    for following in texts:
        assert text is not None
        yield text, False
        text = following
    if text is not None:
        yield text, True
