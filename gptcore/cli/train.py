"""``gptcore train``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes

from gptcore.tasks import TASK_OF_MODEL, TASKS, LanguageModelOptions, TaskOptions
from gptcore.train.config import NOT_SAVED, TrainConfig
from gptcore.train.guard import drop_unwritten


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    __doc__ = TrainConfig.__doc__

    config: Path | None = field(default=None, metadata=NOT_SAVED)
    """YAML file with values of these options, such as a run's config.yaml; options on the command line override it."""
    find_lr: bool = field(default=False, metadata=NOT_SAVED)
    """Do not train: try learning rates on a temporary model, suggest one, and draw out/lr.png."""
    task: Annotated[TaskOptions, OmitArgPrefixes] = field(default_factory=LanguageModelOptions)
    """Options of the model's task. Other models have others: see `gptcore train --model bert --help`."""
    tune_allocator: bool = field(default=True, metadata=NOT_SAVED)
    """Keep freed memory in the process: faster steps on a CPU (see gptkernels.tune_allocator)."""

    @classmethod
    def parse(cls, arguments: list[str]) -> Train:
        """Parses `arguments`, which override the file that ``--config`` names.

        The model decides which options the task has, so ``--model`` and ``--config`` are parsed first.
        """
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        finder.add_argument("--model")
        first, _ = finder.parse_known_args(arguments)
        values: dict[str, Any] = {"data": tyro.MISSING, "out": tyro.MISSING, "config": first.config}
        if first.config is not None:
            values |= TrainConfig.read(first.config)
        if first.model in TASK_OF_MODEL and first.model != values.get("model", "gpt"):
            options, _ = TASKS[TASK_OF_MODEL[first.model]]
            values |= {"model": first.model, "task": options()}
        return tyro.cli(cls, prog="gptcore train", args=arguments, default=cls(**values))

    def run(self) -> int:
        import gptkernels

        from gptcore.train import find_lr, train

        if self.tune_allocator:
            gptkernels.tune_allocator()
        if self.find_lr:
            sweep = find_lr(self)
            print(f"suggestion: --lr {sweep.suggestion:.1e} ({self.out / 'lr.png'} shows the sweep)")
            return 0
        try:
            return 130 if train(self).interrupted else 0
        finally:
            drop_unwritten()
