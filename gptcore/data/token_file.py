"""Token files: a header of 40 bytes, then token ids as little-endian unsigned integers.

| bytes | field |
| --- | --- |
| 0 to 7 | magic ``gpttoken`` |
| 8 to 9 | version of the format, 1 |
| 10 to 11 | bytes per id: 2 if the vocabulary has at most 65,536 tokens, otherwise 4 |
| 12 to 15 | size of the vocabulary |
| 16 to 23 | number of ids |
| 24 to 39 | fingerprint of the tokenizer |

A long text is stored in several token files, its shards: see :class:`ShardWriter`.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gptcore._files import publish, temporary_sibling

_MAGIC = b"gpttoken"
_VERSION = 1
_HEADER = struct.Struct("<8sHHIQ16s")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class TokenWriter:
    """Stream token ids into a token file. Use it in a ``with`` block.

    The ids go to a temporary file beside ``path``. It replaces ``path`` when the block ends without an exception, and is
    deleted otherwise.

    Args:
        path: the file to write; replaced if it exists.
        vocab_size: every id must be less than this. An id takes 2 bytes up to 65,536, and 4 bytes above.
        fingerprint: the tokenizer's, :attr:`gptcore.text.tokenizer.Tokenizer.fingerprint`, 32 hexadecimal digits.

    Raises:
        ValueError: if ``vocab_size`` is not in 1 to 2**32 - 1 or ``fingerprint`` is not 32 hexadecimal
            digits.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """

    def __init__(self, path: str | Path, *, vocab_size: int, fingerprint: str) -> None:
        if not 1 <= vocab_size < 1 << 32:
            raise ValueError(f"vocab_size must be in 1 to 2**32 - 1; got {vocab_size}")
        try:
            self._fingerprint = bytes.fromhex(fingerprint)
        except ValueError:
            self._fingerprint = b""
        if len(self._fingerprint) != 16:
            raise ValueError(f"fingerprint must be 32 hexadecimal digits; got {fingerprint!r}")
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.count = 0
        """The number of ids written so far."""
        self._dtype = _DTYPES[2 if vocab_size <= 1 << 16 else 4]
        self._temporary = temporary_sibling(self.path)

    def __enter__(self) -> TokenWriter:
        self._file = self._temporary.open("xb")
        self._file.write(bytes(_HEADER.size))  # the magic is written last: a file left behind by a crash is not valid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                width = self._dtype.itemsize
                header = (_MAGIC, _VERSION, width, self.vocab_size, self.count, self._fingerprint)
                self._file.seek(0)
                self._file.write(_HEADER.pack(*header))
                publish(self._file, self.path)
        finally:
            try:
                self._file.close()  # may raise too: it writes what is buffered, and the disk may be full
            finally:
                self._temporary.unlink(missing_ok=True)

    def write(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        """Append ids: a list or a 1-D integer array.

        Raises:
            TypeError: if they are not integers.
            ValueError: if they are not 1-D, or an id is not in 0 to ``vocab_size - 1``.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1:
            raise ValueError(f"tokens must be 1-D; got the shape {ids.shape}")
        if ids.size == 0:
            return
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"tokens must be integers; got {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1})")
        self._file.write(ids.astype(self._dtype).data)
        self.count += len(ids)


