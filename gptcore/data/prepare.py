"""``prepare``: a corpus becomes a folder of token files, ready to train on.

The folder holds ``train.bin``, ``val.bin`` (see :mod:`gptcore.data.token_file`), ``tokenizer.json`` and
``corpus.json``, the report. It appears as a whole, by one rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcore._files import atomic_writer, sync_folder, temporary_sibling
from gptcore.data.corpus import Document, documents, source_list, sources_state
from gptcore.data.token_file import TokenFile, TokenWriter
from gptcore.tokenizer import Tokenizer, get_tokenizer

if TYPE_CHECKING:
    from gptcore.pretrained_tokenizer import PretrainedTokenizer

_FORMAT = "gptcore-corpus"
_VERSION = 1
_REPORT = "corpus.json"
_FILES = {"train.bin", "val.bin", "tokenizer.json", _REPORT}
_BATCH_CHARACTERS = 1 << 22

_Advance = Callable[[int], None]
"""Called with a number of characters as they are done."""


@dataclass(frozen=True)
class SplitReport:
    """What one of the two token files holds."""

    documents: int
    bytes: int
    """Of UTF-8 text; end-of-text tokens stand for none."""
    tokens: int
    """One end-of-text token per document included."""


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` made. ``str()`` of it is for people to read."""

    out_dir: Path
    sources: tuple[str, ...]
    tokenizer: str
    """``"bpe"``, ``"gpt2"``, or the path of the tokenizer that was asked for."""
    vocab_size: int
    """Of the tokenizer; less than was asked for if the corpus has too few pairs to merge."""
    tokenizer_fingerprint: str
    val_fraction: float
    train: SplitReport
    val: SplitReport
    unigram_entropy: float
    """Nats per validation token of a model that knows only how often each token comes; see ``prepare``."""
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
            counts = f"{split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes"
            lines.append(f"  {name:<9}  {counts}")
        lines.append(f"  {self.bytes_per_token:.2f} bytes per token")
        lines.append(f"  unigram entropy {self.unigram_entropy:.4f} nats per token: a model must do better")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Part:
    """The characters from ``start`` to ``stop`` of a document: nearly always all of it."""

    document: Document
    start: int
    stop: int
    digest: bytes = b""  # of all of the document's text

    def pieces(self) -> Iterator[str]:
        position = 0
        for piece in self.document.pieces():
            if position >= self.stop:
                return
            wanted = piece[max(self.start - position, 0) : self.stop - position]
            position += len(piece)
            if wanted:
                yield wanted


