"""``gptcore classify``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from gptcore.cli._options import Loading

if TYPE_CHECKING:
    from collections.abc import Sequence

_FORMATS = (".csv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Classify(Loading):
    """Label texts with a fine-tuned classifier.

    For example:
      gptcore classify --model runs/spam "You have won! Call 09061 now to claim." "Are you home yet?"
      gptcore classify --model runs/spam --file messages.txt
      gptcore classify --model runs/spam --file messages.csv --text-column message --out labelled.csv
    """

    texts: Positional[tuple[str, ...]] = ()
    """The texts; or give a file."""
    file: Path | None = None
    """File of texts: a CSV, TSV or JSON Lines file, or any other with one text in each line."""
    text_column: str = "text"
    """The file's column of the texts."""
    columns: str | None = None
    """Names of all columns, in order and with commas between them, for a CSV or TSV file without a header."""
    out: Path | None = None
    """CSV or JSON Lines file to write the labels and probabilities to, instead of a table."""
    batch_size: int = 32
    """Number of texts that run together."""

    def run(self) -> int:
        from gptcore._files import atomic_writer
        from gptcore.evaluate.classification import predict
        from gptcore.models import Classifier

        if self.out is not None and self.out.suffix not in _FORMATS:
            raise ValueError(f"out: got {self.out}; accepted are names that end with {' or '.join(_FORMATS)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}; accepted are positive integers")
        texts = self._texts()
        model, tokenizer = self.load(Classifier)
        found = predict(model, tokenizer, texts, self.batch_size, progress=len(texts) > self.batch_size)
        labels = model.config.labels
        rows = list(zip(texts, found.classes, found.probabilities.tolist()))
        if self.out is None:
            print(_table(labels, rows))
        else:
            with atomic_writer(self.out) as file:
                file.write(_written(labels, rows, self.out.suffix).encode())
            print(f"{self.out}: {len(rows):,} texts")
        if found.cut:
            print(
                f"{found.cut:,} texts are longer than the context: only their first {model.config.context} tokens were read"
            )
        return 0

    def _texts(self) -> Sequence[str]:
        from gptcore.data.labelled import read_texts
        from gptcore.data.table import TABLE_SUFFIXES, read_lines

        if bool(self.texts) == (self.file is not None):
            raise ValueError(
                f"texts: got {'both texts and' if self.texts else 'neither texts nor'} a file; accepted is one"
            )
        if self.file is None:
            if empty := [text for text in self.texts if not text.strip()]:
                raise ValueError(f"texts: got {empty[0]!r}; accepted are texts that are not empty")
            return self.texts
        path = self.file.expanduser()
        if path.name.lower().removesuffix(".gz").endswith(TABLE_SUFFIXES):
            columns = [name.strip() for name in self.columns.split(",")] if self.columns else []
            return read_texts(path, text_column=self.text_column, columns=columns)
        return list(read_lines(path))


def _table(labels: Sequence[str], rows: Sequence[tuple[str, int, list[float]]]) -> str:
    width = max(len(label) for label in labels)
    return "\n".join(f"{labels[i]:<{width}}  {chances[i]:>6.1%}  {' '.join(text.split())}" for text, i, chances in rows)


def _written(labels: Sequence[str], rows: Sequence[tuple[str, int, list[float]]], suffix: str) -> str:
    """The contents of a CSV or JSON Lines file: text, label, its probability, and the probability of each class."""
    import csv
    import io
    import json

    if suffix == ".jsonl":
        lines = []
        for text, i, chances in rows:
            found: dict[str, Any] = {"text": text, "label": labels[i], "probability": chances[i]}
            lines.append(json.dumps(found | {"probabilities": dict(zip(labels, chances))}, ensure_ascii=False) + "\n")
        return "".join(lines)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["text", "label", "probability", *(f"probability of {label}" for label in labels)])
    for text, i, chances in rows:
        writer.writerow([text, labels[i], f"{chances[i]:.6f}", *(f"{chance:.6f}" for chance in chances)])
    return file.getvalue()
