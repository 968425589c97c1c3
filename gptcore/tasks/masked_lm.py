"""Masked language modelling: some tokens of a text are hidden, and the model learns to predict them from the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gptcore.generate.fill import fill
from gptcore.tasks.prepared import PreparedText
from gptcore.tasks.task import Task, TaskOptions
from gptcore.text import PretrainedTokenizer, Tokenizer
from gptcore.text.tokenizer import TOKENIZER


@dataclass(frozen=True)
class MaskedLMOptions(TaskOptions):
    """Options of masked language modelling."""

    name: ClassVar[str] = "masked_lm"
    models: ClassVar[tuple[str, ...]] = ("bert",)
    changeable: ClassVar[frozenset[str]] = frozenset({"sample_text"})

    mask_fraction: float = 0.15
    """Share of a row's tokens that the model has to predict."""
    sample_text: str = "The function returns a [MASK]."
    """Text whose [MASK]s the sample at each evaluation fills; empty for no sample."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_fraction <= 1.0:
            raise ValueError(f"mask_fraction: got {self.mask_fraction}; accepted is 0 < mask_fraction <= 1")


class MaskedBatch(NamedTuple):
    """Rows of text in which some tokens are hidden, and the ids of those tokens."""

    tokens: Tensor
    """``(B, T)`` int64 ids, with the hidden tokens replaced."""
    positions: Tensor
    """``(K,)`` int64: indices of the hidden tokens in the flattened ``(B * T)``."""
    targets: Tensor
    """``(K,)`` int64: the ids of the hidden tokens; -100 is ignored."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``"""
        batch, length = self.tokens.shape
        return batch, length

    def to(self, device: torch.device) -> MaskedBatch:
        """Returns the batch with its tensors on `device`."""
        return MaskedBatch(*(part.to(device) for part in self))


class MaskedLM(Task):
    """Masked language modelling on a folder that ``gptcore prepare --tokenizer wordpiece`` made.

    A row is ``[CLS]``, text, ``[SEP]``. Each time a row is drawn, `mask_fraction` of its tokens are chosen at random: 80 % of
    them are replaced by ``[MASK]``, 10 % by a random token, and 10 % stay.

    Source: Devlin et al., "BERT", arXiv 1810.04805, section 3.1.
    """

    def __init__(
        self,
        options: MaskedLMOptions,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None:
        self.options, self.seed = options, seed
        self.length = context - 2  # tokens of text in a row
        if self.length < 1:
            raise ValueError(f"context: got {context}; accepted are 3 and more")
        self.text = PreparedText(data, self.length, tokenizer)
        self.tokenizer = self.text.tokenizer
        self.digest, self.fingerprint, self.baseline = self.text.digest, self.text.fingerprint, self.text.baseline
        names = ("cls_token", "sep_token", "mask_token")
        try:
            self.cls, self.sep, self.mask = (self.tokenizer.special_id(name) for name in names)
        except ValueError as error:
            raise ValueError(
                f"data: the tokenizer of {data} has no [CLS], [SEP] or [MASK]; accepted are folders that gptcore prepare "
                "--tokenizer wordpiece made"
            ) from error

    def model_changes(self) -> dict[str, Any]:
        return {"vocab_size": self.tokenizer.vocab_size}

    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> MaskedBatch:
        # Every process reads and masks all rows, then takes its own: their generators stay equal.
        text, _ = self.text.train.batch(size, self.length, generator)
        return self._masked(text, generator, rows)

    def evaluation(self, size: int, limit: int | None) -> Iterator[MaskedBatch]:
        generator = torch.Generator().manual_seed(self.seed)
        return (self._masked(text, generator) for text, _ in self.text.val.windows(self.length, size, limit))

    def loss(self, model: Any, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        total = model(batch.tokens, positions=batch.positions, targets=batch.targets, reduction="sum")
        return total, (batch.targets != -100).sum().to(total.dtype)

    def sample(self, model: Any) -> str:
        text = self.options.sample_text
        if not text:
            return ""
        guesses = fill(model, self.tokenizer, text, count=3)
        return f"{text} " + "; ".join(", ".join(f"{word} {share:.0%}" for word, share in words) for words in guesses)

    def save(self, folder: Path) -> None:
        shutil.copyfile(self.text.folder / TOKENIZER, folder / TOKENIZER)

    def _masked(self, text: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> MaskedBatch:
        """Masks text ``(B, T - 2)`` and returns `rows` of it as a batch."""
        size, length = text.shape
        count = max(1, round(self.options.mask_fraction * length))
        chance = torch.rand(size, length, generator=generator)
        # [SEP] between documents is chosen last, and its target ignored.
        columns = chance.masked_fill(text == self.sep, -1.0).topk(count, dim=1).indices  # (B, count)
        fate = torch.rand(size, count, generator=generator)
        others = torch.randint(self.tokenizer.vocab_size, (size, count), generator=generator)
        text, columns, fate, others = text[rows], columns[rows], fate[rows], others[rows]
        hidden = text.gather(1, columns)
        replaced = torch.where(fate < 0.8, torch.full_like(hidden, self.mask), torch.where(fate < 0.9, others, hidden))
        replaced = torch.where(hidden == self.sep, hidden, replaced)
        tokens = torch.cat(
            [
                torch.full((len(text), 1), self.cls),
                text.scatter(1, columns, replaced),
                torch.full((len(text), 1), self.sep),
            ],
            dim=1,
        )
        positions = columns + 1 + torch.arange(len(text))[:, None] * tokens.shape[1]
        targets = hidden.masked_fill(hidden == self.sep, -100)
        return MaskedBatch(tokens, positions.flatten(), targets.flatten())
