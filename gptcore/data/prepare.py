"""``prepare``: a corpus becomes a folder of token files, ready to train on.

The folder holds the shards of the training and of the validation split, ``train-00000.bin`` and ``val-00000.bin``
onwards (see :mod:`gptcore.data.token_file`), ``tokenizer.json`` and ``corpus.json``, the report. It appears as a
whole, by one rename. :func:`open_split` opens one split of it.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptcore._files import atomic_writer, folder_writer
from gptcore.data.corpus import documents, source_list, sources_state, unread_files
from gptcore.data.split import CHANGED, RULE, Advance, Piece, survey
from gptcore.data.token_file import ShardWriter, TokenFile
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import TOKENIZER, Tokenizer, get_tokenizer
from gptcore.text.wordpiece import train_wordpiece

_FORMAT = "gptcore-corpus"
_VERSION = 2
_REPORT = "corpus.json"
_FILES = re.compile(rf"(train|val)(-\d{{5,}})?\.bin|tokenizer\.json|{re.escape(_REPORT)}")
"""What a prepared corpus consists of; version 1 had no shards."""
_BATCH_CHARACTERS = 1 << 18
"""Encoded by one thread at a time: enough to make starting it cheap."""

_TRAINERS: dict[str, tuple[Callable[[Iterable[str], int], Tokenizer | PretrainedTokenizer], int]] = {
    "bpe": (Tokenizer.train, 257),
    "wordpiece": (train_wordpiece, 32),
}
"""The tokenizers that are trained on the corpus: what trains them, and the smallest vocabulary."""

_LOST = 0.01
"""The least `PrepareReport.lost_text` that is spoken of."""
_Ids = Sequence[int] | NDArray[np.uint32]


@dataclass(frozen=True)
class SplitReport:
    """What the token files of one split hold."""

    documents: int
    bytes: int
    """Of UTF-8 text; end-of-text tokens stand for none."""
    tokens: int
    """One end-of-text token per document included."""
    shards: tuple[int, ...]
    """The number of tokens in each token file, in order."""


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` made. ``str()`` of it is for people to read."""

    out_dir: Path
    sources: tuple[str, ...]
    tokenizer: str
    """``"bpe"``, ``"wordpiece"``, ``"gpt2"``, or the path of the tokenizer that was asked for."""
    vocab_size: int
    """Of the tokenizer; less than was asked for if the corpus has too few pairs to merge."""
    tokenizer_fingerprint: str
    val_fraction: float
    train: SplitReport
    val: SplitReport
    empty_documents: int
    """Documents without text, which are in neither split."""
    unigram_entropy: float
    """Nats per validation token of a model that knows only how often each token comes; see ``prepare``."""
    cut_documents: int = 0
    """Documents whose end is in the validation split and whose rest is in the training split: counted in both."""
    lost_text: float = 0.0
    """Share of a sample's characters that a tokenizer of other people's does not give back: dropped, or unknown to it."""
    unread_files: dict[str, int] = field(default_factory=dict)
    """What the sources' folders held besides the files that were read: how many of each ending, the most first."""
    reused: bool = False
    """True if the folder already held all this, and nothing was done."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, over both splits."""
        return (self.train.bytes + self.val.bytes) / (self.train.tokens + self.val.tokens)

    def __str__(self) -> str:
        done = "was already prepared, nothing to do" if self.reused else "is prepared"
        lines = [f"{self.out_dir} {done}: {', '.join(self.sources)}"]
        lines.append(f"  tokenizer  {self.tokenizer}, {self.vocab_size:,} tokens, {self.tokenizer_fingerprint}")
        for name, split in ("train", self.train), ("val", self.val):
            share = f"{split.bytes / (self.train.bytes + self.val.bytes):.1%}"
            counts = f"{split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes, {share}"
            shards = f", {len(split.shards):,} shards" if len(split.shards) > 1 else ""
            lines.append(f"  {name:<9}  {counts}{shards}")
        if self.cut_documents:
            lines.append(f"  {_cut_in_two(self.cut_documents)}")
        if self.lost_text > _LOST:
            lines.append(f"  {_not_given_back(self.lost_text)}")
        if self.empty_documents:
            lines.append(f"  {self.empty_documents:,} documents without text were left out")
        if self.unread_files:
            kinds = [f"{count:,} {ending}" for ending, count in self.unread_files.items()]
            shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8:,} more kinds" if len(kinds) > 8 else "")
            lines.append(f"  not read in folders: {shown} (a file that is named, or that a glob matches, is)")
        lines.append(f"  {self.bytes_per_token:.2f} bytes per token")
        lines.append(f"  unigram entropy {self.unigram_entropy:.4f} nats per token: a model must do better")
        return "\n".join(lines)


