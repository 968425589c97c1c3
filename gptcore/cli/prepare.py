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

    For example:
      gptcore prepare python-docs --out data/python-docs
      gptcore prepare books/ 'notes/*.md' --out data/mine --vocab-size 8192
      gptcore prepare books/ --out data/books --tokenizer gpt2
      gptcore prepare 'crawl/*.jsonl.gz' --field content --out data/crawl
      gptcore prepare hf:roneneldan/TinyStories --out data/stories
    """

    sources: Positional[tuple[str, ...]]
    """Files (.jsonl, .ndjson, .parquet and arrays in .json hold a document per record; .gz is unpacked), folders, globs,
    the names of fetched texts, hf:NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset, or python-docs: the documentation
    that comes with Python."""
    out: Path
    """Folder to make."""
    field: str = "text"
    """Field of a record that holds its text."""
    tokenizer: str = "bpe"
    """bpe, or wordpiece (BERT's kind): trained on the corpus; gpt2; or a saved tokenizer's path."""
    vocab_size: int = 4096
    """Tokens of a trained tokenizer."""
    val_fraction: float = 0.1
    """Share of the text's bytes kept for validation: whole documents or, where there are few, the end of the largest."""
    shard_tokens: int = 100_000_000
    """Tokens in each token file, of 2 bytes if the vocabulary has at most 65,536 tokens, otherwise of 4."""
    overwrite: bool = False
    """Replace what was prepared there with other settings."""

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
