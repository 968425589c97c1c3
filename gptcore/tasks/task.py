"""What the trainer knows of a task: `Task`, its options, and the batches that it makes."""

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
    """Rows of examples, whatever they are made of."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``: rows, and tokens of each, padding included."""
        ...

    def to(self: B, device: torch.device) -> B:
        """The same with its tensors on `device`."""
        ...


@dataclass(frozen=True)
class TaskOptions:
    """The options of a task; each task has a frozen dataclass of its own, derived from this one."""

    name: ClassVar[str]
    """The task's name in `gptcore.tasks.TASKS`."""
    free: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ between a run and its continuation: they do not change what is learnt."""

    models: ClassVar[tuple[str, ...]]
    """The `model_type` of the models that it can train."""

    def check_model(self, config: Any) -> None:
        """Raises ValueError where the task cannot train a model of this configuration."""
        if config.model_type not in self.models:
            raise ValueError(
                f"task: got {self.name} for a {config.model_type}; accepted for it are {', '.join(self.models)}"
            )


class Task(ABC):
    """What is learnt from which data. The trainer adds up the losses of a step's batches, over all of its batches and
    processes, and divides by the number of their targets.

    Args:
        options: the task's own.
        data: the folder that the data is in.
        context: tokens of a row, at most.
        seed: of what the task draws besides the order of the data, and of its samples.

    Raises:
        ValueError: the data does not fit the task; names what is wrong. Nothing has been built or written then.
    """

    digest: str
    """Changes with the data."""
    fingerprint: str
    """Changes with the tokenizer, or whatever else decides what the data's numbers mean."""
    baseline: tuple[str, float]
    """What a model reaches that learns nothing of the order of things: its name, and its loss."""

    @abstractmethod
    def model_changes(self) -> dict[str, Any]:
        """Fields of the model's configuration that the data decides, such as `vocab_size`."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator, rows: slice) -> Batch:
        """Draws a batch of `size` rows, on the CPU, and returns `rows` of them.

        Processes that share a batch draw alike, with equal generators, and take their rows.
        """

    @abstractmethod
    def evaluation(self, size: int, limit: int | None) -> Iterator[Batch]:
        """Batches of `size` rows of the validation data on the CPU, the same each time: `limit` rows, or all with None."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """The sum of the targets' losses, and how many targets there are; both scalars on the batch's device.

        Args:
            model: called for the forward; the model itself or a wrapper around it.
            batch: what `batch` or `evaluation` made.
        """

    def sample(self, model: Any) -> str:
        """What the model makes of an example, for people to read; "" for nothing."""
        return ""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what is needed beside the weights to use the model: the tokenizer's file."""
