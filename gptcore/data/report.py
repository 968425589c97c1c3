"""The report of a prepared corpus, ``corpus.json``: what its token files hold and how they were made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gptcore._files import atomic_writer

REPORT = "corpus.json"
_FORMAT = "gptcore-corpus"
_VERSION = 2
_MIN_LOST_TEXT = 0.01
"""The smallest `PrepareReport.lost_text` that is reported to the user."""


@dataclass(frozen=True)
class SplitReport:
    """What the token files of one split hold."""

    documents: int
    bytes: int
    """Length of the text in UTF-8, without end-of-text tokens."""
    tokens: int
    """Number of tokens, one end-of-text token per document included."""
    shards: tuple[int, ...]
    """Number of tokens in each token file, in order."""


@dataclass(frozen=True)
class PrepareReport:
    """What `gptcore.data.prepare.prepare` made. ``str()`` of it is for people to read."""

    out_dir: Path
    sources: tuple[str, ...]
    tokenizer: str
    """``"bpe"``, ``"wordpiece"``, ``"gpt2"``, or the path of the tokenizer that was asked for."""
    vocab_size: int
    """The tokenizer's; less than was asked for if the corpus has too few pairs to merge."""
    tokenizer_fingerprint: str
    val_fraction: float
    train: SplitReport
    val: SplitReport
    empty_documents: int
    """Number of documents without text, which are in neither split."""
    unigram_entropy: float
    """Nats per validation token of a model that knows only how often each token comes; see ``prepare``."""
    cut_documents: int = 0
    """Number of documents that are cut in two: the end is in the validation split, the rest in the training split. Both
    splits count them."""
    lost_text: float = 0.0
    """Share of a sample's characters that are missing after encoding and decoding, because the tokenizer drops them or
    has no token for them. Only tokenizers that came with other people's weights lose text."""
    unread_files: dict[str, int] = field(default_factory=dict)
    """Number of files of each ending that the sources' folders hold and that were not read, the most frequent first."""
    reused: bool = False
    """True if the folder already held this corpus, and nothing was done."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, over both splits."""
        return (self.train.bytes + self.val.bytes) / (self.train.tokens + self.val.tokens)

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the split and the tokenizer, a sentence each."""
        found = []
        if self.cut_documents:
            found.append(_cut_message(self.cut_documents))
        if self.lost_text > _MIN_LOST_TEXT:
            found.append(_lost_message(self.lost_text))
        return found

    def __str__(self) -> str:
        done = "was already prepared, nothing to do" if self.reused else "is prepared"
        lines = [f"{self.out_dir} {done}: {', '.join(self.sources)}"]
        lines.append(f"  tokenizer  {self.tokenizer}, {self.vocab_size:,} tokens, {self.tokenizer_fingerprint}")
        for name, split in ("train", self.train), ("val", self.val):
            share = f"{split.bytes / (self.train.bytes + self.val.bytes):.1%}"
            counts = f"{split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes, {share}"
            shards = f", {len(split.shards):,} shards" if len(split.shards) > 1 else ""
            lines.append(f"  {name:<9}  {counts}{shards}")
        lines += [f"  {warning}" for warning in self.warnings]
        if self.empty_documents:
            lines.append(f"  {self.empty_documents:,} documents without text were left out")
        if self.unread_files:
            kinds = [f"{count:,} {ending}" for ending, count in self.unread_files.items()]
            shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8:,} more kinds" if len(kinds) > 8 else "")
            lines.append(f"  not read in folders: {shown} (to read them, name the files or give a glob)")
        lines.append(f"  {self.bytes_per_token:.2f} bytes per token")
        lines.append(f"  unigram entropy {self.unigram_entropy:.4f} nats per token: a model must do better")
        return "\n".join(lines)


def _cut_message(count: int) -> str:
    which = "the largest document was" if count == 1 else f"the largest document, which comes {count:,} times, was"
    return f"{which} cut in two, and its end is for validation: whole documents alone do not meet val_fraction"


def _lost_message(share: float) -> str:
    return f"the tokenizer loses {share:.0%} of the characters: it drops them, or has no tokens for them"


def write_report(report: PrepareReport, settings: dict[str, Any], folder: Path) -> None:
    """Write ``corpus.json``. ``settings`` are what a later ``prepare`` compares with its own, to reuse the folder."""
    state = asdict(report)
    del state["out_dir"], state["reused"]  # true only of this folder and this call
    state |= {"bytes_per_token": report.bytes_per_token, "settings": settings}
    with atomic_writer(folder / REPORT) as file:
        file.write(json.dumps({"format": _FORMAT, "version": _VERSION} | state, indent=2).encode())


def read_report(folder: str | Path) -> PrepareReport:
    """The report of a prepared corpus, from the ``corpus.json`` in its folder.

    Raises:
        FileNotFoundError: if the folder holds no ``corpus.json``.
        ValueError: if ``corpus.json`` is damaged, or not of this version of gptcore.
    """
    return read_report_and_settings(folder)[0]


def read_report_and_settings(folder: str | Path) -> tuple[PrepareReport, dict[str, Any]]:
    """The report and the settings that `write_report` wrote. Raises as `read_report` does."""
    folder = Path(folder)
    path = folder / REPORT
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no prepared corpus: it has no {REPORT}")
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
