"""Masked words: some tokens of a text are hidden, and learnt from all the others."""

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
from gptcore.text.tokenizer import TOKENIZER


@dataclass(frozen=True)
class MaskedLMOptions(TaskOptions):
    """Options of learning masked words."""

    name: ClassVar[str] = "masked_lm"
    models: ClassVar[tuple[str, ...]] = ("bert",)
    free: ClassVar[frozenset[str]] = frozenset({"sample_text"})

    mask_fraction: float = 0.15
    """Share of a row's tokens that are to be guessed."""
    sample_text: str = "The function returns a [MASK]."
    """Text whose [MASK]s the sample at each evaluation fills; empty for no sample."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_fraction <= 1.0:
            raise ValueError(f"mask_fraction: got {self.mask_fraction}; accepted is 0 < mask_fraction <= 1")


class MaskedBatch(NamedTuple):
    """Rows of text in which some tokens are hidden, and what stood there."""

    tokens: Tensor
    """``(B, T)`` int64 ids, the hidden ones replaced."""
    positions: Tensor
    """``(K,)`` int64: where tokens are hidden, in the flattened ``(B * T)``."""
    targets: Tensor
    """``(K,)`` int64: the ids that stood there; -100 where nothing is to be guessed."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``"""
        batch, length = self.tokens.shape
        return batch, length

    def to(self, device: torch.device) -> MaskedBatch:
        """The same with its tensors on `device`."""
        return MaskedBatch(*(part.to(device) for part in self))


class MaskedLM(Task):
    """Masked words on a folder that ``gptcore prepare --tokenizer wordpiece`` made.

    Of a row's tokens `mask_fraction` are drawn, afresh each time. Of these 80 % are replaced by ``[MASK]``, 10 % by a random
    token, and 10 % stay. A row is ``[CLS]``, text, ``[SEP]``.

    Source: Devlin et al., "BERT", arXiv 1810.04805, section 3.1.
    """

    def __init__(self, options: MaskedLMOptions, data: Path, context: int, seed: int = 0) -> None:
        self.options, self.seed = options, seed
        self.length = context - 2  # of a row's text
        if self.length < 1:
            raise ValueError(f"context: got {context}; accepted are 3 and more")
        self.text = PreparedText(data, self.length)
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

    def batch(self, size: int, generator: torch.Generator, rows: slice) -> MaskedBatch:
        # All rows are read and masked, whichever are returned: processes that share a batch draw alike.
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
        """`rows` of text ``(B, T - 2)`` as a batch."""
        size, length = text.shape
        count = max(1, round(self.options.mask_fraction * length))
        chance = torch.rand(size, length, generator=generator)
        # The marks between documents are nothing to guess: they come last.
        at = chance.masked_fill(text == self.sep, -1.0).topk(count, dim=1).indices  # (B, count)
        how = torch.rand(size, count, generator=generator)
        others = torch.randint(self.tokenizer.vocab_size, (size, count), generator=generator)
        text, at, how, others = text[rows], at[rows], how[rows], others[rows]
        there = text.gather(1, at)
        put = torch.where(how < 0.8, torch.full_like(there, self.mask), torch.where(how < 0.9, others, there))
        put = torch.where(there == self.sep, there, put)
        tokens = torch.cat(
            [
                torch.full((len(text), 1), self.cls),
                text.scatter(1, at, put),
                torch.full((len(text), 1), self.sep),
            ],
            dim=1,
        )
        positions = at + 1 + torch.arange(len(text))[:, None] * tokens.shape[1]
        targets = there.masked_fill(there == self.sep, -100)
        return MaskedBatch(tokens, positions.flatten(), targets.flatten())
