"""Direct preference optimisation: a language model learns to prefer one answer to another."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gptcore.data.conversations import Preference, read_preferences
from gptcore.models import Model
from gptcore.nn import Documents, has_lora, without_lora
from gptcore.nn.mode import evaluation_mode
from gptcore.tasks.assistant import AssistantOptions, AssistantTask
from gptcore.tasks.epochs import Epochs
from gptcore.tasks.packing import Piece, first_fit, packed, spread
from gptcore.text import PretrainedTokenizer, Tokenizer


@dataclass(frozen=True)
class PreferOptions(AssistantOptions):
    """Options of direct preference optimisation."""

    name: ClassVar[str] = "prefer"

    beta: float = 0.1
    """How strongly the model is held to the base: more keeps it closer."""
    label_smoothing: float = 0.0
    """Probability that the two answers of a pair were labelled the wrong way round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.beta < math.inf:
            raise ValueError(f"beta: got {self.beta}; accepted are positive numbers")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: got {self.label_smoothing}; accepted is 0 <= label_smoothing < 0.5")

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        if config.attention_impl == "explicit":
            raise ValueError("attention_impl: got 'explicit' for the task prefer; accepted is 'fused'")


class Pair(NamedTuple):
    """Two answers to the same prompt."""

    chosen: Piece
    rejected: Piece


class PreferBatch(NamedTuple):
    """Rows of chosen answers, then as many rows of the rejected ones, each answer after its prompt."""

    tokens: Tensor
    """``(2 R, T)`` int64 ids."""
    targets: Tensor
    """``(2 R, T)`` int64: the id after each token of an answer; -100 for the tokens of prompts and padding."""
    documents: Documents
    """A document for each prompt with its answer, and for the padding at the end of a row."""
    answers: Tensor
    """``(2, P)`` int64: the documents of the P chosen answers, and those of the rejected ones."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(2 R, T)``"""
        batch, length = self.tokens.shape
        return batch, length

    def to(self, device: torch.device) -> PreferBatch:
        """Returns the batch with its tensors on `device`."""
        documents = self.documents.to(device)
        return PreferBatch(self.tokens.to(device), self.targets.to(device), documents, self.answers.to(device))


