"""Language modelling: the model learns to predict each token of a text from the tokens before it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gptcore.nn import Documents
from gptcore.tasks.prepared import PreparedText
from gptcore.tasks.task import Task, TaskOptions
from gptcore.text import PretrainedTokenizer, Tokenizer
from gptcore.text.tokenizer import TOKENIZER


@dataclass(frozen=True)
class LanguageModelOptions(TaskOptions):
    """Options of language modelling."""

    name: ClassVar[str] = "language_model"
    models: ClassVar[tuple[str, ...]] = ("gpt",)
    changeable: ClassVar[frozenset[str]] = frozenset({"sample_prompt", "sample_tokens"})

    document_mask: bool = False
    """Keep attention within each document, and start its positions at 0."""
    sample_prompt: str = "The function returns"
    """Text that the sample at each evaluation continues; only its end, if it is longer than the context."""
    sample_tokens: int = 40
    """Tokens of that sample; 0 for no sample."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens: got {self.sample_tokens}; accepted are 0 and more")

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        if self.document_mask and config.attention_impl == "explicit":
            raise ValueError(
                "document_mask: got True with attention_impl 'explicit'; accepted is attention_impl 'fused'"
            )


class LanguageModelBatch(NamedTuple):
    """Rows of text, and for each token the next one."""

    tokens: Tensor
    """``(B, T)`` int64 ids."""
    targets: Tensor
    """``(B, T)`` int64: the id after each token."""
    documents: Documents | None
    """The documents in the rows; None: each row is one sequence."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``"""
        batch, length = self.tokens.shape
        return batch, length

    def to(self, device: torch.device) -> LanguageModelBatch:
        """Returns the batch with its tensors on `device`."""
        documents = self.documents and self.documents.to(device)
        return LanguageModelBatch(self.tokens.to(device), self.targets.to(device), documents)


class LanguageModel(Task):
    """Language modelling on a folder that `gptcore prepare` made."""

    def __init__(
        self,
        options: LanguageModelOptions,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None:
        self.options, self.context, self.seed = options, context, seed
        self.text = PreparedText(data, context, tokenizer)
        self.tokenizer = self.text.tokenizer
        self.digest, self.fingerprint, self.baseline = self.text.digest, self.text.fingerprint, self.text.baseline
        self.prompt = self.tokenizer.encode(options.sample_prompt) if options.sample_tokens else []
        if options.sample_tokens and not self.prompt:
            raise ValueError(
                f"sample_prompt: got {options.sample_prompt!r}; accepted is a text of one token or more, "
                "or sample_tokens 0"
            )

    def model_changes(self) -> dict[str, Any]:
        return {"vocab_size": self.tokenizer.vocab_size}

    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> LanguageModelBatch:
        return self._batch(*self.text.train.batch(size, self.context, generator, rows))

    def evaluation(self, size: int, limit: int | None) -> Iterator[LanguageModelBatch]:
        return (self._batch(*window) for window in self.text.val.windows(self.context, size, limit))

    def loss(self, model: Any, batch: LanguageModelBatch) -> tuple[Tensor, Tensor]:
        total = model(batch.tokens, targets=batch.targets, documents=batch.documents, reduction="sum")
        return total, torch.full_like(total, batch.targets.numel())

    @torch.no_grad()
    def sample(self, model: Any) -> str:
        if not self.options.sample_tokens:
            return ""
        device = next(model.parameters()).device
        ids = torch.tensor([self.prompt[-self.context :]], device=device)
        ids = model.generate(ids, self.options.sample_tokens, temperature=0.8, top_k=50, seed=self.seed)
        return self.tokenizer.decode(ids[0].tolist())

    def save(self, folder: Path) -> None:
        shutil.copyfile(self.text.folder / TOKENIZER, folder / TOKENIZER)

    def _batch(self, tokens: Tensor, targets: Tensor) -> LanguageModelBatch:
        documents = Documents.of(tokens, self.tokenizer.eot_token) if self.options.document_mask else None
        return LanguageModelBatch(tokens, targets, documents)
