"""``gptcore prepare``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Prepare:
    """Turn text into token files for training.

    A file is one document. In .jsonl, .ndjson, .parquet and arrays in .json each record is one; .gz files are unpacked.
    python-docs is the documentation that comes with Python.

    For example:
      gptcore prepare python-docs --out data/python-docs
      gptcore prepare books/ 'notes/*.md' --out data/mine --vocab-size 8192
      gptcore prepare books/ --out data/books --tokenizer gpt2
      gptcore prepare 'crawl/*.jsonl.gz' --field content --out data/crawl
      gptcore prepare hf:roneneldan/TinyStories --out data/stories
    """

    sources: Positional[tuple[str, ...]]
    """Files, folders, globs, names of fetched texts, hf:NAME[:CONFIG[:SPLIT]] (a Hugging Face dataset), or python-docs."""
    out: Path
    """Folder to write."""
    field: str = "text"
    """The field of a record that holds its text."""
    tokenizer: str = "bpe"
    """bpe or wordpiece (for BERT), trained on the text; gpt2; or the path of a saved tokenizer."""
    vocab_size: int = 4096
    """Tokens of a tokenizer that is trained."""
    val_fraction: float = 0.1
    """Share of the bytes kept for validation: whole documents or, if there are few, the end of the largest."""
    shard_tokens: int = 100_000_000
    """Tokens in each token file; each takes 2 bytes if the vocabulary has at most 65,536 tokens, otherwise 4."""
    overwrite: bool = False
    """Replace a folder that was prepared with other settings."""

    def run(self) -> int:
        from gptcore.data.prepare import prepare

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            report = prepare(
                list(self.sources),
                self.out,
                field=self.field,
                tokenizer=self.tokenizer,
                vocab_size=self.vocab_size,
                val_fraction=self.val_fraction,
                shard_tokens=self.shard_tokens,
                overwrite=self.overwrite,
            )
        for warning in warned:
            print(f"gptcore: warning: {warning.message}", file=sys.stderr)
        print(report)
        return 0