class ShardWriter:
    """Stream token ids into shards: ``NAME-00000.bin``, ``NAME-00001.bin``, ... Use it in a ``with`` block.

    Each shard is a token file of ``shard_tokens`` ids, except that the last one may be shorter. There is always one
    shard, even for no ids. A document may begin in one shard and go on in the next. If the block ends with an exception,
    the shards that are complete stay on disk.

    Args:
        folder: where to write.
        name: the beginning of the shards' names.
        shard_tokens: ids in a shard; at least 1.
        vocab_size, fingerprint: as for :class:`TokenWriter`.

    Raises:
        ValueError: if ``shard_tokens`` is less than 1, or as for :class:`TokenWriter`.
    """

    def __init__(self, folder: str | Path, name: str, shard_tokens: int, *, vocab_size: int, fingerprint: str) -> None:
        _check_positive("shard_tokens", shard_tokens)
        self._folder, self._name, self._shard_tokens = Path(folder), name, shard_tokens
        self._vocab_size, self._fingerprint = vocab_size, fingerprint
        self._full: list[int] = []  # number of ids of each shard before the current one
        self._writer = self._next_writer()

    @property
    def shards(self) -> tuple[int, ...]:
        """Number of ids in each shard so far."""
        return (*self._full, self._writer.count)

    def __enter__(self) -> ShardWriter:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Append ids, a 1-D integer array. Raises as :meth:`TokenWriter.write` does."""
        while len(tokens) > (room := self._shard_tokens - self._writer.count):
            self._writer.write(tokens[:room])
            self._writer.__exit__(None, None, None)
            self._full.append(self._writer.count)
            self._writer = self._next_writer().__enter__()
            tokens = tokens[room:]
        self._writer.write(tokens)

    def _next_writer(self) -> TokenWriter:
        path = self._folder / shard_name(self._name, len(self._full))
        return TokenWriter(path, vocab_size=self._vocab_size, fingerprint=self._fingerprint)


def shard_name(name: str, index: int) -> str:
    """The file name of a shard."""
    return f"{name}-{index:05}.bin"


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Token ids of one file, or of all shards of a split as if they were one file. ``len()`` is the number of ids.

    The files are mapped into memory: opening is instant, and only the ids that are used are read.
    """

    path: Path
    """The file. For several shards: their folder and the beginning of their names."""
    shards: tuple[NDArray[np.uint16 | np.uint32], ...]
    """The ids, in order: a read-only ``numpy.memmap`` for each file."""
    vocab_size: int
    fingerprint: str
    """The fingerprint of the tokenizer that made the ids."""

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Map a file that :class:`TokenWriter` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a token file, has another version, or its length is not what its header says.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no token file at {path}")
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path} is not a token file: it begins with {header[: len(_MAGIC)]!r}, not {_MAGIC!r}")
        if len(header) < _HEADER.size:
            raise ValueError(f"{path} is truncated: its header has {len(header)} bytes of {_HEADER.size}")
        _, version, width, vocab_size, count, fingerprint = _HEADER.unpack(header)
        if version != _VERSION:
            raise ValueError(f"{path} has format version {version}; this gptcore reads {_VERSION}")
        if width not in _DTYPES:
            raise ValueError(f"{path} is damaged: it says {width} bytes per token; accepted are 2 and 4")
        expected, actual = _HEADER.size + count * width, path.stat().st_size
        if actual != expected:
            state = "truncated" if actual < expected else "damaged"
            raise ValueError(f"{path} is {state}: {count} tokens make {expected} bytes, but it has {actual}")
        if count == 0:  # an empty range cannot be mapped
            tokens = np.empty(0, _DTYPES[width])
        else:
            tokens = np.memmap(path, _DTYPES[width], "r", _HEADER.size, (count,))
        return cls(path, (tokens,), vocab_size, fingerprint.hex())

    @classmethod
    def open_shards(cls, folder: str | Path, name: str, counts: Sequence[int]) -> TokenFile:
        """Map the shards that :class:`ShardWriter` wrote.

        Args:
            folder, name: as they were given to :class:`ShardWriter`.
            counts: the number of ids in each shard, :attr:`ShardWriter.shards`.

        Raises:
            FileNotFoundError: if a shard is missing; names it.
            ValueError: if a shard is damaged, has another number of ids, or another tokenizer than the first.
        """
        files = [cls.open(Path(folder) / shard_name(name, index)) for index in range(len(counts))]
        for file, count in zip(files, counts):
            if len(file) != count:
                raise ValueError(f"{file.path} has {len(file)} tokens; it must have {count}")
            if (file.vocab_size, file.fingerprint) != (files[0].vocab_size, files[0].fingerprint):
                raise ValueError(f"{file.path} was made with another tokenizer than {files[0].path}")
        shards = tuple(shard for file in files for shard in file.shards)
        path = files[0].path if len(files) == 1 else Path(folder) / name
        return cls(path, shards, files[0].vocab_size, files[0].fingerprint)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def tokens(self) -> NDArray[np.uint16 | np.uint32]:
        """All ids, ``(len(self),)``: the mapped file or, if there are several shards, a copy in memory."""
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> NDArray[np.uint16 | np.uint32]:
        """The ids from ``start`` to ``stop``, ``(stop - start,)``. They are copied only if they lie in several shards."""
        parts = []
        index = bisect_right(self._ends, start)
        while start < stop:
            shard, end = self.shards[index], self._ends[index]
            begin = end - len(shard)
            parts.append(shard[start - begin : stop - begin])
            start, index = end, index + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else self.shards[0][:0]

    def batch(
        self,
        batch_size: int,
        context: int,
        generator: torch.Generator | None = None,
        rows: slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random windows of the text and, for each of their tokens, the next token.

        Every window of ``context + 1`` tokens is equally likely, also one that lies in two shards.

        Args:
            batch_size: number of windows.
            context: tokens of a window.
            generator: a CPU generator, which makes the choice repeatable.
            rows: the rows of the batch to read and return. Processes that share one batch draw the same windows and
                take a part each.

        Returns:
            ``(x, y)``, int64 on the CPU, each ``(rows, context)``, where ``y[:, t]`` is the token after ``x[:, t]``.

        Raises:
            ValueError: if ``batch_size`` or ``context`` is less than 1, the file has fewer than ``context + 1`` tokens,
                or an id is outside the vocabulary (a damaged file).
        """
        _check_positive("batch_size", batch_size)
        starts = torch.randint(self._starts(context), (batch_size,), generator=generator)
        return self._gather(starts[rows].tolist(), context)

    def windows(
        self, context: int, batch_size: int = 1, count: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield windows that cover the text in order without overlap, for evaluation.

        Every token but the first is a target once, except for the last ``(len(self) - 1) % context`` tokens, which fill
        no window. Yields ``(x, y)`` as :meth:`batch` returns them, ``batch_size`` windows at a time; the last batch may
        have fewer. With ``count``, only that many windows come, spread evenly: the text is divided into ``count`` equal
        parts, and the middle window of each is taken. Raises as :meth:`batch` does.
        """
        _check_positive("batch_size", batch_size)
        starts: Sequence[int] = range(0, self._starts(context), context)
        if count is not None and count < len(starts):
            _check_positive("count", count)
            starts = [starts[(2 * i + 1) * len(starts) // (2 * count)] for i in range(count)]
        batches = range(0, len(starts), batch_size)
        return (self._gather(starts[i : i + batch_size], context) for i in batches)

    def digest(self) -> str:
        """A hash of the ids, 32 hexadecimal digits, which does not depend on how they are split into shards.

        Of more than a million ids it reads 256 evenly spread pieces of 4,096. An id that is inserted or removed changes
        the hash too, because it changes the length and shifts all ids after it.
        """
        digest = hashlib.blake2b(f"{len(self)} {self.vocab_size} {self.fingerprint}".encode(), digest_size=16)
        for start in range(0, len(self), max(len(self) // 256, 4096)):
            digest.update(self.read(start, min(start + 4096, len(self))).tobytes())
        return digest.hexdigest()

    def _starts(self, context: int) -> int:
        """Number of windows of ``context + 1`` tokens, one for each position where a window can begin."""
        _check_positive("context", context)
        if len(self) < context + 1:
            raise ValueError(
                f"{self.path} has {len(self)} tokens; context={context} needs at least {context + 1}. "
                "Use a shorter context or a larger corpus"
            )
        return len(self) - context

    def _gather(self, starts: Sequence[int], context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows that begin at ``starts``, as inputs and targets."""
        rows = np.stack([self.read(start, start + context + 1) for start in starts])  # (B, T + 1)
        if (highest := int(rows.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.path} is damaged: it holds token id {highest}; its vocabulary has {self.vocab_size}"
            )
        ids = torch.from_numpy(rows.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
