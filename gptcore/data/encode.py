"""Encodes a corpus into the token files of its two splits, on all processor cores."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptcore.data.report import SplitReport
from gptcore.data.split import Piece
from gptcore.data.token_file import ShardWriter
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 18
"""Characters that a thread encodes at a time, so many that the cost of starting it does not count."""
_Ids = Sequence[int] | NDArray[np.uint32]


class SplitWriter:
    """Writes the shards of one split, and counts what they hold."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, tokenizer: Tokenizer | PretrainedTokenizer) -> None:
        self._eot = np.array([tokenizer.eot_token], dtype=np.uint32)
        self.writer = ShardWriter(
            folder, name, shard_tokens, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint
        )
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        """How often each token comes, ``(vocab_size,)``."""
        self._documents = self._bytes = 0

    def write(self, encoded: Iterable[tuple[Piece, _Ids]]) -> None:
        """Append pieces of this split with their ids. Pass many at once: counting costs a pass over the vocabulary."""
        parts = [self._eot[:0]]
        for piece, ids in encoded:
            parts.append(np.asarray(ids, dtype=np.uint32))
            if piece.is_last:
                parts.append(self._eot)
            self._documents += piece.is_last
            self._bytes += len(piece.text.encode())
        tokens = np.concatenate(parts)
        self.writer.write(tokens)
        self.counts += np.bincount(tokens, minlength=len(self.counts))

    @property
    def report(self) -> SplitReport:
        """What was written so far."""
        shards = self.writer.shards
        return SplitReport(documents=self._documents, bytes=self._bytes, tokens=sum(shards), shards=shards)


def encode_splits(
    pieces: Iterable[Piece], tokenizer: Tokenizer | PretrainedTokenizer, folder: Path, shard_tokens: int
) -> tuple[SplitWriter, SplitWriter, float]:
    """Write the shards of both splits into a folder.

    Returns:
        The writers of the training and of the validation split, and `PrepareReport.lost_text`.

    Raises:
        ValueError: if one of the splits is empty.
    """
    train, val = (SplitWriter(folder, name, shard_tokens, tokenizer) for name in ("train", "val"))
    lost = None
    with train.writer, val.writer:
        for encoded in _encoded_batches(pieces, tokenizer):
            if lost is None:
                lost = _lost_text(encoded, tokenizer)
            for split, in_val in (train, False), (val, True):
                split.write(pair for pair in encoded if pair[0].in_val == in_val)
    if not (train.counts.any() and val.counts.any()):
        raise ValueError("the corpus is too short to split: a document of one character cannot be cut in two")
    return train, val, lost or 0.0


def unigram_entropy(train: NDArray[np.int64], val: NDArray[np.int64]) -> float:
    """Cross-entropy, nats per token, of the validation counts under the training counts with add-one smoothing."""
    log_probability = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(val * log_probability).sum() / val.sum())


def _encoded_batches(
    pieces: Iterable[Piece], tokenizer: Tokenizer | PretrainedTokenizer
) -> Iterator[list[tuple[Piece, _Ids]]]:
    """Yield the pieces in order, each with its ids. Later pieces are read while earlier ones are encoded."""
    workers = os.cpu_count() or 1
    if isinstance(tokenizer, Tokenizer):
        threads, characters = workers, _BATCH_CHARACTERS
    else:  # the tokenizers library starts threads itself, and may not bear to be called from several
        threads, characters = 1, _BATCH_CHARACTERS * workers

    def encode(batch: list[Piece]) -> list[tuple[Piece, _Ids]]:
        texts = [piece.text for piece in batch]
        if isinstance(tokenizer, Tokenizer):
            return list(zip(batch, map(tokenizer.encode_array, texts)))
        return list(zip(batch, tokenizer.encode_batch(texts)))

    pending: deque[Future[list[tuple[Piece, _Ids]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in _batches(pieces, characters):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error, drop the batches that have not begun


def _batches(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Group pieces into lists that have ``size`` characters or a little more."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _lost_text(encoded: Iterable[tuple[Piece, _Ids]], tokenizer: Tokenizer | PretrainedTokenizer) -> float:
    """The share of the characters in the first pieces that decoding does not give back.

    Changes of space, case, accents and Unicode form do not count as losses: good tokenizers make them.
    """
    before, after = Counter[str](), Counter[str]()
    if isinstance(tokenizer, PretrainedTokenizer):  # our own tokenizers give back every byte
        for piece, ids in encoded:
            before.update(unicodedata.normalize("NFKD", piece.text.casefold()))
            after.update(unicodedata.normalize("NFKD", tokenizer.decode(ids).casefold()))
            if before.total() > _BATCH_CHARACTERS:
                break
    for character in list(before):
        if character.isspace() or unicodedata.combining(character):
            del before[character]
    return (before - after).total() / max(before.total(), 1)
