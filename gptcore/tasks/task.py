"""The protocol of every task: `Task`, its options and its batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gptcore.models import Model
    from gptcore.text import PretrainedTokenizer, Tokenizer

B = TypeVar("B", bound="Batch")


class Batch(Protocol):
    """A batch of examples, one a row."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``: the number of rows, and of tokens in each, padding included."""
        ...

    def to(self: B, device: torch.device) -> B:
        """Returns the batch with its tensors on `device`."""
        ...


@dataclass(frozen=True)
class TaskOptions:
    """Base of every task's options, which are a frozen dataclass."""

    name: ClassVar[str]
    """The task's name in `gptcore.tasks.TASKS`."""
    changeable: ClassVar[frozenset[str]] = frozenset()
    """Fields that a resumed run may change, because they do not affect training."""
    models: ClassVar[tuple[str, ...]]
    """The `model_type` of each model that the task can train."""

    def check_model(self, config: Any) -> None:
        """Raises ValueError if the task cannot train a model of this configuration."""
        if config.model_type not in self.models:
            raise ValueError(
                f"task: got {self.name} for a {config.model_type}; it accepts the models {', '.join(self.models)}"
            )


class Task(ABC):
    """What a model learns from which data. The trainer sums the losses of a step over its micro-batches and processes, and
    divides the sum by the number of targets.

    Args:
        options: the task's options.
        data: folder or file of the data.
        context: the most tokens in a row.
        seed: for whatever the task draws at random other than the order of the data, and for its samples.
        tokenizer: the base's, when a model is fine-tuned; None when a new model is trained.

    Raises:
        ValueError: the data does not fit the task; says why. Raised before anything is built or written.
    """

    digest: str
    """Changes with the data."""
    fingerprint: str
    """Changes with the tokenizer, or with whatever else gives the data's numbers their meaning."""
    baseline: tuple[str, float] | None = None
    """Name and loss of a trivial model to compare with, such as one that ignores the context; None if there is none."""
    rows: int | None = None
    """Rows of an epoch; None for a task that draws its rows at random, without end."""
    remarks: Sequence[str] = ()
    """What people should know about the data before the first step, such as how many texts were truncated."""

    @abstractmethod
    def __init__(
        self,
        options: Any,
        data: Path,
        context: int,
        seed: int = 0,
        tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    ) -> None: ...

    def model_changes(self) -> dict[str, Any]:
        """Returns the fields of a new model's configuration that the data decides, such as `vocab_size`."""
        return {}

    def build(self, base: Model) -> Model:
        """Returns the model to train, made from a base that is fine-tuned: the base itself, or one with a new head.

        Raises:
            ValueError: the base does not fit the task.
        """
        return base

    def start(self, model: Model) -> None:  # noqa: B027 - most tasks need nothing
        """Is called once before training, with the weights of the base; a resumed run restores its own afterwards."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> Batch:
        """Draws a batch of `size` rows on the CPU and returns `rows` of it.

        Processes that share a batch all draw the same one, with equal generators, and each takes its own rows.

        Args:
            size: rows of the batch.
            generator: the source of randomness; checkpoints save its state.
            rows: the rows that this process takes.
            index: number of batches that the run has drawn before. See `gptcore.tasks.epochs.Epochs`.
        """

    @abstractmethod
    def evaluation(self, size: int, limit: int | None) -> Iterator[Batch]:
        """Yields the validation data on the CPU in batches of `size` rows, the same each time: `limit` rows, or all for None."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses of all targets and the number of targets, both scalars on the batch's device.

        Args:
            model: the model or a wrapper around it; its call is the forward.
            batch: from `batch` or `evaluation`.
        """

    def evaluate(self, model: Any, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns what an evaluation measures on a batch: for each value its sum and the count to divide by; always ``loss``.

        Arguments as `loss`. The trainer adds sums and counts over all batches and processes.
        """
        return {"loss": self.loss(model, batch)}

    def sample(self, model: Any) -> str:
        """Returns the model's output for an example, for people to read; "" for none."""
        return ""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files that using the model needs besides its weights, such as the tokenizer's."""