def prepare(
    sources: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int = 4096,
    val_fraction: float = 0.1,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Turn text into token files for training and validation.

    The corpus is read three times as a stream (to survey it, to train the tokenizer, to encode it), so it may
    be much larger than memory. Each document is followed by an end-of-text token.

    **The split** is by document: one goes to validation if the BLAKE2b hash of its text, as a fraction of the
    largest hash, is less than ``val_fraction``. It depends on neither names nor order, and copies of a
    document stay together. If that leaves one side empty, the documents with the smallest hash are the
    validation split, or those with the largest hash the training split. If all documents are the same, as
    when there is only one, each is cut: the last ``val_fraction`` of its characters, at least one, is for
    validation. A BPE is trained on the training split alone.

    **unigram_entropy** is what a model that ignores all context would score, the number for a trained model
    to beat: ``-sum_v n_val(v) / N_val * ln((n_train(v) + 1) / (N_train + V))`` in nats per token, where
    ``n(v)`` is how often token ``v`` comes in a split of ``N`` tokens, and ``V`` is the size of the
    vocabulary.

    Nothing is seen in ``out_dir`` until everything is done. Running it again with the same settings and
    unchanged sources does nothing but return the same report, with ``reused`` set.

    Args:
        sources: files, folders, globs, ``"python-docs"``; see :func:`gptcore.data.corpus.documents`.
        out_dir: the folder to make.
        tokenizer: ``"bpe"`` to train one on the corpus, ``"gpt2"``, or the path of a saved tokenizer.
        vocab_size: for ``"bpe"``, the number of tokens with end-of-text; otherwise of no effect.
        val_fraction: the share of the corpus to keep for validation, greater than 0 and less than 1.
        overwrite: replace a corpus that was prepared in ``out_dir`` with other settings.
        progress: show a progress bar on the standard error stream.

    Raises:
        ValueError: if a setting is out of range, or the corpus is empty or too short to split.
        FileExistsError: if ``out_dir`` holds something that is no prepared corpus (then ``overwrite`` does
            not help either), or another or a damaged corpus and ``overwrite`` is False.
        FileNotFoundError, OSError, ValueError: from sources and tokenizers that cannot be read.
        RuntimeError: if the sources change while they are being read.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must be greater than 0 and less than 1; got {val_fraction}")
    out_dir = Path(out_dir).expanduser().resolve()
    names = source_list(sources)
    # Loaded now, so that a tokenizer that cannot be had is an error before any work.
    given = None if str(tokenizer) == "bpe" else get_tokenizer(tokenizer)
    if given is None and vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257; got {vocab_size}")
    settings = {
        "tokenizer": given.fingerprint if given else "bpe",
        "vocab_size": None if given else vocab_size,
        "val_fraction": val_fraction,
        "sources_state": sources_state(names),
    }
    existing = _existing(out_dir, settings, overwrite)
    if existing is not None:
        return existing

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(out_dir)
    temporary.mkdir()
    try:
        with _Bars(progress) as bars:
            train, val = _split(_survey(documents(names), bars.start("Reading")), val_fraction)
            trained = given or Tokenizer.train(_text(train, bars.start("Training the tokenizer", train)), vocab_size)
            train_report, train_counts = _encode(train, trained, temporary / "train.bin", bars)
            val_report, val_counts = _encode(val, trained, temporary / "val.bin", bars)
        if sources_state(names) != settings["sources_state"]:
            raise RuntimeError("the sources changed while they were being read; run it again")
        report = PrepareReport(
            out_dir=out_dir,
            sources=tuple(names),
            tokenizer=str(tokenizer),
            vocab_size=trained.vocab_size,
            tokenizer_fingerprint=trained.fingerprint,
            val_fraction=val_fraction,
            train=train_report,
            val=val_report,
            unigram_entropy=_unigram_entropy(train_counts, val_counts),
        )
        trained.save(temporary / "tokenizer.json")
        _write_report(report, settings, temporary / _REPORT)
        _publish_folder(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def read_report(folder: str | Path) -> PrepareReport:
    """The report of a prepared corpus, from the ``corpus.json`` in its folder.

    Raises:
        FileNotFoundError: if the folder holds no ``corpus.json``.
        ValueError: if that is not one that :func:`prepare` wrote.
    """
    return _read_report(Path(folder))[0]


def _survey(corpus: Iterable[Document], advance: _Advance) -> list[_Part]:
    """Read every document once, to measure and to hash it; those without text are left out."""
    surveyed = []
    for document in corpus:
        digest = hashlib.blake2b(digest_size=16)
        characters = 0
        for piece in document.pieces():
            digest.update(piece.encode())
            characters += len(piece)
            advance(len(piece))
        if characters:
            surveyed.append(_Part(document, 0, characters, digest.digest()))
    if not surveyed:
        raise ValueError("the corpus is empty: its documents hold no text")
    return surveyed


def _split(corpus: list[_Part], val_fraction: float) -> tuple[list[_Part], list[_Part]]:
    """The training and the validation split, as :func:`prepare` describes them; neither is empty."""
    digests = {part.digest for part in corpus}
    if len(digests) == 1:
        length = corpus[0].stop
        if length < 2:
            raise ValueError(f"the corpus is too short to split: it has {length} character, and 2 are needed")
        cut = length - min(max(round(length * val_fraction), 1), length - 1)
        return [replace(part, stop=cut) for part in corpus], [replace(part, start=cut) for part in corpus]
    limit = int(val_fraction * 2**128)
    in_val = {digest for digest in digests if int.from_bytes(digest, "big") < limit}
    in_val = in_val or {min(digests)}
    if in_val == digests:
        in_val = digests - {max(digests)}
    train = [part for part in corpus if part.digest not in in_val]
    return train, [part for part in corpus if part.digest in in_val]


def _text(parts: list[_Part], advance: _Advance) -> Iterator[str]:
    for part in parts:
        for piece in part.pieces():
            yield piece
            advance(len(piece))


def _encode(
    parts: list[_Part], tokenizer: Tokenizer | PretrainedTokenizer, path: Path, bars: _Bars
) -> tuple[SplitReport, NDArray[np.int64]]:
    """Write a split's token file. Also returns how often each token comes, ``(vocab_size,)``."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    size = 0
    advance = bars.start(f"Encoding {path.name}", parts)
    with TokenWriter(path, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint) as writer:
        for batch in _batches(parts):
            texts = [text for text, _ in batch]
            for (text, is_last), ids in zip(batch, tokenizer.encode_batch(texts)):
                tokens = np.asarray([*ids, tokenizer.eot_token] if is_last else ids, dtype=np.int64)
                writer.write(tokens)
                counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
                size += len(text.encode())
                advance(len(text))
        return SplitReport(documents=len(parts), bytes=size, tokens=writer.count), counts


def _batches(parts: list[_Part]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces, each with whether it ends its document, in lists long enough to keep every core encoding."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for part in parts:
        position = part.start
        for piece in part.pieces():
            position += len(piece)
            characters += len(piece)
            batch.append((piece, position == part.stop))
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


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
    if _REPORT not in found or found - _FILES:
        foreign = ", ".join(sorted(found - _FILES)[:3]) or "parts of a corpus only"
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
        problem = f"holds a damaged corpus ({error})"
    if not overwrite:
        raise FileExistsError(f"out_dir {out_dir} {problem}; {way_out}")
    return None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    different = [name for name in new if old.get(name) != new[name]]
    return [
        "other sources, or these before they changed"
        if name == "sources_state"
        else f"{name}={old.get(name)!r}, not {new[name]!r}"
        for name in different
    ]


def _check(folder: Path, report: PrepareReport) -> None:
    """Raise ``ValueError`` or ``FileNotFoundError`` unless the folder holds what its report says."""
    fingerprints = [get_tokenizer(folder / "tokenizer.json").fingerprint]
    for name, split in ("train.bin", report.train), ("val.bin", report.val):
        tokens = TokenFile.open(folder / name)
        fingerprints.append(tokens.fingerprint)
        if len(tokens) != split.tokens:
            raise ValueError(f"{name} has {len(tokens)} tokens, but {_REPORT} says {split.tokens}")
    if set(fingerprints) != {report.tokenizer_fingerprint}:
        raise ValueError("its files are of different tokenizers")


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
    if not isinstance(state, dict) or state.get("format") != _FORMAT or state.get("version") != _VERSION:
        raise ValueError(f"{path} is not the report of a corpus prepared by this version of gptcore")
    del state["format"], state["version"]
    state.pop("bytes_per_token", None)  # a property of the report
    try:
        settings = dict(state.pop("settings"))
        state["sources"] = tuple(state["sources"])
        splits = {name: SplitReport(**state.pop(name)) for name in ("train", "val")}
        return PrepareReport(out_dir=folder, **splits, **state), settings
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _publish_folder(temporary: Path, out_dir: Path) -> None:
    """Rename a finished folder to ``out_dir``. A corpus that is there is moved aside, then deleted."""
    if not out_dir.exists():
        temporary.rename(out_dir)
    else:
        aside = temporary_sibling(out_dir)
        out_dir.rename(aside)
        try:
            temporary.rename(out_dir)
        except BaseException:
            aside.rename(out_dir)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(out_dir.parent)


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

    def start(self, description: str, parts: list[_Part] | None = None) -> _Advance:
        """A new bar over ``parts``, or over work of unknown size; returns what moves it."""
        total = None if parts is None else sum(part.stop - part.start for part in parts)
        task = self._progress.add_task(description, total=total)
        return lambda characters: self._progress.advance(task, characters)
