"""What the tasks that train an assistant share: the chat template, the split of the data, the sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from gptcore.generate.chat import Chat
from gptcore.models import Model
from gptcore.tasks.packing import IGNORED, Piece
from gptcore.tasks.task import Task, TaskOptions
from gptcore.text import PretrainedTokenizer, Tokenizer
from gptcore.text.chat_format import ChatFormat, TemplateName, with_template
from gptcore.text.tokenizer import TOKENIZER

T = TypeVar("T")


@dataclass(frozen=True)
class AssistantOptions(TaskOptions):
    """Options of every task that trains an assistant."""

    models: ClassVar[tuple[str, ...]] = ("gpt",)
    changeable: ClassVar[frozenset[str]] = frozenset({"sample_prompt", "sample_tokens"})

    template: TemplateName = "auto"
    """The chat template: alpaca, chatml (needs <|im_start|> and <|im_end|>), or auto, the base's own, else alpaca."""
    val_fraction: float = 0.1
    """Share of the data that is held out for evaluation, drawn by the seed."""
    sample_prompt: str = "What is the capital of France?"
    """Question that the model answers at each evaluation."""
    sample_tokens: int = 40
    """The most tokens of that answer; 0 for no sample."""

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction: got {self.val_fraction}; accepted is 0 < val_fraction < 1")
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens: got {self.sample_tokens}; accepted are 0 and more")


class AssistantTask(Task):
    """Base of the tasks that train an assistant. It gives the tokenizer its chat template; the run's folder keeps it.

    Args:
        options, data, context, seed, tokenizer: see `Task`.

    Raises:
        ValueError: there is no tokenizer, it lacks the template's tokens, or the sample's question is too long.
    """

    def __init__(
        self,
        options: AssistantOptions,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None:
        if tokenizer is None:
            raise ValueError(f"task: got {options.name} for a new model; accepted is gptcore finetune {options.name}")
        self.context, self.seed, self.data = context, seed, data
        self.tokenizer, about_template = with_template(tokenizer, options.template)
        self.format = ChatFormat(self.tokenizer)
        self.fingerprint = tokenizer.fingerprint
        self.remarks = [about_template]
        self.question, self.answer_tokens = options.sample_prompt, 0
        self._highest = 0  # of all token ids
        if options.sample_tokens:
            asked = len(self.encode_prompt(self.question))
            if asked >= context:
                raise ValueError(
                    f"sample_prompt: has {asked} tokens; accepted are up to {context - 1}, one less than the context, "
                    "or sample_tokens 0"
                )
            self.answer_tokens = min(options.sample_tokens, context - asked)

    def tell(self, remark: str) -> None:
        self.remarks = [*self.remarks, remark]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids after which the model answers `text`."""
        ids = self.format.prompt([{"role": "user", "content": text}])
        self._highest = max(self._highest, *ids)
        return ids

    def piece(self, messages: Sequence[Any], name: str, last_only: bool = False) -> tuple[Piece, bool] | None:
        """Returns an example of at most `context` tokens, and whether it was truncated; None if no target is left.

        Args:
            messages: a conversation.
            name: file and line, for errors.
            last_only: whether only the last reply is learnt.

        Raises:
            ValueError: the template does not accept the messages; names file and line.
        """
        try:
            ids, replies = self.format.example(messages)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self._highest = max(self._highest, *ids)
        piece = Piece.of(ids, replies[-1:] if last_only else replies, self.context)
        if bool((piece.targets == IGNORED).all()):
            return None
        return piece, len(ids) - 1 > self.context

    def split(self, examples: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
        """Returns the examples for training and those held out, drawn by the seed.

        Raises:
            ValueError: there are fewer than two.
        """
        if len(examples) < 2:
            raise ValueError(
                f"data: {self.data} has {len(examples)} examples with a token to learn in a context of {self.context}; "
                "accepted are two or more, one of them to evaluate on"
            )
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.seed % 2**63)).tolist()
        held_out = min(max(1, round(fraction * len(examples))), len(examples) - 1)
        return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]

    def digest_of(self, examples: Sequence[Any]) -> str:
        """Returns a hash of the examples and the chat template."""
        state = json.dumps([self.tokenizer.chat_template, list(examples)], sort_keys=True)
        return hashlib.sha256(state.encode()).hexdigest()[:32]

    def build(self, base: Model) -> Model:
        rows = base.config.vocab_size
        if self._highest >= rows:
            token = self.tokenizer.decode([self._highest])
            raise ValueError(
                f"template: the token {token!r} has the id {self._highest}, and the base has embeddings for {rows} ids; "
                "accepted are templates whose tokens the base has, such as alpaca"
            )
        return base

    def sample(self, model: Any) -> str:
        if not self.answer_tokens:
            return ""
        chat = Chat(model, self.tokenizer, max_new_tokens=self.answer_tokens, temperature=0.0)
        return f"{self.question}\n{''.join(chat.reply(self.question))}"

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder / TOKENIZER)
