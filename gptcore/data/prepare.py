"""``prepare``: turns a corpus into a folder of token files, ready to train on.

The folder holds the shards of the training and of the validation split (``train-00000.bin``, ``val-00000.bin``, ...; see
:mod:`gptcore.data.token_file`), the tokenizer (``tokenizer.json``) and the report (``corpus.json``). It appears complete
or not at all. :func:`open_split` opens one of its splits.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gptcore._files import folder_writer
from gptcore.data.corpus import documents, source_list, sources_state, unread_files
from gptcore.data.encode import encode_splits, unigram_entropy
from gptcore.data.report import REPORT, PrepareReport, read_report, read_report_and_settings, write_report
from gptcore.data.split import SOURCES_CHANGED, SPLIT_VERSION, Advance, Piece, plan_split
from gptcore.data.token_file import TokenFile
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import TOKENIZER, Tokenizer, get_tokenizer
from gptcore.text.wordpiece import train_wordpiece

_OWN_FILES = re.compile(rf"(train|val)(-\d{{5,}})?\.bin|{re.escape(TOKENIZER)}|{re.escape(REPORT)}")
"""The names of a prepared corpus's files; version 1 had no shards."""

_TRAINERS: dict[str, tuple[Callable[[Iterable[str], int], Tokenizer | PretrainedTokenizer], int]] = {
    "bpe": (Tokenizer.train, 257),
    "wordpiece": (train_wordpiece, 32),
}
"""The tokenizers that can be trained: the function that does it, and the smallest vocabulary."""


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

    The corpus is read three times as a stream: to plan the split, to train the tokenizer, and to encode it. It may be
    much larger than memory; 16 bytes are kept per document. An end-of-text token follows each document. Documents
    without text are left out, and counted.

    **The split** is by whole documents. The validation split holds ``val_fraction`` of the bytes, to within a tenth of
    the smaller split. Documents are chosen by the BLAKE2b hash of their text, so that neither names nor order matter and
    copies of a document stay together; a document that is larger than what is still missing is passed over. If whole
    documents miss the share, as with one book, or a book and a few notes, the largest document is cut at the end of a
    paragraph, a line or a word, and its end is for validation. The report and a ``UserWarning`` say so, and both parts
    of the document end with an end-of-text token. The tokenizer is trained on the training split alone.

    **unigram_entropy** is the loss of a model that ignores all context, which a trained model has to beat:
    ``-sum_v n_val(v) / N_val * ln((n_train(v) + 1) / (N_train + V))`` in nats per token. ``n(v)`` is how often token
    ``v`` comes in a split of ``N`` tokens, and ``V`` is the size of the vocabulary.

    ``out_dir`` appears when everything is done. A second call with the same settings and unchanged sources does nothing
    and returns the same report with ``reused`` set.

    Args:
        sources: files of text or of records (JSON Lines, Parquet), folders, globs, ``"python-docs"``, fetched texts
            by name, Hugging Face datasets; see :func:`gptcore.data.corpus.documents`.
        out_dir: the folder to make.
        field: the field of records that holds their text.
        tokenizer: ``"bpe"`` or ``"wordpiece"`` (BERT's kind) to train one on the corpus, ``"gpt2"``, or the path of a
            saved tokenizer.
        vocab_size: number of tokens of a tokenizer that is trained, special tokens included; otherwise ignored.
        val_fraction: the share of the corpus's bytes for validation, greater than 0 and less than 1.
        shard_tokens: tokens in each token file except the last of a split; at least 1.
        overwrite: replace a corpus in ``out_dir`` that was prepared with other settings, or is damaged.
        progress: show a progress bar on the standard error stream.

    Raises:
        ValueError: if a setting is out of range, a record is bad, or the corpus is empty or too short to split.
        FileExistsError: if ``out_dir`` holds other files than a prepared corpus, whatever ``overwrite`` is; or if it holds
            another or a damaged corpus and ``overwrite`` is False.
        FileNotFoundError, OSError, ValueError: if a source or the tokenizer cannot be read.
        MissingPackageError: if a package that a source or the tokenizer needs is not installed.
        RuntimeError: if the sources change while they are being read.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must be greater than 0 and less than 1; got {val_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1; got {shard_tokens}")
    out_dir = Path(out_dir).expanduser().resolve()
    names = source_list(sources)
    # The tokenizer is loaded first, so that a bad one is an error before any work.
    train_tokenizer, smallest = _TRAINERS.get(str(tokenizer), (None, 0))
    given = None if train_tokenizer else get_tokenizer(tokenizer)
    if given is None and vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}; got {vocab_size}")
    settings = {
        "tokenizer": given.fingerprint if given else str(tokenizer),
        "vocab_size": None if given else vocab_size,
        "val_fraction": val_fraction,
        "split": SPLIT_VERSION,
        "field": field,
        "shard_tokens": shard_tokens,
        "sources_state": sources_state(names),
    }
    existing = _existing_report(out_dir, settings, overwrite)
    if existing is not None:
        return existing

    unread = unread_files(names)
    with folder_writer(out_dir) as temporary:
        with _Bars(progress) as bars:
            split = plan_split(documents(names, field=field), val_fraction, bars.start("Reading"))

            def read(step: str) -> Iterator[Piece]:
                return split.pieces(documents(names, field=field), bars.start(step, split.characters))

            if given is None:
                texts = (piece.text for piece in read("Training the tokenizer") if not piece.in_val)
                assert train_tokenizer is not None
                used = train_tokenizer(texts, vocab_size)
            else:
                used = given
            train, val, lost_text = encode_splits(read("Encoding"), used, temporary, shard_tokens)
        if sources_state(names) != settings["sources_state"]:
            raise RuntimeError(SOURCES_CHANGED)
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
            unigram_entropy=unigram_entropy(train.counts, val.counts),
            cut_documents=split.cut_documents,
            lost_text=lost_text,
            unread_files=unread,
        )
        used.save(temporary / TOKENIZER)
        write_report(report, settings, temporary)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return report


