"""Text classification: the model learns the label of a text."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from gptkernels import cross_entropy
from torch import Tensor

from gptcore.data.labelled import read_labelled, split
from gptcore.generate import pad_right
from gptcore.models import Classifier, Model
from gptcore.tasks.epochs import Epochs
from gptcore.tasks.packing import spread
from gptcore.tasks.task import Task, TaskOptions
from gptcore.text import PretrainedTokenizer, Tokenizer
from gptcore.text.tokenizer import TOKENIZER

Balance = Literal["none", "weights", "sampling"]


@dataclass(frozen=True)
class ClassifyOptions(TaskOptions):
    """Options of text classification."""

    name: ClassVar[str] = "classify"
    models: ClassVar[tuple[str, ...]] = ("gpt", "bert", "classifier")

    text_column: str = "text"
    """Column of the texts."""
    label_column: str = "label"
    """Column of the labels."""
    columns: str | None = None
    """Names of all columns, in order and with commas between them, for a CSV or TSV file without a header: label,text."""
    val_fraction: float = 0.1
    """Share of the texts for validation."""
    test_fraction: float = 0.1
    """Share of the texts that are held out for the test at the end; 0 for no test."""
    balance: Balance = "none"
    """For classes of different size. weights: a text of a rare class counts more; sampling: it comes more often."""

    def __post_init__(self) -> None:
        if self.balance not in get_args(Balance):
            raise ValueError(f"balance: got {self.balance!r}; accepted are {', '.join(get_args(Balance))}")

    @property
    def column_names(self) -> list[str]:
        """The names in `columns`; none if the file has a header."""
        return [] if self.columns is None else [name.strip() for name in self.columns.split(",")]


class ClassifyBatch(NamedTuple):
    """Texts, padded on the right to the longest of them, and their classes."""

    tokens: Tensor
    """``(B, T)`` int64 ids; 0 after the end of a text."""
    lengths: Tensor
    """``(B,)`` int64 tokens of each text."""
    targets: Tensor
    """``(B,)`` int64 indices of the classes."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``"""
        batch, length = self.tokens.shape
        return batch, length

    def to(self, device: torch.device) -> ClassifyBatch:
        """Returns the batch with its tensors on `device`."""
        return ClassifyBatch(*(part.to(device) for part in self))