class Prefer(AssistantTask):
    r"""Direct preference optimisation on a file of preferences, see `gptcore.data.conversations.read_preferences`.

    For a prompt x, the chosen answer y and the rejected one z, the reward of an answer is ``r(y) = beta * (log p(y | x) -
    log q(y | x))``: p is the model, q the reference, which is the base before training. ``log p(y | x)`` is the sum over the
    answer's tokens and its stop token. With the margin ``h = r(y) - r(z)`` and the label smoothing e, the loss of a pair is

        ``-(1 - e) log sigmoid(h) - e log sigmoid(-h)``

    which a Bradley-Terry model of the rewards gives. Its gradient, for e = 0, is ``-beta * sigmoid(-h) * (grad log p(y | x) -
    grad log p(z | x))``: pairs whose order is still wrong count most. Before training h is 0 and the loss log 2.

    With LoRA the reference is the model with its adapters switched off; otherwise a frozen copy of the base, in memory beside it.
    A row of a batch is a row of chosen answers and a row of the rejected ones.

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv 2305.18290,
    equations 5 and 7; label smoothing: Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023.
    """

    def __init__(
        self,
        options: PreferOptions,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None:
        super().__init__(options, data, context, seed, tokenizer)
        self.beta, self.smoothing = options.beta, options.label_smoothing
        self.baseline = "before training", math.log(2.0)
        preferences = read_preferences(data)
        pairs: list[Pair] = []
        truncated = 0
        for preference in preferences:
            found = self._pair(preference)
            if found is not None:
                pairs.append(found[0])
                truncated += found[1]
        train, val = self.split(pairs, options.val_fraction)
        self.train, self.val = self._rows(train), self._rows(val)
        self.rows = len(self.train)
        self.order = Epochs(self.rows, seed)
        self.digest = self.digest_of([preference[1:] for preference in preferences])
        self.tell(f"{len(train):,} pairs to learn from in {self.rows:,} pairs of rows; {len(val):,} held out")
        if truncated:
            self.tell(f"{truncated:,} pairs have an answer beyond the context of {context} and were truncated")
        if left_out := len(preferences) - len(pairs):
            self.tell(f"{left_out:,} pairs were left out: an answer begins after the context of {context} tokens")
        self._reference: Model | None = None
        self._lora = False

    def start(self, model: Model) -> None:
        self._lora = has_lora(model)
        if self._lora:
            self._reference = model
            return
        from torch.distributed.tensor import DTensor

        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError(
                "parallel: got fsdp, with which the base cannot be copied as the reference; accepted are ddp, or trained lora, "
                "which needs no copy"
            )
        self._reference = copy.deepcopy(model).eval().requires_grad_(False)

    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> PreferBatch:
        return self._batch([self.train[i] for i in self.order.indices(size, index)[rows]])

    def evaluation(self, size: int, limit: int | None) -> Iterator[PreferBatch]:
        rows = [self.val[i] for i in spread(len(self.val), limit)]
        return (self._batch(rows[i : i + size]) for i in range(0, len(rows), size))

    def loss(self, model: Any, batch: PreferBatch) -> tuple[Tensor, Tensor]:
        return self._losses(self.margins(model, batch))

    def evaluate(self, model: Any, batch: PreferBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Besides the loss: `chosen_rate`, the share of pairs whose chosen answer has the larger reward; `margin`, the mean h."""
        margins = self.margins(model, batch)
        loss, count = self._losses(margins)
        return {"loss": (loss, count), "chosen_rate": ((margins > 0).sum(), count), "margin": (margins.sum(), count)}

    def margins(self, model: Any, batch: PreferBatch) -> Tensor:
        """Returns h of each pair, ``(P,)`` float32: the reward of the chosen answer minus that of the rejected one."""
        reference = self._reference
        if reference is None:
            raise RuntimeError("Prefer: start(model) must be called before the loss: it keeps the reference")
        with torch.no_grad(), evaluation_mode(reference), without_lora(reference) if self._lora else nullcontext():
            base = log_probabilities(reference, batch)
        rewards = self.beta * (log_probabilities(model, batch) - base)  # (2, P)
        return rewards[0] - rewards[1]

    def _losses(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        losses = -(1.0 - self.smoothing) * logsigmoid(margins) - self.smoothing * logsigmoid(-margins)
        total = losses.sum()
        return total, torch.full_like(total, len(margins))

    def _pair(self, preference: Preference) -> tuple[Pair, bool] | None:
        """Returns the two answers after their prompt, and whether one was truncated; None if of one no token is left."""
        found = []
        for answer in (preference.chosen, preference.rejected):
            messages = [*preference.prompt, {"role": "assistant", "content": answer}]
            example = self.piece(messages, preference.name, last_only=True)
            if example is None:
                return None
            found.append(example)
        return Pair(found[0][0], found[1][0]), found[0][1] or found[1][1]

    def _rows(self, pairs: list[Pair]) -> list[list[Pair]]:
        """Returns the pairs of each row. They come in the order of the split, which the seed has drawn."""
        lengths = [[len(piece.tokens) for piece in pair] for pair in pairs]
        bins = first_fit(lengths, self.context, range(len(pairs)))
        return [[pairs[i] for i in places] for places in bins]

    def _batch(self, rows: Sequence[Sequence[Pair]]) -> PreferBatch:
        pieces = [[pair.chosen for pair in row] for row in rows] + [[pair.rejected for pair in row] for row in rows]
        tokens, targets, documents = packed(pieces, self.context, self.tokenizer.eot_token)
        assert documents is not None
        answers, document = [], 0
        for row in pieces:
            answers += range(document, document + len(row))
            document += len(row) + (sum(len(piece.tokens) for piece in row) < self.context)  # the padding is one more
        return PreferBatch(tokens, targets, documents, torch.tensor(answers).view(2, -1))


def log_probabilities(model: Any, batch: PreferBatch) -> Tensor:
    """Returns the log-probability of each answer, ``(2, P)`` float32: of the chosen and of the rejected ones.

    The logits of all tokens are never held: the model returns only the loss of each target.
    """
    losses = model(batch.tokens, targets=batch.targets, documents=batch.documents, reduction="none")  # (2 R, T)
    lengths = batch.documents.cu_lengths.diff().long()
    sums = torch.segment_reduce(losses.float().flatten(), "sum", lengths=lengths)  # (documents,)
    return -sums[batch.answers]
