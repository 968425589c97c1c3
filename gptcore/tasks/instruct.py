"""Instruction tuning: a language model learns to answer, from conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gptcore.data.conversations import read_conversations
from gptcore.models import Model
from gptcore.nn.mode import evaluation_mode
from gptcore.tasks.assistant import AssistantOptions, AssistantTask
from gptcore.tasks.epochs import Epochs
from gptcore.tasks.language_model import LanguageModelBatch
from gptcore.tasks.packing import IGNORED, Piece, first_fit, packed, padded, spread
from gptcore.text import PretrainedTokenizer, Tokenizer

_ROWS_OF_BASELINE = 4
"""Rows of a batch when the base is evaluated: few, to need less memory than a training step."""


@dataclass(frozen=True)
class InstructOptions(AssistantOptions):
    """Options of instruction tuning."""

    name: ClassVar[str] = "instruct"

    packing: bool = True
    """Several examples in a row, attention kept within each; --no-packing: one a row, padded to the longest of the batch."""

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        if self.packing and config.attention_impl == "explicit":
            raise ValueError(
                "packing: got True with attention_impl 'explicit'; accepted is attention_impl 'fused', or no packing"
            )


class Instruct(AssistantTask):
    """Instruction tuning on a file of conversations, see `gptcore.data.conversations.read_conversations`.

    The loss is that of the assistant's messages alone, each with the stop token after it; the rest is only read. An example
    with more tokens than the context is cut at its end, and left out if no token to learn remains. `baseline` is the loss of the
    base on the held-out conversations, from before training.

    Source: Ouyang et al., "Training language models to follow instructions with human feedback", arXiv 2203.02155, section 3.5
    (supervised fine-tuning).
    """

    def __init__(
        self,
        options: InstructOptions,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None:
        super().__init__(options, data, context, seed, tokenizer)
        self.packing = options.packing
        conversations = read_conversations(data)
        found = [self.piece(messages, name) for name, messages in conversations]
        kept = [example for example in found if example is not None]
        train, val = self.split([piece for piece, _ in kept], options.val_fraction)
        self.train, self.val = self._rows(train), self._rows(val)
        self.rows = len(self.train)
        lengths = None if self.packing else [len(row[0].tokens) for row in self.train]
        self.order = Epochs(self.rows, seed, lengths)
        self.digest = self.digest_of([messages for _, messages in conversations])
        self._tell(train, val, sum(cut for _, cut in kept), len(found) - len(kept))

    def start(self, model: Model) -> None:
        device, sums = next(model.parameters()).device, torch.zeros(2, dtype=torch.float64)  # nats, targets
        with torch.no_grad(), evaluation_mode(model):
            for batch in self.evaluation(_ROWS_OF_BASELINE, None):
                sums += torch.stack(self.loss(model, batch.to(device))).cpu().double()
        self.baseline = "the base's loss", float(sums[0] / sums[1])

    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> LanguageModelBatch:
        return self._batch([self.train[i] for i in self.order.indices(size, index)[rows]])

    def evaluation(self, size: int, limit: int | None) -> Iterator[LanguageModelBatch]:
        rows = [self.val[i] for i in spread(len(self.val), limit)]
        return (self._batch(rows[i : i + size]) for i in range(0, len(rows), size))

    def loss(self, model: Any, batch: LanguageModelBatch) -> tuple[Tensor, Tensor]:
        total = model(batch.tokens, targets=batch.targets, documents=batch.documents, reduction="sum")
        return total, (batch.targets != IGNORED).sum().to(total.dtype)

    def _rows(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Returns the pieces of each row. They come in the order of the split, which the seed has drawn."""
        if not self.packing:
            return [[piece] for piece in pieces]
        bins = first_fit([[len(piece.tokens)] for piece in pieces], self.context, range(len(pieces)))
        return [[pieces[i] for i in places] for places in bins]

    def _batch(self, rows: list[list[Piece]]) -> LanguageModelBatch:
        pad = self.tokenizer.eot_token
        if self.packing:
            return packed(rows, self.context, pad)
        pieces = [row[0] for row in rows]
        return padded(pieces, max(len(piece.tokens) for piece in pieces), pad)

    def _tell(self, train: list[Piece], val: list[Piece], cut: int, left_out: int) -> None:
        tokens = sum(len(piece.tokens) for piece in train)
        learnt = sum(int((piece.targets != IGNORED).sum()) for piece in train)
        rows = (
            f" in {len(self.train):,} rows, {tokens / (len(self.train) * self.context):.0%} full"
            if self.packing
            else ""
        )
        self.tell(
            f"{len(train):,} conversations to learn from{rows}, {learnt / tokens:.0%} of the tokens are answers; "
            f"{len(val):,} held out"
        )
        if cut:
            self.tell(f"{cut:,} conversations are longer than the context of {self.context} and were truncated")
        if left_out:
            self.tell(
                f"{left_out:,} conversations were left out: their first answer begins after the context of {self.context} tokens"
            )