class Classify(Task):
    """Classification of labelled texts from a table (see `gptcore.data.labelled`).

    A text is read with the tokens that the model expects around it; one that is longer than the context is cut, and
    `remarks` says how many are. Batches hold texts of similar length. The classes are the labels of the table, sorted.
    """

    def __init__(
        self,
        options: ClassifyOptions,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None:
        if tokenizer is None:
            raise ValueError(
                "task: got classify for a new model; accepted is one to fine-tune: gptcore finetune classify"
            )
        self.options, self.tokenizer = options, tokenizer
        found = read_labelled(
            data, text_column=options.text_column, label_column=options.label_column, columns=options.column_names
        )
        self.classes = found.classes
        self.texts = found.texts
        index = {label: i for i, label in enumerate(self.classes)}
        self.targets = [index[label] for label in found.labels]
        """The class of each text."""
        self.split = split(found.labels, options.val_fraction, options.test_fraction, seed)
        read = [*self.split.train, *self.split.val]
        rows, cut = encode_texts(tokenizer, [self.texts[i] for i in read], context)
        self._rows = dict(zip(read, rows))  # text -> its tokens
        self._train = self._drawn()
        self._epochs = Epochs(len(self._train), seed, [len(self._rows[i]) for i in self._train])
        self.rows = len(self._train)
        counts = [Counter(self.targets[i] for i in self.split.train)[c] for c in range(len(self.classes))]
        shares = [count / len(self.split.train) for count in counts]
        self.baseline = "class frequencies", -sum(share * math.log(share) for share in shares)
        self._weights = None
        if options.balance == "weights":
            self._weights = torch.tensor([1 / (len(shares) * share) for share in shares])
        content = json.dumps([self.texts, found.labels, self.split, options.balance])
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:32]
        self.fingerprint = tokenizer.fingerprint
        self.remarks = _remarks(self, found.repeated, found.contradicted, cut, context)

    def _drawn(self) -> list[int]:
        """The texts of an epoch. With sampling each class comes as often as the largest."""
        if self.options.balance != "sampling":
            return self.split.train
        members: list[list[int]] = [[] for _ in self.classes]
        for i in self.split.train:
            members[self.targets[i]].append(i)
        largest = max(map(len, members))
        return [texts[j % len(texts)] for texts in members for j in range(largest)]

    def build(self, base: Model) -> Model:
        """Returns a classifier around the base, or a base that is a classifier of the same labels."""
        if isinstance(base, Classifier):
            if base.config.labels != self.classes:
                raise ValueError(
                    f"data: has the labels {', '.join(self.classes)}; accepted are those of the base, a classifier: "
                    f"{', '.join(base.config.labels)}"
                )
            model = base
        else:
            model = Classifier.around(base, self.classes)
        known = model.config.vocab_size
        if (largest := max(max(row) for row in self._rows.values())) >= known:
            raise ValueError(f"tokenizer: gives the id {largest}; accepted are those of the base, 0 to {known - 1}")
        return model

    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> ClassifyBatch:
        # All rows are padded, then taken: the processes that share a batch must have the same shape, by which the trainer
        # scales their gradients.
        batch = self._batch([self._train[i] for i in self._epochs.indices(size, index)])
        return ClassifyBatch(*(part[rows] for part in batch))

    def evaluation(self, size: int, limit: int | None) -> Iterator[ClassifyBatch]:
        val = [self.split.val[i] for i in spread(len(self.split.val), limit)]
        val = sorted(val, key=lambda i: len(self._rows[i]))
        return (self._batch(val[start : start + size]) for start in range(0, len(val), size))

    def loss(self, model: Any, batch: ClassifyBatch) -> tuple[Tensor, Tensor]:
        weights = None if self._weights is None else self._weights.to(batch.tokens.device)
        total = model(batch.tokens, lengths=batch.lengths, targets=batch.targets, weights=weights, reduction="sum")
        count = torch.full_like(total, len(batch.targets)) if weights is None else weights[batch.targets].sum()
        return total, count

    def evaluate(self, model: Any, batch: ClassifyBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the loss, in which each text counts the same, and the accuracy."""
        logits = model(batch.tokens, lengths=batch.lengths)
        loss = cross_entropy(logits, batch.targets, reduction="sum")
        count = torch.full_like(loss, len(batch.targets))
        right = (logits.argmax(dim=1) == batch.targets).sum().to(loss.dtype)
        return {"loss": (loss, count), "accuracy": (right, count)}

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder / TOKENIZER)

    def _batch(self, texts: Sequence[int]) -> ClassifyBatch:
        tokens, lengths = pad_right([self._rows[i] for i in texts])
        return ClassifyBatch(tokens, lengths, torch.tensor([self.targets[i] for i in texts]))


def encode_texts(
    tokenizer: Tokenizer | PretrainedTokenizer, texts: Sequence[str], context: int
) -> tuple[list[list[int]], int]:
    """Returns the tokens of each text, at most `context`, and how many texts were cut to that.

    The tokens that the model expects around a text, such as BERT's [CLS] and [SEP], are there in a text that is cut too.

    Raises:
        ValueError: a context without room for a token of a text, or a text that gives no tokens.
    """
    bare, around = tokenizer.encode("a"), tokenizer.encode_prompt("a")
    if (fewest := len(around) - len(bare) + 1) > context:
        raise ValueError(f"context: got {context}; accepted are {fewest} and more")
    before = next((i for i in range(fewest) if around[i : i + len(bare)] == bare), fewest - 1)
    after = around[before + len(bare) :]
    rows, cut = [], 0
    for text in texts:
        row = tokenizer.encode_prompt(text)
        if len(row) < fewest:
            raise ValueError(f"text: got {text!r}, which gives no tokens; accepted are texts of a token or more")
        if len(row) > context:
            row, cut = row[: context - len(after)] + after, cut + 1
        rows.append(row)
    return rows, cut


def _remarks(task: Classify, repeated: int, contradicted: int, cut: int, context: int) -> list[str]:
    counts = Counter(task.targets)
    sizes = ", ".join(f"{label} {counts[i]:,}" for i, label in enumerate(task.classes[:8]))
    more = f" and {len(task.classes) - 8} others" if len(task.classes) > 8 else ""
    parts = task.split
    remarks = [
        f"data     {len(task.texts):,} texts: {sizes}{more}; {len(parts.train):,} for training, {len(parts.val):,} for "
        f"validation, {len(parts.test):,} for the test"
    ]
    if repeated:
        remarks.append(f"         {repeated:,} rows repeat an earlier one and are left out")
    if contradicted:
        remarks.append(f"         {contradicted:,} rows give an earlier row's text another label and are left out")
    if cut:
        remarks.append(f"         {cut:,} texts of training and validation are cut to the context, {context} tokens")
    return remarks
