"""Texts with labels: reads them from a table, and splits them for training, validation and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptcore import _extras
from gptcore.data.readers import shown, text_of
from gptcore.data.table import read_table


class LabelledTexts(NamedTuple):
    """Distinct texts, each with its label."""

    texts: list[str]
    labels: list[str]
    """The label of each text."""
    repeated: int
    """Rows that were left out because an earlier row has the same text and label."""
    contradicted: int
    """Rows that were left out because an earlier row has the same text and another label."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(set(self.labels)))


class Split(NamedTuple):
    """Indices of the texts in each part, in increasing order."""

    train: list[int]
    val: list[int]
    test: list[int]


def read_labelled(
    source: str | Path, *, text_column: str = "text", label_column: str = "label", columns: Sequence[str] = ()
) -> LabelledTexts:
    """Reads labelled texts from a table. A text that occurs again is used once, so that it cannot be in two parts of a split.

    Args:
        source, columns: see `gptcore.data.table.read_table`.
        text_column, label_column: names of the columns. A label of a JSON file may be an integer, true or false as well.

    Raises:
        ValueError: a column that does not exist, an empty text or label, fewer than two different labels, or as
            `read_table`; names the file and the line.
        FileNotFoundError, OSError: as `read_table`.
    """
    label_of: dict[str, str] = {}
    repeated = contradicted = 0
    for name, text, row in _texts(source, text_column, columns):
        if text_column == label_column:
            raise ValueError(f"label_column: got {label_column!r}, the column of the texts; accepted is another")
        label = _label(row, name, label_column)
        if text not in label_of:
            label_of[text] = label
        elif label_of[text] == label:
            repeated += 1
        else:
            contradicted += 1
    if not label_of:
        raise ValueError(f"data: {source} holds no rows; accepted are files with a text of two classes or more")
    found = LabelledTexts(list(label_of), list(label_of.values()), repeated, contradicted)
    if len(found.classes) < 2:
        count, label = len(found.texts), found.labels[0]
        raise ValueError(
            f"data: all {count} texts of {source} have the label {label!r}; accepted are two labels or more"
        )
    return found


def read_texts(source: str | Path, *, text_column: str = "text", columns: Sequence[str] = ()) -> list[str]:
    """Reads the texts of a table. Arguments and errors as `read_labelled`."""
    return [text for _, text, _ in _texts(source, text_column, columns)]


def _texts(source: str | Path, text_column: str, columns: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields ``(name, text, row)`` for each row."""
    for name, row in read_table(source, columns):
        text = text_of(_with_column(row, name, text_column), name, text_column)
        if not text.strip():
            raise ValueError(f"{name}: {text_column!r} is empty; accepted are texts")
        yield name, text, row


def _with_column(row: dict[str, Any], name: str, column: str) -> dict[str, Any]:
    """Returns `row`, which has this column."""
    if column not in row:
        found = ", ".join(shown(key).removeprefix("str ") for key in row) or "none"
        raise ValueError(
            f"{name}: has no column {column!r}; its columns are {found}. Name yours with --text-column and --label-column, and "
            "those of a file without a header with --columns"
        )
    return row


def _label(row: dict[str, Any], name: str, column: str) -> str:
    value = _with_column(row, name, column)[column]
    if isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str):
        raise ValueError(f"{name}: {column!r} must be a string, an integer, true or false; got {shown(value)}")
    if not (label := value.strip()):
        raise ValueError(f"{name}: {column!r} is empty; accepted are labels")
    return label


def split(labels: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Splits texts at random, each class in the same proportions (stratified).

    Args:
        labels: the label of each text; the texts are distinct.
        val_fraction, test_fraction: shares of the texts for validation and test; `test_fraction` may be 0.
        seed: the same seed, labels and fractions give the same split.

    Raises:
        ValueError: a fraction that is not accepted, or too few texts of a class or in all to have each class in each part.
        MissingPackageError: scikit-learn is not installed.
    """
    for name, fraction, lowest in (("val_fraction", val_fraction, "0 <"), ("test_fraction", test_fraction, "0 <=")):
        if not 0 <= fraction < 1 or (name == "val_fraction" and fraction == 0):
            raise ValueError(f"{name}: got {fraction}; accepted is {lowest} {name} < 1")
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction, test_fraction: got {val_fraction} and {test_fraction}; accepted are sums under 1, "
            "which leave texts for training"
        )
    counts = Counter(labels)
    parts = 3 if test_fraction else 2
    rarest = min(counts, key=lambda label: (counts[label], label))
    if counts[rarest] < parts:
        raise ValueError(
            f"data: the label {rarest!r} has {counts[rarest]} distinct texts; accepted are {parts} or more, "
            f"one for each of {'training, validation and test' if test_fraction else 'training and validation'}"
        )
    sizes = []
    for name, fraction in (("test_fraction", test_fraction), ("val_fraction", val_fraction)):
        sizes.append(round(fraction * len(labels)))
        if fraction and sizes[-1] < len(counts):
            raise ValueError(
                f"{name}: got {fraction} of {len(labels)} texts, which is {sizes[-1]}; accepted are fractions that give "
                f"{len(counts)} texts or more, as many as there are classes"
            )
    if len(labels) - sum(sizes) < len(counts):
        raise ValueError(
            f"val_fraction, test_fraction: got {val_fraction} and {test_fraction}, which leave {len(labels) - sum(sizes)} of "
            f"{len(labels)} texts for training; accepted are fractions that leave {len(counts)} or more, one a class"
        )
    cut = _extras.load("sklearn.model_selection", "data: splitting it").train_test_split
    train, held_out = list(range(len(labels))), []
    for size in sizes:
        part: list[int] = []
        if size:
            train, part = cut(train, test_size=size, random_state=seed % 2**32, stratify=[labels[i] for i in train])
        held_out.append(sorted(part))
    if unseen := sorted(set(counts) - {labels[i] for i in train}):
        raise ValueError(
            f"data: no text with the label {unseen[0]!r} is left for training; accepted are more texts with it, "
            "or smaller fractions for validation and test"
        )
    return Split(sorted(train), held_out[1], held_out[0])
