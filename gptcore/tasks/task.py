"""The protocol of every task: `Task`, its options and its batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

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
        data: folder of the data.
        context: the most tokens in a row.
        seed: for whatever the task draws at random other than the order of the data, and for its samples.

    Raises:
        ValueError: the data does not fit the task; says why. Raised before anything is built or written.
    """

    digest: str
    """Changes with the data."""
    fingerprint: str
    """Changes with the tokenizer, or with whatever else gives the data's numbers their meaning."""
    baseline: tuple[str, float]
    """Name and loss of a trivial model to compare with, such as one that ignores the context."""

    @abstractmethod
    def model_changes(self) -> dict[str, Any]:
        """Returns the fields of the model's configuration that the data decides, such as `vocab_size`."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator, rows: slice) -> Batch:
        """Draws a batch of `size` rows on the CPU and returns `rows` of it.

        Processes that share a batch all draw the same one, with equal generators, and each takes its own rows.
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

    def sample(self, model: Any) -> str:
        """Returns the model's output for an example, for people to read; "" for none."""
        return ""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files that using the model needs besides its weights, such as the tokenizer's."""