def open_split(folder: str | Path, split: Literal["train", "val"]) -> TokenFile:
    """The tokens of one split of a prepared corpus, all its shards as if they were one file.

    Raises:
        ValueError: if ``split`` is another name, the corpus was prepared by another version of gptcore, or a shard is
            damaged, has another number of tokens than the report says, or another tokenizer.
        FileNotFoundError: if the folder holds no ``corpus.json``, or lacks a shard.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val'; got {split!r}")
    report = read_report(folder)
    tokens = TokenFile.open_shards(folder, split, (report.train if split == "train" else report.val).shards)
    if tokens.fingerprint != report.tokenizer_fingerprint:
        raise ValueError(f"{tokens.path} was made with another tokenizer than {REPORT} says")
    return tokens


def _existing_report(out_dir: Path, settings: dict[str, Any], overwrite: bool) -> PrepareReport | None:
    """The report of the corpus in ``out_dir`` if it has these settings; None if ``out_dir`` may be written.

    Raises ``FileExistsError`` if it holds something that must not be replaced.
    """
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise FileExistsError(f"out_dir {out_dir} is a file; give the name of a new folder")
    found = {path.name for path in out_dir.iterdir()}
    if not found:
        return None
    others = sorted(name for name in found if not _OWN_FILES.fullmatch(name))
    if REPORT not in found or others:
        held = ", ".join(others[:3]) or "parts of a corpus only"
        raise FileExistsError(f"out_dir {out_dir} holds something else ({held}); choose another folder")
    try:
        report, old = read_report_and_settings(out_dir)
        different = _differences(old, settings)
        if not different:
            _check_files(out_dir, report)
            return replace(report, reused=True)
        problem = f"holds a corpus that was prepared with {'; '.join(different)}"
    except (ValueError, FileNotFoundError) as error:
        problem = f"holds a corpus that cannot be used ({error})"
    if not overwrite:
        remedy = "pass overwrite=True (--overwrite) to replace it, or choose another folder"
        raise FileExistsError(f"out_dir {out_dir} {problem}; {remedy}")
    return None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How the settings of an existing corpus differ from the wanted ones, for an error."""
    messages = {"sources_state": "other sources, or these before they changed", "split": "an earlier version's split"}
    different = [name for name in new if old.get(name) != new[name]]
    return [messages.get(name, f"{name}={old.get(name)!r}, not {new[name]!r}") for name in different]


def _check_files(folder: Path, report: PrepareReport) -> None:
    """Raise ``ValueError`` or ``FileNotFoundError`` unless the folder holds what its report says."""
    if get_tokenizer(folder / TOKENIZER).fingerprint != report.tokenizer_fingerprint:
        raise ValueError(f"{TOKENIZER} is another tokenizer than {REPORT} says")
    open_split(folder, "train")
    open_split(folder, "val")


class _Bars:
    """A progress bar for each step of the work, in characters. Shows nothing unless ``shown``."""

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
        """Add a bar over ``total`` characters (None: unknown); returns the function that moves it."""
        task = self._progress.add_task(description, total=total)
        return lambda characters: self._progress.advance(task, characters)