def prepare(
    sources: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    *,
    field: str = "text",
    tokenizer: str | Path = "bpe",
    vocab_size: int = 4096,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Turn text into token files for training and validation.

    The corpus is read three times as a stream (to survey it, to train the tokenizer, to encode it), so it may
    be much larger than memory; of each document 16 bytes are kept. Each document is followed by an end-of-text
    token; those without text are left out, and counted.

    **The split** is by document, and holds ``val_fraction`` of the bytes to within a tenth of the smaller side.
    Documents are taken for validation by the BLAKE2b hash of their text, so that neither names nor order matter and
    copies of a document stay together; one that is larger than what is still wanted is passed over. Where that does
    not meet the share, as with one book, or a book and a few notes, the largest document is cut: its end, from where a
    paragraph, a line or at least a word begins, is for validation. The report and a ``UserWarning`` say so. Each
    part ends with an end-of-text token, as a whole document does. A BPE is trained on the training split alone.

    **unigram_entropy** is what a model that ignores all context would score, the number for a trained model
    to beat: ``-sum_v n_val(v) / N_val * ln((n_train(v) + 1) / (N_train + V))`` in nats per token, where
    ``n(v)`` is how often token ``v`` comes in a split of ``N`` tokens, and ``V`` is the size of the
    vocabulary.

    Nothing is seen in ``out_dir`` until everything is done. Running it again with the same settings and
    unchanged sources does nothing but return the same report, with ``reused`` set.

    Args:
        sources: files of text or of records (JSON Lines, Parquet), folders, globs, ``"python-docs"``, fetched texts
            by name, Hugging Face datasets; see :func:`gptcore.data.corpus.documents`.
        out_dir: the folder to make.
        field: the field of records that holds their text.
        tokenizer: ``"bpe"`` or ``"wordpiece"`` (BERT's kind) to train one on the corpus, ``"gpt2"``, or the path of a
            saved tokenizer.
        vocab_size: of a tokenizer that is trained, the number of tokens with the special ones; otherwise of no effect.
        val_fraction: the share of the corpus's bytes to keep for validation, greater than 0 and less than 1.
        shard_tokens: tokens in each file of a split but the last; at least 1.
        overwrite: replace a corpus that was prepared in ``out_dir`` with other settings.
        progress: show a progress bar on the standard error stream.

    Raises:
        ValueError: if a setting is out of range, a record is bad, or the corpus is empty or too short to split.
        FileExistsError: if ``out_dir`` holds something that is no prepared corpus (then ``overwrite`` does
            not help either), or another or a damaged corpus and ``overwrite`` is False.
        FileNotFoundError, OSError, ValueError: from sources and tokenizers that cannot be read.
        MissingPackageError: if a library that the sources or the tokenizer need is not installed.
        RuntimeError: if the sources change while they are being read.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must be greater than 0 and less than 1; got {val_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1; got {shard_tokens}")
    out_dir = Path(out_dir).expanduser().resolve()
    names = source_list(sources)
    # Loaded now, so that a tokenizer that cannot be had is an error before any work.
    train_tokenizer, smallest = _TRAINERS.get(str(tokenizer), (None, 0))
    given = None if train_tokenizer else get_tokenizer(tokenizer)
    if given is None and vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}; got {vocab_size}")
    settings = {
        "tokenizer": given.fingerprint if given else str(tokenizer),
        "vocab_size": None if given else vocab_size,
        "val_fraction": val_fraction,
        "split": RULE,
        "field": field,
        "shard_tokens": shard_tokens,
        "sources_state": sources_state(names),
    }
    existing = _existing(out_dir, settings, overwrite)
    if existing is not None:
        return existing

    unread = unread_files(names)
    with folder_writer(out_dir) as temporary:
        with _Bars(progress) as bars:
            split = survey(documents(names, field=field), val_fraction, bars.start("Reading"))

            def read(step: str) -> Iterator[Piece]:
                return split.pieces(documents(names, field=field), bars.start(step, split.characters))

            if given is None:
                texts = (piece.text for piece in read("Training the tokenizer") if not piece.in_val)
                assert train_tokenizer is not None
                used = train_tokenizer(texts, vocab_size)
            else:
                used = given
            train, val, lost_text = _encode(read("Encoding"), used, temporary, shard_tokens)
        if sources_state(names) != settings["sources_state"]:
            raise RuntimeError(CHANGED)
        report = PrepareReport(
            out_dir=out_dir,
            sources=tuple(names),
            tokenizer=str(tokenizer),
            vocab_size=used.vocab_size,
            tokenizer_fingerprint=used.fingerprint,
            val_fraction=val_fraction,
            train=train.report,
            val=val.report,
            empty_documents=split.empty,
            unigram_entropy=_unigram_entropy(train.counts, val.counts),
            cut_documents=split.cut_documents,
            lost_text=lost_text,
            unread_files=unread,
        )
        used.save(temporary / TOKENIZER)
        _write_report(report, settings, temporary / _REPORT)
    if report.cut_documents:
        warnings.warn(_cut_in_two(report.cut_documents), stacklevel=2)
    if report.lost_text > _LOST:
        warnings.warn(_not_given_back(report.lost_text), stacklevel=2)
    return report


def read_report(folder: str | Path) -> PrepareReport:
    """The report of a prepared corpus, from the ``corpus.json`` in its folder.

    Raises:
        FileNotFoundError: if the folder holds no ``corpus.json``.
        ValueError: if that is not one that :func:`prepare` wrote.
    """
    return _read_report(Path(folder))[0]


def open_split(folder: str | Path, split: Literal["train", "val"]) -> TokenFile:
    """The tokens of one split of a prepared corpus, mapped from its shards as if they were one file.

    Raises:
        ValueError: if ``split`` is neither; the corpus was prepared by another version of gptcore; or a shard is
            damaged, has another number of tokens than the report says, or is of another tokenizer.
        FileNotFoundError: if the folder holds no ``corpus.json``, or lacks a shard.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val'; got {split!r}")
    report = read_report(folder)
    tokens = TokenFile.open_shards(folder, split, (report.train if split == "train" else report.val).shards)
    if tokens.fingerprint != report.tokenizer_fingerprint:
        raise ValueError(f"{tokens.path} was made with another tokenizer than {_REPORT} says")
    return tokens


class _Encoded:
    """The shards of one split as they are written, and what is counted meanwhile."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, tokenizer: Tokenizer | PretrainedTokenizer) -> None:
        self._eot = np.array([tokenizer.eot_token], dtype=np.uint32)
        self.writer = ShardWriter(
            folder, name, shard_tokens, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint
        )
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        """How often each token comes, ``(vocab_size,)``."""
        self._documents = self._bytes = 0

    def write(self, encoded: Iterable[tuple[Piece, _Ids]]) -> None:
        """Append pieces of this split with their ids; many at once, as each call costs as much as a vocabulary."""
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
        shards = self.writer.shards
        return SplitReport(documents=self._documents, bytes=self._bytes, tokens=sum(shards), shards=shards)


def _encode(
    pieces: Iterable[Piece], tokenizer: Tokenizer | PretrainedTokenizer, folder: Path, shard_tokens: int
) -> tuple[_Encoded, _Encoded, float]:
    """Write the shards of the training and of the validation split; also returns `PrepareReport.lost_text`."""
    train, val = (_Encoded(folder, name, shard_tokens, tokenizer) for name in ("train", "val"))
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


def _encoded_batches(
    pieces: Iterable[Piece], tokenizer: Tokenizer | PretrainedTokenizer
) -> Iterator[list[tuple[Piece, _Ids]]]:
    """The pieces in order, each with its ids. While some are encoded on every core, the next are read."""
    workers = os.cpu_count() or 1
    if isinstance(tokenizer, Tokenizer):
        threads, characters = workers, _BATCH_CHARACTERS
    else:  # another kind has threads of its own, and need not bear to be called from several
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
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error, what has not begun never does


def _batches(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Lists of pieces that together have ``size`` characters or a few more."""
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


def _cut_in_two(count: int) -> str:
    which = "the largest document was" if count == 1 else f"the largest document, which comes {count:,} times, was"
    return f"{which} cut in two, the end for validation: whole documents would have missed val_fraction"


def _lost_text(encoded: Iterable[tuple[Piece, _Ids]], tokenizer: Tokenizer | PretrainedTokenizer) -> float:
    """The share of the characters of the first pieces that decoding does not give back.

    Spaces, case, accents and other ways to write a character do not count: there are good tokenizers that change them.
    """
    before, after = Counter[str](), Counter[str]()
    if isinstance(tokenizer, PretrainedTokenizer):  # ours give back every byte
        for piece, ids in encoded:
            before.update(unicodedata.normalize("NFKD", piece.text.casefold()))
            after.update(unicodedata.normalize("NFKD", tokenizer.decode(ids).casefold()))
            if before.total() > _BATCH_CHARACTERS:
                break
    for character in list(before):
        if character.isspace() or unicodedata.combining(character):
            del before[character]
    return (before - after).total() / max(before.total(), 1)


def _not_given_back(share: float) -> str:
    return f"the tokenizer does not give back {share:.0%} of the characters: it drops them, or has no tokens for them"


def _unigram_entropy(train: NDArray[np.int64], val: NDArray[np.int64]) -> float:
    """Cross-entropy of the validation counts under the add-one smoothed training counts, nats per token."""
    log_probability = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(val * log_probability).sum() / val.sum())


def _existing(out_dir: Path, settings: dict[str, Any], overwrite: bool) -> PrepareReport | None:
    """The report of what ``out_dir`` already holds if that is what is asked for; None if the way is free."""
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise FileExistsError(f"out_dir {out_dir} is a file; give the name of a new folder")
    found = {path.name for path in out_dir.iterdir()}
    if not found:
        return None
    others = sorted(name for name in found if not _FILES.fullmatch(name))
    if _REPORT not in found or others:
        foreign = ", ".join(others[:3]) or "parts of a corpus only"
        raise FileExistsError(f"out_dir {out_dir} holds something else ({foreign}); choose another folder")
    way_out = "pass overwrite=True to replace it, or choose another folder"
    try:
        report, old = _read_report(out_dir)
        different = _differences(old, settings)
        if not different:
            _check(out_dir, report)
            return replace(report, reused=True)
        problem = f"holds a corpus that was prepared with {'; '.join(different)}"
    except (ValueError, FileNotFoundError) as error:
        problem = f"holds a corpus that cannot be used ({error})"
    if not overwrite:
        raise FileExistsError(f"out_dir {out_dir} {problem}; {way_out}")
    return None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    said = {"sources_state": "other sources, or these before they changed", "split": "an earlier version's split"}
    different = [name for name in new if old.get(name) != new[name]]
    return [said.get(name, f"{name}={old.get(name)!r}, not {new[name]!r}") for name in different]


def _check(folder: Path, report: PrepareReport) -> None:
    """Raise ``ValueError`` or ``FileNotFoundError`` unless the folder holds what its report says."""
    if get_tokenizer(folder / TOKENIZER).fingerprint != report.tokenizer_fingerprint:
        raise ValueError(f"tokenizer.json is another tokenizer than {_REPORT} says")
    open_split(folder, "train")
    open_split(folder, "val")


def _write_report(report: PrepareReport, settings: dict[str, Any], path: Path) -> None:
    state = asdict(report)
    del state["out_dir"], state["reused"]  # true only of this folder and this call
    state |= {"bytes_per_token": report.bytes_per_token, "settings": settings}
    with atomic_writer(path) as file:
        file.write(json.dumps({"format": _FORMAT, "version": _VERSION} | state, indent=2).encode())


def _read_report(folder: Path) -> tuple[PrepareReport, dict[str, Any]]:
    """A prepared corpus's report, and the settings to compare with."""
    path = folder / _REPORT
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no prepared corpus: it has no {_REPORT}")
    try:
        state = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the report of a prepared corpus")
    if (version := state.get("version")) != _VERSION:
        raise ValueError(f"{path} has format version {version}, and this gptcore reads {_VERSION}: prepare again")
    del state["format"], state["version"]
    state.pop("bytes_per_token", None)  # a property of the report
    try:
        settings = dict(state.pop("settings"))
        state["sources"] = tuple(state["sources"])
        splits = {name: _read_split(state.pop(name)) for name in ("train", "val")}
        return PrepareReport(out_dir=folder, **splits, **state), settings
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _read_split(state: dict[str, Any]) -> SplitReport:
    split = replace(SplitReport(**state), shards=tuple(state["shards"]))
    if not all(isinstance(count, int) for count in split.shards) or sum(split.shards) != split.tokens:
        raise ValueError(f"shards of {list(split.shards)} tokens do not make {split.tokens}")
    return split


class _Bars:
    """One progress bar per step of the work, counted in characters; nothing at all if not ``shown``."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, description: str, total: int | None = None) -> Advance:
        """A new bar over ``total`` characters, or over work of unknown size; returns what moves it."""
        task = self._progress.add_task(description, total=total)
        return lambda characters: self._progress.advance(task, characters)
